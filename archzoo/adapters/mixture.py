"""Mixtures of small adapters, blended for each token by a router of their own: MoV and MoLoRA.

The blend is soft: all experts' parameters are weighed and used as one adapter (Zadouri et al.,
Pushing Mixture of Experts to the Limit, arXiv 2309.05444, section 2). So each token has a change of
its own, which no single weight can hold: neither can be merged.

A router that collapses to one expert makes of a mixture what a single adapter is. `gate_entropies`
watches for it, and training logs what it sees of the first batch of each evaluation, in nats:
``validation/gate_entropy`` with its maximum, and of each layer ``validation/gate_entropy/LAYER``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.adapters import Adapter, Target
from archzoo.adapters.ia3 import scales_input
from archzoo.adapters.lora import check_rank, scale_of
from archzoo.low_rank import softmax_of
from archzoo.numerics import KeepsFloat32, cast, widest

if TYPE_CHECKING:
    from archzoo.decoder import Decoder

ROUTER_STD = 0.02  # of routers and of MoLoRA's A, in the authors' code


class SoftRouter(nn.Module):
    """``g = softmax(R x)`` over the experts, in float32 at least.

    With `top_k`, a softmax over the logits of the k largest alone: their gates sum to 1.

    Args:
        columns: Width of x.
        experts: How many.
        top_k: Experts of a token that are not given 0. None: all.

    Raises:
        ValueError: No expert, or a top_k that is not between 1 and their number.
    """

    def __init__(self, columns: int, experts: int, top_k: int | None = None) -> None:
        super().__init__()
        if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
            raise ValueError(f"experts={experts!r} must be an integer of at least 1")
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and experts={experts}")
        self.weight = nn.Parameter(torch.empty(experts, columns))  # R
        self.top_k = None if top_k == experts else top_k

    @property
    def most(self) -> float:
        """The largest entropy that its gates can have, in nats."""
        return math.log(self.top_k or len(self.weight))

    def reset_parameters(self) -> None:
        """R is Gaussian."""
        nn.init.normal_(self.weight, std=ROUTER_STD)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., columns) to gates (..., experts) that sum to 1."""
        weight = self.weight
        return softmax_of(F.linear(cast(x, weight.dtype), weight), self.top_k)


class MoV(KeepsFloat32, Adapter):
    """``y = z * sum_e g_e l_e``, g = softmax(R z): a mixture of (IA)^3's vectors.

    z is the tensor that (IA)^3 scales, and its router reads it: keys and values before rotation,
    each head's vector by itself (R, (experts, head_dim), is shared by the heads of a block, l is
    (heads, experts, head_dim)); on ``down`` its input. On other blocks, z is the whole output.
    l starts at 1 and R at N(0, 0.02^2), so nothing changes before the first step. A layer holds
    experts * (2 kv_dim + width) + experts * (2 head_dim + width) parameters. None decays, and l
    stays in float32, as (IA)^3's.

    With `top_k` the gates of the chosen experts sum to 1. In the authors' code they do not: the
    others' are set to 0 after the softmax, so that y is smaller than z from the start.

    It depends on the token, so it cannot be merged, nor be put on a router or on stacked experts,
    whose weights are read without a call.

    Source: Zadouri et al., arXiv 2309.05444, equations 1 to 3; heads as in the authors' code.

    Args:
        target: What it changes.
        targets: As for `archzoo.LoRA`. None: key, value and down, as in the paper, without that of
            stacked experts.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        experts: Vectors of each block.
        top_k: Experts of a token; the others' gates are 0. None: all, as in the paper.

    Raises:
        ValueError: No expert, or a top_k that is not between 1 and their number.
    """

    default_targets = ("key", "value", "down")
    float32_names = ("vectors",)

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        experts: int = 10,
        top_k: int | None = None,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        self.decays = False
        self.of_input = scales_input(target)
        rows, columns = target.shape
        self.heads = None if self.of_input else target.heads
        width = columns if self.of_input else rows // (self.heads or 1)
        self.router = SoftRouter(width, experts, top_k)
        heads = () if self.heads is None else (self.heads,)
        self.vectors = nn.Parameter(torch.empty(*heads, experts, width))  # l
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """L is 1, R Gaussian."""
        nn.init.ones_(self.vectors)
        self.router.reset_parameters()

    def input(self, x: Tensor) -> Tensor | None:
        """The change of ``down``'s input, (..., columns); None elsewhere."""
        return self.change(x) if self.of_input else None

    def output(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The change of any other block's y, (..., rows); None on ``down``."""
        return None if self.of_input else self.change(y)

    def change(self, z: Tensor) -> Tensor:
        """``z * sum_e g_e (l_e - 1)``, of z's shape (..., width)."""
        vectors = self.vectors - 1  # the gates sum to 1
        if self.heads is None:
            blend: Tensor = cast(self.router(z), vectors.dtype) @ vectors
            return z * blend
        each: Tensor = z.unflatten(-1, (self.heads, -1))
        gates = cast(self.router(each), vectors.dtype).flatten(0, -3)  # (tokens, heads, experts)
        # Head by head; einsum would say the same in three times the time of one token.
        blend = torch.bmm(gates.transpose(0, 1), vectors).transpose(0, 1)
        return (each * blend.view(each.shape)).flatten(-2)


class MoLoRA(Adapter):
    """``y = W x + (alpha / rank) sum_e g_e B_e (A_e x)``, g = softmax(R x): a mixture of LoRAs.

    The gates are multiplied in between A and B, where they cost least. A and R start at
    N(0, 0.02^2) and B at 0, so nothing changes before the first step. A block holds
    experts * (rank * (rows + columns) + columns) parameters.

    It depends on the token, so it cannot be merged, nor be put on a router or on stacked experts,
    whose weights are read without a call.

    Source: Zadouri et al., arXiv 2309.05444, section 2.2; scale and start as in the authors' code.

    Args:
        target: What it changes.
        targets: As for `archzoo.LoRA`. None: query and value.
        layers: Only in these blocks of the decoder, counted from 0. None: in all.
        experts: LoRAs of each block.
        rank: Of each; at most the block's rows or columns.
        alpha: Over rank, the scale of the change.
        top_k: Experts of a token; the others' gates are 0. None: all, as in the paper.

    Raises:
        ValueError: A rank below 1 or above the block's, an alpha of 0, no expert, or a top_k that
            is not between 1 and their number.
    """

    default_targets = ("query", "value")

    def __init__(
        self,
        target: Target,
        *,
        targets: list[str] | None = None,
        layers: list[int] | None = None,
        experts: int = 10,
        rank: int = 4,
        alpha: float = 16.0,
        top_k: int | None = None,
    ) -> None:
        super().__init__(target, targets=targets, layers=layers)
        check_rank(self, target, rank)
        rows, columns = target.shape
        self.router = SoftRouter(columns, experts, top_k)
        # So that each is one matrix of all experts without a copy.
        self.first = nn.Parameter(torch.empty(experts, rank, columns))  # A
        self.second = nn.Parameter(torch.empty(rows, experts, rank))  # B
        self.scale = scale_of(alpha, rank, rank_stabilised=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and R Gaussian, B zero."""
        nn.init.normal_(self.first, std=ROUTER_STD)
        nn.init.zeros_(self.second)
        self.router.reset_parameters()

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """``s sum_e g_e B_e (A_e x)``, (..., rows)."""
        first = self.first
        x = cast(x, first.dtype)  # which may be wider than the base's
        hidden: Tensor = F.linear(x, first.flatten(0, 1)).unflatten(-1, first.shape[:2])
        gates = cast(self.router(x) * self.scale, hidden.dtype)
        return F.linear((hidden * gates[..., None]).flatten(-2), self.second.flatten(1))

    def low_rank(self) -> tuple[Tensor, Tensor, float, Tensor, int | None] | None:
        """A and B of all experts, s, R and top_k; None while its router is watched."""
        if self.router._forward_hooks or type(self.router) is not SoftRouter:
            return None  # its call must be seen
        router = self.router
        first, second = self.first.flatten(0, 1), self.second.flatten(1)
        return first, second, self.scale, router.weight, router.top_k


# ---------------------------------------------------------------------------- watched


@contextmanager
def gate_entropies(decoder: Decoder) -> Iterator[dict[str, Tensor]]:
    """Within it, sums of ``-sum_e g_e log g_e`` over all tokens that a decoder's routers see.

    Nothing is recorded outside it, so that training computes what it computes. It watches calls
    that are not compiled.

    Args:
        decoder: Any; without routers of adapters nothing is watched.

    Yields:
        For each router, by its path: the sum of its entropies in nats, how many they are, and the
        most that one can be times that number, (3,). Padding is not counted.
    """
    sums: dict[str, Tensor] = {}
    handles: list[Any] = []
    valid: list[Tensor] = []

    def enters(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        valid[:] = [arguments[2].valid]

    def watcher(path: str) -> Any:
        def gives(router: SoftRouter, _: Any, gates: Tensor) -> None:
            with torch.no_grad():
                entropy = torch.special.entr(gates).sum(-1)
                counted = torch.ones_like(entropy)
                # A mixer that goes token by token says of each alone what it is.
                if valid and valid[0].shape == entropy.shape[:2]:
                    shape = (*valid[0].shape, *(1,) * (entropy.dim() - 2))
                    counted = counted * valid[0].view(shape)
                count = counted.sum()
                wide = widest(gates.device)
                found = torch.stack([(entropy * counted).sum(), count, router.most * count])
                sums[path] += found.to(wide)

        return gives

    try:
        handles += [block.register_forward_pre_hook(enters) for block in decoder.blocks]
        for path, module in decoder.named_modules():
            if isinstance(module, SoftRouter):
                device = module.weight.device
                sums[path] = torch.zeros(3, dtype=widest(device), device=device)
                handles.append(module.register_forward_hook(watcher(path)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
