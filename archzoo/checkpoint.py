"""Models on disk: a directory of plain files, for use and for handing on.

::

    model/
      config.json         {"archzoo": version, "decoder": {...}, "tokenizer": file, "task": {...}}
      model.safetensors   the weights, shared ones once
      tokenizer.json      or tokenizer.model, where there is a tokenizer

``decoder`` holds the arguments of `Decoder`, every part as ``class_path`` and ``init_args``, and
among them ``context_length``, the longest text seen in training.

Lightning's checkpoints, which are for resuming a run, are read as well. Nothing is ever unpickled
but tensors, numbers, strings and containers of them. A part from outside the zoo is imported by the
path that the configuration names, which runs that module: it must be installed here, and nothing
that comes with a checkpoint is.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import archzoo
from archzoo.decoder import Decoder
from archzoo.parts import find
from archzoo.registry import build_decoder

if TYPE_CHECKING:
    from archzoo.tasks.stream import Task
    from archzoo.tasks.tokenizers import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ADDED = {"loops", "injection"}  # arguments of `Decoder` that older checkpoints do not hold


class Pretrained(NamedTuple):
    """All that a checkpoint holds for use.

    Attributes:
        model: In evaluation mode.
        tokenizer: Or None.
        task: What the model was trained on, ``{"class_path": ..., "init_args": {...}}``, or None.
    """

    model: Decoder
    tokenizer: Tokenizer | None
    task: dict[str, Any] | None


# ---------------------------------------------------------------------------- writing


def save_pretrained(
    directory: str | os.PathLike[str],
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    task: dict[str, Any] | None = None,
) -> None:
    """Write a model for use: configuration, weights and tokenizer.

    Everything is written beside the directory first and then moved in, so that a full disk leaves
    what was there. Other files in the directory stay.

    Args:
        directory: It is made where it is missing.
        model: To write, in its own dtypes.
        tokenizer: To write, or None.
        task: What the model was trained on, as `Task.config` gives it. None: `Decoder.task`.

    Raises:
        ValueError: A part that could not be found again, or a tokenizer of more tokens than the
            model knows.
        OSError: The files cannot be written; nothing has changed.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{directory} is a file: give a directory")
    _check_vocabulary(model, tokenizer, str(directory))
    _check_parts(model.config)
    files = tokenizer.files() if tokenizer is not None else {}
    config = {
        "archzoo": archzoo.__version__,
        "decoder": model.config,
        "tokenizer": next(iter(files), None),
        "task": model.task if task is None else task,
    }
    files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    tensors, shared = _tensors(model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
            place = Path(partial)
            save_file(tensors, place / WEIGHTS, metadata={"format": "pt", **shared})
            for name, content in files.items():
                (place / name).write_bytes(content)
            target.mkdir(exist_ok=True)
            for name in (WEIGHTS, *files):  # the configuration last: it makes the others a model
                (place / name).replace(target / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the model cannot be written to {directory}: {error}") from None


def _tensors(model: Decoder) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's tensors, each once, and {other name: the name that it is stored under}."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, shared


def _check_parts(config: dict[str, Any]) -> None:
    """Refuse a part that `Decoder(**config)` would not find, such as a class in a function."""
    slots = ("mixer", "feed_forward", "embedding", "rotary", "bias")
    named = [(slot, config[slot]) for slot in slots if config[slot]]
    named += [("mixer", spec) for spec in config["pattern"] or []]
    for slot, spec in named:
        try:
            find(slot, spec["class_path"])
        except ValueError as error:
            raise ValueError(f"{error}: define it at the top of a module, to save it") from None


# ---------------------------------------------------------------------------- reading


def from_pretrained(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """A model, in evaluation mode, and its tokenizer (None where it has none).

    Args:
        path: A directory written by `save_pretrained`, or a Lightning checkpoint of a run.
        device: Where the model goes. None: the CPU.

    Raises:
        FileNotFoundError: There is no such file, or none of ours in the directory.
        ValueError: A file is truncated, holds code, names unknown parts, or the weights do not fit
            the configuration.
    """
    found = load(path, device)
    return found.model, found.tokenizer


def _check_device(device: torch.device | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        reason = str(error).strip().partition("\n")[0]
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(
            f"device={str(device)!r} cannot be used here, take {usable}: {reason}"
        ) from None


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Pretrained:
    """`from_pretrained`, with the task beside the model."""
    path = Path(path)
    if path.name in (CONFIG, WEIGHTS):
        path = path.parent
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    _check_device(device or "cpu")
    found = _read_directory(path) if path.is_dir() else _read_lightning(path)
    _check_vocabulary(found.model, found.tokenizer, str(path))
    found.model.task = found.task
    return found._replace(model=found.model.to(device or "cpu").eval())


def task_of(found: Pretrained, **changes: Any) -> Task:
    """The task that a model was trained on, made again with the model's own tokenizer.

    Args:
        found: A checkpoint's content.
        **changes: Arguments of the task that shall differ.

    Raises:
        ValueError: The checkpoint names no task, or one that is not known.
    """
    from archzoo.tasks.stream import build

    if found.task is None:
        raise ValueError("the checkpoint does not say what it was trained on: there is no task")
    arguments = found.task["init_args"] | changes
    with tempfile.TemporaryDirectory(prefix="archzoo-") as directory:
        if "tokenizer" in arguments and found.tokenizer is not None:
            for name, content in found.tokenizer.files().items():
                (Path(directory) / name).write_bytes(content)
                arguments["tokenizer"] = str(Path(directory) / name)
            arguments["vocab_size"] = None
        task = build(found.task | {"init_args": arguments})
        task.prepare()
    return task


def _read_directory(path: Path) -> Pretrained:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        runs = sorted(map(str, [*path.glob("*.ckpt"), *path.glob("*/*.ckpt")]))[-3:]
        hint = f"; did you mean {' or '.join(runs)}?" if runs else ""
        raise FileNotFoundError(f"{path} holds no {CONFIG}{hint}") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path / CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("decoder"), dict):
        raise ValueError(f"{path / CONFIG} is no configuration of archzoo: it has no 'decoder'")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shared = file.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS}") from None
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is truncated or damaged: {error}") from None
    weights |= {name: weights[first] for name, first in shared.items() if first in weights}
    model = _build(config["decoder"], weights, path)
    tokenizer = None
    if config.get("tokenizer"):
        from archzoo.tasks.tokenizers import Tokenizer

        tokenizer = Tokenizer.load(path / Path(config["tokenizer"]).name)
    return Pretrained(model, tokenizer, config.get("task"))


def _read_lightning(path: Path) -> Pretrained:
    content = read_safely(path)
    arguments, state = content.get("hyper_parameters"), content.get("state_dict")
    names = signature(Decoder).parameters
    if (
        not isinstance(arguments, dict)
        or not isinstance(state, dict)
        or names.keys() - arguments.keys() - ADDED
    ):
        raise ValueError(f"{path} was not written by archzoo's training")
    # The decoder's arguments stand among the optimizer's, its weights among the metrics' sums.
    config = {name: arguments.get(name) for name in names}
    weights = {
        name.removeprefix("decoder."): tensor
        for name, tensor in state.items()
        if name.startswith("decoder.")
    }
    model = _build(config, weights, path)
    tokenizer = None
    if content.get("tokenizer"):
        from archzoo.tasks.tokenizers import from_files

        files = {name: data.numpy().tobytes() for name, data in content["tokenizer"].items()}
        try:
            tokenizer = from_files(files)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return Pretrained(model, tokenizer, content.get("task"))


def read_safely(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of torch holds, if that is plain data and tensors; code is refused.

    Raises:
        ValueError: The file is truncated, no checkpoint, or a pickle that would run code.
    """
    with open(path, "rb") as file:
        begin = file.read(2)
    if not zipfile.is_zipfile(path):
        if begin[:1] == b"\x80":
            raise ValueError(f"{path} is a bare pickle, which may run code when loaded: refused")
        what = "truncated" if begin == b"PK" else "empty" if not begin else "no checkpoint"
        raise ValueError(f"{path} is {what}: it cannot be loaded")
    try:
        with warnings.catch_warnings():  # of pickles that it refuses anyway
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch advises here to load without the check: not for a file of unknown origin.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name:
            raise ValueError(
                f"{path} holds code ({name[1]}), which loading would run: refused"
            ) from None
        raise ValueError(f"{path} is damaged, or holds more than plain data: refused") from None
    except Exception as error:  # torch's reader raises of many kinds
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint of a run: it holds a {type(content).__name__}")
    return content


def _build(config: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> Decoder:
    """The decoder of a configuration with the given weights, in their dtypes."""
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights are drawn, for nothing
            model = build_decoder(config)
    except ValueError as error:
        raise ValueError(f"{path}: {_first_line(error)}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} describes no decoder: {_first_line(error)}") from None
    expected = model.state_dict(keep_vars=True)
    table = weights.get("embedding.weight")
    if table is not None and len(table) != model.vocab_size:
        raise ValueError(
            f"{path}: the weights are of a vocabulary of {len(table)} tokens, and the "
            f"configuration says {model.vocab_size}"
        )
    misfit = f"{path}: the weights do not fit the configuration"
    for verb, names in (("miss", expected.keys() - weights), ("have", weights.keys() - expected)):
        if names:
            raise ValueError(f"{misfit}: they {verb} {min(names)}")
    for name, tensor in expected.items():
        found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
        if found != wanted:
            raise ValueError(f"{misfit}: {name} has shape {found} where {wanted} is expected")
    for name, tensor in expected.items():
        tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    return model


def _check_vocabulary(model: Decoder, tokenizer: Tokenizer | None, path: str) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model knows "
            f"{model.vocab_size}: they do not belong together"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
