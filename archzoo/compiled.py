"""What `torch.compile(model)` returns: it holds the model, and gives its weights longer names."""

from __future__ import annotations

from typing import TypeVar

WITHIN = "_orig_mod"  # torch's name of the model

Model = TypeVar("Model")


def uncompiled(model: Model) -> Model:
    """The model that was compiled; another one is given back as it is."""
    found: Model = getattr(model, WITHIN, model)
    return found


def own_name(name: str) -> str:
    """A weight's name in the model itself, whichever of its modules were compiled."""
    return name.replace(f"{WITHIN}.", "")
