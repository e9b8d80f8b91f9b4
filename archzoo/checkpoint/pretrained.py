"""Directories of a model for use: written by `save_pretrained`, and read again."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from archzoo._version import __version__
from archzoo.checkpoint.archives import (
    Stored,
    check_contents,
    check_memory,
    check_regular,
    read_bytes,
    read_json,
)
from archzoo.checkpoint.building import Pretrained, build_with, shapes_of
from archzoo.checkpoint.checks import check_settings, check_task, text_or_none
from archzoo.checkpoint.digest import DIGEST, own_weights, weights_digest
from archzoo.checkpoint.vocabulary import TOKENIZER_LONGEST, check_vocabulary, tokenizer_of
from archzoo.compiled import own_name, uncompiled
from archzoo.decoder import Decoder
from archzoo.parts import SLOTS, find, named_adapters
from archzoo.trust import WITHIN, shown, strings

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What safetensors calls the dtypes that weights may have, or that a message may name.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def new_directory(out: str | None, command: str, what: str = "the model") -> Path:
    """Where a command writes, where there is nothing yet.

    Args:
        out: As it is given.
        command: That writes, for messages.
        what: Is written, for messages.

    Raises:
        FileExistsError: There is something.
        ValueError: No place is given.
    """
    if out is None:
        raise ValueError(f"where is {what} written? {command} --out DIR")
    target = Path(out)
    if target.exists():
        raise FileExistsError(f"{target} exists: name a directory that does not, or move it away")
    return target


def save_pretrained(
    directory: str | os.PathLike[str],
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    task: dict[str, Any] | None = None,
) -> None:
    """Write a model for use: configuration, weights and tokenizer.

    Everything is written beside the directory first and then moved in, so that a full disk does
    not damage what was there. Other files in the directory stay.

    Args:
        directory: It is made where it is missing.
        model: To write, in its own dtypes; what `torch.compile` made of one is written as the
            model itself.
        tokenizer: To write, or None.
        task: What the model was trained on, as `Task.config` gives it. None: `Decoder.task`.

    Raises:
        TypeError: The arguments are in another order.
        ValueError: A part that could not be found again or with an argument of another type than it
            takes, a module that was replaced by hand, so
            that the configuration would build other weights, or a tokenizer of more tokens than
            the model knows.
        OSError: The files cannot be written; nothing has changed.
    """
    model = uncompiled(model)
    task = getattr(model, "task", None) if task is None else task
    _check_order(directory, model, tokenizer, task)
    check_vocabulary(model, tokenizer, str(directory))
    _check_parts(model.config)
    check_settings(json.loads(json.dumps(model.config)), Path(directory))
    _check_rebuilds(model, directory)
    files = tokenizer.files() if tokenizer is not None else {}
    config = {
        "archzoo": __version__,
        "decoder": model.config,
        "tokenizer": next(iter(files), None),
        "task": task,
        "base": model.base,
    }
    if model.merged is not None:
        config["merged"] = model.merged
    files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    tensors, shared = _tensors(model)
    metadata = {DIGEST: weights_digest(own_weights(model)), **shared}
    write_directory(directory, WEIGHTS, tensors, metadata, files)


def write_directory(
    directory: str | os.PathLike[str],
    weights: str,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    files: dict[str, bytes],
) -> None:
    """Write files beside a directory first, and then move all of them in; others in it stay.

    Args:
        directory: It is made where it is missing.
        weights: Name of the file of tensors.
        tensors: By name.
        metadata: Of that file.
        files: The others, by name; the last one makes the others what they are.

    Raises:
        OSError: They cannot be written; nothing has changed.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{directory} is a file: give a directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
            folder = Path(partial)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            save_file(tensors, folder / weights, metadata={"format": "pt", **metadata})
            # It keeps its file to the user: take what the umask left of the others' permissions.
            (folder / weights).chmod((folder / next(iter(files))).stat().st_mode & 0o777)
            for name in (weights, *files):  # or after a power cut a name may have no content
                with open(folder / name, "rb") as file:
                    os.fsync(file.fileno())
            target.mkdir(exist_ok=True)
            for name in (weights, *files):
                (folder / name).replace(target / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the model cannot be written to {directory}: {error}") from None


def _tensors(model: Decoder) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's tensors, each once, and {other name: the name that it is stored under}."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in own_weights(model).items():
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, shared


def _check_order(directory: Any, model: Any, tokenizer: Any, task: Any) -> None:
    """Refuse arguments in another order, by what each of them is."""
    from archzoo.tasks.tokenizers import Tokenizer

    wanted = {
        "directory": (directory, isinstance(directory, str | os.PathLike), "a path"),
        "model": (model, isinstance(model, Decoder), "a Decoder"),
        "tokenizer": (tokenizer, tokenizer is None or isinstance(tokenizer, Tokenizer), "one"),
        "task": (task, task is None or isinstance(task, dict), "a dict, such as Task.config()"),
    }
    for name, (given, fits, kind) in wanted.items():
        if not fits:
            raise TypeError(
                f"{name} is a {type(given).__name__} and not {kind}: call "
                "save_pretrained(directory, model, tokenizer, task)"
            )


def _check_parts(config: dict[str, Any]) -> None:
    """Refuse a part that would not be found again; warn of one that a function defines."""
    slots = [slot for slot in SLOTS if slot in config and slot != "adapter"]
    named = [(slot, config[slot]) for slot in slots if config[slot]]
    named += [("adapter", spec) for spec in named_adapters(config).values()]
    named += [("mixer", spec) for spec in config["pattern"] or []]
    for slot, spec in named:
        try:
            find(slot, spec["class_path"])
        except ValueError as error:
            raise ValueError(f"{error}: define it at the top of a module, to save it") from None
    for key_path, text in strings(config):
        if key_path[-1] == "class_path" and WITHIN in text:
            warnings.warn(
                f"{text!r} is defined in a function: what is saved can be loaded only where that "
                "function has run; define it at the top of a module, and it can be imported",
                stacklevel=3,
            )


def _check_rebuilds(model: Decoder, directory: str | os.PathLike[str]) -> None:
    """Refuse a model whose configuration would build other weights: it could not be loaded."""
    config = json.loads(json.dumps(model.config))
    built, held = (
        {name: tuple(tensor.shape) for name, tensor in own_weights(decoder).items()}
        for decoder in (shapes_of(config, Path(directory))[0], model)
    )
    for name in built | held:
        if held.get(name) != built.get(name):
            found, wanted = (
                f"has shape {shapes[name]}" if name in shapes else "is missing"
                for shapes in (held, built)
            )
            raise ValueError(
                f"{directory}: {name} {found} in the model and {wanted} in what its configuration "
                "builds, so it could not be loaded: a module was replaced by hand; give its class "
                "as the decoder's part instead"
            )


def _held_instead(path: Path) -> str:
    """What a directory without a model holds that may be meant, for messages."""
    if (path / "adapter_config.json").exists():
        return (
            "; it holds an adapter of peft: archzoo adapter import "
            f"{path} --base CHECKPOINT --out DIR reads it"
        )
    if runs := sorted(map(str, [*path.glob("*.ckpt"), *path.glob("*/*.ckpt")]))[-3:]:
        return f"; did you mean {' or '.join(runs)}?"
    if found := sorted(str(file.parent) for file in path.glob("*/adapter.json"))[:3]:
        return f"; it holds adapters, each to be given by itself: {', '.join(found)}"
    return ": give a run, its .ckpt file, or a directory of archzoo.save_pretrained"


def _whose(config: Any, path: Path) -> str:
    """Whose configuration it is instead, for messages."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind is None:
        return ""
    if kind == "archzoo":
        return "; it was exported to transformers: give the checkpoint that it was made of"
    return (
        f"; it is of a model of transformers, {shown(kind)}: archzoo convert {path} --out DIR "
        "reads some of them"
    )


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a directory, once it is sure that it is one."""
    try:
        config = read_json(path / CONFIG)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no {CONFIG}{_held_instead(path)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("decoder"), dict):
        raise ValueError(
            f"{path / CONFIG} is not a valid configuration of archzoo: it has no 'decoder'"
            f"{_whose(config, path)}"
        )
    check_task(config.get("task"), path / CONFIG)
    return config


def read_directory(path: Path, changes: dict[str, Any]) -> Pretrained:
    """The content of a directory that `save_pretrained` wrote; `changes` are of its decoder."""
    config = read_config(path)
    tokenizer = named_tokenizer(config.get("tokenizer"), path)
    with own_tensors(path) as (held, read, sources, digest):
        model = build_with(config["decoder"] | changes, held, read, sources, path, digest)
    model.base = text_or_none(config.get("base"))
    merged = config.get("merged")
    model.merged = merged if isinstance(merged, dict) else None
    return Pretrained(model, tokenizer, config.get("task"))


@contextmanager
def own_tensors(
    path: Path,
) -> Iterator[tuple[dict[str, Stored], Callable[[str], Tensor], dict[str, str], str | None]]:
    """The weights of a directory by their own names: what `build_with` takes of them.

    They are what the file holds, how one of them is read, under which name each weight is stored,
    and their digest.
    """
    with weights_file(path / WEIGHTS) as (file, metadata, stored):
        # Another program may have written what torch.compile(model) calls them.
        called = {own_name(name): name for name in stored}
        held = {own: stored[name] for own, name in called.items()}

        def read(name: str) -> Tensor:
            tensor: Tensor = file.get_tensor(called[name])
            return tensor.clone()  # of its own: the file may change under a map of it

        sources = {name: name for name in held}
        sources |= {n: first for n, first in metadata.items() if first in held and n not in held}
        yield held, read, sources, metadata.get(DIGEST)


def named_tokenizer(name: Any, path: Path) -> Tokenizer | None:
    """The tokenizer that a configuration names, which lies beside it."""
    if name is None:
        return None
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"{path / CONFIG}: tokenizer={shown(name)} is not a file's name beside it")
    try:
        return tokenizer_of({name: read_bytes(path / name, TOKENIZER_LONGEST)}, path / name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no {name}, which {CONFIG} names") from None


@contextmanager
def weights_file(path: Path) -> Iterator[tuple[Any, dict[str, str], dict[str, Stored]]]:
    """`open_tensors` of the weights of a directory."""
    try:
        with open_tensors(path) as opened:
            yield opened
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no {WEIGHTS}") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, str], dict[str, Stored]]]:
    """A safetensors file, its metadata, and what its header says of the tensors.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is truncated, damaged, larger than the memory, or holds tensors of dtypes
            that are not in `DTYPES`.
    """
    try:
        check_regular(path)
        with open(path, "rb") as header:
            check_contents(int.from_bytes(header.read(8), "little"), path)
        check_memory(path.stat().st_size, path)
        with safe_open(path, framework="pt") as file:
            held = {}
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                if entry.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} is {entry.get_dtype()}: that is not read")
                held[name] = Stored(tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
            yield file, file.metadata() or {}, held
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
