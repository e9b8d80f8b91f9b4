"""What is checked of feed-forwards and of routers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from archzoo import block as interface
from archzoo.block import Aux, FeedForward
from archzoo.contract.measure import (
    Violation,
    context_of,
    expect_buffers_survive,
    expect_live_weights,
    expect_same,
    expect_true_gradient,
    expect_untouched,
    expect_zero,
    gradients_of,
    reloaded,
)
from archzoo.contract.subject import BATCH, Subject
from archzoo.feedforward.moe import MixtureOfExperts
from archzoo.numerics import TOLERANCES


def feed_forward_interface(subject: Subject) -> str:
    """Y has the shape and dtype of x; aux is an `Aux` of tensors, or {}."""
    part = subject.make(torch.float32)
    x = subject.draw(BATCH, 7, subject.dim, dtype=torch.float32)
    before = x.clone()
    given = part(x, context_of(x)[0])
    if not (isinstance(given, tuple) and len(given) == 2):
        raise Violation(
            f"forward returns a {type(given).__name__}: it must return y and an Aux, or {{}} where "
            "there is nothing to say"
        )
    y, aux = given[0], _aux(part, given[1])
    if y.shape != x.shape or y.dtype != x.dtype:
        raise Violation(
            f"{tuple(y.shape)} {y.dtype} from {tuple(x.shape)} {x.dtype}: y has the shape and "
            "dtype of x"
        )
    expect_untouched(x, before, "x")
    if (dtype := subject.make()(x.double(), context_of(x)[0])[0].dtype) != torch.float64:
        raise Violation(f"{dtype} from torch.float64: y has the dtype of x")
    for kind, name, value in _entries(aux):
        entry = f"aux's {kind} entry {name!r}"
        if not isinstance(value, Tensor):
            raise Violation(f"{entry} is a {type(value).__name__}, not a tensor")
        if kind in ("losses", "metrics") and value.dim():
            raise Violation(f"{entry} has shape {tuple(value.shape)}, must be a scalar")
        if not value.isfinite().all():
            raise Violation(f"{entry} is not finite")
        if kind in ("metrics", "sums") and value.requires_grad:
            raise Violation(f"{entry} carries a gradient: only losses and pools do")
    part.after_step(aux.sums)
    more = _aux(part, part.pooled_losses(aux.pools))
    if more.sums or more.pools:
        raise Violation("pooled_losses gives sums or pools: it must give losses and metrics alone")
    said = ", ".join(f"{kind} {name}" for kind, name, _ in _entries(aux))
    return f"y as x; aux: {said or 'empty'}"


def _aux(part: FeedForward, given: Any) -> Aux:
    """What a feed-forward says beside, or the rule that it breaks."""
    try:
        return interface.check_aux(part, given)
    except TypeError as error:
        raise Violation(str(error)) from None


def _entries(aux: Aux) -> list[tuple[str, str, Any]]:
    """All of an aux: (kind, name, value)."""
    kinds = ("losses", "metrics", "sums", "pools")
    return [(kind, *entry) for kind in kinds for entry in getattr(aux, kind).items()]


def feed_forward_tokens(subject: Subject) -> str:
    """Each token alone: no other token, no other row, no padding reaches it or its counts."""
    part = subject.make()
    x = subject.draw(BATCH, 9, subject.dim).requires_grad_()
    y, _ = part(x, context_of(x)[0])
    (gradient,) = gradients_of(y[1, 4].square().sum(), [x])
    own = torch.zeros(BATCH, 9, dtype=torch.bool)
    own[1, 4] = True
    expect_zero(gradient[~own], "a token sees another token")
    with torch.no_grad():
        alone, _ = part(x[1:2, 4:5], context_of(x[1:2, 4:5])[0])
        error = expect_same(
            alone[0, 0], y[1, 4], TOLERANCES[torch.float64], "a token alone against among"
        )
        documents = torch.full((BATCH, 9), -1)
        documents[:, 2:7] = 0
        padded, counts = part(x, context_of(x, documents)[0])
        trimmed, want = part(x[:, 2:7], context_of(x[:, 2:7])[0])
        what = "tokens beside padding against the same without"
        error = max(error, expect_same(padded[:, 2:7], trimmed, TOLERANCES[torch.float64], what))
        for kind, name, value in _entries(_aux(part, want)):
            counted = getattr(_aux(part, counts), kind)[name]
            what = f"aux's {kind} entry {name!r} with padding or without: padding is not counted"
            error = max(error, expect_same(counted, value, TOLERANCES[torch.float64], what))
    return f"float64 {error:.0e}; gradient to other tokens exactly 0"


def feed_forward_gradients(subject: Subject) -> str:
    """Autograd gives the derivative."""
    part = subject.make()
    x = subject.draw(2, 6, subject.dim)
    context, _ = context_of(x)
    error = expect_true_gradient(lambda x: part(x, context)[0], part, x, subject)
    many = subject.draw(BATCH, 100, subject.dim)  # so that every expert of a mixture has some
    y, aux = part(many, context_of(many)[0])
    aux = _aux(part, aux)
    losses = [value.sum() for value in (*aux.losses.values(), *aux.pools.values())]
    expect_live_weights(part, y.square().sum() + sum(losses, torch.zeros(())))
    return f"against a finite difference {error:.0e}; every weight has one"


def feed_forward_casts(subject: Subject) -> str:
    """Half precision rounds weights and activations, and nothing else."""
    expect_buffers_survive(subject.make(torch.float32))
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        half = subject.make(torch.float32).to(dtype)
        full = copy.deepcopy(half).float()
        x = subject.draw(2, 50, subject.dim, dtype=dtype)
        with torch.no_grad():
            got, want = half(x, context_of(x)[0])[0], full(x.float(), context_of(x)[0])[0]
        if got.dtype != dtype:
            raise Violation(f"{dtype} in gives {got.dtype} out: y has the dtype of x")
        worst = max(worst, expect_same(got, want, TOLERANCES[dtype], f"{dtype} against float32"))
    return f"bfloat16 and float16 {worst:.0e}"


def feed_forward_repeats(subject: Subject) -> str:
    """The same seed and input give the same bits, saved and loaded too."""
    part, same = subject.make(), subject.make()
    fresh = reloaded(part, subject.make())
    x = subject.draw(2, 9, subject.dim)
    context, _ = context_of(x)
    with torch.no_grad():
        want = part(x, context)[0]
        for name, other in (("a second call", part), ("a copy", same), ("a reloaded one", fresh)):
            if not torch.equal(other(x, context)[0], want):
                raise Violation(f"{name} gives other numbers")
    return "bit for bit"


# ---------------------------------------------------------------------------- routers


def router_interface(subject: Subject) -> str:
    """A `Routing` of batch * time tokens: shapes, ranges, float32 at least."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        router = subject.make(torch.float32).to(dtype)
        x = subject.draw(BATCH, 7, subject.dim, dtype=dtype)
        routing = router(x, context_of(x)[0])
        tokens, experts = BATCH * 7, subject.sizes["experts"]
        k = subject.sizes["top_k"]
        for name, columns in (
            ("weights", k),
            ("indices", k),
            ("probabilities", experts),
            ("raw_logits", experts),
        ):
            value = getattr(routing, name)
            if value.shape != (tokens, columns):
                raise Violation(
                    f"{name} has shape {tuple(value.shape)}, must be {(tokens, columns)}"
                )
            wide = interface.at_least_float32(dtype)
            if name != "indices" and value.dtype != wide:
                raise Violation(f"{name} is {value.dtype} for {dtype} tokens, must be {wide}")
            if not value.isfinite().all():
                raise Violation(f"{name} is not finite")
        if routing.x is not None and not (
            routing.x.dtype == dtype and torch.equal(routing.x, x.flatten(0, 1))
        ):
            raise Violation("x must be what the router was given, or None")
        if routing.indices.dtype != torch.int64:
            raise Violation(f"indices are {routing.indices.dtype}, must be int64")
        if not ((routing.indices >= 0) & (routing.indices < experts)).all():
            raise Violation("indices lie outside the experts")
        if (routing.indices.sort(-1).values.diff(dim=-1) == 0).any():
            raise Violation("a token chooses an expert twice")
        if (routing.probabilities < 0).any():
            raise Violation("a probability is negative")
        total = routing.probabilities.sum(-1)
        expect_same(total, torch.ones_like(total), 1e-5, "probabilities of a token must sum to 1")
    return f"{k} of {experts} experts a token, float32 at least"


def router_tokens(subject: Subject) -> str:
    """Each token alone."""
    router = subject.make().eval()
    x = subject.draw(BATCH, 9, subject.dim).requires_grad_()
    routing = router(x, context_of(x)[0])
    own = torch.zeros(BATCH, 9, dtype=torch.bool)
    own[1, 4] = True
    error = 0.0
    with torch.no_grad():
        alone = router(x[1:2, 4:5], context_of(x[1:2, 4:5])[0])
    for name in ("raw_logits", "probabilities", "weights"):
        value = getattr(routing, name)[13]
        (gradient,) = gradients_of(value.square().sum(), [x])
        expect_zero(gradient[~own], f"a token's {name} see another token")
        what = f"{name} alone against among"
        got = getattr(alone, name)[0]
        error = max(error, expect_same(got, value, TOLERANCES[torch.float64], what))
    if not torch.equal(alone.indices[0], routing.indices[13]):
        raise Violation("a token alone chooses other experts than among others")
    trained = [p for p in router.parameters() if p.requires_grad]
    reached = gradients_of(
        routing.weights.square().sum() + routing.probabilities[:, 0].sum(), trained
    )
    if trained and not any(slope.abs().max() for slope in reached):
        raise Violation("no gradient reaches the router's weights: its choice is never trained")
    return f"float64 {error:.0e}"


def router_casts(subject: Subject) -> str:
    """A cast changes no buffer."""
    expect_buffers_survive(subject.make(torch.float32))
    return "no buffer changes"


def router_repeats(subject: Subject) -> str:
    """In evaluation the same token gets the same routing, saved and loaded too."""
    router, same = subject.make().eval(), subject.make().eval()
    fresh = reloaded(router, subject.make()).eval()
    x = subject.draw(2, 9, subject.dim)
    context, _ = context_of(x)
    with torch.no_grad():
        want = router(x, context)
        for name, other in (("a second call", router), ("a copy", same), ("a reloaded one", fresh)):
            got = other(x, context)
            if not all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True)):
                raise Violation(f"{name} gives other numbers")
    return "bit for bit"


def router_after_step(subject: Subject) -> str:
    """What counts move is a buffer: saved, the same on every rank, and rounded by no cast."""
    experts = subject.sizes["experts"]
    router, other = subject.make(torch.float32), subject.make(torch.float32)
    weights = {n: p.detach().clone() for n, p in router.named_parameters() if p.requires_grad}
    loads = torch.randint(100, (4, experts), generator=subject.generator)
    given = loads.clone()
    for load in given[:-1]:
        router.after_step({"assignments": load})
        other.after_step({"assignments": load})
    fresh = reloaded(router, subject.make(torch.float32))
    for each in (router, other, fresh):
        each.eval().after_step({"assignments": given[-1]})
    if not torch.equal(given, loads):
        raise Violation("after_step writes into sums, which the mixture's balance reads too")
    for name, parameter in router.named_parameters():
        if name in weights and not torch.equal(parameter, weights[name]):
            raise Violation(f"after_step moves the weight {name!r}, which is the optimizer's")
    x = subject.draw(2, 9, subject.dim, dtype=torch.float32)
    context, _ = context_of(x)
    with torch.no_grad():
        want = router(x, context)
        for name, made in (("a copy given the same counts", other), ("a reloaded one", fresh)):
            got = made(x, context)
            if not all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True)):
                raise Violation(f"after a step {name} routes otherwise: what moves is a buffer")
    expect_buffers_survive(router)
    return "saved, the same on every rank, rounded by no cast"


def router_mixture(subject: Subject) -> str:
    """A mixture builds it for any number of experts a token, and each token goes alone."""
    experts = subject.sizes["experts"]
    worst = 0.0
    for top_k in sorted({1, subject.sizes["top_k"], min(3, experts)}):
        router = subject.make(top_k=top_k)
        mixture = MixtureOfExperts(subject.dim, 24, experts=experts, top_k=top_k).double()
        mixture.router = router
        mixture.eval()  # in training a router may add noise
        x = subject.draw(BATCH, 9, subject.dim)
        documents = torch.full((BATCH, 9), -1)
        documents[:, 2:7] = 0
        k = router(x, context_of(x)[0]).indices.shape[-1]
        if k != top_k:
            raise Violation(f"{k} experts a token where the mixture asks for top_k={top_k}")
        padded, aux = mixture(x, context_of(x, documents)[0])
        with torch.no_grad():
            trimmed, _ = mixture(x[:, 2:7], context_of(x[:, 2:7])[0])
        what = f"a mixture of top_k={top_k}, tokens beside padding against the same without"
        error = expect_same(padded[:, 2:7], trimmed, TOLERANCES[torch.float64], what)
        worst = max(worst, error)
        (padded.square().sum() + sum(aux.losses.values())).backward()
        mixture.after_step(aux.sums)
    return f"built, run and trained in a mixture, float64 {worst:.0e}"
