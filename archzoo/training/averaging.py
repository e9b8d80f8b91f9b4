"""Averages of the weights over the steps, by one flag."""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class AverageWeights(WeightAveraging):
    """An exponential moving average of the weights: ``a <- a + (1 - decay) (w - a)`` every step.

    Lightning's, over parameters alone: buffers are copied, for most of them are constants, which
    rounding would move. In this form a weight that stands still, as those beside adapters, is its
    own average bit for bit, which Lightning's sum of two products is not. What is validated, kept
    in checkpoints, and read from them is the average; a checkpoint holds what is trained as well,
    from which a resumed run continues.

    Args:
        decay: From 0 to below 1; it looks back some 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema={decay} must be from 0 to below 1, such as 0.999")

        def average(averaged: list[Tensor], weights: list[Tensor], _: Tensor | int) -> None:
            # A checkpoint's averages are float32 where a run's weights may be another dtype.
            alike = [w.to(a.dtype) for a, w in zip(averaged, weights, strict=True)]
            torch._foreach_lerp_(averaged, alike, 1 - decay)

        super().__init__(use_buffers=False, multi_avg_fn=average)

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

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Beside adapters a checkpoint leaves out the base, which the module has: as it is."""
        there = pl_module.state_dict()
        for held in ("state_dict", "current_model_state"):
            if held in checkpoint:
                checkpoint[held] = there | checkpoint[held]
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
