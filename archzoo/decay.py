"""Which parameters weight decay may shrink."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from archzoo.block import Bias, Embedding, Rotary


def spared_of_decay(module: nn.Module, decays: bool = True) -> set[int]:
    """The ids of parameters that some module holding them says do not decay.

    A module says so of all that it holds by ``decays = False``, or of single parameters of its own
    by their names, ``decays = {"magnitude": False}``. Embeddings, rotaries and biases do not decay
    unless they say otherwise.

    Args:
        module: Whose parameters.
        decays: What the modules around it say.
    """
    said = getattr(module, "decays", None)
    by_name = said if isinstance(said, Mapping) else {}
    if isinstance(said, bool):
        decays = said
    elif isinstance(module, Embedding | Rotary | Bias):
        decays = False
    found = {
        id(parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if not by_name.get(name, decays)
    }
    for child in module.children():
        found |= spared_of_decay(child, decays)
    return found


def decaying(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that decay: matrices, and stacks of them, that nothing spares."""
    spared = spared_of_decay(module)
    return [p for p in module.parameters() if p.dim() >= 2 and id(p) not in spared]
