"""Callbacks of training: checkpoints and the progress shown."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from archzoo.analysis.curves import OUT_OF_DISTRIBUTION
from archzoo.analysis.tables import Screen
from archzoo.training.ending import Ended, Signals
from archzoo.training.files import MetricsFile
from archzoo.training.loop import ResumingFitLoop
from archzoo.training.module import LanguageModel
from archzoo.training.ranks import AnySignal


class Checkpoints(Checkpoint):
    """Keeps two checkpoints of a run: ``last.ckpt``, to resume from, and ``best.ckpt``.

    They are written between optimizer steps and replaced whole, and never with a loss or weights
    that are not finite, so that there is a good one whatever ends a run.

    Args:
        every_n_steps: Optimizer steps between two writings of last.ckpt; it is also written after
            every validation and at the end.
        monitor: Metric that says which checkpoint is best, such as validation/exact_match; None:
            out-of-distribution exact match where the task evaluates it (`ood_digits`), else
            validation/loss.
        mode: "min" or "max": which values of `monitor` are better.
    """

    def __init__(
        self, every_n_steps: int = 500, monitor: str | None = None, mode: str = "min"
    ) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps={every_n_steps} must be at least 1")
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode={mode!r} is neither min nor max")
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.best: float | None = None
        #: What validation gave, and at which step: for the best one, and for the last one.
        self.reached: dict[str, dict[str, float]] = {}
        self.saved: int | None = None  # the step that last.ckpt holds, as far as this run knows
        self.directory = Path()
        self._logs: list[MetricsFile] = []
        self._rows: list[int] | None = None  # of each log, when the checkpoint was written
        self._loop: ResumingFitLoop | None = None
        self._module: lightning.LightningModule | None = None  # that is trained
        self._before: dict[str, Any] = {}  # what callbacks knew before the validation that runs

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self._module, LanguageModel):
            self._module.finish_row()  # which is then among those that are counted
        return {
            "best": self.best,
            "reached": self.reached,
            "rows": [log.rows for log in self._logs],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.reached = state_dict["best"], state_dict.get("reached", {})
        self._rows = state_dict.get("rows")
        self._note_validated()

    def _note_validated(self) -> None:
        step = self.reached.get("last", {}).get("step")
        if self._loop is not None:
            self._loop.validated = None if step is None else int(step)

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if getattr(trainer.strategy, "_state_dict_type", None) == "sharded":
            raise ValueError(
                f"{type(trainer.strategy).__name__} writes checkpoints as directories of shards, "
                "which cannot be read here: set state_dict_type to full"
            )
        self.directory = Path(trainer.default_root_dir)
        self._logs = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        self._module = pl_module if stage == "fit" else None
        if stage == "fit":
            self._loop = ResumingFitLoop.take_over(trainer)
            if not trainer.global_step:  # an earlier run's; one that is resumed says so after this
                self.best, self.reached, self.saved, self._rows = None, {}, None, None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.saved = trainer.global_step or None
        rows = self._rows if self._rows and len(self._rows) == len(self._logs) else None
        for number, log in enumerate(self._logs):
            log.begin(trainer.global_step, rows[number] if rows else None)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # During an accumulation the step stays the one that was saved.
        # The last step is saved before callbacks that average weights replace them.
        ends = trainer.global_step == trainer.max_steps
        if ends or trainer.global_step % self.every_n_steps == 0:
            self.save_last(trainer, pl_module)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        callbacks: list[lightning.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._before = copy.deepcopy(
            {callback.state_key: callback.state_dict() for callback in callbacks}
        )

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        if getattr(pl_module, "cut_short", False):  # by `EndOnSignal`: this validation never was
            checkpoint["callbacks"] = {name: state for name, state in self._before.items() if state}

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if getattr(pl_module, "cut_short", False):
            return
        monitor, mode = self.monitored(trainer.callback_metrics)
        value = trainer.callback_metrics[monitor]
        # A loss of nan is never the best, nor stays it where a checkpoint says so.
        sign = 1 if mode == "min" else -1
        found = {name: float(entry) for name, entry in trainer.callback_metrics.items()}
        found["step"] = trainer.global_step
        # Of equals, such as runs of zeros, the one of the lower loss.
        mine, best = (
            _comparable(of, sign, entry.get("validation/loss"))
            for of, entry in ((value.item(), found), (self.best, self.reached.get("best", {})))
        )
        better = mine < best
        if better:
            self.best = value.item()
            self.reached["best"] = found
        self.reached["last"] = found
        self._note_validated()
        # Before last.ckpt, which says that it is there.
        if better and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check(pl_module)
            trainer.save_checkpoint(self.directory / "best.ckpt")
        self.saved = None  # write last.ckpt again: now it knows the best, and that this was done
        self.save_last(trainer, pl_module)

    def monitored(self, metrics: Collection[str]) -> tuple[str, str]:
        """The metric that says which checkpoint is best, and its mode.

        Args:
            metrics: Names of all that a validation has given.

        Raises:
            ValueError: It is none of them.
        """
        found, mode = self.monitor, self.mode
        if found is None:
            has_ood = OUT_OF_DISTRIBUTION in metrics
            found, mode = (OUT_OF_DISTRIBUTION, "max") if has_ood else ("validation/loss", "min")
        if found not in metrics:
            given = ", ".join(sorted(set(metrics) - {"step"}))
            raise ValueError(
                f"checkpoint.monitor: there is no metric {found}; validation gives {given}"
            )
        return found, mode

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.save_last(trainer, pl_module)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        if isinstance(pl_module, LanguageModel):
            with contextlib.suppress(Exception):  # such as the same of a GPU
                pl_module.finish_row()

    def save_last(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write last.ckpt, unless it holds this step already."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # In the middle of an accumulation there are gradients, which no checkpoint holds.
        midway = trainer.fit_loop.epoch_loop._should_accumulate()
        if midway or trainer.global_step in (0, self.saved):
            return
        self._check(pl_module)
        trainer.save_checkpoint(self.directory / "last.ckpt")
        self.saved = trainer.global_step

    def _check(self, pl_module: lightning.LightningModule) -> None:
        if isinstance(pl_module, LanguageModel):
            pl_module.check_losses()
            pl_module.check_weights()


def _comparable(value: float | None, sign: int, loss: float | None) -> tuple[float, ...]:
    """A metric and the loss beside it, the better the smaller; nan comes last."""
    numbers = (None if value is None else sign * value, loss)
    return tuple(math.inf if n is None or math.isnan(n) else n for n in numbers)


class EndOnSignal(lightning.Callback):
    """Ends a run after a signal: after a whole step, with last.ckpt written.

    A validation is broken off; a run that is resumed begins with it.

    Args:
        signals: Which notes the signal.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self._any = AnySignal()

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.signals.gentle = True

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._end_if_received(trainer, pl_module, wait=False)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        # In the middle of an accumulation nothing can be saved: the step comes first.
        if trainer.state.fn != "fit" or trainer.sanity_checking or loop._should_accumulate():
            return
        if self._received(trainer) and not loop.val_loop.batch_progress.is_last_batch:
            assert isinstance(pl_module, LanguageModel)
            pl_module.cut_short = True
            # Ends the loop, not the process: callbacks that lent the model other weights for the
            # validation take them back.
            raise StopIteration

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        midway = trainer.fit_loop.epoch_loop._should_accumulate()
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not midway:
            self._end_if_received(trainer, pl_module)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.signals.gentle = False  # all is written
        self._end_if_received(trainer, pl_module)

    def _received(self, trainer: lightning.Trainer, wait: bool = True) -> int:
        """The signal that any of the ranks was sent, 0 for none."""
        return self._any(trainer, self.signals.received or 0, wait)

    def _end_if_received(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        wait: bool = True,
    ) -> None:
        if not (received := self._received(trainer, wait)):
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save_last(trainer, pl_module)
        raise Ended(received)


class SaveAndEndOnSignal(EndOnSignal, Checkpoint):
    """`EndOnSignal` among the callbacks that write checkpoints, which come after all others."""


class ShowProgress(ProgressBar):
    """A bar on a terminal, and a line a validation; elsewhere a line every so often as well.

    It draws itself from a thread of its own, so a step pays for one assignment only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Screen()
        self.shown: Progress | None = None
        self._enabled = True
        self._began = self._said = time.perf_counter()  # the second: when the last line was
        self._said_step = 0  # and of which step it was
        self._seen_step = 0  # of the latest row that was looked at

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @rank_zero_only
    def say(self, *parts: str) -> None:
        """Print a line, above the bar where there is one, broken between parts if it must be."""
        if self._enabled:
            width = self.console.width if self.console.is_terminal else None
            for line in fold(parts, width):
                self.console.print(line, highlight=False, soft_wrap=width is None)

    def _start(self, title: str, total: float | None) -> None:
        if not self._enabled or not self.console.is_terminal:
            return
        self.shown = Progress(
            TextColumn(title),
            # Only the bar may shrink: on a narrow terminal it matters least.
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            refresh_per_second=4,
            expand=True,
        )
        self.shown.add_task(title, total=total, metrics="")
        self.shown.start()

    def _stop(self) -> None:
        if self.shown is not None:
            self.shown.stop()
            self.shown = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        self.say(pl_module.about())
        steps = trainer.estimated_stepping_batches
        self._start("training", None if steps == float("inf") else steps)
        if self.shown is not None:
            self.shown.update(self.shown.task_ids[0], completed=trainer.global_step)
        self._began = self._said = time.perf_counter()
        self._said_step = trainer.global_step
        self._seen_step = pl_module.logged_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if pl_module.logged_step == self._seen_step:  # there is no new row
            return
        self._seen_step = pl_module.logged_step
        if self.shown is not None:
            # The loss alone, and the speed where it fits: the lines above say the rest.
            wide = self.console.width >= 90
            parts = phrases(pl_module.latest, "train")
            self.shown.update(
                self.shown.task_ids[0],
                completed=trainer.global_step,
                metrics="  ".join(parts[: None if wide else 1]),
            )
            return
        now = time.perf_counter()
        # Soon at first, and seldom in a long run.
        pause = min(max(10.0, (now - self._began) / 10), 300.0)
        loop = trainer.fit_loop
        fetcher = loop._data_fetcher
        # A validation that is due has its own line of this step.
        due = fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)
        if now - self._said > pause and pl_module.logged_step > self._said_step and not due:
            self._say_step(pl_module.logged_step, pl_module, "train")

    def _say_step(self, step: int, pl_module: LanguageModel, *splits: str) -> None:
        self._said, self._said_step = time.perf_counter(), step
        about = [f"step {step:>6}", f"{self._said - self._began:6.0f} s"]
        self.say(*about, *phrases(pl_module.latest, *splits))

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        if trainer.state.fn != "fit":
            self.say(*phrases(pl_module.latest, "validation"))
        elif not pl_module.cut_short and not trainer.sanity_checking:
            self._say_step(trainer.global_step, pl_module, "train", "validation")

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, LanguageModel)
        pl_module.finish_row()
        if trainer.global_step != self._said_step:
            self._say_step(trainer.global_step, pl_module, "train")
        self._stop()
        for checkpoint in trainer.checkpoint_callbacks:
            # A model may be best out of distribution long before the end: say both.
            for name, found in getattr(checkpoint, "reached", {}).items():
                if OUT_OF_DISTRIBUTION in found:
                    about = f"{name:<4} step {found['step']:>6.0f}"
                    self.say(about, *phrases(found, "validation"))

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self._stop()

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, LanguageModel)
        part = pl_module.task.test_part if pl_module.task else "test"
        self.say(*phrases(pl_module.latest, "test"), f"of the {part} part")


def fold(parts: Sequence[str], width: int | None) -> list[str]:
    """Parts separated by two blanks, folded to a width; further lines are indented."""
    lines = [""]
    for part in parts:
        line = f"{lines[-1]}  {part}" if lines[-1].strip() else lines[-1] + part
        if width is None or len(line) <= width or not lines[-1].strip():
            lines[-1] = line
        else:
            lines.append(f"    {part}")
    return lines


UNITS = {
    "loss": ("loss", "{:.4f}", 1.0),
    "perplexity": ("perplexity", "{:.3f}", 1.0),
    "bits_per_byte": ("bits/byte", "{:.4f}", 1.0),
    "token_accuracy": ("tokens", "{:.2f} %", 100.0),
    "exact_match": ("exact match", "{:.2f} %", 100.0),
    "accuracy": ("pairs", "{:.2f} %", 100.0),  # of answers, and from here on of preferences
    "reward": ("reward", "{:.3f}", 1.0),
    "kl": ("KL", "{:.3f}", 1.0),
    "length": ("length", "{:.2f}", 1.0),
    "tokens_per_second": ("", "{:,.0f} tokens/s", 1.0),
    "mfu": ("MFU", "{:.1f} %", 100.0),
}


def phrases(values: dict[str, float], *splits: str) -> list[str]:
    """Logged values as a person reads them: ``loss 0.0421``, ``validation loss 0.05``, ..."""
    parts = []
    for split in splits:
        for name, (title, pattern, scale) in UNITS.items():
            value = values.get(f"{split}/{name}")
            if value is not None:
                whose = "" if split == "train" else f"{split} "
                title = f"{whose}{title} " if title else ""
                parts.append(title + pattern.format(value * scale))
        for name, value in values.items():
            length = name.partition(f"{split}/exact_match/")[2]
            if length:
                parts.append(f"{length}: {value:.2%}")
    return parts
