"""The command line: LightningCLI's verbs, the trainer's own (precompute, inspect, plan), and export and study.

``main`` serves ``python -m lit_isdpo``, the console script ``lit-isdpo`` and Python.
"""

import inspect
import logging
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from jsonargparse import Namespace, get_loader, set_loader
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_isdpo import __version__
from lit_isdpo.cli.failures import RankWatch, explain
from lit_isdpo.cli.layers import SECTIONS as ALL_SECTIONS
from lit_isdpo.cli.layers import as_options, changed, flags, left_out
from lit_isdpo.cli.options import check, is_sharded
from lit_isdpo.cli.parser_errors import check_config_files, explain_option, explain_verb
from lit_isdpo.commands.export import export
from lit_isdpo.commands.label import PreferenceLabels
from lit_isdpo.commands.trainer import IsdpoTrainer
from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule, TextDataModule
from lit_isdpo.evaluation.endpoint import hide_secrets
from lit_isdpo.lab.folder import PREFIX, resolve
from lit_isdpo.names import with_present_paths
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
NAMED = (PreferenceModule, OnlineModule, SFTModule, RewardModule, SFTDataModule)  # by their bare names
SECTIONS = {
    "probe": SamplingProbe,
    "evaluation": Evaluation,
    "labels": PreferenceLabels,
    "checkpoint": BestCheckpoint,
    "last": LastCheckpoint,
}
LIGHTNINGS_VERBS = LightningCLI.subcommands()  # each with the parameters that are no options
OWN_VERBS = {verb: getattr(IsdpoTrainer, verb) for verb in ("precompute", "inspect", "plan")}
NO_OPTIONS = LIGHTNINGS_VERBS | {verb: {"model", "datamodule"} for verb in OWN_VERBS}
OPTIONS = {
    verb: inspect.signature(getattr(IsdpoTrainer, verb)).parameters.keys() - {"self", *skipped}
    for verb, skipped in NO_OPTIONS.items()
}
"""Maps each verb of the trainer to the options that only some verbs have; all verbs have the sections."""
COMMANDS: dict[str, Callable[..., None]] = {"export": export, "study": study}  # they share no options
VERBS = {
    "fit": "Trains; with --ckpt_path it goes on from a checkpoint. Options of the method and of the data: "
    "fit --model.help PreferenceModule, fit --data.help PreferenceDataModule.",
    "validate": "Loss, weights and KL of the validation rows, and a few samples.",
    "test": "Evaluates a policy: rewards, win rates, KL and lengths of sampled responses.",
    "predict": "Samples responses to the prompts, and labels pairs of them if wanted.",
}
VERBS |= {verb: str(inspect.getdoc(made)).partition("\n")[0] for verb, made in (OWN_VERBS | COMMANDS).items()}
"""Every verb, with its line of help."""
HELP = """usage: lit-isdpo VERB [--config FILE ...] [--OPTION VALUE ...]

Importance-sampled direct alignment (IS-DPO, arXiv 2506.08681). Begin with:

    lit-isdpo fit --config configs/quickstart.yaml

verbs (each with --help for its options):
"""
YAML = "yaml, former classes"  # the parser's name for YAML in which a class may be named as it once was


class IsdpoCLI(LightningCLI):
    """LightningCLI for one verb, with the run's callbacks as config sections and the lab's names resolved.

    Args:
        verb: a method of the trainer.
        arguments: its options.
        notes: sentences to print before anything is loaded.
    """

    trainer: IsdpoTrainer

    def __init__(self, verb: str, arguments: Sequence[str], notes: Sequence[str] = ()) -> None:
        self.verb, self.notes = verb, notes
        super().__init__(
            args=[*arguments],
            run=False,
            model_class=LanguageModule,
            datamodule_class=TextDataModule,
            trainer_class=IsdpoTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # the data module's own order knows ranks, and resumes
                "num_sanity_val_steps": 0,  # RunReport validates before the first step, and logs it
                "enable_model_summary": False,
                "callbacks": [RunReport(), Throughput(), PredictionWriter(), RankWatch()],
            },
            parser_kwargs=_parser_options(verb),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Gives ``model`` and ``data`` a default class, so that flags work without a file; adds the other sections."""
        for section, cls in (("model", PreferenceModule), ("data", PreferenceDataModule)):
            parser.set_defaults({section: {"class_path": f"{cls.__module__}.{cls.__qualname__}"}})
        for section, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, section)
        self.keywords = parser.add_method_arguments(IsdpoTrainer, self.verb, skip={*NO_OPTIONS[self.verb]})
        if self.verb in ("validate", "test"):
            parser.set_defaults(verbose=False)  # our callbacks print what is measured

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the options."""
        self.config = _parse(parser, args)

    def before_instantiate_classes(self) -> None:
        """Refuses what does not work together, before anything is loaded."""
        check(self.verb, self.config)
        for note in self.notes:
            rank_zero_info(note)

    def instantiate_classes(self) -> None:
        """Builds everything; the saved config keeps the lab's names, which mean the same on every machine."""
        self.config_init = self.parser.instantiate_classes(_in_force(self.verb, self.config))
        self.model, self.datamodule = self.config_init.model, self.config_init.data
        options = self.config_init.trainer
        if options.logger in (None, True):
            root = options.default_root_dir
            tensorboard = TensorBoardLogger(root, name="", default_hp_metric=False)
            options.logger = [tensorboard, CSVLogger(root, name="")]
        if options.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].insert(0, ProgressBar())  # first, so that it ends before the report
        trainer = self.instantiate_trainer()
        assert isinstance(trainer, IsdpoTrainer)
        self.trainer = trainer
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # nobody wants another
            self.trainer.strategy.checkpoint_io = CheckpointFiles()

    def run(self) -> None:
        """Calls the verb; Lightning's verbs get a folder that no other run writes to."""
        keywords = {name: self.config_init[name] for name in self.keywords}
        ckpt_path = keywords.get("ckpt_path")
        if self.verb == "fit" and ckpt_path:
            print_changes(ckpt_path, self.parser.dump(self.config, skip_none=False))
        if self.verb in ("validate", "test", "predict") and not ckpt_path:
            rank_zero_info("No --ckpt_path is given: the model is the one that it names, untrained here.")
            if self.model.random_start:
                rank_zero_info(self.model.random_start)
        if self.verb == "predict" and not self.model.writes:
            raise InputError(
                "predict: responses are sampled from a policy, and model is a reward model; give it to an evaluation."
            )
        is_run = self.verb in LIGHTNINGS_VERBS
        if is_run:
            keywords["weights_only"] = True  # no code that a checkpoint holds runs; the environment would decide
        with self.trainer.own_folder() if is_run else nullcontext():
            getattr(self.trainer, self.verb)(model=self.model, datamodule=self.datamodule, **keywords)


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: as on the command line, without the program's name; by default those of the process.

    Raises:
        SystemExit: with status 2 after one sentence on bad input; with 74 (EX_IOERR) where the system does not let it
            write or read, and 71 (EX_OSERR) where a process that helped has died or memory is not enough; with 75
            (EX_TEMPFAIL) where a fit was asked to leave by SIGTERM; with 130 after Ctrl-C.
    """
    _quieten()
    try:
        _run([with_present_paths(argument) for argument in (sys.argv[1:] if args is None else args)])
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


def _run(arguments: Sequence[str]) -> None:
    """Finds the verb and gives it its options.

    Raises:
        InputError: there is no verb, or it does not take the options.
    """
    if arguments and arguments[0] in ("--help", "-h"):
        print(HELP, *(f"  {verb:<12}{line}" for verb, line in VERBS.items()), sep="\n")
        raise SystemExit(0)
    if arguments and arguments[0] == "--version":
        print(__version__)
        raise SystemExit(0)
    place = next((number for number, argument in enumerate(arguments) if argument in VERBS), None)
    if place is None or any(name != "config" for name, _ in flags(arguments[:place])):
        raise InputError(explain_verb(arguments, [*VERBS]))
    verb, options = arguments[place], [*as_options(arguments[:place], arguments[place]), *arguments[place + 1 :]]
    check_config_files(arguments)
    if verb in COMMANDS:
        parser = LightningArgumentParser(**_parser_options(verb))
        parser.add_argument("--config", action="config", help="A YAML file with options.")
        parser.add_function_arguments(COMMANDS[verb])
        config = parser.instantiate_classes(_parse(parser, options))
        COMMANDS[verb](**{name: value for name, value in config.items() if name != "config"})
    else:
        rows = left_out(arguments, verb)
        options += [f"--{option}=null" for option in rows]
        IsdpoCLI(verb, options, [*changed(arguments, verb).values(), *rows.values()]).run()


def _parser_options(verb: str) -> dict[str, Any]:
    """A parser that raises for a mistake, and takes no typo for an abbreviation."""
    set_loader(YAML, partial(_load, verb))
    options = {"prog": f"lit-isdpo {verb}", "description": VERBS[verb], "parser_mode": YAML}
    return {**options, "exit_on_error": False, "allow_abbrev": False}


def _load(verb: str, text: str) -> Any:
    """Reads YAML. Classes get their present names; what a run of another verb saved loses that verb's own options."""
    content = get_loader("yaml")(with_present_paths(text))
    # Only what a run saved has every section; in a file that was written by hand such an option is a mistake.
    if verb not in OPTIONS or not isinstance(content, dict) or not {"seed_everything", *ALL_SECTIONS} <= content.keys():
        return content
    foreign = {*chain(*OPTIONS.values())} - OPTIONS[verb]
    return {name: value for name, value in content.items() if name not in foreign}


def _parse(parser: LightningArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The options of a verb.

    Raises:
        InputError: names the mistake, and what may have been meant.
    """
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(explain_option(str(error), arguments, parser)) from error


def _in_force(verb: str, config: Namespace) -> Namespace:
    """A copy of a config in which the lab's names are folders, and options that other options imply have values."""
    config = config.clone()
    model, data, trainer, evaluation = config.model.init_args, config.data.init_args, config.trainer, config.evaluation
    root = Path(trainer.default_root_dir)
    if data.get("seed") is None:
        data.seed = int(config.seed_everything)
    if evaluation.folder is None:  # not in the run's own folder: other runs go on with what is there
        evaluation.folder = str(root / "evaluations")
    if (reference := model.get("reference")) and reference.cache_dir is None:  # shared by runs too
        reference.cache_dir = str(root / "reference_logps")
    if verb in ("inspect", "plan"):  # for another machine than this one
        trainer.accelerator, trainer.devices, trainer.num_nodes = "cpu", 1, 1
        if not is_sharded(config):
            trainer.strategy = "auto"
    if verb != "test":  # nobody asks them, and a reward model may be as large as the policy
        evaluation.reward = evaluation.judge = None
    if is_sharded(config):  # FSDP's tensors are counted in versions, which inference mode does not
        trainer.inference_mode = False
    _resolve_lab(model, root / "lab", default="reference")
    _resolve_lab(data, root / "lab", default="pairs")
    return config


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
)
