"""Trackers of runs by one flag: W&B, TensorBoard, MLflow and trackio, beside metrics.csv.

Lightning's own loggers, set up so that a run needs no account and no network, and stays
in the same place when it is resumed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from archzoo._version import __version__
from archzoo.training.ending import say

#: What each is in Python, and in the extras of this package.
TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
PROJECT = "archzoo"  # where the environment names none
FILE = "trackers.json"  # in a run's directory: under which names the trackers know it


class TrackioLogger(Logger):
    """Hands a run to trackio, which keeps it in a database on this machine.

    Args:
        project: Of trackio.
        name: The run's.
        resume: Continue the last run of that name.
    """

    def __init__(self, project: str, name: str, resume: bool = False) -> None:
        super().__init__()
        self._project, self._name, self._resume = project, name, resume
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The module, once it has begun the run."""
        import trackio

        if self._run is None:
            resume = "allow" if self._resume else "never"
            self._run = trackio.init(self._project, name=self._name, resume=resume, embed=False)
        return trackio

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.experiment  # noqa: B018, which begins the run
        self._run.config.update(dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self.experiment.finish()
            self._run = None


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers that are not there.

    Raises:
        ValueError: The message has the command that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--tracker {name}: {name} is not installed: pip install 'archzoo[{name}]'"
            )


def make_trackers(
    names: Iterable[str], directory: Path, resumed: Path | None = None
) -> dict[str, Logger]:
    """The loggers of some trackers, by name.

    Args:
        names: Of `TRACKERS`.
        directory: The run's; its name is the run's name.
        resumed: The directory of the run that is resumed, or None: a new one begins.
    """
    names = list(names)
    check_installed(names)
    known = _known(resumed)
    made: dict[str, Logger] = {}
    for name in names:
        made[name] = _make(name, directory, known.get(name))
    return made


def _known(resumed: Path | None) -> dict[str, str]:
    """Under which names the trackers know the run of a directory."""
    try:
        text = (resumed / FILE).read_text(encoding="utf-8") if resumed else "{}"
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _make(name: str, directory: Path, known: str | None) -> Logger:
    run = directory.name
    if name == "tensorboard":
        return TensorBoardLogger(str(directory), "", "tensorboard", default_hp_metric=False)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        given: dict[str, Any] = {"project": project, "name": run, "save_dir": str(directory)}
        directory.mkdir(parents=True, exist_ok=True)  # or W&B takes the system's scratch directory
        if "WANDB_MODE" not in os.environ:
            given["mode"] = _wandb_mode(directory)
        return WandbLogger(id=known or uuid.uuid4().hex[:8], **given)
    if name == "mlflow":
        place = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        return MLFlowLogger(experiment, run, tracking_uri=place, run_id=known)
    return TrackioLogger(os.environ.get("TRACKIO_PROJECT", PROJECT), run, known is not None)


def _wandb_mode(directory: Path) -> str:
    """How W&B runs where no one says: online for those who have logged in."""
    import wandb

    if wandb.login(prompt=False):
        return "online"
    say(
        f"W&B has no login: the run is kept in {directory}/wandb; `wandb login`, then `wandb sync` "
        "of that directory's run sends it"
    )
    return "offline"


class Tracked(lightning.Callback):
    """Tells the trackers a run's settings, and notes under which names they know it.

    Args:
        trackers: As `make_trackers` gives them.
        settings: Of the run, plain data.
    """

    def __init__(self, trackers: dict[str, Logger], settings: dict[str, Any]) -> None:
        self.trackers, self.settings = trackers, settings
        self._noted = False

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        for logger in self.trackers.values():
            if not _has_settings(logger):
                logger.log_hyperparams({"archzoo": __version__, **_flat(self.settings)})

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        for logger in self.trackers.values():
            if isinstance(logger, TensorBoardLogger) and trainer.global_step:
                _forget_later(logger, trainer.global_step)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        _finish_wandb(self.trackers.values(), 0)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        _finish_wandb(self.trackers.values(), 1)

    @rank_zero_only
    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
        # When the directory is prepared for the run, and not before.
        if not self._noted:
            self._noted = True
            names = {name: str(logger.version) for name, logger in self.trackers.items()}
            path = Path(trainer.default_root_dir, FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(names) + "\n", encoding="utf-8")


@rank_zero_only
def _forget_later(logger: TensorBoardLogger, step: int) -> None:
    """TensorBoard shows nothing of a run after the step that it is resumed at."""
    logger.experiment.close()
    logger._experiment = None
    logger._kwargs["purge_step"] = step + 1


def _is_first() -> bool:
    """Whether this is the process that logs."""
    return not getattr(rank_zero_only, "rank", 0)


def _finish_wandb(loggers: Iterable[Logger], status: int) -> None:
    """End W&B's run, which the next run of this process would otherwise write into."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and _is_first():
            logger.experiment.finish(status)


def _has_settings(logger: Logger) -> bool:
    """Whether it is MLflow's and of a resumed run: MLflow takes each setting once."""
    if not isinstance(logger, MLFlowLogger) or not _is_first():
        return False
    return bool(logger.experiment.get_run(str(logger.run_id)).data.params)


def _flat(settings: Any, above: str = "") -> dict[str, Any]:
    """Settings by their full names; empty ones are left out."""
    if not isinstance(settings, dict):
        plain = isinstance(settings, str | int | float | bool)
        return {above: settings if plain else json.dumps(settings)}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if value is not None:
            found |= _flat(value, f"{above}.{name}" if above else str(name))
    return found


@rank_zero_only
def write_texts(logger: Any, step: int, texts: list[dict[str, Any]]) -> None:
    """Show texts in a tracker, under the name samples.

    Args:
        logger: Any of Lightning's; one that takes no texts gets none.
        step: Optimizer steps.
        texts: Rows of strings by column.
    """
    lines = "\n\n".join(" | ".join(map(str, row.values())) for row in texts)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("samples", lines, step)
    elif isinstance(logger, WandbLogger):
        rows = [[step, *row.values()] for row in texts]
        logger.log_text("samples", columns=["step", *texts[0]], data=rows, step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(str(logger.run_id), lines, f"samples/{step:08}.txt")
    elif isinstance(logger, TrackioLogger):
        trackio = logger.experiment
        trackio.log({"samples": trackio.Markdown(lines)}, step=step)


def refusal(error: Exception) -> str | None:
    """One line for what a tracker's own library refuses, None where no tracker's does."""
    library = type(error).__module__.partition(".")[0]
    if library not in TRACKERS:
        return None
    said = " ".join(str(error).split())
    return f"--tracker {library}: {said} (without {library}: --tracker null)"
