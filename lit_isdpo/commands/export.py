"""A checkpoint in, a Hugging Face folder out."""

import csv
import json
import re
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lit_isdpo import __version__
from lit_isdpo.data.encoding import load_tokenizer
from lit_isdpo.evaluation.store import naming
from lit_isdpo.policy.adapters import CONFIG_NAME, Adapter, check_same_tensors, parse_adapter
from lit_isdpo.policy.loading import LOADING_ERRORS, PolicyConfig, load_causal_lm, read_config, why_not_loaded
from lit_isdpo.training.checkpoint_files import StoredCheckpoint
from lit_isdpo.training.models import BASE_KEY, WEIGHTS_PREFIX
from lit_isdpo.training.reward import REWARD_WEIGHTS_PREFIX
from lit_isdpo.training.run_folder import code_files, copy_code, saved_config
from lit_isdpo.types import InputError

CONFIG_FILE = "config.json"

CARD = """
# {name}

{what} trained with lit_isdpo {version}, exported from optimizer step {step}.
Load it with `{loader}.from_pretrained` and `AutoTokenizer.from_pretrained`{numerics}.

## Measured on the validation set, at step {metrics_step}

{metrics}

{meaning}

## Configuration of the run

{fence}yaml
{config}{fence}
"""
OF_POLICIES = (
    "Rewards are those that the loss implies (for DPO: beta times the log-ratio, policy over reference); KL is\n"
    "sampled, in nats per response; gold reward and win rate are there only if the true reward is known."
)
OF_REWARD_MODELS = (
    "Accuracy is the share of pairs whose chosen response has the higher score. Only the difference of two scores of\n"
    "one prompt means something."
)
METRIC = re.compile(r"val/[\w/.@-]+")


def export(
    ckpt_path: str,
    output_dir: str,
    run_dir: str | None = None,
    base_model: str | None = None,
    as_adapter: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Writes the model of a checkpoint as a Hugging Face folder: safetensors, tokenizer, chat template, model card.

    A reward model becomes a sequence-classification model with one label. An adapter is merged into its base in fp32,
    so that no small change is rounded away.

    Args:
        ckpt_path: the checkpoint, such as ``RUN/checkpoints/last.ckpt``.
        output_dir: the folder to write; it must be new or empty.
        run_dir: the run's folder, with its ``model`` and ``config.yaml``, if the checkpoint was moved away from it.
        base_model: folder or hub id of the model that the run's adapter belongs to, if it is not where it was.
        as_adapter: write only the run's adapter, as a PEFT folder.
        trust_remote_code: run Python code that came with the model.

    Raises:
        InputError: a path is missing, is not what it should be, or would be overwritten.
    """
    trained, output = TrainedModel(ckpt_path, run_dir, base_model, trust_remote_code), Path(output_dir).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output_dir: {output_dir!r} exists and is not an empty folder; name a new one.")
    trained.check()
    tokenizer = load_tokenizer(str(trained.folder), trust_remote_code=trust_remote_code)
    card = _card(trained, output.name, as_adapter)
    model = trained.adapter() if as_adapter else trained.whole()
    output.parent.mkdir(parents=True, exist_ok=True)
    with naming(output), TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = Path(temporary) / output.name
        if isinstance(model, Adapter):
            model.save(folder)
            wrote = f"an adapter of {sum(tensor.numel() for tensor in model.state().values()):,} values"
        else:
            model.save_pretrained(folder)
            wrote = f"{sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}"
        tokenizer.save_pretrained(folder)
        if trust_remote_code:
            copy_code(PolicyConfig(path=str(trained.folder)), folder)
        card.save(folder / "README.md")
        folder.replace(output)  # nobody finds half of it
    print(f"Wrote {output_dir} ({wrote}).")


def load_policy(
    ckpt_path: str | Path,
    run_dir: str | Path | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The policy of a checkpoint, in memory, its adapter merged; arguments and errors as those of ``export``."""
    trained = TrainedModel(ckpt_path, run_dir, base_model, trust_remote_code)
    if trained.scores:
        raise InputError(f"ckpt_path: {str(ckpt_path)!r} holds no policy of this project.")
    trained.check()
    model = trained.whole()
    model.eval()
    return model


class TrainedModel:
    """The model that a checkpoint holds the weights of, and its run's folder holds the configuration of.

    Args:
        ckpt_path: the checkpoint.
        run_dir: the run's folder; by default the one that the checkpoint is in.
        base_model: as for :func:`export`.
        trust_remote_code: as for :func:`export`.

    Attributes:
        run: the run's folder.
        folder: the folder in it with the model's configuration and tokenizer.
        scores: whether it is a reward model.

    Raises:
        InputError: the checkpoint is missing or holds no model, or the folder does not hold its configuration.
    """

    def __init__(
        self, ckpt_path: str | Path, run_dir: str | Path | None, base_model: str | None, trust_remote_code: bool
    ) -> None:
        path = Path(ckpt_path)
        if not path.exists():
            raise InputError(f"ckpt_path: no such checkpoint: {str(path)!r}.")
        if (path / "checkpoints").is_dir():
            raise InputError(
                f"ckpt_path: {str(path)!r} is a run's folder; name a file in it, such as checkpoints/last.ckpt."
            )
        self.run = Path(run_dir) if run_dir else path.resolve().parent.parent
        self.folder = self.run / "model"
        self._configuration(CONFIG_FILE)
        self.base_model, self.trust_remote_code = base_model, trust_remote_code
        self.checkpoint = StoredCheckpoint(path)
        self.scores = bool(self.checkpoint.under(REWARD_WEIGHTS_PREFIX))
        self.prefix = REWARD_WEIGHTS_PREFIX if self.scores else WEIGHTS_PREFIX
        self.auto_class: Any = AutoModelForSequenceClassification if self.scores else AutoModelForCausalLM
        self.has_base = BASE_KEY in self.checkpoint.extras
        if not self.checkpoint.under(self.prefix):
            raise InputError(f"ckpt_path: {str(path)!r} holds no model of this project.")

    def check(self) -> None:
        """Reads the checkpoint once, and looks for the code that the model came with, which the run's folder has.

        Raises:
            InputError: the checkpoint is damaged; or the code is there and may not run, or may run and is not there.
        """
        self.checkpoint.check()
        there = [name for name in code_files(self.folder) if (self.folder / name).is_file()]
        if there and not self.trust_remote_code:
            raise InputError(
                f"trust_remote_code: the model of the run {str(self.run)!r} came with Python code that its training "
                f"ran; read model/{there[0]} and set trust_remote_code to true if you trust it."
            )
        # A model with a base is loaded from where that is.
        kinds = {"AutoTokenizer"} | (set() if self.has_base else {"AutoConfig", self.auto_class.__name__})
        missing = [name for name in code_files(self.folder, kinds) if not (self.folder / name).is_file()]
        if self.trust_remote_code and missing:
            raise InputError(
                f"run_dir: {str(self.folder)!r} lacks {missing[0]}, the Python code of its model, which older versions "
                "did not keep; copy it there, with all that it imports, from the folder of the model that the run "
                "began with."
            )

    def whole(self) -> PreTrainedModel:
        """All of it in memory, an adapter merged."""
        if not self.has_base and self.base_model is not None:
            raise InputError(
                f"base_model: {str(self.checkpoint.path)!r} holds a whole model, which needs no other; leave the "
                "option out."
            )
        model = self.adapter().merge() if self.has_base else self._with_weights()
        if (self.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.folder)
        return model

    def adapter(self) -> Adapter:
        """The adapter in its base, which is widened to fp32 after it was loaded as in the run."""
        path = self.checkpoint.path
        if not self.has_base:
            raise InputError(f"as_adapter: {str(path)!r} holds a whole model and no adapter; leave the option out.")
        options = self._configuration(CONFIG_NAME)
        base, revision = options.pop("base_model_name_or_path", None), options.pop("revision", None)
        policy = PolicyConfig(
            path=self.base_model or str(base),
            revision=None if self.base_model else revision,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )
        model = load_causal_lm(policy, option="base_model (what the adapter was trained on; say where it is)").float()
        adapter = Adapter(model, parse_adapter(options), revision=policy.revision)
        if adapter.base_fingerprint != self.checkpoint.extras[BASE_KEY]:
            raise InputError(
                f"base_model: {policy.path!r} has other weights than the model that the adapter was trained on."
            )
        try:
            adapter.load_state(self.checkpoint.read(WEIGHTS_PREFIX))
        except ValueError as error:
            raise InputError(
                f"ckpt_path: {str(path)!r} is no checkpoint of the run {str(self.run)!r} ({error})."
            ) from error
        return adapter

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The type that the weights had in training, in memory."""
        return "bfloat16" if self._configuration(CONFIG_FILE).get("dtype") == "bfloat16" else "float32"

    def _configuration(self, name: str) -> dict[str, Any]:
        """What a JSON file of the folder holds."""
        file = self.folder / name
        if not file.is_file():
            raise InputError(
                f"{str(self.run)!r} is not the run's folder (it has no model/{name}): name it with --run_dir."
            )
        try:
            content = json.loads(file.read_text())
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise InputError(f"run_dir: {str(file)!r} is not what a run wrote.")
        return content

    def _with_weights(self) -> PreTrainedModel:
        stored = self.checkpoint.under(self.prefix)
        source = PolicyConfig(path=str(self.folder), trust_remote_code=self.trust_remote_code)
        config = read_config(source, option="run_dir")
        try:
            with no_init_weights():  # all of them are read
                model: PreTrainedModel = self.auto_class.from_config(
                    config,
                    dtype=next(tensor.dtype for tensor in stored.values() if tensor.is_floating_point()),
                    trust_remote_code=self.trust_remote_code,
                )
        except LOADING_ERRORS as error:
            raise InputError(why_not_loaded(source, "run_dir", error)) from error
        model.tie_weights()  # which is a part of what was left out
        own = model.state_dict()
        try:
            check_same_tensors(own, stored)
        except ValueError as error:
            raise InputError(
                f"ckpt_path: the weights in {str(self.checkpoint.path)!r} do not fit the model of {str(self.folder)!r} "
                f"({error})."
            ) from error
        self.checkpoint.read_into(self.prefix, own)
        return model


def _card(trained: TrainedModel, name: str, as_adapter: bool) -> ModelCard:
    """What the model is, what its run measured, and how the run was configured."""
    step = int(trained.checkpoint.extras["global_step"])
    config_file = trained.run / "config.yaml"
    text = yaml.safe_dump(saved_config(config_file) if config_file.is_file() else {}, sort_keys=False)
    metrics_step, metrics = _validation(trained.run / "metrics.csv", step)
    rows = ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in metrics.items())]
    data = ModelCardData(
        library_name="peft" if as_adapter else "transformers",
        pipeline_tag="text-classification" if trained.scores else "text-generation",
        tags=["lit-isdpo", "reward-model" if trained.scores else "preference-optimization"],
    )
    kind = "A reward model" if trained.scores else "A language model"
    content = CARD.format(
        name=" ".join(name.split()),
        what="An adapter of a language model," if as_adapter else kind,
        loader="peft.AutoPeftModelForCausalLM" if as_adapter else trained.auto_class.__name__,
        numerics=f"; with `dtype={trained.dtype}` its base is what it was in training" if as_adapter else "",
        version=__version__,
        step=step,
        metrics_step=metrics_step,
        metrics="\n".join(rows) if metrics else "(none in metrics.csv)",
        meaning=OF_REWARD_MODELS if trained.scores else OF_POLICIES,
        config=text,
        fence=max(re.findall("`{3,}", text), key=len, default="``") + "`",  # no text of the config ends the block
    )
    return ModelCard(f"---\n{data}\n---\n{content}")


def _validation(file: Path, step: int) -> tuple[str, dict[str, float]]:
    """The step and values of the validation at ``step``, or else of the last one before it."""
    if not file.is_file():
        return "-", {}
    whole_lines = file.read_text().rpartition("\n")[0]  # a kill may have cut the last one, in a number even
    try:
        validations = [row for row in csv.DictReader(StringIO(whole_lines)) if row.get("val/loss")]
        rows = [row for row in validations if int(row["step"]) <= step]
        if not rows:
            return "-", {}
        last = rows[-1]
        return last["step"], {key: float(value) for key, value in last.items() if METRIC.fullmatch(key) and value}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"run_dir: {str(file)!r} is damaged ({error}); mend it, or move it away to export without its metrics."
        ) from error
