"""LoRA: a change of low rank beside each weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.adapters import Adapter, Target


class LoRA(Adapter):
    """``y = W x + (alpha / rank) B (A x)``, A (rank, columns), B (rows, rank), of each block alone.

    A starts uniform within 1 / sqrt(columns), as the authors' code has it (the paper says
    Gaussian), and B at 0, so nothing changes before the first step. Each target block has an A of
    its own: ``query`` and ``value`` of one matrix cost rank * (2 columns + rows of both). Each
    expert has its own A and B.

    Source: Hu et al., arXiv 2106.09685, section 4.1; scale by 1 / sqrt(rank): Kalajdzievski,
    arXiv 2312.03732, section 3.

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value, as in the paper.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        rank: Of the change.
        alpha: Over rank, the scale of the change.
        dropout: Of x, where the change is added to y; where a weight is read there is no x, so an
            adapted router or expert has none.
        rank_stabilised: Scale by alpha / sqrt(rank) instead of alpha / rank.

    Raises:
        ValueError: A rank below 1, or dropout outside [0, 1).
    """

    kinds = ("linear", "experts")
    default_targets = ("query", "value")
    mergeable = True

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rank_stabilised: bool = False,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        *stack, rows, columns = target.shape
        self.first = nn.Parameter(torch.empty(*stack, rank, columns))  # A
        self.second = nn.Parameter(torch.empty(*stack, rows, rank))  # B
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform within 1 / sqrt(columns), B zero."""
        bound = self.first.shape[-1] ** -0.5
        nn.init.uniform_(self.first, -bound, bound)
        nn.init.zeros_(self.second)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """``s B (A x)``, (..., rows); of a stack (experts, rows of x, rows)."""
        x = x.to(self.first.dtype)  # which may be wider than the base's
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if self.first.dim() == 2:
            return F.linear(F.linear(x, self.first), self.second) * self.scale
        return x @ self.first.mT @ self.second.mT * self.scale

    def delta(self, weight: Tensor) -> Tensor:
        """``s B A``, of the weight's shape."""
        return self.second @ self.first * self.scale
