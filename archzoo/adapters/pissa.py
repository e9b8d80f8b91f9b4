"""PiSSA: LoRA that starts from the weight's leading singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter, Target
from archzoo.adapters.lora import check_rank, scale_of, times
from archzoo.numerics import at_least_float32


class PiSSA(Adapter):
    """``y = W x + s (B A - B0 A0) x``: A and B start at A0 and B0, the principal part of W.

    With ``W = U S V^T``, ``B0 = U_r sqrt(S_r / s)`` and ``A0 = sqrt(S_r / s) V_r^T`` of the rank
    largest singular values, by an exact decomposition. So both have a gradient at the first step.
    The authors train B A beside a frozen residual ``W - s B0 A0`` that replaces W; here W stays
    whole and the buffers ``first_start`` and ``second_start`` hold A0 and B0, which trains the same
    and can be switched off, removed and put on the same base again. They are saved with A and B:
    another decomposition could turn the signs, or more where singular values are equal, and what
    was learned would fit no longer. `archzoo.conversion.low_rank.to_lora` makes LoRAs of twice the
    rank, which need them no more.

    Weight decay would pull the pretrained part of W to 0 instead of the change, so A and B do not
    decay. Dropout would drop that part, too: there is none.

    Parameters: rank * (rows + columns) for a block; buffers: as many.

    Source: Meng et al., arXiv 2404.02948, equations 2 to 4 (section 3).

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        rank: Of the principal part; at most the block's rows or columns.
        alpha: Over rank, the scale s of what is learned, above 0. None: rank, as the authors', so
            that the scale is 1.
        rank_stabilised: Scale by alpha / sqrt(rank) instead of alpha / rank.

    Raises:
        ValueError: A rank below 1 or above the block's, or an alpha that is not above 0.
    """

    kinds = ("linear", "experts")
    default_targets = ("query", "value")
    mergeable = True
    #: Of weights, by `archzoo.training.optim.decay_groups`.
    decays = False

    first_start: Tensor
    second_start: Tensor

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        rank: int = 8,
        alpha: float | None = None,
        rank_stabilised: bool = False,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        check_rank(self, target, rank)
        alpha = rank if alpha is None else alpha
        if alpha < 0:
            raise ValueError(f"PiSSA: alpha={alpha} must be above 0: A0 and B0 divide by its root")
        self.scale = scale_of(alpha, rank, rank_stabilised)
        *stack, rows, columns = target.shape
        self.first = nn.Parameter(torch.empty(*stack, rank, columns))  # A
        self.second = nn.Parameter(torch.empty(*stack, rows, rank))  # B
        self.register_buffer("first_start", torch.empty_like(self.first.data))  # A0
        self.register_buffer("second_start", torch.empty_like(self.second.data))  # B0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, for what they start from is the weight: `start` gives it."""
        for tensor in (self.first, self.second, self.first_start, self.second_start):
            nn.init.zeros_(tensor)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """A, A0 and B, B0 from the principal part of the weight, or of each of a stack's."""
        rank = self.first.shape[-2]
        wide = weight.to(at_least_float32(weight.dtype))
        left, values, right = torch.linalg.svd(wide, full_matrices=False)
        root = (values[..., :rank] / self.scale).sqrt()
        self.first.copy_(root[..., None] * right[..., :rank, :])
        self.second.copy_(left[..., :rank] * root[..., None, :])
        self.first_start.copy_(self.first)
        self.second_start.copy_(self.second)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change ``B A - B0 A0`` as ``[B, B - B0] [A - A0; A0]``.

        It is 0 at the start to the last bit, and loses nothing to the difference of two products.

        Returns:
            ``[A - A0; A0]`` (2 rank, columns) and ``[B, B - B0]`` (rows, 2 rank), of each of a
            stack.
        """
        first = torch.cat([self.first - self.first_start, self.first_start], dim=-2)
        second = torch.cat([self.second, self.second - self.second_start], dim=-1)
        return first, second

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """Both factors and s."""
        return *self.factors(), self.scale

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """``s (B A - B0 A0) x``, (..., rows); of a stack (experts, rows of x, rows)."""
        first, second = self.factors()
        return times(times(x.to(first.dtype), first) * self.scale, second)

    def delta(self, weight: Tensor) -> Tensor:
        """``s (B A - B0 A0)``, of the weight's shape."""
        first, second = self.factors()
        return second @ first * self.scale
