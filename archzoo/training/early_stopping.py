"""Ending a run that no longer gets better, by one flag."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping

from archzoo.training.callbacks import Checkpoints
from archzoo.training.ending import say


class StopEarly(EarlyStopping):
    """Ends a run when the metric of best.ckpt has not improved for some validations in a row.

    Lightning's callback. Which metric it is, and which values are better, is `checkpoint.monitor`
    and `checkpoint.mode`.

    Args:
        patience: So many validations.
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"early_stopping={patience} must be at least 1 validation")
        super().__init__(
            monitor="validation/loss",
            patience=patience,
            check_finite=False,  # a loss that is not finite ends the run anyway
            check_on_train_epoch_end=False,
        )

    @property
    def state_key(self) -> str:
        """Without the metric, which is not known before the first validation."""
        return type(self).__qualname__

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})  # today's

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
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
        if self.wait_count >= self.patience:
            say(
                f"the run had ended early: --early_stopping {self.patience}; a larger one, or none "
                "(null), trains on"
            )
            trainer.should_stop = True

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if getattr(pl_module, "cut_short", False) or self._should_skip_check(trainer):
            return
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoints)]
        self.monitor, self.mode = (checkpoints or [Checkpoints()])[0].monitored(trainer)
        if not self.best_score.isfinite():  # none yet
            worst = torch.inf if self.mode == "min" else -torch.inf
            self.best_score = torch.tensor(worst)
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop and self.wait_count >= self.patience:
            say(
                f"ended early: {self.monitor} was best at {self.best_score:.4f}, "
                f"{self.wait_count} validations ago"
            )
