"""Averages of the weights over the steps, by one flag."""

from __future__ import annotations

import warnings

import lightning
from lightning.pytorch.callbacks import EMAWeightAveraging


class AverageWeights(EMAWeightAveraging):
    """An exponential moving average of the weights: ``a <- decay a + (1 - decay) w`` every step.

    Lightning's, over parameters alone: buffers are copied, for most of them are constants, which
    rounding would move. What is validated, kept in checkpoints, and read from them is the average;
    a checkpoint holds what is trained as well, from which a resumed run continues.

    Args:
        decay: From 0 to below 1; it looks back some 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} must be from 0 to below 1, such as 0.999")
        super().__init__(use_buffers=False, decay=decay)

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        if getattr(pl_module, "device_mesh", None) is not None:
            raise ValueError(
                "--ema keeps a second model whole, and FSDP2 cuts it: take --trainer.strategy ddp"
            )
        with warnings.catch_warnings():  # about sharding, which is refused
            warnings.filterwarnings("ignore", ".*overrides the configure_model.*")
            super().setup(trainer, pl_module, stage)
