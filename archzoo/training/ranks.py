"""Sums over the ranks of a run: the processes that train one model together."""

from __future__ import annotations

from typing import TypeVar

import lightning
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from archzoo.block import Aux
from archzoo.decoder import Decoder

Tensors = TypeVar("Tensors")  # a tensor, or lists and dicts of them


def sum_over_ranks(trainer: lightning.Trainer, entries: Tensors) -> Tensors:
    """The sum of each tensor over the ranks: one reduction for all of one dtype.

    Args:
        trainer: Whose ranks.
        entries: A tensor, or lists and dicts of them: the same on every rank but for the numbers.
    """
    if trainer.world_size == 1:
        return entries
    tensors, structure = tree_flatten(entries)
    sums = dict.fromkeys(range(len(tensors)))
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in equal order
        alike = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[number].flatten() for number in alike])  # it works in place
        flat = trainer.strategy.reduce(flat, reduce_op="sum")
        for number, part in zip(
            alike, flat.split([tensors[number].numel() for number in alike]), strict=True
        ):
            sums[number] = part.view_as(tensors[number])
    summed: Tensors = tree_unflatten(sums.values(), structure)
    return summed


def pooled_losses(trainer: lightning.Trainer, decoder: Decoder, aux: list[Aux]) -> list[Aux]:
    """The losses of all ranks' tokens, from the sums that each rank returns as `Aux.pools`.

    Their value is the same everywhere. Gradients are averaged over ranks later on, so each rank's
    part of a sum is scaled for the mean to be the gradient of all tokens together.

    Args:
        trainer: Of the ranks.
        decoder: Whose feed-forwards say what their pools mean.
        aux: Of this rank, a layer each.
    """
    mine = [layer.pools for layer in aux]
    if not any(mine):
        return []
    ours = sum_over_ranks(trainer, tree_map(Tensor.detach, mine))
    ranks = trainer.world_size
    return decoder.pooled_losses(
        tree_map(lambda total, part: total + ranks * (part - part.detach()), ours, mine)
    )
