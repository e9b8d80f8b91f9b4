"""Averages of the weights over the steps, by one flag."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class _InDtypesOf:
    """What `AveragedModel.update_parameters` reads of a model, its weights in its averages' dtypes.

    Args:
        averages: Of the same model.
        model: Whose weights are to be added to them.
    """

    def __init__(self, averages: nn.Module, model: nn.Module) -> None:
        self.averages, self.model = averages, model

    def parameters(self) -> Iterator[Tensor]:
        pairs = zip(self.averages.parameters(), self.model.parameters(), strict=True)
        return (weight.detach().to(average.dtype) for average, weight in pairs)

    def buffers(self) -> Iterator[Tensor]:
        return self.model.buffers()


class _Averages(AveragedModel):
    """Torch's, which may be wider than the weights.

    Averages are float32 where a run's weights may be another dtype. torch 2.11 groups both by dtype
    before it hands them on, and refuses such pairs; later ones do not.
    """

    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(_InDtypesOf(self.module, model))  # type: ignore[arg-type]


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
            torch._foreach_lerp_(averaged, weights, 1 - decay)

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
        if self._average_model is not None:  # Lightning makes it, and only of torch's own class
            self._average_model.__class__ = _Averages

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
