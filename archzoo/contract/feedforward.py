"""What is checked of feed-forwards and of routers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from archzoo import block as interface
from archzoo.contract.measure import (
    VALUES,
    Violation,
    context_of,
    expect_buffers_survive,
    expect_same,
    expect_true_gradient,
    expect_zero,
    gradients_of,
    reloaded,
)
from archzoo.contract.subject import BATCH, Subject


def feed_forward_interface(subject: Subject) -> str:
    """Y has the shape and dtype of x; aux is a dict of tensors with known prefixes."""
    part = subject.make(torch.float32)
    x = subject.draw(BATCH, 7, subject.dim, dtype=torch.float32)
    given = part(x, context_of(x)[0])
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)):
        raise Violation(
            f"forward returns a {type(given).__name__}: it must return y and a dict, {{}} where "
            "there is nothing to say"
        )
    y, aux = given
    if y.shape != x.shape or y.dtype != x.dtype:
        raise Violation(
            f"{tuple(y.shape)} {y.dtype} from {tuple(x.shape)} {x.dtype}: y has the shape and "
            "dtype of x"
        )
    for name, value in aux.items():
        if name.split("/")[0] not in ("loss", "metric", "sum", "pool") or "/" not in name:
            raise Violation(f"aux entry {name!r}: names begin with loss/, metric/, sum/ or pool/")
        if not isinstance(value, Tensor):
            raise Violation(f"aux entry {name!r} is a {type(value).__name__}, not a tensor")
        if not name.startswith(("sum/", "pool/")) and value.dim():
            raise Violation(f"aux entry {name!r} has shape {tuple(value.shape)}, must be a scalar")
        if not name.startswith(("loss/", "pool/")) and value.requires_grad:
            raise Violation(f"aux entry {name!r} carries a gradient: only loss/ and pool/ do")
    sums = {name: value for name, value in aux.items() if name.startswith("sum/")}
    part.after_step(sums)
    pools = {name: value for name, value in aux.items() if name.startswith("pool/")}
    for name in part.pooled_losses(pools):
        if name.split("/")[0] not in ("loss", "metric"):
            raise Violation(f"pooled_losses gives {name!r}: names begin with loss/ or metric/")
    return f"y as x; aux: {', '.join(aux) or 'empty'}"


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
            alone[0, 0], y[1, 4], VALUES[torch.float64], "a token alone against among"
        )
        documents = torch.full((BATCH, 9), -1)
        documents[:, 2:7] = 0
        padded, counts = part(x, context_of(x, documents)[0])
        trimmed, want = part(x[:, 2:7], context_of(x[:, 2:7])[0])
        what = "tokens beside padding against the same without"
        error = max(error, expect_same(padded[:, 2:7], trimmed, VALUES[torch.float64], what))
        for name, value in want.items():
            what = f"aux entry {name!r} with padding against without: padding is not counted"
            error = max(error, expect_same(counts[name], value, VALUES[torch.float64], what))
    return f"float64 {error:.0e}; gradient to other tokens exactly 0"


def feed_forward_gradients(subject: Subject) -> str:
    """Autograd gives the derivative."""
    part = subject.make()
    x = subject.draw(2, 6, subject.dim)
    context, _ = context_of(x)
    error = expect_true_gradient(lambda x: part(x, context)[0], part, x, subject)
    return f"against a finite difference {error:.0e}"


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
        worst = max(worst, expect_same(got, want, VALUES[dtype], f"{dtype} against float32"))
    return f"bfloat16 and float16 {worst:.0e}"


def feed_forward_repeats(subject: Subject) -> str:
    """The same seed and input give the same bits, saved and loaded too."""
    part, twin = subject.make(), subject.make()
    fresh = reloaded(part, subject.make())
    x = subject.draw(2, 9, subject.dim)
    context, _ = context_of(x)
    with torch.no_grad():
        want = part(x, context)[0]
        for name, other in (("a second call", part), ("a twin", twin), ("a reloaded one", fresh)):
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
        k = routing.indices.shape[-1]
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
        total = routing.probabilities.sum(-1)
        expect_same(total, torch.ones_like(total), 1e-5, "probabilities of a token must sum to 1")
    return f"{k} of {experts} experts a token, float32 at least"


def router_tokens(subject: Subject) -> str:
    """Each token alone."""
    router = subject.make().eval()
    x = subject.draw(BATCH, 9, subject.dim).requires_grad_()
    routing = router(x, context_of(x)[0])
    (gradient,) = gradients_of(routing.raw_logits[13].square().sum(), [x])
    own = torch.zeros(BATCH, 9, dtype=torch.bool)
    own[1, 4] = True
    expect_zero(gradient[~own], "a token's routing sees another token")
    with torch.no_grad():
        alone = router(x[1:2, 4:5], context_of(x[1:2, 4:5])[0])
    error = expect_same(
        alone.weights[0], routing.weights[13], VALUES[torch.float64], "alone against among"
    )
    return f"float64 {error:.0e}"


def router_casts(subject: Subject) -> str:
    """A cast changes no buffer."""
    expect_buffers_survive(subject.make(torch.float32))
    return "no buffer changes"
