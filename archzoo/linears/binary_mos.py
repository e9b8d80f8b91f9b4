"""BinaryMoS: a matrix of signs whose scales each token mixes for itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from archzoo.kernels import one_bit
from archzoo.linears.binary import BinaryLinear, StraightThrough


class BinaryMoSLinear(BinaryLinear):
    """``y = ((x * (G S_in)) Sign(W)^T) * (G S_out) + b``, ``G = softmax(x R^T)``, of each block.

    The rows of S_in (n, i) and S_out (n, o) are n pairs of scales, which one router mixes, in
    float32 at least. All n start as the decomposition of the drawn W, see `svid`: then y is
    OneBit's without its norm for any R, and R gets no gradient until they have moved apart, which
    they do by R, which is drawn within 1 / sqrt(i). A block takes ``o i + 16 n (2 i + o)`` bits.

    Source: Jo et al., Mixture of Scales, arXiv 2406.12311, eq. 3 to 5, and the authors' code
    (6fe7530). There each of query, key and value is a matrix of its own; here each block is.

    Args:
        in_features: Width of x.
        blocks: Names and rows, as of `Linear`.
        scales: n, pairs of scales.
        straight_through: "clip", the paper's, or "tanh", OneBit's: see `BinaryLinear`.
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
        scales: int = 4,
        straight_through: StraightThrough = "clip",
        packed: bool = False,
        stack: int | None = None,
        bias: bool = False,
        residual_projection: bool = False,
    ) -> None:
        if isinstance(scales, bool) or not isinstance(scales, int) or scales < 1:
            raise ValueError(f"scales={scales!r} must be an integer of at least 1")
        self.scales = scales
        super().__init__(
            in_features,
            blocks,
            straight_through=straight_through,
            packed=packed,
            stack=stack,
            bias=bias,
            residual_projection=residual_projection,
        )

    def _add_scales(self, leading: tuple[int, ...]) -> None:
        shape = (*leading, len(self.blocks), self.scales, self.in_features)
        self.input_scales = nn.Parameter(torch.empty(shape))
        self.output_scales = nn.Parameter(torch.empty(*leading, self.scales, self.out_features))
        self.router = nn.Parameter(torch.empty(shape))

    @torch.no_grad()
    def _start_scales(self, after: Tensor, before: Tensor) -> None:
        self.output_scales.copy_(after[..., None, :].expand_as(self.output_scales))
        self.input_scales.copy_(before[..., None, :].expand_as(self.input_scales))
        bound = self.in_features**-0.5
        nn.init.uniform_(self.router, -bound, bound)

    def _pairs(self, index: int | None, block: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """A block's R, S_in and S_out."""
        before: Tensor = self.input_scales
        after: Tensor = self.output_scales
        router: Tensor = self.router
        if index is not None:
            before, after, router = before[index], after[index], router[index]
        return router[block], before[block], after[:, rows]

    def _scales(
        self, x: Tensor, index: int | None, block: int, rows: slice
    ) -> tuple[Tensor, Tensor]:
        return one_bit.mixed_scales(x, *self._pairs(index, block, rows))

    def _packed_product(
        self, x: Tensor, signs: Tensor, index: int | None, block: int, rows: slice
    ) -> Tensor:
        return one_bit.mixed_product(x, signs, *self._pairs(index, block, rows))

    def _mean_scales(self) -> tuple[Tensor, Tensor]:
        return self.output_scales.mean(dim=-2), self.input_scales.mean(dim=-2)

    def _scale(self) -> Tensor:
        return self.output_scales

    @property
    def is_one_matrix(self) -> bool:  # type: ignore[override]
        """Never: each token has a matrix of its own."""
        return False
