"""The command line: LightningCLI's verbs, the trainer's own (precompute, inspect, plan), and export and study.

``main`` serves ``python -m lit_isdpo``, the console script ``lit-isdpo`` and Python.
"""

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import transformers
from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_isdpo import __version__
from lit_isdpo.cli.failures import Peers, explain
from lit_isdpo.cli.layers import changed, left_out
from lit_isdpo.cli.misspelt import check_config_files, explain_option
from lit_isdpo.cli.options import check, is_sharded
from lit_isdpo.commands.export import export
from lit_isdpo.commands.label import PreferenceLabels
from lit_isdpo.commands.trainer import IsdpoTrainer
from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule, TextDataModule
from lit_isdpo.evaluation.credentials import hide_secrets
from lit_isdpo.lab.folder import PREFIX, resolve
from lit_isdpo.objective import remedies
from lit_isdpo.study.runner import study
from lit_isdpo.training.checkpoint_files import CheckpointFiles
from lit_isdpo.training.checkpoints import EX_TEMPFAIL, BestCheckpoint, LastCheckpoint
from lit_isdpo.training.evaluation import Evaluation
from lit_isdpo.training.language import LanguageModule
from lit_isdpo.training.online import OnlineModule
from lit_isdpo.training.preference import PreferenceModule
from lit_isdpo.training.probe import SamplingProbe
from lit_isdpo.training.reward import RewardModule
from lit_isdpo.training.run_folder import print_changes
from lit_isdpo.training.run_report import PredictionWriter, ProgressBar, RunReport
from lit_isdpo.training.sft import SFTModule
from lit_isdpo.training.throughput import Throughput
from lit_isdpo.types import InputError

INTERRUPTED = 130  # as shells have it: 128 + SIGINT
MODULES = (  # what is imported goes by its bare name
    *(PreferenceModule, OnlineModule, SFTModule, RewardModule, PreferenceDataModule, SFTDataModule, remedies),
)
OWN_VERBS: dict[str, Callable[..., None]] = {"export": export, "study": study}
DESCRIPTION = """Importance-sampled direct alignment (IS-DPO, arXiv 2506.08681). Begin with: lit-isdpo fit --config
configs/quickstart.yaml. Besides the subcommands below there are lit-isdpo export, which writes a checkpoint as a
Hugging Face folder, and lit-isdpo study, which compares methods over seeds (each with --help)."""


class Parser(LightningArgumentParser):
    """Lightning's parser, which answers a mistake with the mistake alone and not with a page of usage."""

    arguments: ClassVar[Sequence[str]] = ()  # those of the command that is parsed
    of_verb: ClassVar[LightningArgumentParser | None] = None  # knows all options of the verb

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # a typo must not pass for an abbreviation

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and exits with status 2."""
        parsers = [self, *filter(None, [Parser.of_verb])]
        said = explain_option(" ".join(message.split()), self.arguments, parsers)
        print(f"error: {hide_secrets(said)}", file=sys.stderr)
        raise SystemExit(2)


class IsdpoCLI(LightningCLI):
    """LightningCLI with the run's callbacks as config sections and the lab's names resolved.

    Args:
        arguments: the command line, without the program's name.
        **options: those of LightningCLI.
    """

    trainer: IsdpoTrainer

    def __init__(self, arguments: Sequence[str], **options: Any) -> None:
        # The options of a verb take a tenth of a second to gather, and there are many verbs.
        self._verbs = set(self.subcommands()).intersection(arguments) or set(self.subcommands())
        verb = next((argument for argument in arguments if argument in self._verbs), "")
        self._left_out, self._changed = left_out(arguments, verb), changed(arguments, verb)
        super().__init__(args=[*arguments, *(one.flag for one in self._left_out)], **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives ``model`` and ``data`` a default class, so that flags work without a file, and adds the sections."""
        parser.set_defaults(
            {"model": {"class_path": _path(PreferenceModule)}, "data": {"class_path": _path(PreferenceDataModule)}}
        )
        parser.add_lightning_class_args(SamplingProbe, "probe")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(PreferenceLabels, "labels")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Leaves the printing of what is measured to our callbacks, unless the user asks Lightning for its table."""
        if subcommand not in self._verbs:  # its name and its line of help are enough
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        Parser.of_verb = parser
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters override the config: here the config is the one truth."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs, and the trainer's own."""
        own = ("precompute", "inspect", "plan")
        return LightningCLI.subcommands() | {verb: {"model", "datamodule"} for verb in own}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Has checkpoints loaded without running code that they may hold; by default the environment would decide."""
        own = {"weights_only": True} if subcommand in LightningCLI.subcommands() else {}
        return super()._prepare_subcommand_kwargs(subcommand) | own

    def before_instantiate_classes(self) -> None:
        """Refuses what does not work together, before anything is loaded; says what config files do to each other."""
        check(str(self.subcommand), self.config[self.subcommand])
        for one in (*self._changed, *self._left_out):
            rank_zero_info(str(one))

    def instantiate_classes(self) -> None:
        """Builds everything from a copy in which the lab's names are folders; the saved config keeps the names."""
        self.written = self.config
        self.config = self.written.clone()
        config = self.config[self.subcommand]
        if config.data.init_args.get("seed") is None:
            config.data.init_args.seed = int(config.seed_everything)
        if config.evaluation.folder is None:  # not in the run's own folder: other runs go on with what is there
            config.evaluation.folder = str(Path(config.trainer.default_root_dir) / "evaluations")
        if (reference := config.model.init_args.get("reference")) and reference.cache_dir is None:  # shared by runs too
            reference.cache_dir = str(Path(config.trainer.default_root_dir) / "reference_logps")
        if self.subcommand in ("inspect", "plan"):  # for another machine than this one
            for key, value in {"accelerator": "cpu", "devices": 1, "num_nodes": 1}.items():
                config.trainer[key] = value
            if not is_sharded(config):
                config.trainer.strategy = "auto"
        if self.subcommand != "test":  # nobody asks them, and a reward model may be as large as the policy
            config.evaluation.reward = config.evaluation.judge = None
        if is_sharded(config):  # FSDP's tensors are counted in versions, which inference mode does not
            config.trainer.inference_mode = False
        root = Path(config.trainer.default_root_dir) / "lab"
        _resolve_lab(config.model.init_args, root, default="reference")
        _resolve_lab(config.data.init_args, root, default="pairs")
        super().instantiate_classes()

    def before_fit(self) -> None:
        """Says what a resumed fit changes."""
        if ckpt_path := self.config.fit.get("ckpt_path"):
            print_changes(ckpt_path, self._parser("fit").dump(self.config.fit, skip_none=False))

    def before_validate(self) -> None:
        """Says which policy is looked at."""
        if not self.config[str(self.subcommand)].get("ckpt_path"):
            rank_zero_info("No --ckpt_path is given: the model is the one that it names, untrained here.")
            if self.model.random_start:
                rank_zero_info(self.model.random_start)

    before_test = before_validate

    def before_predict(self) -> None:
        """Likewise; refuses a model that does not write."""
        self.before_validate()
        if not self.model.writes:
            raise InputError(
                "predict: responses are sampled from a policy, and model is a reward model; give it to an evaluation."
            )

    def _run_subcommand(self, subcommand: str) -> None:
        """Gives each run a folder of its own; the other verbs write elsewhere."""
        with self.trainer.own_folder() if subcommand in LightningCLI.subcommands() else nullcontext():
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds TensorBoard and CSV logs unless the config names other loggers."""
        self.config = self.written  # what is saved keeps the lab's names, which mean the same on every machine
        trainer = self._get(self.config_init, "trainer")
        if trainer.get("logger") in (None, True):
            root = trainer.default_root_dir
            tensorboard = TensorBoardLogger(root, name="", default_hp_metric=False)
            kwargs["logger"] = [tensorboard, CSVLogger(root, name="")]
        if trainer.get("enable_progress_bar") is not False:
            self.trainer_defaults["callbacks"].insert(0, ProgressBar())  # first, so that it ends before the report
        made = super().instantiate_trainer(**kwargs)
        if type(made.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody wants another
            made.strategy.checkpoint_io = CheckpointFiles()
        return made


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: as on the command line, without the program's name; by default those of the process.

    Raises:
        SystemExit: with status 2 after one sentence on bad input; with 74 (EX_IOERR) where the system does not let it
            write or read, and 71 (EX_OSERR) where a process that helped has died or memory is not enough; with 75
            (EX_TEMPFAIL) where a fit was asked to leave by SIGTERM; with 130 after Ctrl-C.
    """
    Parser.of_verb = None
    Parser.arguments = arguments = list(sys.argv[1:] if args is None else args)
    _quieten()
    try:
        check_config_files(arguments)
        if arguments and arguments[0] in OWN_VERBS:
            verb, prog = OWN_VERBS[arguments[0]], f"lit-isdpo {arguments[0]}"
            auto_cli(verb, args=arguments[1:], prog=prog, as_positional=False, parser_class=Parser)
            return
        IsdpoCLI(
            arguments,
            model_class=LanguageModule,
            datamodule_class=TextDataModule,
            trainer_class=IsdpoTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # the data module's own order knows ranks, and resumes
                "num_sanity_val_steps": 0,  # RunReport validates before the first step, and logs it
                "enable_model_summary": False,
                "callbacks": [RunReport(), Throughput(), PredictionWriter(), Peers()],
            },
            parser_class=Parser,
            parser_kwargs={"version": __version__, "prog": "lit-isdpo", "description": DESCRIPTION},
        )
    except SIGTERMException:  # it came before the first step, which LastCheckpoint waits for
        raise SystemExit(EX_TEMPFAIL) from None
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        rank_zero_info("Stopped by Ctrl-C.")  # Lightning has made a SystemExit of it
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if (failure := explain(error)) is None:
            raise
        print(f"error: {hide_secrets(' '.join(failure.sentence.split()))}", file=sys.stderr)
        raise SystemExit(failure.status) from None


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _resolve_lab(config: Any, root: Path, *, default: Any) -> None:
    """Replaces, in place, every string that names something of the lab by its folder; a reward's task is a name."""
    items = config.items() if isinstance(config, Namespace | dict) else enumerate(config)
    for key, value in list(items):
        if isinstance(value, str) and value.startswith(PREFIX) and str(key).rpartition(".")[2] != "task":
            config[key] = str(resolve(value, root, default=default, say=rank_zero_info))
        elif isinstance(value, Namespace | dict | list):
            _resolve_lab(value, root, default=default)


def _quieten() -> None:
    """Leaves the messages that a user can act on."""
    for name in NOISY_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_noise)  # a filter is added once
    for message in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    transformers.utils.logging.disable_progress_bar()
    threading.excepthook = _report_thread


def _report_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer is a thread: of a full disk the main one hears from it, and says so."""
    if args.exc_value is None or explain(args.exc_value) is None:
        threading.__excepthook__(args)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)


NOISY_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
NOISE = (
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Seed set to",
    "`Trainer.fit` stopped",
    "`weights_only` was not set",
    "\nDetected KeyboardInterrupt",  # main() says so
)
SILENCED_WARNINGS = (
    "It is recommended to use .*sync_dist=True",  # the probe's values are those of all ranks already
    "Be aware that when using `ckpt_path`",  # a checkpoint serves other verbs and other callbacks too
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own code
    "Experiment logs directory .* exists and is not empty",  # the TensorBoard logger has just made the run's folder
    "LightningCLI's args parameter is intended",  # main() passes the process's own arguments
)
