"""How rules are measured: what raises `Violation` where two values differ, and by how much."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from archzoo import block as interface
from archzoo.contract.subject import Subject
from archzoo.documents import Context

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Violation(Exception):
    """A rule is broken; the message says which, and by how much."""


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``: relative RMS; infinite where a value is not finite."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    scale = want.norm().item()
    return float((got - want).norm().item() / (scale if scale else 1.0))


def expect_same(got: Tensor, want: Tensor, tolerance: float, what: str) -> float:
    """The error, or a `Violation` that names what differs.

    Args:
        got: Any tensor.
        want: What it should be.
        tolerance: Largest relative error, as `relative_error` measures it.
        what: Of which the violation speaks.
    """
    if got.shape != want.shape:
        raise Violation(f"{what}: shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    if not got.isfinite().all():
        raise Violation(f"{what}: NaN or infinite values")
    error = relative_error(got, want)
    if not error <= tolerance:
        raise Violation(f"{what}: relative RMS error {error:.1e}, allowed {tolerance:.0e}")
    return error


def expect_zero(gradient: Tensor | None, what: str) -> None:
    """A `Violation` unless a gradient is exactly zero (None: no path at all)."""
    if gradient is not None and gradient.abs().max() != 0:
        raise Violation(f"{what}: gradient {gradient.abs().max():.1e}, must be exactly 0")


def context_of(
    x: Tensor, documents: Tensor | None = None, cursor: Any = None
) -> tuple[Context, Any]:
    """The context of x (batch, time, ...) after `cursor`, and the cursor that follows.

    Args:
        x: (batch, time, ...).
        documents: (batch, time) int, or None: one document a row.
        cursor: Where the text before x ended; None: nothing came before.
    """
    return interface.make_context(
        x.shape[0], x.shape[1], documents=documents, cursor=cursor, device=x.device
    )


def leaves_of(state: Any) -> Iterator[Any]:
    """The tensors, ints and whatever else a state holds."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for entry in state:
            yield from leaves_of(entry)
    else:
        yield state


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors a state holds."""
    return [leaf for leaf in leaves_of(state) if isinstance(leaf, Tensor)]


def gradients_of(scalar: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a scalar by some tensors; zeros where no path leads.

    The graph stays: the next call may need a part of it.
    """
    if not scalar.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wanted]
    found = torch.autograd.grad(scalar, wanted, allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(wanted, found, strict=True)
    ]


def expect_true_gradient(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, subject: Subject
) -> float:
    """Hold autograd to a finite difference, along one random direction of x and all weights.

    Args:
        function: Of x, by the module's weights.
        module: Whose weights get gradients too.
        x: Any floats, in float64.
        subject: Whose generator draws the direction.
    """
    x = x.clone().requires_grad_()
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    y = function(x)
    weights = subject.draw(*y.shape)
    slopes = gradients_of((y * weights).sum(), wanted)
    directions = [subject.draw(*tensor.shape) for tensor in wanted]
    along = sum(float((slope * d).sum()) for slope, d in zip(slopes, directions, strict=True))
    step, ends = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):  # to one side, then twice as far back to the other
            for tensor, direction in zip(wanted, directions, strict=True):
                tensor.add_(direction, alpha=sign * step)
            ends.append(float((function(x) * weights).sum()))
        for tensor, direction in zip(wanted, directions, strict=True):
            tensor.add_(direction, alpha=step)
    measured = (ends[0] - ends[1]) / (2 * step)
    # Along a random direction the slope is about as large as the whole gradient is long.
    scale = sum(float(slope.square().sum()) for slope in slopes) ** 0.5 or 1.0
    error = abs(along - measured) / scale
    if not error <= 1e-5:
        raise Violation(
            f"autograd gives the slope {along:.6g} along a random direction, a finite difference "
            f"{measured:.6g}: the backward pass must be the derivative of the forward pass"
        )
    return error


def expect_live_weights(module: nn.Module, scalar: Tensor) -> None:
    """Every weight that is to be trained must get a gradient, and a finite one."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, slope in zip(named, gradients_of(scalar, list(named.values())), strict=True):
        if not slope.isfinite().all():
            raise Violation(f"the gradient of the parameter {name!r} is not finite")
        if not slope.abs().max():
            raise Violation(f"the parameter {name!r} gets no gradient: it is never trained")


def expect_untouched(given: Tensor, before: Tensor, what: str) -> None:
    """A part may not write into what it is given.

    Args:
        given: What the part was given, after the call.
        before: A copy of it from before.
        what: Of which the violation speaks.
    """
    if not torch.equal(given, before):
        raise Violation(f"{what} is changed in place: others still need it")


def expect_buffers_survive(module: nn.Module) -> None:
    """No number that a cast would round may live in a buffer (or a frozen parameter)."""
    kept = dict(module.named_buffers())
    kept |= {name: p for name, p in module.named_parameters() if not p.requires_grad}
    before = {name: tensor.detach().clone() for name, tensor in kept.items()}
    rounded = copy.deepcopy(module).bfloat16()
    after = dict(rounded.named_buffers()) | dict(rounded.named_parameters())
    for name, tensor in before.items():
        if not torch.equal(after[name].to(tensor.dtype), tensor):
            raise Violation(
                f"the buffer {name!r} changes under .bfloat16(): positions, decays and counters "
                "must not live in a float buffer (build them per call with block.constant), or "
                "must be listed in KeepsFloat32.float32_names"
            )


def saved_and_loaded(data: Any) -> Any:
    """What comes back from a file, loaded without running code."""
    file = io.BytesIO()
    torch.save(data, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(module: nn.Module, fresh: AnyModule) -> AnyModule:
    """Save a module's weights, and load them into another that had different ones."""
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1.0)
    fresh.load_state_dict(saved_and_loaded(module.state_dict()))
    return fresh


def by_dtype(errors: dict[torch.dtype, float]) -> str:
    """The error of each dtype, for a report."""
    return ", ".join(f"{str(d).removeprefix('torch.')} {error:.0e}" for d, error in errors.items())


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
