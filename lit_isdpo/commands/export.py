"""A checkpoint in, a Hugging Face folder out."""

import csv
import json
import re
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
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

CARD = """---
library_name: {kind.library}
pipeline_tag: {kind.task}
tags:
- lit-isdpo
- {kind.tag}
---

# {name}

{kind.what} trained with lit_isdpo {version}, exported from optimizer step {step}.
Load it with `{kind.loader}.from_pretrained` and `AutoTokenizer.from_pretrained`{numerics}.

## Measured on the validation set, at step {metrics_step}

{metrics}

{kind.metrics}

## Configuration of the run

{fence}yaml
{config}{fence}
"""


METRIC = re.compile(r"val/[\w/.@-]+")


class Kind(NamedTuple):
    """What a model card says about a model of its kind."""

    library: str
    task: str
    tag: str
    what: str
    loader: str
    metrics: str


OF_POLICIES = (
    "Rewards are those that the loss implies (of DPO: beta times the log-ratio, policy over reference); KL is sampled, "
    "in\nnats a response; gold reward and win rate are there only where the true reward is known."
)
POLICY = Kind(
    "transformers",
    "text-generation",
    "preference-optimization",
    "A language model",
    "AutoModelForCausalLM",
    OF_POLICIES,
)
ADAPTER = POLICY._replace(
    library="peft", what="An adapter of a language model,", loader="peft.AutoPeftModelForCausalLM"
)
REWARD_MODEL = Kind(
    "transformers",
    "text-classification",
    "reward-model",
    "A reward model",
    "AutoModelForSequenceClassification",
    "Accuracy is the share of pairs whose chosen response has the higher score. Only the difference of two scores of\n"
    "one prompt means something.",
)


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
    where no small change is rounded away.

    Args:
        ckpt_path: the checkpoint, ``RUN/checkpoints/last.ckpt`` say.
        output_dir: the folder to write; it must be new or empty.
        run_dir: the run's folder, with its ``model`` and ``config.yaml``, where the checkpoint was moved away from it.
        base_model: folder or hub id of the model that the run's adapter belongs to, where it is not where it was.
        as_adapter: write the run's adapter alone, as a PEFT folder.
        trust_remote_code: run Python code that came with the model.

    Raises:
        InputError: a path is missing, is not what it should be, or would be overwritten.
    """
    checkpoint_file, output = Path(ckpt_path), Path(output_dir).resolve()
    run = find_run(checkpoint_file, run_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"output_dir: {output_dir!r} exists and is not an empty folder; name a new one.")
    checkpoint = StoredCheckpoint(checkpoint_file)
    checkpoint.check()
    scores = checkpoint.holds(REWARD_WEIGHTS_PREFIX)
    if not scores and not checkpoint.holds(WEIGHTS_PREFIX):
        raise InputError(f"ckpt_path: {ckpt_path!r} holds no model of this project.")
    kind = REWARD_MODEL if scores else ADAPTER if as_adapter else POLICY
    _check_code(checkpoint, run, trust_remote_code)
    tokenizer = load_tokenizer(str(run / "model"), trust_remote_code=trust_remote_code)
    card = _card(run, output.name, int(checkpoint.extras["global_step"]), kind)
    model = (_adapter if as_adapter else _whole_model)(checkpoint, run, base_model, trust_remote_code)
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
            copy_code(PolicyConfig(path=str(run / "model")), folder)
        (folder / "README.md").write_text(card)
        folder.replace(output)  # nobody finds half of it
    print(f"Wrote {output_dir} ({wrote}).")


def load_policy(
    ckpt_path: str | Path,
    run_dir: str | Path | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The policy of a checkpoint, in memory, its adapter merged; arguments and errors as those of ``export``."""
    checkpoint_file = Path(ckpt_path)
    run = find_run(checkpoint_file, run_dir)
    checkpoint = StoredCheckpoint(checkpoint_file)
    checkpoint.check()
    if not checkpoint.holds(WEIGHTS_PREFIX):
        raise InputError(f"ckpt_path: {str(checkpoint_file)!r} holds no policy of this project.")
    _check_code(checkpoint, run, trust_remote_code)
    model = _whole_model(checkpoint, run, base_model, trust_remote_code)
    model.eval()
    return model


def find_run(checkpoint_file: Path, run_dir: str | Path | None) -> Path:
    """The folder of the run that a checkpoint is from.

    Raises:
        InputError: the checkpoint is missing, or the folder does not hold the model's configuration.
    """
    if not checkpoint_file.exists():
        raise InputError(f"ckpt_path: no such checkpoint: {str(checkpoint_file)!r}.")
    if (checkpoint_file / "checkpoints").is_dir():
        raise InputError(
            f"ckpt_path: {str(checkpoint_file)!r} is a run's folder; name a file in it, checkpoints/last.ckpt say."
        )
    run = Path(run_dir) if run_dir else checkpoint_file.resolve().parent.parent
    if not (run / "model" / "config.json").is_file():
        raise InputError(f"{str(run)!r} is not the run's folder (it has no model/config.json): name it with --run_dir.")
    return run


def _check_code(checkpoint: StoredCheckpoint, run: Path, trust_remote_code: bool) -> None:
    """Looks for the code that the run's model came with, which is in the run's folder if it ran there.

    Raises:
        InputError: it is there and may not run, or it may and is not there.
    """
    folder = run / "model"
    there = [name for name in code_files(folder) if (folder / name).is_file()]
    if there and not trust_remote_code:
        raise InputError(
            f"trust_remote_code: the model of the run {str(run)!r} came with Python code that its training ran; read "
            f"model/{there[0]} and set trust_remote_code to true if you trust it."
        )
    kinds = {"AutoTokenizer"}
    if BASE_KEY not in checkpoint.extras:  # else the model is loaded from where its base is
        kinds |= {"AutoConfig", _factory(checkpoint).__name__}
    missing = [name for name in code_files(folder, kinds) if not (folder / name).is_file()]
    if trust_remote_code and missing:
        raise InputError(
            f"run_dir: {str(folder)!r} lacks {missing[0]}, the Python code of its model, which older versions did not "
            "keep; copy it there, with all that it imports, from the folder of the model that the run began with."
        )


def _factory(checkpoint: StoredCheckpoint) -> Any:
    """The auto class of what a checkpoint holds."""
    scores = checkpoint.holds(REWARD_WEIGHTS_PREFIX)
    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM


def _whole_model(
    checkpoint: StoredCheckpoint, run: Path, base_model: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    folder, path = run / "model", checkpoint.path
    if BASE_KEY in checkpoint.extras:
        model = _adapter(checkpoint, run, base_model, trust_remote_code).merge()
    elif base_model is not None:
        raise InputError(f"base_model: {str(path)!r} holds a whole model, which needs no other; leave the option out.")
    else:
        model = _trained_model(checkpoint, folder, trust_remote_code)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _adapter(checkpoint: StoredCheckpoint, run: Path, base_model: str | None, trust_remote_code: bool) -> Adapter:
    """The checkpoint's adapter in its base, which is widened to fp32 after it was loaded as in the run."""
    file, path = run / "model" / CONFIG_NAME, checkpoint.path
    if BASE_KEY not in checkpoint.extras:
        raise InputError(f"as_adapter: {str(path)!r} holds a whole model and no adapter; leave the option out.")
    if not file.is_file():
        raise InputError(
            f"{str(run)!r} is not the run's folder (it has no model/{CONFIG_NAME}): name it with --run_dir."
        )
    try:
        options = json.loads(file.read_text())
        base, revision = options.pop("base_model_name_or_path"), options.pop("revision")
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"run_dir: {str(file)!r} is not what a run wrote.") from error
    policy = PolicyConfig(
        path=base_model or base,
        revision=None if base_model else revision,
        dtype=_dtype(run),
        trust_remote_code=trust_remote_code,
    )
    model = load_causal_lm(policy, option="base_model (what the adapter was trained on; say where it is)").float()
    adapter = Adapter(model, parse_adapter(options), revision=policy.revision)
    if adapter.base_fingerprint != checkpoint.extras[BASE_KEY]:
        raise InputError(
            f"base_model: {policy.path!r} has other weights than the model that the adapter was trained on."
        )
    try:
        adapter.load_state(checkpoint.read(WEIGHTS_PREFIX))
    except ValueError as error:
        raise InputError(f"ckpt_path: {str(path)!r} is no checkpoint of the run {str(run)!r} ({error}).") from error
    return adapter


def _trained_model(checkpoint: StoredCheckpoint, folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    prefix = REWARD_WEIGHTS_PREFIX if checkpoint.holds(REWARD_WEIGHTS_PREFIX) else WEIGHTS_PREFIX
    stored = checkpoint.under(prefix)
    source = PolicyConfig(path=str(folder), trust_remote_code=trust_remote_code)
    config = read_config(source, option="run_dir")
    try:
        with no_init_weights():  # all of them are read
            model: PreTrainedModel = _factory(checkpoint).from_config(
                config,
                dtype=next(tensor.dtype for tensor in stored.values() if tensor.is_floating_point()),
                trust_remote_code=trust_remote_code,
            )
    except LOADING_ERRORS as error:
        raise InputError(why_not_loaded(source, "run_dir", error)) from error
    model.tie_weights()  # which is a part of what was left out
    own = model.state_dict()
    try:
        check_same_tensors(own, stored)
    except ValueError as error:
        raise InputError(
            f"ckpt_path: the weights in {str(checkpoint.path)!r} do not fit the model of {str(folder)!r} ({error})."
        ) from error
    checkpoint.read_into(prefix, own)
    return model


def _card(run: Path, name: str, step: int, kind: Kind) -> str:
    config_file = run / "config.yaml"
    config = saved_config(config_file) if config_file.is_file() else {}
    metrics_step, metrics = _validation(run / "metrics.csv", step)
    rows = ["| metric | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in metrics.items())]
    text = yaml.safe_dump(config, sort_keys=False)
    return CARD.format(
        name=" ".join(name.split()),
        kind=kind,
        numerics=f"; with `dtype={_dtype(run)}` its base is what it was in training" if kind is ADAPTER else "",
        version=__version__,
        step=step,
        metrics_step=metrics_step,
        metrics="\n".join(rows) if metrics else "(none in metrics.csv)",
        config=text,
        fence=max(re.findall("`{3,}", text), key=len, default="``") + "`",  # no text of the config ends the block
    )


def _dtype(run: Path) -> Literal["float32", "bfloat16"]:
    """Of the weights that a run's policy had in memory."""
    try:
        dtype = json.loads((run / "model" / "config.json").read_text()).get("dtype")
    except (ValueError, AttributeError) as error:
        raise InputError(f"run_dir: {str(run / 'model' / 'config.json')!r} is no model's configuration.") from error
    return "bfloat16" if dtype == "bfloat16" else "float32"


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
