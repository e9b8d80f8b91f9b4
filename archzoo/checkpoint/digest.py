"""One hash of weights, which says whether they are those that were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archzoo.compiled import own_name

DIGEST = "digest"  # in the weights' metadata, and in a run's checkpoint


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """One hash of weights: of their names, shapes, dtypes and bytes, wherever they lie.

    Args:
        weights: By name, as a decoder's `state_dict` gives them.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by their own names, whichever of its modules were compiled."""
    return {own_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def check_digest(weights: Mapping[str, Tensor], digest: Any, path: Path) -> None:
    """Refuse weights that are not those that were written; without a digest they are foreign.

    Args:
        weights: By name.
        digest: Of the weights that were written. None: the file has none, and all is well.
        path: Of the file, for messages.
    """
    if digest is not None and weights_digest(weights) != digest:
        raise ValueError(
            f"{path}: the weights are not those that were written, by their digest: the file is "
            "damaged or was edited; get it anew, or take the digest out of it if the change is "
            "wanted"
        )
