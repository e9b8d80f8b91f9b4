"""Routers: a token in, k experts and their weights out.

The two differ in one line each, how a token's logits z come about; all that follows is shared, so
that any option combines with either::

    LinearRouter       z = W x
    AttentionRouter    z = softmax(q k^T) v        [q; k; v] = W x

    z~ = lambda (z - mean(z)) / std(z)             logit_norm: lambda
    s  = softmax(z~), or sigmoid(z~)               score
    chosen = the top_k of s + b                    bias_rate; b: the experts' bias, else 0
    w  = s / sum of s over the chosen              renormalise
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from archzoo.block import Router, Routing
from archzoo.documents import Context
from archzoo.kernels.routers import attend_experts, choose, project
from archzoo.linear import Linear
from archzoo.numerics import KeepsFloat32, at_least_float32, without_autocast

# Added to the variance: finite gradients where all logits of a token are equal.
VARIANCE_EPS = 1e-6


def normalise_logits(logits: Tensor, target: float) -> Tensor:
    """Give each token's logits mean 0 and deviation `target`: ``lambda (z - mean(z)) / std(z)``.

    The deviation is the sample one (over n - 1). The mean changes neither a softmax nor a choice.
    A sigmoid sees it: logits that lie close together and far from 0, as an attention router's do,
    would all be scored 0 or 1 if it were left in. Scaling a token's logits changes nothing: the
    router's weights only set directions, and the gradient is orthogonal to the centred logits.

    Source: Wei et al., Skywork-MoE, arXiv 2406.06563, on gating logit normalization.

    Args:
        logits: (tokens, experts).
        target: lambda. The larger, the sharper the gate: at lambda 1 the first of 16 experts gets
            on average 1.8 times the second's probability.
    """
    variance, mean = torch.var_mean(logits, dim=-1, keepdim=True, correction=1)
    return (logits - mean) * (target * (variance + VARIANCE_EPS).rsqrt())


class TopKRouter(KeepsFloat32, Router, ABC):
    """The base of these routers: everything after the logits, in float32 at least.

    One of your own says how a token's logits come about, and takes every option with it::

        class CosineRouter(archzoo.TopKRouter):
            def logits(self, projected):
                return projected / projected.norm(dim=-1, keepdim=True)

    Args:
        dim: Width of x.
        experts: To choose from.
        top_k: Experts a token is sent to; it belongs to the mixture, which passes it here.
        logit_norm: Standard deviation that each token's logits are given (Skywork's lambda; 1 in
            its paper). None: the logits stay as they are.
        score: "softmax" over all experts, or "sigmoid" of each logit alone.
        renormalise: Make the chosen experts' weights sum to 1. None: where top_k is above 1; a
            single weight of always 1 would cut the router off the loss.
        bias_rate: Step of the bias that balances the load without a loss: it is added to the
            scores for the choice alone, and moves by this much towards even load after every
            optimizer step (Wang et al., arXiv 2408.15664, algorithm 1; 1e-3 there). 0: no bias.
    """

    #: Vectors of one number per expert that the projection makes of a token.
    projections = 1
    #: Their names, by which adapters know them. Empty: router, or router_0, router_1, ...
    block_names: tuple[str, ...] = ()
    #: Start at N(0, 1 / dim) instead of the decoder's N(0, init_std^2).
    unit_variance = False

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int = 2,
        *,
        logit_norm: float | None = None,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalise: bool | None = None,
        bias_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and experts={experts}")
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={score!r} is neither softmax nor sigmoid")
        if logit_norm is not None and logit_norm <= 0:
            raise ValueError(f"logit_norm={logit_norm} must be above 0; omit it for none")
        if logit_norm is not None and experts < 3:
            raise ValueError(
                f"logit_norm makes a constant of {experts} experts' gate: take 3 experts or more"
            )
        if bias_rate < 0:
            raise ValueError(f"bias_rate={bias_rate} must be at least 0")
        self.experts, self.top_k = experts, top_k
        self.logit_norm, self.score, self.bias_rate = logit_norm, score, bias_rate
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        numbered = [f"router_{number}" for number in range(self.projections)]
        names = self.block_names or (numbered if self.projections > 1 else ["router"])
        self.projection = Linear(dim, dict.fromkeys(names, experts))
        self.projection.weight_is_read = True  # by a kernel that routers have of their own
        self.projection.keeps_init = self.unit_variance
        self.expert_bias: Tensor
        if bias_rate:
            self.float32_names = ("expert_bias",)
            dtype = at_least_float32(torch.get_default_dtype())
            self.register_buffer("expert_bias", torch.empty(experts, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with no bias; a projection that is not the decoder's to draw is drawn here."""
        if self.unit_variance:
            nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)
        if self.bias_rate:
            nn.init.zeros_(self.expert_bias)

    @abstractmethod
    def logits(self, projected: Tensor) -> Tensor:
        """(tokens, projections * experts) to (tokens, experts)."""

    def forward(self, x: Tensor, context: Context) -> Routing:
        """X (batch, time, dim) to a `Routing` of batch * time tokens, row by row."""
        with without_autocast(x.device):
            given = x.dtype
            x = x.flatten(0, 1).to(at_least_float32(given))
            projected, again = project(x, self.projection.effective_weight().to(x.dtype))
            raw = self.logits(projected)
            logits = raw if self.logit_norm is None else normalise_logits(raw, self.logit_norm)
            weights, indices, probabilities = choose(
                logits,
                self.top_k,
                self.expert_bias if self.bias_rate else None,
                sigmoid=self.score == "sigmoid",
                renormalise=self.renormalise,
            )
        return Routing(weights, indices, probabilities, raw, again if x.dtype == given else None)

    def after_step(self, sums: dict[str, Tensor]) -> None:
        """Move the experts' bias towards even load: ``b_j += rate * sign(mean(c) - c_j)``.

        The mean of the step is taken off: it would change no choice, and only drift.

        Args:
            sums: Its mixture's, of which ``assignments`` is c.
        """
        if self.bias_rate:
            assignments = sums["assignments"]
            short = assignments.sum() - self.experts * assignments  # in integers: exact
            step = short.sign().to(self.expert_bias)
            self.expert_bias.add_(step - step.mean(), alpha=self.bias_rate)


class LinearRouter(TopKRouter):
    """``z = W x``: one direction per expert.

    Source: Shazeer et al., arXiv 1701.06538, section 2.1, without its noise. With `logit_norm` it
    is Skywork's gate, whose bias its released code omits, too. It holds experts * dim
    parameters, N(0, init_std^2) at the start as the decoder's other matrices.
    """

    def logits(self, projected: Tensor) -> Tensor:
        """(tokens, experts), as they come."""
        return projected


class AttentionRouter(TopKRouter):
    """``z_i = sum_j softmax_j(q_i k_j) v_j``: the experts' scores attend to each other.

    ``[q; k; v] = W x`` gives each expert one number of each, and everything happens within one
    token. z_i is a weighted mean of v, so z has little spread: the gate is softer than a linear
    one. It holds 3 * experts * dim parameters, N(0, 1 / dim) at the start: with the usual 0.02 a
    narrow model's q k would vanish, and with it nearly all of the router's gradient.

    Source: Wu et al., Yuan 2.0-M32, arXiv 2405.17976, on the attention router. The paper does not
    say how z becomes a weight; its code renormalises over the chosen, as here.
    """

    projections, unit_variance = 3, True
    block_names = ("router_query", "router_key", "router_value")

    def logits(self, projected: Tensor) -> Tensor:
        """Each token's experts among themselves: no other token comes near."""
        return attend_experts(projected)
