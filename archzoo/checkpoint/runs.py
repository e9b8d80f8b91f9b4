"""Lightning's checkpoints, which are for resuming a run: read without running code."""

from __future__ import annotations

import os
import re
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from archzoo.checkpoint.archives import Archive, Stored
from archzoo.checkpoint.bases import (
    BASE,
    DTYPES,
    Base,
    base_weights,
    check_base,
    find_base,
    parse_base,
)
from archzoo.checkpoint.building import Pretrained, build_with, expected_of
from archzoo.checkpoint.checks import check_settings, check_sizes, check_task, text_or_none
from archzoo.checkpoint.digest import DIGEST, check_digest, weights_digest
from archzoo.checkpoint.pretrained import WEIGHTS, read_config, read_directory, weights_file
from archzoo.checkpoint.vocabulary import run_tokenizer
from archzoo.compiled import own_name
from archzoo.decoder import Decoder
from archzoo.trust import shown

Path_ = str | os.PathLike[str]
LAST = "last.ckpt"  # of a run's directory
WHOLE = "whole.ckpt"  # all of a checkpoint that is a directory of DeepSpeed's, in that directory
# Arguments of `Decoder` that older checkpoints do not hold.
ADDED = {"loops", "injection", "linear", "adapter", "adapters", "convolution"}
FREEZING = ("freeze", "unfreeze", "unfreeze_every")  # of a run's settings
OF_ADAPTERS = re.compile(r"^prompt\.|\.mixer\.prefix\.|\.adapter_modules\.")  # in a weight's name


def read_run(path: Path, changes: dict[str, Any], base: Path_ | None = None) -> Pretrained:
    """What a run's checkpoint holds for use; `changes` are of its decoder.

    Args:
        path: Of the file.
        changes: Arguments of the decoder instead of the checkpoint's.
        base: Where the weights lie that the file leaves out, as an adapted run's does. None: where
            they were.
    """
    with Archive(path) as archive:
        content = archive.content
        config, held = check_run(content, path)
        tokenizer = run_tokenizer(archive, path)
        record = base_in(content, path)
        beside: dict[str, Tensor] = {}
        place = None if record is None else find_base(record, base, path)
        if record is not None and place is not None:
            check_beside(path, place)
            beside = _weights_beside(record, place, path)
        sizes = {n: Stored(tuple(tensor.shape), tensor.dtype) for n, tensor in beside.items()}
        sizes |= held
        model = build_with(
            config | changes,
            sizes,
            lambda name: archive.tensor(held[name]) if name in held else beside[name],
            {name: name for name in sizes},
            path,
            content.get(DIGEST),
            held.keys(),
        )
        model.base = text_or_none(content.get("base"))
    if place is not None and not held.keys() & beside.keys():  # nothing of it has moved
        model.base_path = str(place)
    return Pretrained(model, tokenizer, content.get("task"))


def read_whole(path: Path, changes: dict[str, Any], base: Path_ | None = None) -> Pretrained:
    """What a directory of `save_pretrained` or a run's checkpoint holds for use.

    Args:
        path: Of the directory or the file.
        changes: Arguments of the decoder instead of those that it holds.
        base: As for `read_run`.
    """
    return read_directory(path, changes) if path.is_dir() else read_run(path, changes, base)


def directory_of(path: Path_) -> Path:
    """The run's directory, in which a run's checkpoint lies."""
    path = Path(path)
    return path.parent.parent if path.name == WHOLE else path.parent


def base_in(content: dict[str, Any], path: Path_) -> Base | None:
    """What a run's checkpoint says of the weights that it leaves out; None: it holds them all."""
    record = content.get(BASE)
    return None if record is None else parse_base(record, path)


def names_base(path: Path) -> bool:
    """Whether a file is a run's checkpoint that leaves out the base of its adapters."""
    with Archive(path) as archive:
        content = archive.content
        return isinstance(content, dict) and base_in(content, path) is not None


def frozen_in(path: Path) -> tuple[dict[str, Any], int]:
    """What a run's checkpoint says of freezing, by `Freezing`'s arguments, and its steps so far.

    Args:
        path: Of the file.

    Raises:
        ValueError: What it says is not of the right type.
    """
    with Archive(path) as archive:
        content = archive.content
        check_run(content, path)
    freeze, unfreeze, every = (content["hyper_parameters"].get(name) for name in FREEZING)
    steps = content.get("global_step", 0)
    for name, names in (("freeze", freeze), ("unfreeze", unfreeze)):
        listed = isinstance(names, list) and all(isinstance(entry, str) for entry in names)
        if not (names is None or listed):
            raise ValueError(f"{path}: {name}={shown(names)} is not valid: it takes names")
    for name, count in (("unfreeze_every", 1 if every is None else every), ("global_step", steps)):
        if type(count) is not int or count < (name in FREEZING):
            raise ValueError(f"{path}: {name}={shown(count)} is not valid: it takes a count")
    return {"freeze": freeze or [], "unfreeze": unfreeze or [], "every": every}, steps


def check_beside(path: Path, place: Path) -> None:
    """Refuse a run's checkpoint that does not fit the base it leaves out, before either is built.

    Args:
        path: Of the checkpoint.
        place: Of the base, a whole model.

    Raises:
        ValueError: It does not, or the base is none.
    """
    of_base = _sizes_of(place)
    with Archive(path) as archive:
        config, held = check_run(archive.content, path)
    sizes = of_base | held
    expected_of(config, sizes, {name: name for name in sizes}, path)


def _sizes_of(place: Path) -> dict[str, Stored]:
    """What a whole model's file says of each of its weights, but for those of adapters."""
    if place.is_dir():
        read_config(place)
        with weights_file(place / WEIGHTS) as (_, metadata, stored):
            held = {own_name(name): entry for name, entry in stored.items()}
            shared = {n: held[first] for n, first in metadata.items() if first in held}
            held = shared | held
    else:
        with Archive(place) as archive:
            _, held = check_run(archive.content, place)
            if base_in(archive.content, place) is not None:
                raise ValueError(
                    f"{place} is not a base: it holds adapters alone; name the model beside them"
                )
    return {name: entry for name, entry in held.items() if not OF_ADAPTERS.search(name)}


def _weights_beside(record: Base, place: Path, path: Path) -> dict[str, Tensor]:
    """The weights of a base, in the dtype in which adapters were trained beside it."""
    model = read_whole(place, {}).model.to(DTYPES[record.dtype])
    model.base_path = str(place)
    check_base(model, record, path)
    return {name: weight.detach() for name, weight in base_weights(model).items()}


def _decoder_weights(content: dict[str, Any]) -> dict[str, Any]:
    """The decoder's tensors in a run's checkpoint, by their own names."""
    named = {own_name(n): held for n, held in content["state_dict"].items() if isinstance(n, str)}
    return {
        name.removeprefix("decoder."): tensor
        for name, tensor in named.items()
        if name.startswith("decoder.")
    }


def sign(content: dict[str, Any]) -> None:
    """Put the digest of the decoder's weights into a run's checkpoint that is to be written."""
    if _is_run(content):
        content[DIGEST] = weights_digest(_decoder_weights(content))


def read_safely(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of torch holds, if that is plain data and tensors; code is refused.

    A run's checkpoint is held to what its own settings say, before its tensors are read, and to
    its digest.

    Raises:
        ValueError: The file is truncated, not a checkpoint, a pickle that would run code, or one
            whose settings do not fit its weights.
    """
    with Archive(path) as archive:
        content = archive.content
        if not isinstance(content, dict):
            kind = type(content).__name__
            raise ValueError(f"{path} is not a valid checkpoint of a run: it holds a {kind}")
        ours = _is_run(content)
        if ours:
            config, held = check_run(content, Path(path))
        if ours and base_in(content, Path(path)) is None:  # else there is nothing to hold it to
            expected_of(config, held, {name: name for name in held}, Path(path))
        content = archive.everything()
        if ours:
            check_digest(_decoder_weights(content), content.get(DIGEST), Path(path))
        assert isinstance(content, dict)
        return content


def _is_run(content: Any) -> bool:
    """Whether a checkpoint was written by archzoo's training."""
    if not isinstance(content, dict):
        return False
    arguments, state = content.get("hyper_parameters"), content.get("state_dict")
    names = signature(Decoder).parameters.keys()
    return (
        isinstance(arguments, dict)
        and isinstance(state, dict)
        and not names - arguments.keys() - ADDED
    )


def check_run(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """A run's settings of its decoder and what it holds of it, of the right types and sizes."""
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} is not a valid checkpoint of a run: it holds a {kind}")
    if not _is_run(content):
        raise ValueError(f"{path} was not written by archzoo's training")
    held = _decoder_weights(content)
    wrong = [name for name, tensor in held.items() if not isinstance(tensor, Stored)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is not a tensor")
    # The decoder's arguments are among the optimizer's, its weights among the metrics' sums.
    config = {n: content["hyper_parameters"].get(n) for n in signature(Decoder).parameters}
    check_settings(config, path)
    if base_in(content, path) is None:
        check_sizes(config, held, path)
    check_task(content.get("task"), path)
    return config, held
