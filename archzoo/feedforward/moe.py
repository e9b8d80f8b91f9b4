"""Mixture of experts: a router sends each token to few of many feed-forwards.

Three steps, each a module of its own: the router decides (routers.py), the experts compute (here),
the balance watches the load (balance.py). Nothing is dropped unless `drop` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Aux, FeedForward, Router
from archzoo.derivatives import exporting, transformed
from archzoo.documents import Context
from archzoo.feedforward.balance import Balance, within_capacity
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.freezing import is_frozen
from archzoo.kernels.experts import (
    cast_weight,
    collect_rows,
    loop_experts,
    make_dispatch,
    multiply,
    spread_rows,
)
from archzoo.kernels.launching import fused
from archzoo.kernels.swiglu import swiglu, swiglu_plainly
from archzoo.linear import Linear
from archzoo.numerics import product_dtype
from archzoo.parts import Part, build, describe

RouterFactory = Callable[[int, int, int], Router]

BACKENDS = ("loop", "grouped", "gather", "dense")
# Weights that `gather` may copy. On a CPU 2^17 is about where a loop over the experts in use gets
# faster; on an H200 grouped products are as fast from 2^26 on.
COPIED = {"cpu": 2**17}
COPIED_ELSEWHERE = 2**26


# ---------------------------------------------------------------------------- experts


class Matrices(NamedTuple):
    """All experts' weights, in the dtype that a layer computes in and as they are stored.

    Attributes:
        gate_up: (experts, 2 width, dim), cast.
        down: (experts, dim, width), cast.
        stored: The two before the cast: the products' gradients go there.
    """

    gate_up: Tensor
    down: Tensor
    stored: tuple[Tensor, Tensor]


class Experts(nn.Module):
    """SwiGLU experts side by side: ``E_e(x) = (silu(x Wg_e) * (x Wu_e)) Wd_e``.

    Where a Linear of theirs is more than a matrix (`Linear.is_one_matrix`), each expert is called
    with its tokens. Else four ways compute the same thing:

    * loop: one expert after the other. The reference implementation: any dtype, any size.
    * grouped: `torch.nn.functional.grouped_mm`, all experts in one product.
    * gather: each assignment with a copy of its expert's weights; for a few tokens.
    * dense: every expert for every token, the others at weight 0; no choice decides what is
      computed, so that `torch.func.vmap` can run over it.

    Args:
        dim: Width of x.
        width: Hidden width of each expert; each holds 3 * dim * width parameters.
        experts: How many.
    """

    def __init__(self, dim: int, width: int, experts: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, {"gate": width, "up": width}, stack=experts)
        self.down = Linear(width, {"down": dim}, stack=experts, residual_projection=True)
        self.dim, self.width, self.experts = dim, width, experts

    def choose_backend(self, assignments: int, dtype: torch.dtype, device: torch.device) -> str:
        """The backend that runs when none is given, chosen by sizes, dtype and device.

        Args:
            assignments: tokens * k.
            dtype: The products are computed in.
            device: Where.
        """
        if transformed():
            return "dense"
        # What is exported runs for any length.
        if not (torch.is_grad_enabled() or exporting()):
            copied = 3 * assignments * self.dim * self.width
            if copied <= COPIED.get(device.type, COPIED_ELSEWHERE):
                return "gather"
        if self.can_be_grouped(dtype):
            return "grouped"
        eager_on_gpu = device.type == "cuda" and not torch.compiler.is_compiling()
        if eager_on_gpu and torch.cuda.is_current_stream_capturing():  # no compiler follows this
            return "dense"  # which does not ask the device how many rows each expert has
        return "loop"

    def can_be_grouped(self, dtype: torch.dtype) -> bool:
        """Whether all experts are one kernel in training, which no host waits for.

        In bfloat16 grouped products are, and rows of a multiple of 16 bytes are what they take; in
        other dtypes torch itself makes a loop of them.

        Args:
            dtype: The products are computed in.
        """
        return dtype == torch.bfloat16 and self.dim % 8 == 0 and self.width % 8 == 0

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        backend: str | None = None,
        kept: Tensor | None = None,
        matrices: Matrices | None = None,
    ) -> Tensor:
        """``y_t = sum_j w_tj E_(i_tj)(x_t)``, the sum in the weights' dtype.

        Args:
            x: (tokens, dim).
            weights: (tokens, k), float32 at least.
            indices: (tokens, k) int64.
            backend: "loop", "grouped", "gather" or "dense"; None: `choose_backend`.
            kept: (tokens, k) bool: what is not dropped; None: nothing is. A dropped assignment
                adds nothing and, but for "gather" and "dense", is not computed.
            matrices: What `matrices` gave for x; None: it is called here.

        Returns:
            (tokens, dim) in x's dtype.
        """
        matrices = matrices or self.matrices(x)
        if matrices is None:
            return self.called(x, weights, indices, kept)
        gate_up, down, _ = matrices
        dtype, k = gate_up.dtype, indices.shape[1]
        backend = backend or self.choose_backend(indices.numel(), dtype, x.device)
        if backend not in BACKENDS:
            raise ValueError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
        if backend in ("gather", "dense") and kept is not None:
            weights = weights * kept
        if backend == "dense":
            return self.dense(x.to(dtype), weights, gate_up, down, indices).to(x.dtype)
        if backend == "gather":
            y = self.gather(x.to(dtype), gate_up, down, indices)
            return (y * weights[:, :, None]).sum(dim=1).to(x.dtype)
        dispatch = make_dispatch(indices, self.experts, kept, kernels=fused(x, self.dim))
        rows = spread_rows(x, dispatch, k, dtype)
        if backend == "grouped":
            rows = self.grouped(rows, matrices, dispatch.ends)
        else:
            rows = self.loop(rows, gate_up, down, dispatch.ends)
        return collect_rows(rows, weights, dispatch).to(x.dtype)

    def matrices(self, x: Tensor) -> Matrices | None:
        """All experts' weights in the dtype that x is computed in; None: they say not all.

        Autocast does not know grouped products, so all is cast here, once for every backend.
        """
        if not (self.gate_up.is_one_matrix and self.down.is_one_matrix):
            return None
        dtype = product_dtype(x)
        stored = (self.gate_up.effective_weight(), self.down.effective_weight())
        return Matrices(cast_weight(stored[0], dtype), cast_weight(stored[1], dtype), stored)

    def called(
        self, x: Tensor, weights: Tensor, indices: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """`forward` by a call of each expert, with its tokens alone.

        Args:
            x: (tokens, dim).
            weights: (tokens, k).
            indices: (tokens, k) int64.
            kept: (tokens, k) bool, or None.
        """
        changes = (self.gate_up.weight_change(), self.down.weight_change())

        def expert(rows: Tensor, index: int) -> Tensor:
            hidden = swiglu_plainly(self.gate_up.member(rows, index, changes[0]))
            return self.down.member(hidden, index, changes[1])

        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if transformed() or exporting() or capturing:  # nothing may ask for an expert's tokens
            if kept is not None:
                weights = weights * kept
            chosen = indices[:, :, None] == torch.arange(self.experts, device=x.device)
            gates = (weights[:, :, None] * chosen).sum(dim=1).to(x.dtype)  # (tokens, experts)
            each = torch.stack([expert(x, index) for index in range(self.experts)], dim=1)
            return (each * gates[:, :, None]).sum(dim=1).to(x.dtype)
        dispatch = make_dispatch(indices, self.experts, kept, kernels=fused(x, self.dim))
        rows = spread_rows(x, dispatch, indices.shape[1], x.dtype)
        sizes = dispatch.ends.diff(prepend=dispatch.ends.new_zeros(1)).tolist()
        rest = len(rows) - sum(sizes)
        parts = rows.split([*sizes, rest])[:-1]
        # In training one without tokens is called too, for its gradient of zeros.
        all_of_them = torch.is_grad_enabled()
        found = [expert(p, e) for e, p in enumerate(parts) if len(p) or all_of_them]
        spare = found[0].new_zeros(rest, self.dim) if found else rows.new_zeros(rest, self.dim)
        return collect_rows(torch.cat([*found, spare]), weights, dispatch).to(x.dtype)

    @staticmethod
    def gather(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor) -> Tensor:
        """X (tokens, dim) to (tokens, k, dim).

        Args:
            x: (tokens, dim).
            gate_up: (experts, 2 width, dim).
            down: (experts, dim, width).
            indices: (tokens, k) int64, the chosen experts.
        """
        hidden = torch.einsum("td,tkhd->tkh", x, gate_up[indices])
        hidden = swiglu(hidden.flatten(0, 1)).view(*indices.shape, down.shape[-1])
        return torch.einsum("tkh,tkdh->tkd", hidden, down[indices])

    @staticmethod
    def dense(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor) -> Tensor:
        """X (tokens, dim) to the weighted sum over experts, of the same shape.

        Args:
            x: (tokens, dim).
            weights: (tokens, k), of the chosen experts.
            gate_up: (experts, 2 width, dim).
            down: (experts, dim, width).
            indices: (tokens, k) int64, the chosen experts.
        """
        chosen = indices[:, :, None] == torch.arange(len(down), device=indices.device)
        gates = (weights[:, :, None] * chosen).sum(dim=1)  # (tokens, experts)
        hidden = torch.einsum("td,ehd->eth", x, gate_up)
        hidden = swiglu(hidden.flatten(0, 1)).view(len(down), len(x), down.shape[-1])
        return torch.einsum("eth,edh,te->td", hidden, down, gates.to(x.dtype))

    @staticmethod
    def loop(rows: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        """Rows (assignments, dim) sorted by expert, to the same; later rows are not computed.

        Args:
            rows: (assignments, dim), sorted by expert.
            gate_up: (experts, 2 width, dim).
            down: (experts, dim, width).
            ends: (experts,) int64, the row after each expert's last.
        """
        if torch.compiler.is_compiling():
            return loop_experts(rows, gate_up, down, ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        rest = len(rows) - sum(sizes)
        # An expert without rows still gets a gradient, of zeros, as ranks that reduce theirs
        # together need: from unbind, which also avoids the tensor of all experts that indexing
        # would fill for each in its backward pass.
        parts = rows.split([*sizes, rest])[:-1]
        experts = zip(parts, gate_up.unbind(), down.unbind(), strict=True)
        none = not any(sizes)  # then all take part, with nothing
        results = [F.linear(swiglu(F.linear(x, a)), b) for x, a, b in experts if len(x) or none]
        return torch.cat([*results, rows.new_zeros(rest, rows.shape[1])])

    @staticmethod
    def grouped(rows: Tensor, matrices: Matrices, ends: Tensor) -> Tensor:
        """Rows (assignments, dim) sorted by expert, to the same; later rows are not computed.

        Args:
            rows: (assignments, dim), sorted by expert.
            matrices: Of all experts.
            ends: (experts,) int64, the row after each expert's last.
        """
        hidden = swiglu(multiply(rows, matrices.gate_up, matrices.stored[0], ends))
        return multiply(hidden, matrices.down, matrices.stored[1], ends)

    @torch.no_grad()
    def similarity(self) -> Tensor:
        """The mean cosine between the weights of two experts, a scalar: 1 for copies.

        Source: Skywork-MoE, arXiv 2406.06563, which watches it after upcycling.
        """
        stored = (self.gate_up.effective_weight(), self.down.effective_weight())
        flat = torch.cat([weight.flatten(1) for weight in stored], dim=1)
        dtype = torch.promote_types(flat.dtype, torch.float32)
        unit = F.normalize(flat.to(dtype), dim=1)
        cosines = unit @ unit.T
        pairs = self.experts * (self.experts - 1)
        return (cosines.sum() - cosines.trace()) / max(pairs, 1)


# ---------------------------------------------------------------------------- the part


class MixtureOfExperts(FeedForward):
    """``y = sum over the chosen e of w_e E_e(x)``, plus shared experts that see every token.

    The router alone decides a token's experts and their weights w. The aux holds the balancing
    losses, the metrics of the load and the counts for `after_step`. In evaluation without gradients
    it is empty, so that decoding computes no statistics.

    Args:
        dim: Width of x.
        width: Hidden width of each expert. The layer holds 3 * dim * width parameters per expert,
            of which those of top_k experts and of all shared ones are active for a token.
        experts: To choose from.
        top_k: Experts a token is sent to.
        router: LinearRouter or AttentionRouter with its options: built as
            router(dim, experts, top_k) [LinearRouter].
        shared_experts: Experts that see every token.
        balance: The balancing loss: "switch" (n sum f P), "squared_mean" (sum (P - 1/n)^2,
            Skywork's) or "none".
        balance_over: Whose tokens of a micro-batch the losses take: "rank", each rank's own, or
            "ranks", those of all ranks together, so that the loss is that of the global batch.
            A training loop of your own then calls `Decoder.pooled_losses`.
        coefficient: Of the balancing loss; the largest where it adapts.
        adaptive: Let the coefficient follow the layer's drop rate, as Skywork does.
        z_coefficient: Of the z-loss on the raw logits; 1e-3 is usual.
        capacity_factor: Capacity of each expert over an even load, for the drop rate that is logged
            and adapted to, and for `drop`.
        drop: "none", or "position": in training an expert takes tokens in the order of the batch
            until it is full. A dropped assignment adds nothing, the others' weights stay.
        watch_similarity: Log the mean cosine between experts, the thing to watch after upcycling;
            it takes a product of all weights with themselves at every step.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        router: RouterFactory | None = None,
        shared_experts: int = 0,
        balance: Literal["none", "switch", "squared_mean"] = "switch",
        balance_over: Literal["rank", "ranks"] = "rank",
        coefficient: float = 0.01,
        adaptive: bool = False,
        z_coefficient: float = 0.0,
        capacity_factor: float = 1.25,
        drop: Literal["none", "position"] = "none",
        watch_similarity: bool = False,
    ) -> None:
        super().__init__()
        if shared_experts < 0:
            raise ValueError(f"shared_experts={shared_experts} must be at least 0")
        if drop not in ("none", "position"):
            raise ValueError(f"drop={drop!r} is neither none nor position")
        self.router = _build_router(router or "LinearRouter", dim, experts, top_k)
        self.experts = Experts(dim, width, experts)
        self.shared = GatedFeedForward(dim, shared_experts * width) if shared_experts else None
        self.balance = Balance(
            experts,
            kind=balance,
            coefficient=coefficient,
            adaptive=adaptive,
            z_coefficient=z_coefficient,
            capacity_factor=capacity_factor,
            over=balance_over,
        )
        self.top_k, self.drop, self.capacity_factor = top_k, drop, capacity_factor
        self.shared_experts, self.watch_similarity = shared_experts, watch_similarity

    @property
    def inactive_parameters(self) -> int:
        """Parameters that are not active for a token: those of experts it is not sent to."""
        inactive = self.experts.experts - self.top_k
        return inactive * 3 * self.experts.dim * self.experts.width

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Aux]:
        """X (batch, time, dim) to y of the same shape, and the aux of `Balance`."""
        tokens = x.flatten(0, 1)
        # Before the router: a GPU casts while the router's many small kernels are launched.
        matrices = self.experts.matrices(tokens)
        routing = self.router(x, context)
        kept = None
        if self.drop == "position" and self.training:
            kept = within_capacity(
                routing.indices,
                self.experts.experts,
                self.capacity_factor,
                context.valid.flatten() if context.packed else None,
            )
        if routing.x is not None:
            tokens = routing.x
        y = self.experts(
            tokens, routing.weights, routing.indices, kept=kept, matrices=matrices
        ).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, context)[0]
        if not (self.training or torch.is_grad_enabled()):
            return y, Aux()
        aux = self.balance(routing, context, kept)
        if self.watch_similarity:
            aux.metrics["similarity"] = self.experts.similarity()
        return y, aux

    def pooled_losses(self, pools: dict[str, Tensor]) -> Aux:
        """The balancing losses of all ranks' tokens."""
        return self.balance.pooled_losses(pools)

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Move the coefficient, and what the router moves, by the counts of an optimizer step.

        A router that is frozen stays as it is, and what balances it too.
        """
        if is_frozen(self.router):
            return
        self.balance.after_step(sums["assignments"], sums.get("dropped"))
        self.router.after_step(sums)


def _build_router(router: Part, dim: int, experts: int, top_k: int) -> Router:
    """The router that a name or plain data describes."""
    for name, value in (("experts", experts), ("top_k", top_k)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    spec = describe("router", router)
    for name in ("top_k", "experts"):
        if name in spec["init_args"]:
            raise ValueError(f"{name} belongs to MixtureOfExperts: set it there, not in the router")
    made: Router = build("router", spec, dim, experts, top_k)
    return made
