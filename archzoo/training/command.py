"""`fit`, `validate`, `test` and `predict`: LightningCLI, fitted to this package.

What it adds: a directory for every run, a CSV and checkpoints in it always, one clear line where
something is misspelt, and model, data and tokenizer taken from a checkpoint where one is named.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import shlex
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's affair

import torch
from lightning.fabric.utilities import rank_zero_only
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from archzoo import parts, shipped
from archzoo.checkpoint import (
    base_in,
    directory_of,
    locate,
    read_safely,
    read_task,
    tokenizer_files,
)
from archzoo.checkpoint.bases import WAY_OUT, find_base
from archzoo.checkpoint.runs import check_beside, names_base
from archzoo.decoder import Decoder
from archzoo.tasks.stream import Task, import_all, known_tasks, named, readable
from archzoo.training import settings
from archzoo.training.arguments import (
    file_of,
    names_configuration,
    objective_of,
    of_named_run,
    run_name,
    says_all,
    settings_beside,
    typed,
    value_of,
    with_files_read,
    without,
)
from archzoo.training.callbacks import (
    Checkpoints,
    EndOnSignal,
    SaveAndEndOnSignal,
    ShowProgress,
)
from archzoo.training.comparison import module_arguments
from archzoo.training.compiling import CompileModel
from archzoo.training.deepspeed import check_usable
from archzoo.training.directory import RunDirectory
from archzoo.training.ending import SIGNALS, Ended, say
from archzoo.training.files import CheckpointFiles, MetricsFile
from archzoo.training.flags import add_flags, callbacks_of, move_flags, trackers_of, with_flags
from archzoo.training.module import LanguageModel
from archzoo.training.objectives import OBJECTIVES, find_objective
from archzoo.training.optimizers import describe_optimizer, find_optimizer
from archzoo.training.ranks import check_sizes, check_strategy, is_said
from archzoo.training.rate_finder import find_learning_rate
from archzoo.training.trackers import refusal
from archzoo.training.user_errors import explain, with_class
from archzoo.trust import load_installed, with_moved

RUN_DIRECTORY = "the run's directory"  # a sentinel until its name is known
COMMANDS = ("fit", "validate", "test", "predict")
NOT_STORED = {"preset", "match", "weights"}  # a run's checkpoint holds what they led to
HARDWARE = ("accelerator", "devices")  # of the trainer's settings
# What settings say of other runs than the one that they make.
NOT_OF_A_RUN = ("ckpt_path", "resume", "table", "arms", "arm", "compare", "claim")


class Resolved(NamedTuple):
    """What a `fit` would run.

    Attributes:
        settings: All of them, plain data: what the run's config.yaml would hold.
        model: With its decoder not made yet.
        task: With its data not prepared yet.
    """

    settings: dict[str, Any]
    model: LanguageModel
    task: Task


def run(command: str, arguments: list[str]) -> int:
    """Run one of `COMMANDS`; what is wrong with the arguments is raised as ValueError."""
    _import_parts()
    for name in (None, "lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_worth_saying)
    # Batches are computed in place, within a fraction of a step: a worker would only cost.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # Lightning's own affair
    # Its engine clips by the same setting, and `LanguageModel` leaves that to it.
    warnings.filterwarnings("ignore", ".*DeepSpeed handles gradient clipping internally.*")
    warnings.filterwarnings("ignore", ".*When saving the DeepSpeed Stage 3 checkpoint.*")
    warnings.filterwarnings("ignore", ".*`torch.distributed.[a-z_]*` is deprecated.*")  # by it
    if command != "fit":  # which take none of what a callback has kept
        warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be.*")
    # FSDP2 fears writes into what a block returns; nothing here writes there.
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")
    try:
        with settings.imported_only(), _user_errors():
            _start(CommandLine, command, arguments)
    except Ended as end:
        if not end.explained:
            say(f"{end}: nothing was written")
        return end.status
    except Exception as error:
        if is_said(error):
            return 1
        raise
    return 0


def resolve(arguments: list[str]) -> Resolved:
    """The settings, the model and the task of `archzoo fit ARGUMENTS`, of which nothing is run.

    Raises:
        ValueError: What is wrong with the arguments, as `run` says it.
    """
    _import_parts()
    with settings.imported_only(), _user_errors():
        line = _start(_ResolvedOnly, "fit", arguments)
    parser, config = line._parser("fit"), line.config["fit"].clone()
    for name in NOT_OF_A_RUN:
        config[name] = None
    text = parser.dump(config, skip_none=False, skip_validation=True)
    return Resolved(settings.parse(text, "the settings"), line.model, line.datamodule)


def _import_parts() -> None:
    """Import what settings may name by class names alone."""
    for module in parts.MODULES:
        importlib.import_module(module)
    import_all()
    load_installed()


@contextmanager
def _user_errors() -> Iterator[None]:
    """Raises as ValueError what is wrong with the arguments."""
    try:
        yield
    except ValueError as error:
        if "Does not validate against" in str(error):  # jsonargparse, around what a class said
            raise ValueError(explain(str(error), ())) from error
        raise
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        if (said := refusal(error)) is None:
            raise
        raise ValueError(said) from error


def _start(cls: type[CommandLine], command: str, arguments: list[str]) -> CommandLine:
    return cls(
        find_objective(objective_of(command, arguments)),
        Task,
        subclass_mode_data=True,
        args=[command, *arguments],
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_class=Parser,
        trainer_defaults={
            "log_every_n_steps": 10,
            "check_val_every_n_epoch": None,  # val_check_interval counts batches of the whole run
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        parser_kwargs={
            "prog": "archzoo",
            "exit_on_error": False,
            command: {"exit_on_error": False},
        },
    )


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors name what comes nearest to the mistake."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # --trainer.max_step would be taken for max_steps, and today's shorthand be ambiguous
        # tomorrow.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._described: type | None = None  # the class whose arguments it parses

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        self._described = args[0] if args else kwargs["theclass"]
        # A value is never the name of a file that holds the value: files are read by `settings`.
        return list(super().add_class_arguments(*args, **kwargs | {"sub_configs": False}))

    def add_subclass_arguments(self, *args: Any, **kwargs: Any) -> Any:
        added = super().add_subclass_arguments(*args, **kwargs)
        for action in self._actions:
            if hasattr(action, "_enable_path"):
                action._enable_path = False
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self._described is not None:
            message = with_class(message, self._described, _names_of(self))
        raise ValueError(explain(message, _names_of(self))) from None


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's directory: all settings, to run it again or resume it."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.config = self.config.clone()
        # A run from this file is a new one, of this variant.
        for name in NOT_OF_A_RUN:
            self.config[name] = None

    def _save(self, trainer: Any, pl_module: Any) -> None:
        super().setup(trainer, pl_module, "fit")  # once, after `RunDirectory` is prepared

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._save(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, pl_module)


class CommandLine(LightningCLI):
    """LightningCLI with a directory for every run, and settings that come from a checkpoint."""

    _run_directory: RunDirectory | None = None  # of a `fit`, on the first process

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        # Describing the arguments of the other commands would take a quarter of a second for each.
        command = settings["args"][0]
        only = {command: LightningCLI.subcommands()[command]}
        self.subcommands = lambda: only  # type: ignore[method-assign]
        try:
            super().__init__(*arguments, **settings)  # does all of it
        finally:
            if self._run_directory is not None:
                self._run_directory.lock.release()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run's directory is runs/NAME (see trainer.default_root_dir); default: the "
            "configuration file's name, or the preset's.",
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: fit resumes from the last.ckpt of the run's directory where there is one, "
            "and begins otherwise.",
        )
        parser.add_argument(
            "--table",
            type=str | None,
            default=None,
            help="Of validate and test: their figures are added to TABLE.csv beside the "
            "checkpoint; default: validate.csv and test.csv. For another task than the run's: "
            "--data Addition --table test_addition.",
        )
        parser.add_argument(
            "--arms",
            type=dict[str, dict[str, Any]] | None,
            default=None,
            help="Variants to compare: by the name of each, the settings it changes in this file.",
        )
        parser.add_argument(
            "--arm",
            type=str | None,
            default=None,
            help="The variant of the configuration file (one of its arms) that is run; default: "
            "the file as it is.",
        )
        parser.add_argument(
            "--compare",
            type=dict[str, Any] | None,
            default=None,
            help="Options of archzoo compare for this file, by name; fit does not read them.",
        )
        parser.add_argument(
            "--claim",
            type=dict[str, Any] | list[dict[str, Any]] | None,
            default=None,
            help="What archzoo compare tests with this file; fit does not read it.",
        )
        parser.add_argument(
            "--objective",
            type=str | None,
            default=None,
            help=f"What is trained for instead of cross-entropy: {', '.join(OBJECTIVES)}, or the "
            "path of a class of yours; its settings stand beside the others under model.",
        )
        parser.add_argument(
            "--compile",
            type=Literal["auto", "graphs"] | bool,
            default="auto",
            help="Whether fit compiles the model: auto does on an NVIDIA GPU from 20 M parameters "
            "on, and replays the step of a mixture of experts, or of less than 60 M with "
            "attention or retention, as CUDA graphs where it can; true compiles wherever it runs, "
            "false nowhere. graphs: any model, with graphs (see docs/speed.md).",
        )
        add_flags(parser)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    # ------------------------------------------------------------------------ parsing

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        command, *arguments = args
        self._command = command
        self._given = list(arguments)
        if command == "fit" and names_configuration(arguments):  # `fit addition`
            arguments = ["--config", str(shipped.configuration(arguments[0])), *arguments[1:]]
        self.run_name = run_name(arguments)
        arguments = with_flags(with_files_read(arguments))
        path = value_of(arguments, "--ckpt_path")
        logger = value_of(arguments, "--trainer.logger")
        if logger == "TensorBoardLogger" and not value_of(arguments, "--trainer.logger.save_dir"):
            arguments += ["--trainer.logger.save_dir", RUN_DIRECTORY]
        weights = value_of(arguments, "--model.weights")
        if (
            weights
            and not path
            and not any(a.startswith(("--config", "-c", "--data")) for a in arguments)
        ):
            arguments = ["--config", settings.written(self._data_of(weights)), *arguments]
        if not value_of(arguments, "--config"):
            path = of_named_run(command, path, arguments)
            if path:
                arguments = [*without(arguments, "--ckpt_path"), "--ckpt_path", path]
        if path and path not in ("last", "best"):
            path = file_of(path)
            # Last, so that no file's `ckpt_path: null` takes it back.
            arguments = [*without(arguments, "--ckpt_path"), "--ckpt_path", path]
            checkpoint = read_safely(path)
            beside = directory_of(path) / "config.yaml"
            if command == "fit" and not value_of(arguments, "--config") and beside.is_file():
                arguments = ["--config", settings_beside(beside, arguments), *arguments]
            elif not self._says_model(arguments):
                # Before the other arguments, so that they have the last word.
                stored = self._stored_settings(checkpoint, path, arguments)
                arguments = ["--config", settings.written(stored), *arguments]
        self.config = parser.parse_args([command, *map(with_moved, arguments)])

    def _says_model(self, arguments: list[str]) -> bool:
        """Whether files say all of the model: to train it, or to evaluate by its objective."""
        if not value_of(arguments, "--config"):
            return False
        return self._command == "fit" or objective_of(self._command, arguments) is not None

    def _stored_settings(
        self, checkpoint: dict[str, Any], path: str, given: list[str]
    ) -> dict[str, Any]:
        """Model and data of a checkpoint as a configuration file would say it."""
        model, task = checkpoint.get("hyper_parameters"), checkpoint.get("task")
        if not isinstance(model, dict) or not isinstance(task, dict):
            raise ValueError(f"{path} was not written by archzoo's training")
        weights = None
        if record := base_in(checkpoint, path):
            weights = find_base(record, value_of(given, "--model.weights"), Path(path))
        model = module_arguments(checkpoint)
        model = {n: value for n, value in model.items() if n != "weights" and value is not None}
        if self._command != "fit":
            model.pop("optimizer", None)  # whose class need not be there
            model.pop("distil", None)  # whose teacher need not be there
        known = inspect.signature(LanguageModel).parameters.keys() - NOT_STORED
        known |= inspect.signature(Decoder).parameters.keys()
        stored = {n for n, value in checkpoint["hyper_parameters"].items() if value is not None}
        odd = sorted(map(str, stored - known))
        if odd:
            raise ValueError(f"{path}: a run's checkpoint does not hold the setting {odd[0]!r}")
        settings.check({"model": model}, path)
        model |= {} if weights is None else {"weights": str(weights)}
        own = path if tokenizer_files(checkpoint) else None
        return {"model": model, "data": self._data(task, own, path, given)}

    def _data_of(self, weights: str) -> dict[str, Any]:
        """The task that weights were trained on, with their own tokenizer."""
        task, tokenizer = read_task(weights)
        if task is None:
            raise ValueError(f"{weights} does not say what it was trained on: give --data")
        own = None if tokenizer is None else str(locate(weights))
        return {"data": self._data(task, own, weights, [])}

    def _data(self, task: Any, own: str | None, path: str, given: list[str]) -> dict[str, Any]:
        """A checkpoint's task as `data`; what it reads lies under the current directory.

        Args:
            task: As the checkpoint describes it.
            own: Where the model's own tokenizer is read from, for a task that would learn another
                from its text. None: it has none.
            path: Of the checkpoint, for messages.
            given: What the command line says.
        """
        try:
            cls, arguments = named(task)
            options = {argument.partition("=")[0] for argument in given}
            ways = ("--data.", "--data.init_args.")
            instead = {n for n in arguments if any(f"{way}{n}" in options for way in ways)}
            arguments = readable(cls, arguments, {*instead, *(["tokenizer"] if own else [])})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if own and "tokenizer" in arguments:
            arguments |= {"tokenizer": own, "vocab_size": None}
        settings.check({"data": {"class_path": task["class_path"], "init_args": arguments}}, path)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}

    def _parse_ckpt_path(self) -> None:
        """Done in `parse_arguments`, before anything is required."""

    # ------------------------------------------------------------------------ the run

    @property
    def directory(self) -> Path:
        """Where this command writes: the run's directory, or the checkpoint's."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs")
        path = config.ckpt_path
        if self.subcommand != "fit" and path and path not in ("last", "best"):
            return directory_of(path)
        weights = config.model.weights
        otherwise = config.model.preset or (f"{Path(weights).stem}_fit" if weights else "model")
        name = config.name or self.run_name or otherwise
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(
                f"name={name!r} is not a plain name: the run's directory is runs/NAME, and "
                "--trainer.default_root_dir DIR puts it elsewhere"
            )
        return root / name

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.name = self.directory.name
        move_flags(config)
        find_optimizer(describe_optimizer(config.model.optimizer))
        logger = config.trainer.get("logger.init_args")
        if logger is not None and logger.get("save_dir") == RUN_DIRECTORY:
            logger.save_dir, logger.name, logger.version = str(self.directory), "", "tensorboard"
        last = self.directory / "last.ckpt"
        if config.resume is not None and self.subcommand != "fit":
            raise ValueError(f"--resume is for fit; {self.subcommand} takes --ckpt_path CHECKPOINT")
        self._check_table(config.table)
        if config.resume == "auto" and last.exists():
            config.ckpt_path = str(last)
        if config.ckpt_path in ("last", "best"):
            config.ckpt_path = str(self.directory / f"{config.ckpt_path}.ckpt")
        if config.ckpt_path:
            config.ckpt_path = file_of(config.ckpt_path)
            _mean_what_it_meant(config)
            _check_beside(config)
        _check_trainer(config.trainer)
        check_strategy(config.trainer.strategy)
        check_usable(config.trainer.strategy, config.trainer.accelerator)
        settings.check_amounts(config.data)

    def _check_table(self, table: str | None) -> None:
        if table is None:
            return
        if self.subcommand not in ("validate", "test"):
            raise ValueError(f"--table is for validate and test; {self.subcommand} has its own")
        if not re.fullmatch(r"\w[\w.+-]*", table) or table == "metrics":
            raise ValueError(
                f"--table {table}: give the plain name of a file, without .csv; metrics is of fit"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        fitting = self.subcommand == "fit"
        if not fitting:
            self.save_config_callback = None
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoints)]
        if config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, ShowProgress()]
        given, finds = self.config[self.subcommand], self._finds_rate
        trackers: dict[str, Any] = {}
        if fitting and not finds:
            if not config.get("fast_dev_run"):
                trackers = trackers_of(given, self.directory, given.ckpt_path)
            callbacks = [*callbacks, *callbacks_of(given, trackers)]
        if finds:
            callbacks, self.save_config_callback = [], None
        elif fitting and not config.get("fast_dev_run"):
            config["callbacks"] = [*self._hold_directory(), *_as_list(config.get("callbacks"))]
        if fitting and not finds:
            callbacks = [*callbacks, CompileModel(self.config["fit"].compile)]
            saves = any(isinstance(callback, Checkpoints) for callback in callbacks)
            callbacks = [*callbacks, (SaveAndEndOnSignal if saves else EndOnSignal)(SIGNALS)]
        config["default_root_dir"] = str(self.directory)
        table = "metrics" if fitting else self.config[self.subcommand].table or self.subcommand
        file = MetricsFile(self.directory / f"{table}.csv")
        config["logger"] = [file, *_as_list(config.get("logger")), *trackers.values()]
        config["plugins"] = [CheckpointFiles(), *_as_list(config.get("plugins"))]
        if config.get("precision") is None:
            config["precision"] = usual_precision(config)
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
            check_sizes(trainer.strategy)
            # Lightning's own handlers end a run as if it had finished, and with several ranks they
            # wait for each other inside of a handler.
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            # So no signal reaches its loop, which would ask for one at every step, and wait.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
            return trainer
        except (MisconfigurationException, TypeError) as error:
            if not re.search("device|gpu|accelerator", str(error), re.IGNORECASE):
                raise
            # Lightning names the setting or the reason, never both.
            given = ", ".join(f"trainer.{name}={config.get(name)}" for name in HARDWARE)
            raise ValueError(f"{given}: {error} 'auto' takes what there is") from error

    @rank_zero_only
    def _take_directory(self) -> None:
        config = self.config[self.subcommand]
        path = config.ckpt_path
        resumes = path and directory_of(Path(path).resolve()) == self.directory.resolve()
        if config.resume == "auto":  # it was ended before anything could be saved
            names = ("last.ckpt", "best.ckpt")
            resumes = resumes or not any((self.directory / name).exists() for name in names)
        self._run_directory = RunDirectory(self.directory, bool(resumes))

    def _hold_directory(self) -> list[RunDirectory]:
        """The callback that prepares the run's directory, which is locked from now on."""
        self._take_directory()
        return [] if self._run_directory is None else [self._run_directory]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            arguments["verbose"] = False  # `ShowProgress` prints the figures
        return arguments

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Ended as end:
            if subcommand == "fit":
                self._say_how_to_go_on(end)
            launcher = self.trainer.strategy.launcher
            if self.trainer.global_rank and isinstance(launcher, _SubprocessScriptLauncher):
                end.status = 0  # the process that started this one would take it for a failure
            raise
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}; {self._good()}. A lower --model.learning_rate or "
                "--trainer.gradient_clip_val 1 may help"
            ) from None
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            if str(error).startswith("Early stopping conditioned on metric"):
                raise ValueError(_unknown_metric(str(error))) from error
            if _of_another_process(error):
                raise ConnectionError(
                    f"another process of this run ended, and says why if it could; {self._good()}"
                ) from error
            if not _while_restoring(error):
                raise
            raise ValueError(
                f"{self.config[subcommand].ckpt_path} is damaged, or another model's: "
                f"{type(error).__name__} {error} while it was restored"
            ) from error

    def _good(self) -> str:
        """What a run can be resumed from, after an error."""
        last = self.directory / "last.ckpt"
        return f"{last} is the last good checkpoint" if last.exists() else "nothing was saved"

    def _say_how_to_go_on(self, end: Ended) -> None:
        """After a run was ended by a signal: what is saved, and the command that resumes it."""
        trainer, last = self.trainer, self.directory / "last.ckpt"
        step = trainer.global_step
        if step == (self.model.loaded_step or 0) or self._tries():
            say(f"{end} before a step was done: nothing was written")
        elif not any(isinstance(c, Checkpoints) for c in trainer.checkpoint_callbacks):
            say(f"{end} at step {step}; nothing is saved under trainer.enable_checkpointing: false")
        else:
            say(f"{end}\n{last} holds all up to step {step}; to resume:")
            again = ["--ckpt_path", str(last)]  # with the settings that lie beside it
            if says_all(self._given):
                given = without(without(self._given, "--ckpt_path"), "--resume")
                again = [*given, "--resume", "auto"]
            say("  " + shlex.join([*typed("fit"), *again]))
        end.explained = True

    def _tries(self) -> bool:
        """Whether this command only tries itself out: then it writes nothing."""
        return bool(self.config[self.subcommand].trainer.fast_dev_run)

    def after_fit(self) -> None:
        if self._finds_rate:
            return
        self._say_finished()
        self._say_where()

    @rank_zero_only
    def _say_finished(self) -> None:
        """Where a run was resumed that had nothing left to do."""
        trainer, path = self.trainer, self.config[self.subcommand].ckpt_path
        if not path or trainer.global_step != self.model.loaded_step or trainer.should_stop:
            return
        limit = "max_steps" if trainer.global_step >= trainer.max_steps > -1 else "max_epochs"
        print(
            f"{path} had reached trainer.{limit}={getattr(trainer, limit)}: nothing was left to "
            "train; a larger one trains on"
        )

    def after_test(self) -> None:
        self._say_where()

    @rank_zero_only
    def _say_where(self) -> None:
        if self._tries():
            print("trainer.fast_dev_run: nothing was written")
            return
        table = f"{self.config[self.subcommand].table or 'test'}.csv"
        names = ("last.ckpt", "best.ckpt", "metrics.csv", table, "config.yaml")
        found = [name for name in names if (self.directory / name).exists()]
        if found:
            print(f"{self.directory} holds {', '.join(found)}")

    @property
    def _finds_rate(self) -> bool:
        return self.subcommand == "fit" and bool(self.config["fit"].find_learning_rate)

    def fit(self, **arguments: Any) -> None:
        """Train, or with --find_learning_rate look for a learning rate."""
        if not self._finds_rate:
            self.trainer.fit(**arguments)
            return
        rate = find_learning_rate(self.trainer, self.model, self.datamodule)
        if rate is None:
            raise ValueError("the loss fell at no learning rate: look at the data and the model")
        given = shlex.join(a for a in self._given if not a.startswith("--find_learning_rate"))
        say(f"the loss fell fastest at a learning rate of {rate:g}; to train with it:")
        say(f"  {shlex.join(typed('fit'))} {given} --model.learning_rate {rate:g}")

    def predict(self, **arguments: Any) -> None:
        """Write predictions.jsonl, a row a line, and show the first ones."""
        batches = self.trainer.predict(**arguments) or []
        rows = [row for batch in batches for row in batch]
        self._write_predictions(rows)

    @rank_zero_only
    def _write_predictions(self, rows: list[dict[str, str]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        for line in lines[:8]:
            print(line)
        if self._tries():
            print("trainer.fast_dev_run: nothing was written")
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "predictions.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path} holds {len(rows)} predictions")


class _ResolvedOnly(CommandLine):
    """Stops when the model and the task are made; random numbers and directories stay."""

    def _set_seed(self) -> None:
        pass

    def instantiate_trainer(self, **arguments: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


# ---------------------------------------------------------------------------- small helpers

# Lightning's notes that say nothing new here: what machine this is, what else it sells, and the
# limit that ended a run. Its others are shown, and so are the reports of a profiler. What it says
# of Tensor Cores, bf16-mixed uses by itself; float32 is left whole, for routers and norms need it.
CHATTER = re.compile(
    r"Seed set to |available: |used: |Tip: |litlogger|litmodels|LOCAL_RANK: |^-+$"
    r"|Automatic Mixed Precision|weights_only|Restor(ing|ed) |Loaded model weights"
    r"|`Trainer.fit` stopped: `max_(steps|epochs)|fast_dev_run|distributed_backend"
    r"|Starting with \d+ processes|Initializing distributed|that has Tensor Cores"
    r"|Found current_model_state|initializing deepspeed distributed"
)


def _worth_saying(record: logging.LogRecord) -> bool:
    known = record.name.startswith("lightning") and record.levelno < logging.WARNING
    return not (known and CHATTER.search(record.getMessage()))


def _unknown_metric(text: str) -> str:
    """What Lightning's EarlyStopping says of a metric that there is not, as a setting's fault."""
    wanted, *known = re.findall("`([^`]+)`", text)
    return (
        f"trainer.callbacks: EarlyStopping.monitor: there is no metric {wanted}; there are "
        f"{', '.join(sorted(set(known) - {'EarlyStopping'}))}"
    )


def _of_another_process(error: BaseException) -> bool:
    """Whether an exchange with another process failed because that one is gone."""
    kinds = getattr(torch.distributed, "DistError", ())
    said = str(error)
    return isinstance(error, kinds) or "gloo/transport" in said or "closed by peer" in said


def _while_restoring(error: BaseException) -> bool:
    """Whether an error comes from Lightning's reading of a checkpoint's content."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(Path(file).name == "checkpoint_connector.py" for file in files)


def _check_trainer(config: Any) -> None:
    """Refuse what Lightning takes for something else, or starts and cannot end."""
    interval = config.val_check_interval
    if isinstance(interval, int | float) and not interval > 0:
        raise ValueError(
            f"trainer.val_check_interval={interval} must be above 0: steps from one validation to "
            "the next; trainer.limit_val_batches=0 turns validation off"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_cpu = config.accelerator == "cpu" or (
        config.accelerator == "auto" and not torch.cuda.is_available()
    )
    devices = str(config.devices)
    started = "LOCAL_RANK" in os.environ  # by another program, which knows why
    if on_cpu and not started and devices.isdigit() and int(devices) > max(cores or 1, 2):
        raise ValueError(
            f"trainer.devices={devices}: on the CPU these are processes, and there are {cores} "
            "cores; 'auto' takes one process"
        )


def usual_precision(config: dict[str, Any]) -> str | None:
    """bf16-mixed on a GPU that has it, unless a plugin says how numbers are kept."""
    if config.get("accelerator") not in ("auto", "gpu", "cuda"):
        return None
    if any(isinstance(plugin, Precision) for plugin in _as_list(config.get("plugins"))):
        return None
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)
    return "bf16-mixed" if bf16 else None


def _names_of(parser: Any) -> list[str]:
    """Full names of what a parser or one of its subcommands' takes."""
    names = []
    for action in parser._actions:
        names += [option[2:] for option in action.option_strings if option.startswith("--")]
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                names += _names_of(subparser)
    return names


def _mean_what_it_meant(config: Any) -> None:
    """Arguments of the task that came after a checkpoint are what they were when it was made."""
    kind = str(config.data.class_path).rpartition(".")[2]
    task = known_tasks().get(f"archzoo.tasks.{kind}")
    if task is None or not task.added:
        return
    stored, _ = read_task(config.ckpt_path)
    if not isinstance(stored, dict) or str(stored.get("class_path")).rpartition(".")[2] != kind:
        return  # another task's arguments mean nothing here
    given = stored.get("init_args")
    takes = inspect.signature(task).parameters  # a class may do without what its base was given
    for name, value in task.added.items():
        if isinstance(given, dict) and name in takes and name not in given:
            config.data.init_args[name] = value


def _check_beside(config: Any) -> None:
    """Refuse a checkpoint of adapters that do not fit the base, before they are put on it."""
    path, weights = Path(config.ckpt_path), config.model.weights
    if weights is None or not names_base(path):
        return
    if not Path(weights).exists():
        raise FileNotFoundError(f"{path}: its base {weights} is not there: {WAY_OUT}")
    check_beside(path, locate(weights))


def _as_list(value: Any) -> list[Any]:
    """Loggers or plugins as the configuration may give them: none, one, or several."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
