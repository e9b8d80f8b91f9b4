"""MoSLoRA: LoRA with a matrix between A and B that mixes the subspaces."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from archzoo.adapters import Target
from archzoo.adapters.lora import LoRA, times


class MoSLoRA(LoRA):
    """``y = W x + s B M (A x)``, s = alpha / rank, M (rank, rank) the mixer, learned as well.

    It can say what LoRA can, for M may be taken into A; it moves differently. With M = I and kept
    there it is LoRA.

    A starts uniform within 1 / sqrt(columns), B at 0, and M uniform within 1 / sqrt(rank)
    (Kaiming's, with the slope sqrt(5) that `nn.Linear` has) or orthogonal. With B = 0 no M that is
    0 could start: neither would ever get a gradient. At the first step B alone gets one.

    Parameters: rank * (rows + columns) + rank^2 for a block.

    Source: Wu et al., arXiv 2406.11909, equation 7; the start of M: section 4 and the authors'
    code.

    Args:
        target: What it changes.
        targets: Names of blocks, or regular expressions that match a whole path such as
            ``blocks.0.mixer.query_key_value.query``. None: query and value.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        rank: Of the change; at most the block's rows or columns.
        alpha: Over rank, the scale of the change.
        dropout: Of x, as LoRA's.
        rank_stabilised: Scale by alpha / sqrt(rank) instead of alpha / rank.
        mixer_init: How the mixer starts: "kaiming" or "orthogonal".

    Raises:
        ValueError: What LoRA refuses, or another start of the mixer.
    """

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
        mixer_init: Literal["kaiming", "orthogonal"] = "kaiming",
    ) -> None:
        super().__init__(
            target,
            targets=targets,
            layers=layers,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rank_stabilised=rank_stabilised,
        )
        if mixer_init not in ("kaiming", "orthogonal"):
            raise ValueError(
                f"MoSLoRA: mixer_init={mixer_init!r} is neither kaiming nor orthogonal; with a "
                "mixer of 0 nothing would ever move, and with the identity kept it is LoRA"
            )
        self.mixer_init = mixer_init
        self.mixer = nn.Parameter(torch.empty(*target.shape[:-2], rank, rank))  # M
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B as LoRA's, M by `mixer_init`; each expert's matrices are drawn by themselves."""
        super().reset_parameters()
        if not hasattr(self, "mixer"):  # LoRA's constructor draws before it is there
            return
        rank = self.mixer.shape[-1]
        if self.mixer_init == "kaiming":
            nn.init.uniform_(self.mixer, -(rank**-0.5), rank**-0.5)
        else:
            for mixer in self.mixer.view(-1, rank, rank).unbind():
                nn.init.orthogonal_(mixer)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """``s B M (A x)``, (..., rows); of a stack (experts, rows of x, rows)."""
        mixed = times(times(self.dropped(x), self.first), self.mixer)
        return times(mixed * self.scale, self.second)

    low_rank = LoRA.low_rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """M A and B of the change ``s B M A``."""
        return self.mixer @ self.first, self.second
