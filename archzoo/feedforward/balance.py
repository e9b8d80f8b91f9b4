"""Balancing: what keeps a router from sending all tokens to few experts, and how even the load is.

In the formulas c_j is the number of tokens sent to expert j (of n), f_j = c_j / sum(c) its
fraction, P_j its mean probability. None of them counts padding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from archzoo.block import Aux, Routing
from archzoo.documents import Context
from archzoo.kernels.launching import fused
from archzoo.kernels.routers import MAX_BALANCED, largest, summarise_load
from archzoo.numerics import KeepsFloat32, at_least_float32

# Skywork-MoE, arXiv 2406.06563, on adaptive auxiliary loss coefficients.
GAIN = 0.2  # xi: the coefficient that a drop rate of 1 would call for
MEMORY = 0.99  # beta: how much of the coefficient stays at each optimizer step


# ---------------------------------------------------------------------------- load


def count_assignments(indices: Tensor, experts: int, valid: Tensor | None = None) -> Tensor:
    """c: how many tokens each expert gets, (experts,) int64.

    Args:
        indices: (tokens, k), the chosen experts.
        experts: How many there are.
        valid: (tokens,) bool, not padding; None: all.
    """
    chosen = indices[..., None] == torch.arange(experts, device=indices.device)
    if valid is not None:
        chosen = chosen & valid[:, None, None]
    return chosen.sum(dim=(0, 1))


def sum_over_tokens(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The sum of values (tokens, ...) over the tokens that are not padding."""
    return values.sum(dim=0) if valid is None else torch.tensordot(valid.to(values), values, dims=1)


def mean_over_tokens(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of values (tokens, ...) over the tokens that are not padding."""
    if valid is None:
        return values.mean(dim=0)
    weight = valid.to(values.dtype) / valid.sum().clamp(min=1)
    mean: Tensor = torch.tensordot(weight, values, dims=1)
    return mean


def _as_written(factor: float) -> tuple[int, int]:
    """Numerator and denominator of a factor as it is written: 11 and 10 of 1.1.

    A compiler follows this, where it does not follow `fractions`.
    """
    digits, _, exponent = str(factor).partition("e")
    whole, _, decimals = digits.partition(".")
    places = len(decimals) - int(exponent or "0")
    numerator = int(whole + decimals) * 10 ** max(-places, 0)
    denominator = 10 ** max(places, 0)
    common = math.gcd(numerator, denominator)
    return numerator // common, denominator // common


def capacity(assignments: Tensor | int, experts: int, factor: float) -> Tensor | int:
    """ceil(factor * assignments / experts): the most tokens that each expert takes.

    In integers, so that no rounding adds one: 1.1 is taken for 11/10.

    Args:
        assignments: tokens * k, an int or an int64 tensor.
        experts: How many there are.
        factor: The capacity factor; 1 is enough for an even load.
    """
    numerator, denominator = _as_written(factor)
    return -((-assignments * numerator) // (denominator * experts))


def load_fractions(
    assignments: Tensor, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """f: each expert's fraction of the assignments, (experts,); all 0 where there are none.

    Args:
        assignments: c, (experts,) int64.
        total: Their sum, where it is known: a sum less to compute.
        dtype: Of the fractions. Torch would take its default's, which may be bfloat16.
    """
    total = assignments.sum() if total is None else total
    return assignments.to(dtype) / at_least_1(total)


def at_least_1(total: Tensor | int) -> Tensor | int:
    """A count that may be divided by."""
    return total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)


def virtual_drop_rate(
    assignments: Tensor,
    factor: float,
    total: Tensor | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The fraction of assignments over capacity: ``sum_j relu(c_j - C) / sum(c)``.

    It tells how uneven the load is where nothing is dropped. C is `capacity`. Counts are summed
    over micro-batches and ranks first, so the rate does not depend on how a batch was split.

    Args:
        assignments: c, (experts,) int64.
        factor: The capacity factor, 1.25 by our choice: Skywork's report does not name one.
        total: The assignments' sum, where it is known.
        dtype: Of the rate.

    Returns:
        A scalar.
    """
    total = assignments.sum() if total is None else total
    over = (assignments - capacity(total, len(assignments), factor)).clamp(min=0)
    return over.sum().to(dtype) / at_least_1(total)


def within_capacity(indices: Tensor, experts: int, factor: float, valid: Tensor | None) -> Tensor:
    """Which assignments are within capacity, by position: the batch's first tokens come first.

    An expert takes assignments in the order of tokens until it is full; padding does not count.

    Args:
        indices: (tokens, k), the chosen experts.
        experts: How many there are.
        factor: The capacity factor. The capacity follows from the number of tokens given, padding
            included, so that no count is read from a device.
        valid: (tokens,) bool, not padding; None: all.

    Returns:
        (tokens, k) bool.
    """
    flat = indices.flatten()
    chosen = flat[:, None] == torch.arange(experts, device=indices.device)
    if valid is not None:
        chosen = chosen & valid.repeat_interleave(indices.shape[1])[:, None]
    rank = chosen.cumsum(dim=0).gather(1, flat[:, None])[:, 0]  # counted from 1
    kept = (rank <= capacity(flat.numel(), experts, factor)).view_as(indices)
    return kept if valid is None else kept & valid[:, None]


# ---------------------------------------------------------------------------- losses


def switch_loss(mean_probabilities: Tensor, fractions: Tensor) -> Tensor:
    """``n sum_j f_j P_j``: 1 where the load is even, n where one expert gets it all.

    Its gradient goes through P alone.

    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4, for k choices a token.

    Args:
        mean_probabilities: P, (experts,).
        fractions: f, (experts,).
    """
    fractions = fractions.to(mean_probabilities.dtype)
    return len(fractions) * torch.dot(fractions, mean_probabilities)


def squared_mean_loss(mean_probabilities: Tensor) -> Tensor:
    """``sum_j (P_j - 1/n)^2``: 0 where the mean probability is even, 1 - 1/n where one has it all.

    It sees probabilities only: the counts may be uneven where it is 0.

    Source: Wei et al., Skywork-MoE, arXiv 2406.06563, on adaptive auxiliary loss coefficients.

    Args:
        mean_probabilities: P, (experts,).
    """
    return (mean_probabilities - 1 / len(mean_probabilities)).square().sum()


def z_loss(raw_logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean over tokens of ``logsumexp(z)^2``, which keeps logits from growing.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.

    Args:
        raw_logits: z, (tokens, experts), before any normalisation, which would make it a constant.
        valid: (tokens,) bool, not padding; None: all.
    """
    return mean_over_tokens(raw_logits.logsumexp(dim=-1).square(), valid)


# ---------------------------------------------------------------------------- what to look at


def load_metrics(fractions: Tensor) -> dict[str, Tensor]:
    """How even a load f (experts,) is, as scalars.

    Returns:
        max_violation: (max c - mean c) / mean c; 0 where the load is even.
        entropy: H(f) / log n; 1 where the load is even, 0 where one expert gets it all.
        unused: The fraction of experts that got nothing.
    """
    experts = len(fractions)
    return {
        "max_violation": fractions.max() * experts - 1,
        "entropy": torch.special.entr(fractions).sum() / math.log(max(experts, 2)),
        "unused": (fractions == 0).to(fractions.dtype).mean(),
    }


def gate_ratios(probabilities: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
    """How sharp a gate is: mean ratios of a token's largest probabilities.

    Source: Skywork-MoE, arXiv 2406.06563, whose Max1/Max2 and Max2/Max3 these are.

    Args:
        probabilities: (tokens, experts).
        valid: (tokens,) bool, not padding; None: all.

    Returns:
        max1_max2 and, from three experts on, max2_max3; empty for one expert.
    """
    top, _ = largest(probabilities, min(3, probabilities.shape[-1]))
    # A ratio above 1e7 says no more, and would swamp the mean.
    means = mean_over_tokens(top[:, :-1] / top[:, 1:].clamp(min=1e-7), valid)
    return dict(zip(("max1_max2", "max2_max3"), means.unbind(), strict=False))


# ---------------------------------------------------------------------------- the part


class Balance(KeepsFloat32):
    """The load balancing of one mixture: a loss, its coefficient, and metrics of the load.

    The coefficient is constant or adaptive. An adaptive one starts at `coefficient`, its largest
    value, and follows the drop rate r of each optimizer step::

        alpha <- beta alpha + (1 - beta) min(xi r, coefficient)        beta 0.99, xi 1/5

    so that a layer whose load is even gets no loss (Skywork-MoE, arXiv 2406.06563). It halves in
    69 steps at best, and stays at its largest from r = 5 % on where that is 0.01. r is the
    fraction of dropped assignments or, where nothing is dropped, the virtual one.

    The loss takes the tokens of one micro-batch, on one rank or on all. It is convex in P: the
    smaller the micro-batches, the larger its mean over them, and the stronger its effect. Over all
    ranks it is the loss of their tokens together, however many ranks there are: the sums that it
    is made of are returned as `Aux.pools`, summed outside, and passed to `pooled_losses`.

    Args:
        experts: How many there are.
        kind: "none", "switch" or "squared_mean".
        coefficient: Of the loss; the largest where it adapts.
        adaptive: Let the coefficient follow the drop rate.
        z_coefficient: Of the z-loss; 0: none.
        capacity_factor: For the drop rate, virtual or real.
        over: "rank" or "ranks": whose tokens the losses take.
    """

    def __init__(
        self,
        experts: int,
        *,
        kind: Literal["none", "switch", "squared_mean"],
        coefficient: float,
        adaptive: bool,
        z_coefficient: float,
        capacity_factor: float,
        over: Literal["rank", "ranks"] = "rank",
    ) -> None:
        super().__init__()
        if over not in ("rank", "ranks"):
            raise ValueError(f"balance_over={over!r} is neither rank nor ranks")
        if kind not in ("none", "switch", "squared_mean"):
            raise ValueError(f"balance={kind!r} is not one of none, switch, squared_mean")
        if adaptive and kind == "none":
            raise ValueError("adaptive=True needs a loss: set balance to switch or squared_mean")
        for name, value in (("coefficient", coefficient), ("z_coefficient", z_coefficient)):
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
        if capacity_factor <= 0:
            raise ValueError(f"capacity_factor={capacity_factor} must be above 0")
        self.experts, self.kind, self.adaptive = experts, kind, adaptive
        self.largest, self.z_coefficient = coefficient, z_coefficient
        self.capacity_factor, self.over = capacity_factor, over
        self.alpha: Tensor
        if adaptive:
            self.float32_names = ("alpha",)
            dtype = at_least_float32(torch.get_default_dtype())
            self.register_buffer("alpha", torch.empty((), dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let an adaptive coefficient start at its largest."""
        if self.adaptive:
            nn.init.constant_(self.alpha, self.largest)

    def forward(self, routing: Routing, context: Context, kept: Tensor | None = None) -> Aux:
        """The aux of one micro-batch: losses, metrics, and the counts that `after_step` takes.

        Args:
            routing: Of batch * time tokens.
            context: Of the same tokens.
            kept: (tokens, k) bool, what was not dropped; None: nothing was.
        """
        valid = context.valid.flatten() if context.packed else None
        assignments, total, aux = self._load(routing, valid)
        if self.over == "ranks":
            aux.pools = self._pools(routing, assignments, valid)
        elif self.z_coefficient:
            aux.losses["z"] = self.z_coefficient * z_loss(routing.raw_logits, valid)
        aux.sums["assignments"] = assignments
        if kept is not None:
            aux.sums["dropped"] = dropped = total - kept.sum()
            dtype = routing.probabilities.dtype
            aux.metrics["drop_rate"] = dropped.to(dtype) / at_least_1(total)
        return aux

    def _load(self, routing: Routing, valid: Tensor | None) -> tuple[Tensor, Tensor | int, Aux]:
        """The assignments, their sum, and an aux of the balancing loss and the metrics."""
        kind = self.kind if self.over == "rank" else "none"
        probabilities, indices = routing.probabilities, routing.indices
        by_kernels = fused(probabilities) and probabilities.dtype == torch.float32
        if valid is None and by_kernels and self.experts <= MAX_BALANCED:
            total = indices.numel()
            most = int(capacity(total, self.experts, self.capacity_factor))
            coefficient = self.alpha if self.adaptive else self.largest
            assignments, loss, seen = summarise_load(
                probabilities, indices, kind, coefficient, most
            )
            aux = self._aux(loss)
            aux.metrics |= seen
            return assignments, total, aux
        assignments = count_assignments(indices, self.experts, valid)
        every: Tensor | int = indices.numel() if valid is None else assignments.sum()
        mean = None if kind == "none" else mean_over_tokens(probabilities, valid)
        fractions = load_fractions(assignments, every, probabilities.dtype)
        aux = self._losses(self._loss(mean, fractions), None)
        aux.metrics |= load_metrics(fractions)
        aux.metrics["drop_rate"] = virtual_drop_rate(
            assignments, self.capacity_factor, every, probabilities.dtype
        )
        aux.metrics |= gate_ratios(probabilities.detach(), valid)
        return assignments, every, aux

    def _loss(self, mean: Tensor | None, fractions: Tensor) -> Tensor | None:
        if mean is None:
            return None
        return switch_loss(mean, fractions) if self.kind == "switch" else squared_mean_loss(mean)

    def _losses(self, loss: Tensor | None, z: Tensor | None) -> Aux:
        """The losses times their coefficients, and the metrics of them."""
        if loss is None:
            aux = Aux()
        else:
            # A copy: the backward pass must not see the coefficient of the next step.
            aux = self._aux((self.alpha.clone() if self.adaptive else self.largest) * loss)
            aux.metrics["balance"] = loss.detach()
        if z is not None:
            aux.losses["z"] = self.z_coefficient * z
        return aux

    def _aux(self, loss: Tensor | None) -> Aux:
        """An aux of the balancing loss, which is multiplied by its coefficient already."""
        if loss is None:
            return Aux()
        metrics = {"coefficient": self.alpha.clone()} if self.adaptive else {}
        return Aux({"balance": loss}, metrics)

    def _pools(
        self, routing: Routing, assignments: Tensor, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Sums over this rank's tokens: the losses are functions of all ranks' sums."""
        like = routing.probabilities
        tokens = len(like) if valid is None else valid.sum()
        pools = {"tokens": torch.as_tensor(tokens, device=like.device, dtype=like.dtype)}
        if self.kind != "none":
            pools["probabilities"] = sum_over_tokens(like, valid)
            pools["assignments"] = assignments.to(like.dtype)
        if self.z_coefficient:
            squares = routing.raw_logits.logsumexp(dim=-1).square()
            pools["z"] = sum_over_tokens(squares, valid)
        return pools

    def pooled_losses(self, pools: dict[str, Tensor]) -> Aux:
        """The losses of all ranks' tokens, from their sums."""
        if not pools:
            return Aux()
        tokens = pools["tokens"].clamp(min=1)
        loss = z = None
        if self.kind != "none":
            fractions = load_fractions(pools["assignments"], dtype=tokens.dtype)
            loss = self._loss(pools["probabilities"] / tokens, fractions)
        if self.z_coefficient:
            z = pools["z"] / tokens
        return self._losses(loss, z)

    def after_step(self, assignments: Tensor, dropped: Tensor | None = None) -> None:
        """Let the coefficient follow the drop rate of an optimizer step.

        Args:
            assignments: c, (experts,) int64, summed over the step's micro-batches and ranks.
            dropped: Number of dropped assignments, summed in the same way; None: none.
        """
        if not self.adaptive:
            return
        dtype = self.alpha.dtype
        if dropped is None:
            rate = virtual_drop_rate(assignments, self.capacity_factor, dtype=dtype)
        else:
            rate = dropped.to(dtype) / at_least_1(assignments.sum())
        wanted = (GAIN * rate).clamp(max=self.largest)
        self.alpha.lerp_(wanted, 1 - MEMORY)
