"""Checkpoints of shards, as torch.distributed.checkpoint writes them, read without running code."""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo.checkpoint.runs import WHOLE, sign

INDEX = ".metadata"  # torch's pickle: where each chunk of each tensor lies
REST = "meta.pt"  # Lightning's: all of the checkpoint but weights and the optimizer's state
NAMES = "parameter_names"  # in it: of all parameters, in the model's order
OPTIMIZER = "optimizer_"  # of an entry's name, before the optimizer's number

_OF_TORCH = "torch.distributed.checkpoint"
#: What an index may name. None of it does more than hold what it is given.
CLASSES = {
    f"{_OF_TORCH}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_OF_TORCH}.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(n for n, v in vars(torch).items() if isinstance(v, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


def is_sharded(place: Path) -> bool:
    """Whether a directory holds a checkpoint of shards."""
    return (place / INDEX).is_file() and (place / REST).is_file()


def make_whole(place: Path) -> Path:
    """The file of all of a checkpoint of shards, in its directory: made when it is first asked for.

    Weights and the optimizer's state are put together, as ModelParallelStrategy writes them whole.
    So every command reads it, and a run is resumed from it by any number of processes.

    Args:
        place: The directory.

    Raises:
        ValueError: It is damaged, or holds more than data.
        OSError: The file cannot be written.
    """
    whole = place / WHOLE
    if whole.is_file():
        return whole
    content = read_shards(place)
    sign(content)
    partial = place / f"{WHOLE}.{os.getpid()}.partial"
    try:
        torch.save(content, partial)
        partial.replace(whole)  # several processes may do this: each sees none or all of it
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{whole} cannot be written, which puts the shards beside it together: {error}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return whole


def read_shards(place: Path) -> dict[str, Any]:
    """A checkpoint of shards as ModelParallelStrategy writes it whole.

    Args:
        place: The directory.

    Raises:
        ValueError: It is damaged, or holds more than data.
    """
    try:
        content: dict[str, Any] = torch.load(place / REST, map_location="cpu", weights_only=True)
        nested: dict[str, Any] = {}
        for path, value in _entries(place):
            *parents, last = path
            at = nested
            for name in parents:
                at = at.setdefault(name, {})
            at[last] = value
        number = {name: n for n, name in enumerate(content.pop(NAMES))}
        optimizers = sorted(name for name in nested if name.startswith(OPTIMIZER))
        content["state_dict"] = nested["state_dict"]
        content["optimizer_states"] = [_by_number(nested[name], number) for name in optimizers]
    except Exception as error:  # of many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{place} is damaged, or holds more than data: {reason}") from None
    return content


class _Index(pickle.Unpickler):
    """Makes nothing but what an index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _entries(place: Path) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each entry, by the names and numbers that lead to it."""
    index = _Index(io.BytesIO((place / INDEX).read_bytes())).load()
    chunks: dict[str, list[tuple[Any, Any]]] = {}
    for key, stored in index.storage_data.items():
        chunks.setdefault(key.fqn, []).append((key, stored))
    for name, described in index.state_dict_metadata.items():
        found = [(key, _stored(place, stored)) for key, stored in chunks[name]]
        if hasattr(described, "chunks"):
            yield index.planner_data[name], _joined(name, described, found)
        else:
            yield index.planner_data[name], found[0][1]


def _stored(place: Path, stored: Any) -> Any:
    """One chunk of a file."""
    name = stored.relative_path
    if Path(name).name != name or stored.transform_descriptors:
        raise ValueError(f"a chunk lies in {name}")
    with open(place / name, "rb") as file:
        file.seek(stored.offset)
        content = file.read(stored.length)
    if len(content) != stored.length:
        raise ValueError(f"{name} is cut short")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _joined(name: str, described: Any, chunks: list[tuple[Any, Any]]) -> Tensor:
    """A tensor of its chunks, which must fill it."""
    if sum(chunk.numel() for _, chunk in chunks) != math.prod(described.size):
        raise ValueError(f"the chunks of {name} do not make a tensor of {tuple(described.size)}")
    whole = torch.empty(described.size, dtype=described.properties.dtype)
    for key, chunk in chunks:
        at = zip(key.offset or (), chunk.shape, strict=True)
        part = whole[tuple(slice(start, start + length) for start, length in at)]
        if part.shape != chunk.shape:
            raise ValueError(f"a chunk of {name} lies outside of it")
        part.copy_(chunk)
    return whole


def _by_number(state: dict[str, Any], number: dict[str, int]) -> dict[str, Any]:
    """An optimizer's state with its parameters' numbers for their names, as FSDP2's whole files."""
    groups = [state["param_groups"][n] for n in sorted(state["param_groups"])]
    return {
        "state": {number[name]: held for name, held in state.get("state", {}).items()},
        "param_groups": [
            group | {"params": [number[name] for name in group["params"]]} for group in groups
        ],
    }
