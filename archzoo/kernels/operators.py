"""Kernels as operators: what a compiler takes into its graph without looking inside.

In eager mode the kernels run below a `torch.autograd.Function`, since the way through torch's
dispatcher costs more than most launches. A compiler cannot follow a launch, and is given the same
function as an operator, with the shapes of its results and its gradient. Whoever calls asks
`compiling`, and what is exported is made of torch's own operations wherever there are such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from archzoo.derivatives import exporting

_library = torch.library.Library("archzoo", "FRAGMENT")


def compiling() -> bool:
    """Whether a graph is being made that runs in this process: operators of ours may be in it."""
    return torch.compiler.is_compiling() and not exporting()


def define(
    schema: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    gradients: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """An operator ``archzoo::name``.

    Args:
        schema: Name, parameters and results, as `torch.library` reads them. No result may share
            memory with a parameter or another result.
        compute: Computes it.
        shapes: Makes empty results, strides included, of the same arguments.
        keep: ``keep(ctx, inputs, output)``, for the backward pass. None: it has none.
        gradients: ``gradients(ctx, *grads)``, of each parameter; made of operators, too.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, compute, key)
    torch.library.register_fake(f"archzoo::{name}", shapes, lib=_library)
    if keep is not None and gradients is not None:
        torch.library.register_autograd(
            f"archzoo::{name}", gradients, setup_context=keep, lib=_library
        )
    operator: Callable[..., Any] = getattr(torch.ops.archzoo, name)
    return operator
