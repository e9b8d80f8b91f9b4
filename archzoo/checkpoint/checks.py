"""What a file says, held to what a decoder and a task take, before anything is built."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from inspect import formatannotation, signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from archzoo.checkpoint.archives import Stored, check_memory
from archzoo.decoder import Decoder
from archzoo.parts import SLOTS, find
from archzoo.trust import shown

MISFIT = "the weights do not fit the configuration"
# The largest sizes that a checkpoint may have: more than any model uses, less than fills a memory.
LARGEST_LOOPS = 10_000
MOST_ADAPTERS, MOST_TARGETS = 64, 10_000
LARGEST = {
    "batch_size": 2**16,
    "validation_examples": 2**20,
    "test_examples": 2**20,
    "ood_examples": 2**20,
    "digits": 2**10,
    "numbers": 2**6,
    "lines": 2**16,
    "context_length": 2**26,
}


def check_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse weights of a run that diverged.

    Args:
        weights: By name.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: Some are not finite; the message names the file and the first of them.
    """
    for name, tensor in weights.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(
                f"{path}: {bad:,} of the {tensor.numel():,} numbers of {name} are not finite: the "
                "run diverged; take an earlier checkpoint of it"
            )


def check_settings(config: dict[Any, Any], path: Path) -> None:
    """Refuse settings of a decoder that are of another type than it takes."""
    parameters = signature(Decoder, eval_str=True).parameters
    for name, value in config.items():
        if name not in parameters:
            continue  # which building answers by the nearest known one
        if name in ("vocab_size", "dim", "depth", "heads"):
            if type(value) is not int or not 1 <= value < 2**63:
                raise ValueError(
                    f"{path}: {name}={shown(value)}: a decoder needs an integer of at least 1"
                )
        elif name == "adapters" and isinstance(value, dict):
            if len(value) > MOST_ADAPTERS:
                raise ValueError(f"{path}: {len(value)} adapters are more than {MOST_ADAPTERS}")
            for entry in value.values():
                _check_part("adapter", entry, path)
                _check_targets(entry, path)
        elif name in SLOTS:
            _check_part(name, value, path)
            if name == "adapter":
                _check_targets(value, path)
        elif not _fits(value, parameters[name].annotation):
            kind = formatannotation(parameters[name].annotation)
            raise ValueError(f"{path}: {name}={shown(value)} is not valid: it takes {kind}")
    for entry in config.get("pattern") or []:
        _check_part("mixer", entry, path)
    for name, most in (("loops", LARGEST_LOOPS), ("context_length", LARGEST["context_length"])):
        if (config.get(name) or 1) > most:
            raise ValueError(f"{path}: {name}={shown(config[name])} is more than {most:,}")


def _check_targets(spec: Any, path: Path) -> None:
    """Refuse regular expressions, which can take for ever; a model that is saved holds paths."""
    arguments = (spec.get("init_args") or {}) if isinstance(spec, dict) else {}
    targets, layers = (arguments.get(name) or [] for name in ("targets", "layers"))
    for name, values in (("targets", targets), ("layers", layers)):
        if isinstance(values, list) and len(values) > MOST_TARGETS:
            raise ValueError(f"{path}: an adapter has {len(values):,} {name}, more than is read")
    for target in targets if isinstance(targets, list) else []:
        if not (isinstance(target, str) and re.fullmatch(r"[\w.]+", target)):
            raise ValueError(
                f"{path}: an adapter's target {shown(target)} is not a block's name or path: a "
                "file may hold no regular expression"
            )


def _check_part(slot: str, spec: Any, path: Path) -> None:
    """Refuse a part that is not described, or whose arguments are of other types than it takes."""
    if spec is None or isinstance(spec, str):
        return
    arguments = spec.get("init_args") if isinstance(spec, dict) else ()
    if (
        not isinstance(spec, dict)
        or not isinstance(spec.get("class_path"), str)
        or not isinstance(arguments, dict | None)
    ):
        raise ValueError(
            f"{path}: {slot}={shown(spec)} is not valid: it takes a part's name, or "
            "its class_path and init_args"
        )
    try:
        parameters = signature(find(slot, spec["class_path"]), eval_str=True).parameters
    except ValueError as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    except NameError:  # a user's own part whose annotations mean nothing here
        return
    for name, value in (arguments or {}).items():
        if name in SLOTS:
            _check_part(name, value, path)
        elif name in parameters and not _fits(value, parameters[name].annotation):
            kind = formatannotation(parameters[name].annotation)
            whose = f"{path}: {spec['class_path']}"
            raise ValueError(f"{whose}: {name}={shown(value)} is not valid: it takes {kind}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether plain data fits an annotation; one that is not of plain data fits anything."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, entry) for entry in inner)
    if origin is Literal:
        return any(type(value) is type(entry) and value == entry for entry in inner)
    if annotation is float:
        return type(value) in (int, float)
    if annotation is int:
        return type(value) is int and abs(value) < 2**63
    if annotation in (bool, str, types.NoneType, None):
        return type(value) is (types.NoneType if annotation is None else annotation)
    if origin in (list, tuple):
        kinds = [kind for kind in inner if kind is not ...]
        return isinstance(value, list | tuple) and all(
            any(_fits(entry, kind) for kind in kinds) for entry in value
        )
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, inner[1]) for entry in value.values())
    return True


def check_sizes(config: dict[Any, Any], held: Mapping[str, Stored], path: Path) -> None:
    """Refuse sizes that are not those of the weights' header, before anything is built.

    Args:
        config: Arguments of `Decoder`.
        held: What the weights' header says of each, by name.
        path: Of the file, for messages.
    """
    misfit = f"{path}: {MISFIT}"
    tables = ("head.weight", "embedding.weight", "embedding.embedding.weight")
    table = next((held[name] for name in tables if name in held), None)
    if table is None or len(table.shape) != 2:
        raise ValueError(f"{misfit}: they miss head.weight")
    vocab_size, dim, depth = config.get("vocab_size"), config.get("dim"), config.get("depth")
    if table.shape[0] != vocab_size:
        raise ValueError(
            f"{path}: the weights are of a vocabulary of {table.shape[0]} tokens, and the "
            f"configuration says {vocab_size}"
        )
    if table.shape[1] != dim:
        raise ValueError(f"{misfit}: they have {table.shape[1]} columns where dim={dim} is said")
    layers = {found[1] for name in held if (found := re.match(r"blocks\.(\d{1,9})\.", name))}
    if depth is None or depth > len(layers):
        raise ValueError(f"{misfit}: they miss blocks.{len(layers)}.*, for it says depth={depth}")
    pattern = config.get("pattern")
    if pattern and len(pattern) > max(depth, 64):
        raise ValueError(f"{path}: pattern has {len(pattern):,} mixers for depth={depth}")
    check_memory(sum(tensor.nbytes for tensor in held.values()), path)


def check_task(task: Any, path: Path) -> None:
    """Refuse what describes no task, or one that would fill a memory."""
    if task is None:
        return
    if (
        not isinstance(task, dict)
        or not isinstance(task.get("class_path"), str)
        or not isinstance(task.get("init_args"), dict)
    ):
        raise ValueError(f"{path}: task={shown(task)} is not valid: it takes class_path, init_args")
    _check_amounts(task["init_args"], path)


def _check_amounts(arguments: Any, path: Path) -> None:
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            most = LARGEST.get(name) if isinstance(name, str) else None
            if most is not None and type(value) in (int, float) and not value <= most:
                raise ValueError(
                    f"{path}: its task's {name}={shown(value)} is more than the {most:,} that are "
                    "read from a checkpoint"
                )
            _check_amounts(value, path)
    elif isinstance(arguments, list | tuple):
        for entry in arguments:
            _check_amounts(entry, path)


def first_line(error: Exception) -> str:
    """What an error says, in a line; of one that says nothing, its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def text_or_none(value: Any) -> str | None:
    """A value of a file, where it is text."""
    return value if isinstance(value, str) else None
