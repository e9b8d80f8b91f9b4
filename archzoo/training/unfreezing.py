"""Gradual unfreezing: layer by layer over the steps (Howard and Ruder, arXiv 1801.06146, 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import BaseFinetuning

from archzoo.training.comparison import learned_count
from archzoo.training.ending import say

if TYPE_CHECKING:
    from archzoo.training.module import LanguageModel


class LayerByLayer(BaseFinetuning):
    """Unfreezes a `LanguageModel` by its `Freezing`, at optimizer steps instead of epochs.

    What is trained follows from the step, so there is nothing to save. The optimizer has the groups
    of all that is ever trained from the start, and state only of what has had a gradient: so the
    schedule of the learning rate and a checkpoint in the middle know each group at all times.
    Lightning's own way, a new group for each module, is known to neither; it also takes parameters
    of equal values, such as norms at their start, for one.
    """

    _stage: int | None = None  # what the model was last told

    def freeze_before_training(self, pl_module: Any) -> None:
        self._stage = None

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        """Unfreeze what the step says.

        Args:
            pl_module: A `LanguageModel`.
            epoch: The optimizer steps that it has taken.
            optimizer: Which knows all parameters already.
        """
        module: LanguageModel = pl_module
        assert module.freezing is not None
        stage = module.freezing.stage_at(epoch)
        if stage == self._stage:
            return
        module.freezing.apply(module.net, stage)
        if stage:
            learned, count = learned_count(module.net), module.net.parameter_count()
            say(f"step {epoch}: {learned:,} of {count:,} parameters learn: {learned / count:.1%}")
        self._stage = stage

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Nothing: epochs do not count."""

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        module: Any = pl_module
        self.finetune_function(module, module.steps_taken, trainer.optimizers[0])

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Refuse what cuts parameters up when it is made, and would not see them unfrozen."""
        if getattr(pl_module, "sharded", False):
            raise ValueError(
                "unfreeze_every: sharded weights cannot be unfrozen on the way: take strategy ddp"
            )

    def state_dict(self) -> dict[str, Any]:
        return {}
