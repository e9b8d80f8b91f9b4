"""OneBit: a matrix of signs between two vectors of values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.kernels import one_bit
from archzoo.linears.binary import BinaryLinear, StraightThrough

EPS = 1e-5  # of the norm


class OneBitLinear(BinaryLinear):
    """``y = ((x * g) Sign(W)^T) * h + b``, of each block of rows.

    With `norm` the paper's layer norm, without weights and with eps 1e-5, follows h: over the rows
    of a block, before b. The scales start as the decomposition of the drawn W, see `svid`. A block
    of o rows takes ``o i + 16 (o + i)`` bits, where the scales take 16 each.

    Source: Xu et al., OneBit, arXiv 2402.11295, section 3.1, and the authors' code (42d6d7b). There
    each of query, key and value is a matrix of its own; here each block is.

    Args:
        in_features: Width of x.
        blocks: Names and rows, as of `Linear`.
        norm: Add the layer norm. y then does not depend on the size of h, which is the same for
            all rows at the start.
        straight_through: "tanh", the paper's, or "clip", BinaryMoS's: see `BinaryLinear`.
        packed: Keep the signs alone, 1 bit each: what `archzoo binarise --packed` writes.
        stack: As of `Linear`.
        bias: The same.
        residual_projection: The same.
    """

    def __init__(
        self,
        in_features: int,
        blocks: Mapping[str, int],
        *,
        norm: bool = False,
        straight_through: StraightThrough = "tanh",
        packed: bool = False,
        stack: int | None = None,
        bias: bool = False,
        residual_projection: bool = False,
    ) -> None:
        super().__init__(
            in_features,
            blocks,
            straight_through=straight_through,
            packed=packed,
            stack=stack,
            bias=bias,
            residual_projection=residual_projection,
        )
        self.norm = norm

    def _add_scales(self, leading: tuple[int, ...]) -> None:
        shape = (*leading, len(self.blocks), self.in_features)
        self.input_scale = nn.Parameter(torch.empty(shape))
        self.output_scale = nn.Parameter(torch.empty(*leading, self.out_features))

    @torch.no_grad()
    def _start_scales(self, after: Tensor, before: Tensor) -> None:
        self.output_scale.copy_(after)
        self.input_scale.copy_(before)

    def _scales(
        self, x: Tensor, index: int | None, block: int, rows: slice
    ) -> tuple[Tensor, Tensor]:
        before: Tensor = self.input_scale
        after: Tensor = self.output_scale
        if index is not None:
            before, after = before[index], after[index]
        return before[block], after[rows]

    def _mean_scales(self) -> tuple[Tensor, Tensor]:
        return self.output_scale, self.input_scale

    def _scale(self) -> Tensor:
        return self.output_scale

    @property
    def is_one_matrix(self) -> bool:  # type: ignore[override]
        """Unless a norm follows it, or it is packed."""
        return super().is_one_matrix and not self.norm

    def _finish(self, y: Tensor) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], eps=EPS) if self.norm else y

    def _packed_product(
        self, x: Tensor, signs: Tensor, index: int | None, block: int, rows: slice
    ) -> Tensor:
        before, after = self._scales(x, index, block, rows)
        return one_bit.product(x, signs, before, after, EPS if self.norm else None)
