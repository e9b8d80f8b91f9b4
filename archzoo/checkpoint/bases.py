"""The base of adapters: the weights that they stand beside, known by their digest.

A file of adapters holds no weights of the base. It says where they were read from, and their
digest; nothing else is taken for them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archzoo.adapters.attach import adapter_modules
from archzoo.checkpoint.building import names_in_float32
from archzoo.checkpoint.digest import own_weights, weights_digest
from archzoo.compiled import own_name
from archzoo.decoder import Decoder
from archzoo.trust import check_path, shown

BASE = "base_weights"  # in a run's checkpoint that holds adapters alone
WAY_OUT = (
    "say where it is: --model.weights PLACE for fit, validate, test and predict, --base PLACE for "
    "generate, show and adapter, base=PLACE in Python"
)
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32)}
DTYPES |= {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16)}


class Base(NamedTuple):
    """What a file of adapters says of their base.

    Attributes:
        path: Where it was read from: relative to the current directory, as every path in settings,
            or absolute. None: nowhere.
        digest: `weights_digest` of its weights in the dtype.
        dtype: Such as "float32": in which the adapters were trained beside it.
    """

    path: str | None
    digest: str
    dtype: str

    def __str__(self) -> str:
        where = "" if self.path is None else f" (read from {self.path})"
        return f"{self.digest[:12]}{where}"


def base_weights(decoder: Decoder) -> dict[str, Tensor]:
    """A decoder's weights by name, without those of adapters."""
    of_adapters = tuple(f"{own_name(path)}." for path, _ in adapter_modules(decoder))
    weights = own_weights(decoder)
    return {name: w for name, w in weights.items() if not name.startswith(of_adapters)}


def base_of(decoder: Decoder) -> Base:
    """The base of a decoder's adapters, or the decoder itself where it has none."""
    dtype = str(decoder.dtype).removeprefix("torch.")
    return Base(decoder.base_path, base_digest(decoder, decoder.dtype), dtype)


def base_digest(decoder: Decoder, dtype: torch.dtype) -> str:
    """The digest of a decoder's base as it would be in a dtype."""
    kept, weights = names_in_float32(decoder), base_weights(decoder)
    low = dtype in (torch.bfloat16, torch.float16)
    for name, weight in weights.items():
        if weight.is_floating_point():
            weights[name] = weight.detach().to(torch.float32 if low and name in kept else dtype)
    return weights_digest(weights)


def check_base(decoder: Decoder, wanted: Base, path: Path) -> None:
    """Refuse a decoder that is not the base of a file's adapters.

    Args:
        decoder: With or without adapters.
        wanted: What the file says.
        path: Of the file, for messages.
    """
    found = base_digest(decoder, DTYPES[wanted.dtype])
    if found != wanted.digest:
        lower = DTYPES[wanted.dtype].itemsize > decoder.dtype.itemsize
        cast = "; a model that is to be cast is cast afterwards" if lower else ""
        mine = "" if decoder.base_path is None else f" (read from {decoder.base_path})"
        raise ValueError(
            f"{path} belongs to another base: {wanted}, and this one is {found[:12]}{mine}, by "
            f"their digests: load the adapter beside the weights that it was trained with{cast}"
        )


def parse_base(record: Any, path: str | os.PathLike[str]) -> Base:
    """What a file says of a base, once it is sure that it says it."""
    if (
        not isinstance(record, dict)
        or record.keys() != set(Base._fields)
        or not isinstance(record["path"], str | None)
        or not isinstance(record["digest"], str)
        or not re.fullmatch("[0-9a-f]{64}", record["digest"])
        or record["dtype"] not in list(DTYPES)
    ):
        raise ValueError(
            f"{path}: its base {shown(record)} is not valid: it takes path, digest and dtype"
        )
    return Base(**record)


def find_base(record: Base, given: str | os.PathLike[str] | None, path: Path) -> Path:
    """Where the base of a file's adapters lies: where it is said to, or was.

    Args:
        record: What the file says.
        given: Where the user says that it is. None: nowhere.
        path: Of the file, for messages.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: The file names no place, or one that a file may not name.
    """
    if given is not None:
        return Path(given)
    if record.path is None:
        raise ValueError(f"{path} holds adapters alone and names no base: {WAY_OUT}")
    try:
        check_path(record.path, always=True)
    except ValueError as error:
        raise ValueError(f"{path}: its base {error}: {WAY_OUT}") from None
    if not Path(record.path).exists():
        raise FileNotFoundError(
            f"{path} holds adapters alone, and their base {shown(record.path)} is not there, seen "
            f"from the current directory: {WAY_OUT}"
        )
    return Path(record.path)
