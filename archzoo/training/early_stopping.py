"""Ending a run that no longer gets better, or that is good enough, by a flag each."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping

from archzoo.training.callbacks import UNITS, Checkpoints
from archzoo.training.ending import say

# Metrics that are shares of what is asked, from 0 to 1: those that are shown in per cent.
SHARES = [name for name, (_, _, scale) in UNITS.items() if scale == 100.0]


def check_threshold(threshold: float, monitor: str, mode: str) -> None:
    """Refuse a threshold that a metric cannot reach, or has reached before it is trained.

    Args:
        threshold: As it is given.
        monitor: The metric's name, such as validation/exact_match.
        mode: "min" or "max": which values are better.

    Raises:
        ValueError: It does not go with the metric or its mode.
    """
    about = f"--stopping_threshold {threshold}"
    if not math.isfinite(threshold):
        raise ValueError(f"{about} must be a number")
    if not any(share in monitor.split("/") for share in SHARES):
        return
    if mode == "min":
        raise ValueError(f"{about}: {monitor} is better the higher: --checkpoint.mode max")
    if not 0 < threshold <= 1:
        raise ValueError(f"{about}: {monitor} is a share, from 0 to 1: 99 % is 0.99")


class StopEarly(EarlyStopping):
    """Ends a run that no longer gets better, or that is good enough.

    Lightning's callback. Its metric is that of best.ckpt: `checkpoint.monitor`, and
    `checkpoint.mode` says which values are better. Unlike Lightning's, a threshold is reached by a
    value that equals it, and that value counts as others do where the run is resumed.

    Args:
        patience: So many validations in a row without a better value end the run; None: none do.
        threshold: A value as good as this ends the run at once; None: none does.
    """

    def __init__(self, patience: int | None = None, threshold: float | None = None) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"early_stopping={patience} must be at least 1 validation")
        self.threshold = threshold
        super().__init__(
            monitor="validation/loss",
            patience=sys.maxsize if patience is None else patience,
            check_finite=False,  # a loss that is not finite ends the run anyway
            check_on_train_epoch_end=False,
        )

    @property
    def state_key(self) -> str:
        """Without the metric, which is not known before the first validation."""
        return type(self).__qualname__

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not trainer.global_step:  # else an earlier run's
            self.wait_count, self.stopped_epoch = 0, 0
            self.best_score = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})  # today's

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._check_validations(trainer)
        checkpoints = _checkpoints(trainer)
        if self.threshold is not None:
            check_threshold(
                self.threshold, checkpoints.monitor or "validation/loss", checkpoints.mode
            )
        last = checkpoints.reached.get("last", {})
        if self.wait_count >= self.patience:
            say(
                f"the run had ended early: --early_stopping {self.patience}; a larger one, or none "
                "(null), trains on"
            )
            trainer.should_stop = True
        elif self.threshold is not None and last.get("step") == trainer.global_step:
            monitor, mode = checkpoints.monitored(last)
            if _reaches(last[monitor], self.threshold, mode):
                say(
                    f"the run had ended: {monitor} was {last[monitor]:.4f}, and "
                    f"--stopping_threshold is {self.threshold}; another, or none (null), trains on"
                )
                trainer.should_stop = True

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if getattr(pl_module, "cut_short", False) or self._should_skip_check(trainer):
            return
        self.monitor, self.mode = _checkpoints(trainer).monitored(trainer.callback_metrics)
        if self.threshold is not None:
            check_threshold(self.threshold, self.monitor, self.mode)
        if not self.best_score.isfinite():  # none yet
            worst = torch.inf if self.mode == "min" else -torch.inf
            self.best_score = torch.tensor(worst)
        super().on_validation_end(trainer, pl_module)
        value = float(trainer.callback_metrics[self.monitor])
        if self.threshold is not None and trainer.strategy.reduce_boolean_decision(
            _reaches(value, self.threshold, self.mode), all=False
        ):
            trainer.should_stop = True
            say(
                f"ended after {trainer.global_step} steps: {self.monitor} is {value:.4f}, and "
                f"--stopping_threshold {self.threshold}"
            )
        elif trainer.should_stop and self.wait_count >= self.patience:
            say(
                f"ended early: {self.monitor} was best at {self.best_score:.4f}, "
                f"{self.wait_count} validations ago"
            )

    def _check_validations(self, trainer: lightning.Trainer) -> None:
        """Refuse to count validations where there are none; a threshold is then not looked at.

        For the run has an end without one, and fewer steps are a way to try a configuration out.
        """
        if self.patience == sys.maxsize:
            return
        batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if not trainer.enable_validation:
            raise ValueError(
                f"--early_stopping {self.patience} counts validations, and there are none: see "
                "trainer.limit_val_batches"
            )
        every: Any = trainer.val_check_batch
        if trainer.check_val_every_n_epoch is None and every > batches:
            raise ValueError(
                f"--early_stopping {self.patience} counts validations, and the first would come "
                f"after {every} batches of {batches:.0f}: a lower --trainer.val_check_interval"
            )


def _checkpoints(trainer: lightning.Trainer) -> Checkpoints:
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
    return (found or [Checkpoints()])[0]


def _reaches(value: float, threshold: float, mode: str) -> bool:
    """Of float32, as metrics are; nan reaches nothing."""
    mine, asked = torch.tensor([value, threshold], dtype=torch.float32).tolist()
    return bool(mine <= asked if mode == "min" else mine >= asked)
