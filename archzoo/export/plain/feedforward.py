"""Feed-forwards in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.export.plain.core import Aux, Context, FeedForward, Router


class GatedFeedForward(nn.Module):
    """SwiGLU and its kin: ``y = (activation(x Wg) * (x Wu)) Wd``.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, eq. 6.
    """

    def __init__(self, dim: int, width: int, *, activation: str = "silu") -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * width, bias=False)  # one matrix, gate first
        self.down = nn.Linear(width, dim, bias=False)
        self.down.residual_projection = True  # type: ignore[assignment]
        self.activation: Any = getattr(F, activation)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Any]:
        """X (batch, time, dim) to y of the same shape."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up), {}


class PlainFeedForward(nn.Module):
    """The two-matrix feed-forward: ``y = activation(x Wu) Wd``.

    Source: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.3.
    """

    def __init__(self, dim: int, width: int, *, activation: str = "gelu") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)
        self.down.residual_projection = True  # type: ignore[assignment]
        self.activation: Any = getattr(F, activation)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Any]:
        """X (batch, time, dim) to y of the same shape."""
        return self.down(self.activation(self.up(x))), {}


class Stack(nn.Module):
    """One matrix for each expert: weight (experts, rows, columns)."""

    def __init__(self, experts: int, columns: int, rows: int, residual_projection: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))
        self.residual_projection = residual_projection


class Experts(nn.Module):
    """SwiGLU experts side by side: ``E_e(x) = (silu(x Wg_e) * (x Wu_e)) Wd_e``."""

    def __init__(self, dim: int, width: int, experts: int) -> None:
        super().__init__()
        self.gate_up = Stack(experts, dim, 2 * width, False)
        self.down = Stack(experts, width, dim, True)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """The sum of w_e E_e(x) over the chosen experts: x (tokens, dim) to the same shape.

        Args:
            x: (tokens, dim).
            weights: (tokens, k).
            indices: (tokens, k), the chosen experts.
        """
        y = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
        for expert, (gate_up, down) in enumerate(
            zip(self.gate_up.weight, self.down.weight, strict=True)
        ):
            token, choice = (indices == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
            hidden = F.linear(F.silu(gate) * up, down)
            y = y.index_add(0, token, (hidden * weights[token, choice, None]).to(y.dtype))
        return y.to(x.dtype)


class MixtureOfExperts(FeedForward):
    """``y = sum over the chosen e of w_e E_e(x)``, plus shared experts that see every token.

    In training the aux holds the balancing loss, with its coefficient, and the counts by which
    `after_step` moves the coefficient and the router's bias.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        router: nn.Module,
        experts: int = 8,
        top_k: int = 2,
        shared_experts: int = 0,
        balance: str = "switch",
        coefficient: float = 0.01,
        adaptive: bool = False,
        z_coefficient: float = 0.0,
        capacity_factor: float = 1.25,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(dim, width, experts)
        self.shared_experts = shared_experts
        if shared_experts:
            self.shared = GatedFeedForward(dim, shared_experts * width)
        self.balance = Balance(
            experts, balance, coefficient, adaptive, z_coefficient, capacity_factor
        )

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Any]:
        """X (batch, time, dim) to y of the same shape, and the aux."""
        weights, indices, probabilities, raw = self.router(x, context)[:4]
        y = self.experts(x.flatten(0, 1), weights, indices).view_as(x)
        if self.shared_experts:
            y = y + self.shared(x, context)[0]
        if not self.training:
            return y, {}
        return y, self.balance(indices, probabilities, raw, context.valid.flatten())

    @torch.no_grad()
    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Once per optimizer step, with the aux' sums."""
        self.balance.after_step(sums["assignments"])
        self.router.after_step(sums)  # type: ignore[operator]


class Balance(nn.Module):
    """What keeps a router from sending all tokens to few experts.

    With c_j the tokens sent to expert j of n, f_j = c_j / sum(c), P_j its mean probability, the
    loss is, times its coefficient::

        switch          n sum_j f_j P_j             Fedus et al., arXiv 2101.03961, eq. 4
        squared_mean    sum_j (P_j - 1/n)^2         Wei et al., Skywork-MoE, arXiv 2406.06563

    An adaptive coefficient follows the rate r of assignments beyond the capacity of 1.25 times an
    even load, ``alpha <- 0.99 alpha + 0.01 min(r / 5, coefficient)`` (Skywork-MoE).
    """

    def __init__(
        self,
        experts: int,
        kind: str,
        coefficient: float,
        adaptive: bool,
        z_coefficient: float,
        capacity_factor: float,
    ) -> None:
        super().__init__()
        self.experts, self.kind, self.largest = experts, kind, coefficient
        self.adaptive, self.z_coefficient = adaptive, z_coefficient
        self.capacity_factor = capacity_factor
        if adaptive:
            self.alpha: Tensor
            self.register_buffer("alpha", torch.tensor(float(coefficient)))

    def forward(self, indices: Tensor, probabilities: Tensor, raw: Tensor, valid: Tensor) -> Aux:
        """The losses of one batch, and the count of each expert's tokens.

        Args:
            indices: (tokens, k), the chosen experts.
            probabilities: (tokens, experts).
            raw: (tokens, experts), the logits.
            valid: (tokens,) bool, not padding.
        """
        chosen = F.one_hot(indices, self.experts) * valid[:, None, None]
        assignments = chosen.sum(dim=(0, 1))
        aux = Aux(sums={"assignments": assignments})
        weight = valid.to(probabilities.dtype) / valid.sum().clamp(min=1)
        mean = weight @ probabilities
        alpha = self.alpha.clone() if self.adaptive else self.largest
        if self.kind == "switch":
            fractions = assignments.to(mean.dtype) / assignments.sum().clamp(min=1)
            aux.losses["balance"] = alpha * self.experts * (fractions * mean).sum()
        if self.kind == "squared_mean":
            aux.losses["balance"] = alpha * (mean - 1 / self.experts).square().sum()
        if self.z_coefficient:  # keeps logits from growing: ST-MoE, arXiv 2202.08906, eq. 5
            squares = raw.logsumexp(dim=-1).square()
            aux.losses["z"] = self.z_coefficient * (weight * squares).sum()
        return aux

    def after_step(self, assignments: Tensor) -> None:
        """Let the coefficient follow the load of an optimizer step."""
        if self.adaptive:
            total = int(assignments.sum())
            capacity = math.ceil(round(self.capacity_factor * total / self.experts, 9))
            over = (assignments - capacity).clamp(min=0).sum()
            rate = over.to(self.alpha.dtype) / max(total, 1)
            self.alpha.lerp_((0.2 * rate).clamp(max=self.largest), 0.01)


class TopKRouter(Router):
    """The k experts of a token and their weights, from its logits z, in float32 at least.

    ::

    z~ = lambda (z - mean(z)) / std(z)             logit_norm: lambda (Skywork-MoE)
    s  = softmax(z~), or sigmoid(z~)               score
    chosen = the top_k of s + b                    bias_rate; b: the experts' bias, else 0
    w  = s / sum of s over the chosen              renormalise
    """

    projections = 1  # vectors of one number per expert that the projection makes of a token
    unit_variance = False  # start at N(0, 1 / dim) instead of the decoder's N(0, init_std^2)

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int = 2,
        *,
        logit_norm: float | None = None,
        score: str = "softmax",
        renormalise: bool | None = None,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.experts, self.top_k = experts, top_k
        self.logit_norm, self.score, self.bias_rate = logit_norm, score, bias_rate
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.projection = nn.Linear(dim, self.projections * experts, bias=False)
        if self.unit_variance:
            nn.init.normal_(self.projection.weight, std=dim**-0.5)
            self.projection.keeps_init = True  # type: ignore[assignment]
        if bias_rate:
            self.expert_bias: Tensor
            self.register_buffer("expert_bias", torch.zeros(experts))

    def logits(self, projected: Tensor) -> Tensor:
        """(tokens, projections * experts) to (tokens, experts)."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X (batch, time, dim) to weights and indices (tokens, k), probabilities, raw logits."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
            raw = self.logits(F.linear(x, self.projection.weight.to(x.dtype)))
            logits = raw
            if self.logit_norm is not None:  # mean 0 and deviation lambda, token by token
                variance, mean = torch.var_mean(raw, dim=-1, keepdim=True, correction=1)
                logits = (raw - mean) * (self.logit_norm * (variance + 1e-6).rsqrt())
            if self.score == "sigmoid":
                scores = logits.sigmoid()
                probabilities = scores / scores.sum(dim=-1, keepdim=True)
            else:
                scores = probabilities = logits.softmax(dim=-1)
            order = scores + self.expert_bias if self.bias_rate else logits
            indices = order.topk(self.top_k, dim=-1).indices
            weights = scores.gather(1, indices)
            if self.renormalise:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, indices, probabilities, raw

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Move the experts' bias towards even load (Wang et al., arXiv 2408.15664)."""
        if self.bias_rate:
            assignments = sums["assignments"]
            step = (assignments.sum() - self.experts * assignments).sign().to(self.expert_bias)
            self.expert_bias.add_(step - step.mean(), alpha=self.bias_rate)


class LinearRouter(TopKRouter):
    """``z = W x``: one direction per expert (Shazeer et al., arXiv 1701.06538, section 2.1)."""

    def logits(self, projected: Tensor) -> Tensor:
        """(tokens, experts), as they come."""
        return projected


class AttentionRouter(TopKRouter):
    """``z_i = sum_j softmax_j(q_i k_j) v_j``: the experts' scores attend to each other.

    ``[q; k; v] = W x`` gives each expert one number of each; no other token comes near.

    Source: Wu et al., Yuan 2.0-M32, arXiv 2405.17976, on the attention router.
    """

    projections, unit_variance = 3, True

    def logits(self, projected: Tensor) -> Tensor:
        """Each token's experts among themselves."""
        q, k, v = projected.chunk(3, dim=-1)
        attention = (q[:, :, None] * k[:, None, :]).softmax(dim=-1)
        return (attention * v[:, None, :]).sum(dim=-1)
