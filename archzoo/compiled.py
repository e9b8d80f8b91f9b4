"""What is asked of torch's compiler, and what `torch.compile(model)` returns.

That holds the model, and gives its weights longer names.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

WITHIN = "_orig_mod"  # torch's name of the model

Model = TypeVar("Model")


def uncompiled(model: Model) -> Model:
    """The model that was compiled; another one is given back as it is."""
    found: Model = getattr(model, WITHIN, model)
    return found


def own_name(name: str) -> str:
    """A weight's name in the model itself, whichever of its modules were compiled."""
    return name.replace(f"{WITHIN}.", "")


def options(graphs: bool = False) -> dict[str, Any]:
    """What is asked of torch's compiler, beside its own choices.

    Args:
        graphs: Whether what is compiled is captured in CUDA graphs, and replayed.
    """
    from torch._inductor import config  # takes a while to import

    from archzoo.graph_passes import WEIGHT_GRADIENTS  # imports it

    # Loops are put in order before they are fused, and not after: else the cast of the residual
    # stream's gradient, 23 kernels and 0.8 of 60 ms of a step, stays apart from what makes it.
    name = "loop_ordering_after_fusion"
    given: dict[str, Any] = {name: False} if hasattr(config, name) else {}
    # Rows that are no multiple of 128 bytes are padded else, and copied for each kernel of ours,
    # which takes rows without: 0.5 of 11.1 ms of a step of transformer_small, 2,736 wide.
    given["comprehensive_padding"] = False
    if torch.version.hip is None:  # where such a product was never run
        given["post_grad_custom_pre_pass"] = WEIGHT_GRADIENTS
    if graphs:
        # A graph is of one shape: batches of many lengths are launched kernel by kernel. With
        # partitions torch (2.11, 2.13) takes the loop variables of kernels for such lengths, cuts
        # a step of skywork_base into 73 parts, and records them anew at each step.
        given |= {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
        if hasattr(config, "graph_partition"):
            given["graph_partition"] = False
    return given


def as_fit_asks(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of `torch.compile`, with `options` where they leave all to it, on an NVIDIA GPU.

    Args:
        given: The arguments.
        device: Of the model.
    """
    ours = device.type == "cuda" and torch.version.hip is None
    if not ours or any(given.get(name) is not None for name in ("backend", "mode", "options")):
        return given
    keep_traced_functions()
    return given | {"options": options()}


def keep_traced_functions() -> None:
    """Let torch's cache on disk hold graphs that an autograd.Function of ours was traced into.

    What it looks up is the traced backward pass, too, so that another one is another graph. Else
    each start of a model of attention traces it anew.
    """
    from torch._functorch import config

    name = "autograd_cache_allow_custom_autograd_functions"
    if hasattr(config, name):
        setattr(config, name, True)
