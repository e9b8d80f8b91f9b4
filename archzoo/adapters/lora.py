"""LoRA: a change of low rank beside each weight, and what its relatives share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.adapters import Adapter, Target


def check_rank(adapter: Adapter, target: Target, rank: int) -> None:
    """Refuse a rank that the target's matrix, or each matrix of its stack, cannot have.

    Args:
        adapter: Whose rank it is.
        target: What the adapter changes.
        rank: Of the change.

    Raises:
        ValueError: It is no integer, below 1, or above the smaller of rows and columns.
    """
    rows, columns = target.shape[-2:]
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"{type(adapter).__name__}: rank={rank!r} must be an integer")
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"{type(adapter).__name__}: rank={rank} must be at least 1 and at most "
            f"{min(rows, columns)} for {target.path}, of {rows} rows and {columns} columns: take "
            f"{'a lower one, or remove it from targets' if rank > 0 else 'a higher one'}"
        )


def scale_of(alpha: float, rank: int, rank_stabilised: bool) -> float:
    """``alpha / rank``, or ``alpha / sqrt(rank)``.

    Args:
        alpha: Any number but 0.
        rank: Of the change.
        rank_stabilised: Divide by the root.

    Raises:
        ValueError: It is 0 or not finite: nothing would ever change.
    """
    if not alpha or not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha} must be a number other than 0: it scales the change")
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x M^T`` of one matrix, or of each of a stack."""
    return F.linear(x, matrix) if matrix.dim() == 2 else x @ matrix.mT


class LoRA(Adapter):
    """``y = W x + s B (A x)``, s = alpha / rank, A (rank, columns), B (rows, rank), of each block.

    A starts uniform within 1 / sqrt(columns), as the authors' code has it (the paper says
    Gaussian), and B at 0, so nothing changes before the first step, at which A's gradient is 0.
    Each target block has an A of its own: ``query`` and ``value`` of one matrix cost
    rank * (2 columns + rows of both). Each expert has its own A and B.

    Parameters: rank * (rows + columns) for a block.

    Source: Hu et al., arXiv 2106.09685, section 4.1; scale by 1 / sqrt(rank): Kalajdzievski,
    arXiv 2312.03732, section 3.

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value, as in the paper.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        rank: Of the change; at most the block's rows or columns.
        alpha: Over rank, the scale of the change.
        dropout: Of x, where the change is added to y; where a weight is read there is no x, so an
            adapted router or expert has none.
        rank_stabilised: Scale by alpha / sqrt(rank) instead of alpha / rank.

    Raises:
        ValueError: A rank below 1 or above the block's, an alpha of 0, or dropout outside [0, 1).
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
        check_rank(self, target, rank)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        *stack, rows, columns = target.shape
        self.first = nn.Parameter(torch.empty(*stack, rank, columns))  # A
        self.second = nn.Parameter(torch.empty(*stack, rows, rank))  # B
        self.scale = scale_of(alpha, rank, rank_stabilised)
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform within 1 / sqrt(columns), B zero."""
        bound = self.first.shape[-1] ** -0.5
        nn.init.uniform_(self.first, -bound, bound)
        nn.init.zeros_(self.second)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the change ``s B A``."""
        return self.first, self.second

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and s; None while it drops some of x."""
        if self.dropout and self.training:
            return None
        return *self.factors(), self.scale

    def dropped(self, x: Tensor) -> Tensor:
        """X in the dtype of A, which may be wider than the base's, with dropout while it trains."""
        x = x.to(self.first.dtype)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def output(self, x: Tensor, y: Tensor) -> Tensor | None:
        """``s B (A x)``, (..., rows); of a stack (experts, rows of x, rows)."""
        # Scaled where it is smallest: y has many times as many numbers.
        return times(times(self.dropped(x), self.first) * self.scale, self.second)

    def delta(self, weight: Tensor) -> Tensor:
        """``s B A``, of the weight's shape."""
        return self.change()

    def change(self) -> Tensor:
        """``s B A``."""
        first, second = self.factors()
        return second @ first * self.scale
