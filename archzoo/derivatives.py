"""Second derivatives and function transforms: where fast forms give way to plain ones.

A kernel, or an `autograd.Function` written for speed, knows one derivative of ordinary tensors. Its
plain form is made of torch's own operations, and so has all of them and goes through `torch.func`
(grad, vmap, jvp and what is built of them) and forward-mode differentiation. Two questions decide:

* `transformed`, before a fast form runs: is there a transform under way? Then the plain form runs.
* `differentiated_again`, in a fast form's backward: is a derivative of this derivative wanted, or
  is it itself transformed? Then `plain_gradients` makes the gradients of the plain form.

`torch.autograd.function.once_differentiable` answers neither: it returns constants where the
incoming gradient needs none, and `torch.autograd.grad` drops its error from the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_under_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active


def transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is under way.

    Neither depends on whether gradients are on. Under a compiler they are those that it traces:
    it would trace a fast form in them as it is, and the tangent of an operator of ours as 0.
    """
    return _under_functorch() or forward_ad._current_level >= 0  # dual numbers


# Dynamo asks while it traces, and puts no call into its graph: that would name an address, by which
# no cache finds the graph again. It is torch.compiler.assume_constant_result without its import.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def followed() -> bool:
    """Whether a compiler or a transform follows what is done; it takes 0.15 us in eager mode.

    Then no number can be looked at, and what is made belongs to whoever follows.
    """
    return torch.compiler.is_compiling() or transformed()


def exporting() -> bool:
    """Whether `torch.export` makes a graph for any length, of torch's own operations.

    `torch.compiler.is_exporting` says yes under every compiler up to torch 2.12.
    """
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def differentiated_again() -> bool:
    """In a backward pass: whether it is to be differentiated (``create_graph=True``), or mapped."""
    return torch.is_grad_enabled() or transformed()


def plain_gradients(
    compute: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``compute(*inputs)``, to be differentiated again.

    Args:
        compute: The plain form.
        inputs: What it takes; those without gradient get None.
        grads: Of its outputs; None where there is no incoming gradient.
    """
    with torch.enable_grad():
        # Aliases: an input given twice gets the gradient of each occurrence separately.
        given = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        made = compute(*given)
        outputs = made if isinstance(made, tuple) else (made,)
        pairs = [
            (y, grad)
            for y, grad in zip(outputs, grads, strict=True)
            if grad is not None and y.requires_grad
        ]
        learn = [x for x in given if x is not None and x.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                learn,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
            if pairs
            else [None] * len(learn)
        )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in given)
