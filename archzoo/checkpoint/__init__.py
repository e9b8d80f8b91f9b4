"""Models on disk: a directory of plain files, for use and for handing on.

::

    model/
      config.json         {"archzoo": version, "decoder": {...}, "tokenizer": file, "task": {...}}
      model.safetensors   the weights, shared ones once
      tokenizer.json      or tokenizer.model, where there is a tokenizer

``decoder`` holds the arguments of `Decoder`, every part as ``class_path`` and ``init_args``, and
among them ``context_length``, the longest text seen in training.

The weights' file carries a digest of them, which is checked when it is read; a file without one is
another tool's, and is taken with the usual checks.

Lightning's checkpoints, which are for resuming a run, are read as well. Nothing in a file is ever
called (`archives`), and sizes come first: settings that do not give the shapes in the weights'
header are refused before anything is built. A part from outside the zoo is found among what the
user has imported, and nothing is imported because a file names it (`archzoo.trust`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import formatannotation, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from archzoo._version import __version__
from archzoo.checkpoint.archives import (
    Archive,
    Stored,
    check_contents,
    check_json_depth,
    check_memory,
    check_regular,
    read_bytes,
    read_json,
)
from archzoo.decoder import Decoder
from archzoo.numerics import KeepsFloat32
from archzoo.parts import SLOTS, find, named_adapters
from archzoo.registry import build_decoder
from archzoo.trust import WITHIN, strings

if TYPE_CHECKING:
    from archzoo.tasks.stream import Task
    from archzoo.tasks.tokenizers import Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LAST = "last.ckpt"  # of a run's directory
# Arguments of `Decoder` that older checkpoints do not hold.
ADDED = {"loops", "injection", "linear", "adapter", "adapters"}
DIGEST = "digest"  # in the weights' metadata, and in a run's checkpoint
TOKENIZER_LONGEST = 2**26  # bytes of a tokenizer's file
MISFIT = "the weights do not fit the configuration"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
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
# The largest sizes that a checkpoint may have: more than any model uses, less than fills a memory.
LARGEST_LOOPS = 10_000
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


# ---------------------------------------------------------------------------- writing


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
        model: To write, in its own dtypes.
        tokenizer: To write, or None.
        task: What the model was trained on, as `Task.config` gives it. None: `Decoder.task`.

    Raises:
        TypeError: The arguments stand in another order.
        ValueError: A part that could not be found again, a module that was replaced by hand, so
            that the configuration would build other weights, or a tokenizer of more tokens than
            the model knows.
        OSError: The files cannot be written; nothing has changed.
    """
    task = getattr(model, "task", None) if task is None else task
    _check_order(directory, model, tokenizer, task)
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{directory} is a file: give a directory")
    _check_vocabulary(model, tokenizer, str(directory))
    _check_parts(model.config)
    _check_rebuilds(model, directory)
    files = tokenizer.files() if tokenizer is not None else {}
    config = {
        "archzoo": __version__,
        "decoder": model.config,
        "tokenizer": next(iter(files), None),
        "task": task,
        "base": model.base,
    }
    files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    tensors, shared = _tensors(model)
    metadata = {"format": "pt", DIGEST: weights_digest(model.state_dict()), **shared}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as partial:
            folder = Path(partial)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            save_file(tensors, folder / WEIGHTS, metadata=metadata)
            # It keeps its file to the user: take what the umask left of the others' permissions.
            (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)
            for name in (WEIGHTS, *files):  # or after a power cut a name may have no content
                with open(folder / name, "rb") as file:
                    os.fsync(file.fileno())
            target.mkdir(exist_ok=True)
            for name in (WEIGHTS, *files):  # the configuration last: it makes the others a model
                (folder / name).replace(target / name)
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
        {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
        for decoder in (_shapes_of(config, Path(directory))[0], model)
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


# ---------------------------------------------------------------------------- reading


def from_pretrained(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """A model, in evaluation mode, and its tokenizer (None where it has none).

    Args:
        path: A directory written by `save_pretrained`, a Lightning checkpoint of a run, or a run's
            directory, which stands for its last.ckpt.
        device: Where the model goes; "auto": a GPU where there is one. None: the CPU.

    Raises:
        FileNotFoundError: There is no such file, or none of ours in the directory.
        ValueError: A file is truncated, holds code, names unknown parts, or the weights do not fit
            the configuration.
    """
    found = load(path, device)
    return found.model, found.tokenizer


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: of a run's directory its last.ckpt, else the path itself.

    Raises:
        TypeError: It is not a path.
        FileNotFoundError: There is nothing.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a checkpoint is given by its path, and this is a {type(path).__name__}")
    path = Path(path)
    if path.name in (CONFIG, WEIGHTS):
        path = path.parent
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    last = path / LAST
    return last if path.is_dir() and not (path / CONFIG).exists() and last.exists() else path


def device_of(name: torch.device | str | None) -> torch.device:
    """The device of a name; "auto": a GPU where there is one; None: the CPU.

    Raises:
        ValueError: It cannot be used here.
    """
    gpu = torch.cuda.is_available()
    found = ("cuda" if gpu else "cpu") if name == "auto" else name or "cpu"
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device={str(name)!r} cannot be used here, take {'cpu or cuda' if gpu else 'cpu'}: "
            f"{reason}"
        ) from None


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Pretrained:
    """`from_pretrained`, with the task beside the model.

    Args:
        path: As for `from_pretrained`.
        device: Where the model goes; "auto": a GPU where there is one. None: the CPU.
    """
    path, device = locate(path), device_of(device)
    found = _read_directory(path) if path.is_dir() else _read_lightning(path)
    _check_vocabulary(found.model, found.tokenizer, str(path))
    found.model.task = found.task
    return found._replace(model=found.model.to(device).eval())


def task_of(found: Pretrained, **changes: Any) -> Task:
    """The task that a model was trained on, rebuilt with the model's own tokenizer.

    Args:
        found: A checkpoint's content.
        **changes: Arguments of the task that shall differ, such as `path` where the text lies
            elsewhere: what a checkpoint names is read under the current directory only.

    Raises:
        ValueError: The checkpoint names no task, or one that is not known.
    """
    from archzoo.tasks.stream import build_task

    if found.task is None:
        raise ValueError("the checkpoint does not say what it was trained on: there is no task")
    if "tokenizer" in (found.task.get("init_args") or {}) and found.tokenizer is not None:
        changes |= {"tokenizer": found.tokenizer, "vocab_size": None}
    task = build_task(found.task, **changes)
    task.prepare()
    return task


def read_task(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any] | None, Tokenizer | None]:
    """What a model was trained on and its tokenizer, as `load` gives them; no weights are read.

    Args:
        path: As for `from_pretrained`.
    """
    path = locate(path)
    if path.is_dir():
        config = _read_config(path)
        return config.get("task"), _named_tokenizer(config.get("tokenizer"), path)
    with Archive(path) as archive:
        _check_run(archive.content, path)
        return archive.content.get("task"), _run_tokenizer(archive, path)


def _read_config(path: Path) -> dict[str, Any]:
    """The configuration in a directory, once it is sure that it is one."""
    try:
        config = read_json(path / CONFIG)
    except FileNotFoundError:
        runs = sorted(map(str, [*path.glob("*.ckpt"), *path.glob("*/*.ckpt")]))[-3:]
        hint = f"; did you mean {' or '.join(runs)}?" if runs else ""
        raise FileNotFoundError(f"{path} holds no {CONFIG}{hint}") from None
    if not isinstance(config, dict) or not isinstance(config.get("decoder"), dict):
        raise ValueError(
            f"{path / CONFIG} is not a valid configuration of archzoo: it has no 'decoder'"
        )
    _check_task(config.get("task"), path / CONFIG)
    return config


def _read_directory(path: Path) -> Pretrained:
    config = _read_config(path)
    tokenizer = _named_tokenizer(config.get("tokenizer"), path)
    with _weights_file(path / WEIGHTS) as (file, metadata, held):

        def read(name: str) -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()  # of its own: the file may change under a map of it

        sources = {name: name for name in held}
        sources |= {n: first for n, first in metadata.items() if first in held and n not in held}
        model = _build(config["decoder"], held, read, sources, path, metadata.get(DIGEST))
    model.base = _text(config.get("base"))
    return Pretrained(model, tokenizer, config.get("task"))


@contextmanager
def _weights_file(path: Path) -> Iterator[tuple[Any, dict[str, str], dict[str, Stored]]]:
    """A safetensors file, its metadata, and what its header says of the tensors."""
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
                    raise ValueError(f"{path}: {name} is {entry.get_dtype()}: weights are floats")
                held[name] = Stored(tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
            yield file, file.metadata() or {}, held
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no {WEIGHTS}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None


def _named_tokenizer(name: Any, path: Path) -> Tokenizer | None:
    """The tokenizer that a configuration names, which lies beside it."""
    if name is None:
        return None
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"{path / CONFIG}: tokenizer={_short(name)} is not a file's name beside it"
        )
    try:
        return _tokenizer({name: read_bytes(path / name, TOKENIZER_LONGEST)}, path / name)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} holds no {name}, which {CONFIG} names") from None


def _tokenizer(files: dict[str, bytes], path: Path) -> Tokenizer:
    from archzoo.tasks.tokenizers import from_files

    try:
        for name, content in files.items():
            if name.endswith(".json"):
                check_json_depth(content.decode())
        return from_files(files)
    except Exception as error:  # the libraries behind it raise of many kinds
        raise ValueError(f"{path}: {_first_line(error)}") from error


def _read_lightning(path: Path) -> Pretrained:
    with Archive(path) as archive:
        content = archive.content
        config, held = _check_run(content, path)
        tokenizer = _run_tokenizer(archive, path)
        sources = {name: name for name in held}
        model = _build(
            config,
            held,
            lambda name: archive.tensor(held[name]),
            sources,
            path,
            content.get(DIGEST),
        )
        model.base = _text(content.get("base"))
    return Pretrained(model, tokenizer, content.get("task"))


def _run_tokenizer(archive: Archive, path: Path) -> Tokenizer | None:
    """The tokenizer that a run's checkpoint holds."""
    files = archive.content.get("tokenizer") or {}
    if isinstance(files, dict):
        stored = {name: file for name, file in files.items() if isinstance(file, Stored)}
        if sum(file.nbytes for file in stored.values()) > TOKENIZER_LONGEST:
            raise ValueError(f"{path} holds a tokenizer of more than {TOKENIZER_LONGEST:,} bytes")
        files = files | {name: archive.tensor(file) for name, file in stored.items()}
    contents = tokenizer_files({"tokenizer": files}, str(path))
    return _tokenizer(contents, path) if contents else None


def tokenizer_files(checkpoint: dict[str, Any], whose: str = "the checkpoint") -> dict[str, bytes]:
    """The tokenizer's files that a run's checkpoint holds, for `tokenizers.from_files`.

    Args:
        checkpoint: Its content.
        whose: For messages.

    Raises:
        ValueError: It holds something else there, as a damaged file may.
    """
    files = checkpoint.get("tokenizer") or {}
    if not isinstance(files, dict) or not all(
        isinstance(content, Tensor) and content.dtype == torch.uint8 for content in files.values()
    ):
        raise ValueError(f"{whose} holds no tokenizer where it should")
    return {str(name): content.cpu().flatten().numpy().tobytes() for name, content in files.items()}


def _decoder_weights(content: dict[str, Any]) -> dict[str, Any]:
    """The decoder's tensors in a run's checkpoint, by their own names."""
    return {
        name.removeprefix("decoder."): tensor
        for name, tensor in content["state_dict"].items()
        if isinstance(name, str) and name.startswith("decoder.")
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
            config, held = _check_run(content, Path(path))
            _expected(config, held, {name: name for name in held}, Path(path))
        content = archive.everything()
        if ours:
            _check_digest(_decoder_weights(content), content.get(DIGEST), Path(path))
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


def _check_run(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
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
    # The decoder's arguments stand among the optimizer's, its weights among the metrics' sums.
    config = {n: content["hyper_parameters"].get(n) for n in signature(Decoder).parameters}
    _check_settings(config, path)
    _check_sizes(config, held, path)
    _check_task(content.get("task"), path)
    return config, held


# ---------------------------------------------------------------------------- checking


def _check_settings(config: dict[Any, Any], path: Path) -> None:
    """Refuse settings of a decoder that are of another type than it takes."""
    parameters = signature(Decoder, eval_str=True).parameters
    for name, value in config.items():
        if name not in parameters:
            continue  # which building answers by the nearest known one
        if name in ("vocab_size", "dim", "depth", "heads"):
            if type(value) is not int or not 1 <= value < 2**63:
                raise ValueError(
                    f"{path}: {name}={_short(value)}: a decoder needs an integer of at least 1"
                )
        elif name == "adapters" and isinstance(value, dict):
            for entry in value.values():
                _check_part("adapter", entry, path)
        elif name in SLOTS:
            _check_part(name, value, path)
        elif not _fits(value, parameters[name].annotation):
            kind = formatannotation(parameters[name].annotation)
            raise ValueError(f"{path}: {name}={_short(value)} is not valid: it takes {kind}")
    for entry in config.get("pattern") or []:
        _check_part("mixer", entry, path)
    for name, most in (("loops", LARGEST_LOOPS), ("context_length", LARGEST["context_length"])):
        if (config.get(name) or 1) > most:
            raise ValueError(f"{path}: {name}={_short(config[name])} is more than {most:,}")


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
            f"{path}: {slot}={_short(spec)} is not valid: it takes a part's name, or "
            "its class_path and init_args"
        )
    try:
        parameters = signature(find(slot, spec["class_path"]), eval_str=True).parameters
    except ValueError as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    except NameError:  # a user's own part whose annotations mean nothing here
        return
    for name, value in (arguments or {}).items():
        if name in SLOTS:
            _check_part(name, value, path)
        elif name in parameters and not _fits(value, parameters[name].annotation):
            kind = formatannotation(parameters[name].annotation)
            whose = f"{path}: {spec['class_path']}"
            raise ValueError(f"{whose}: {name}={_short(value)} is not valid: it takes {kind}")


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


def _check_sizes(config: dict[Any, Any], held: Mapping[str, Stored], path: Path) -> None:
    """Refuse sizes that are not those of the weights' header, before anything is built."""
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


def _check_task(task: Any, path: Path) -> None:
    """Refuse what describes no task, or one that would fill a memory."""
    if task is None:
        return
    if (
        not isinstance(task, dict)
        or not isinstance(task.get("class_path"), str)
        or not isinstance(task.get("init_args"), dict)
    ):
        raise ValueError(
            f"{path}: task={_short(task)} is not valid: it takes class_path, init_args"
        )
    _check_amounts(task["init_args"], path)


def _check_amounts(arguments: Any, path: Path) -> None:
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            most = LARGEST.get(name) if isinstance(name, str) else None
            if most is not None and type(value) in (int, float) and not value <= most:
                raise ValueError(
                    f"{path}: its task's {name}={_short(value)} is more than the {most:,} that are "
                    "read from a checkpoint"
                )
            _check_amounts(value, path)
    elif isinstance(arguments, list | tuple):
        for entry in arguments:
            _check_amounts(entry, path)


def _check_digest(weights: Mapping[str, Tensor], digest: Any, path: Path) -> None:
    """Refuse weights that are not those that were written; without a digest they are foreign."""
    if digest is not None and weights_digest(weights) != digest:
        raise ValueError(
            f"{path}: the weights are not those that were written, by their digest: the file is "
            "damaged or was edited; get it anew, or take the digest out of it if the change is "
            "wanted"
        )


def _build(
    config: dict[str, Any],
    held: Mapping[str, Stored],
    read: Callable[[str], Tensor],
    sources: dict[str, str],
    path: Path,
    digest: str | None,
) -> Decoder:
    """The decoder of a configuration with the weights of a file, in their dtypes.

    Args:
        config: Arguments of `Decoder`.
        held: What the file holds, by name.
        read: One of its tensors, in memory of its own.
        sources: Under which of those names each weight stands: a shared one stands once.
        path: For messages.
        digest: Of the weights, where the file has one.
    """
    model, made = _expected(config, held, sources, path)
    expected = model.state_dict(keep_vars=True)
    misfit = f"{path}: {MISFIT}"
    if digest is None:
        _check_dtypes(model, {name: held[sources[name]].dtype for name in expected}, misfit)
    loaded = {source: read(source) for source in dict.fromkeys(sources[n] for n in expected)}
    weights = {name: loaded[sources[name]] for name in expected}
    _check_digest(weights, digest, path)
    for names in _names_of_each(expected):
        first = names[0]
        for name in names[1:]:
            if sources[name] != sources[first] and not _same(weights[name], weights[first]):
                raise ValueError(f"{misfit}: {first} and {name} differ, which are one tensor in it")
    if made is not None:
        del expected
        _assign(model, weights)
        if _is_whole(model, made):
            return model
        model = _decoder(config, path)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(weights)
    return model


def _expected(
    config: dict[str, Any], held: Mapping[str, Stored], sources: dict[str, str], path: Path
) -> tuple[Decoder, _Made | None]:
    """The decoder of a configuration, without its weights, once it is sure that they fit it.

    Beside it stands what `_shapes_of` gives.

    Args:
        config: As for `_build`, and so are the others.
        held: The same.
        sources: The same; the other names of shared weights are added.
        path: The same.
    """
    _check_settings(config, path)
    _check_sizes(config, held, path)
    model, made = _shapes_of(config, path)
    expected = model.state_dict(keep_vars=True)
    misfit = f"{path}: {MISFIT}"
    # A tensor of several names may stand under one of them, or under each: other tools write both.
    for names in _names_of_each(expected):
        first = next((sources[name] for name in names if name in sources), None)
        sources |= {name: first for name in names if first is not None and name not in sources}
    for verb, odd in (("miss", expected.keys() - sources), ("have", sources.keys() - expected)):
        if odd:
            raise ValueError(f"{misfit}: they {verb} {min(odd)}")
    for name, tensor in expected.items():
        entry = held[sources[name]]
        if entry.shape != tuple(tensor.shape):
            raise ValueError(
                f"{misfit}: {name} has shape {entry.shape} where {tuple(tensor.shape)} is expected"
            )
        wanted = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
        if entry.dtype not in wanted:
            given, kind = (str(d).removeprefix("torch.") for d in (entry.dtype, wanted[0]))
            raise ValueError(f"{misfit}: {name} is {given} where {kind} or the like is expected")
    return model, made


def _names_of_each(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor: tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _decoder(config: dict[str, Any], path: Path) -> Decoder:
    try:
        with torch.random.fork_rng(devices=[]):  # of a part that needs its weights' values
            return build_decoder(config)
    except ValueError as error:
        raise ValueError(f"{path}: {_first_line(error)}") from error
    except Exception as error:  # a part can fail at wrong settings in any way
        raise ValueError(f"{path} describes no decoder: {_first_line(error)}") from error


class _Made(TorchFunctionMode):
    """Sees every tensor that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, list | tuple) else (result,)
        self.tensors += [weakref.ref(entry) for entry in found if isinstance(entry, Tensor)]
        return result

    def without_memory(self) -> bool:
        """Whether someone still holds one that has no values, being on the meta device."""
        return any((tensor := made()) is not None and tensor.is_meta for made in self.tensors)


def _shapes_of(config: dict[str, Any], path: Path) -> tuple[Decoder, _Made | None]:
    """The decoder of a configuration without memory for its weights, and what was made for it.

    None where a part of the user's needs its weights' values: the decoder has memory then.
    """
    try:
        with torch.device("meta"), _Made() as made:
            return _decoder(config, path), made
    except ValueError:
        return _decoder(config, path), None


def _is_whole(model: Decoder, made: _Made) -> bool:
    """Whether a model that was built without memory has all its values, now that it has weights.

    Parts of the zoo fill a buffer that no file holds themselves when a model is moved. A part of
    the user's may keep a tensor anywhere, as it was made in its constructor.
    """
    own = [module for module in model.modules() if _is_own(module)]
    for module in own:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    if len(own) < len(list(model.modules())) and made.without_memory():
        return False
    model.to("cpu")
    return True


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("archzoo", "torch")


def _assign(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Replace the weights on the meta device by those given, laid out as the model lays them."""
    made: dict[int, Tensor] = {}
    used: set[int] = set()
    for name, old in model.state_dict(keep_vars=True).items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if id(old) not in made:
            new = weights[name]
            if new.stride() != old.stride() or id(new) in used:
                new = torch.empty_strided(old.shape, old.stride(), dtype=new.dtype).copy_(new)
            used.add(id(weights[name]))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            made[id(old)] = new
        if isinstance(old, nn.Parameter):
            module._parameters[attribute] = made[id(old)]  # type: ignore[assignment]
        else:
            module._buffers[attribute] = made[id(old)]


def _check_dtypes(model: Decoder, dtypes: Mapping[str, torch.dtype], misfit: str) -> None:
    """Refuse foreign weights of several dtypes, but for those that stay float32 in any model."""
    kept = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, KeepsFloat32)
        for name in module.float32_names
    }
    usual = dtypes["head.weight"]
    for name, dtype in dtypes.items():
        if dtype not in (usual, torch.float32 if name in kept else usual) and dtype in FLOATS:
            given, others = (str(d).removeprefix("torch.") for d in (dtype, usual))
            raise ValueError(f"{misfit}: {name} is {given} where head.weight is {others}")


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, nan included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(one, other)


def _check_vocabulary(model: Decoder, tokenizer: Tokenizer | None, path: str) -> None:
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model knows "
            f"{model.vocab_size}: they do not belong together"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _short(value: Any) -> str:
    """A value in a message, which a stranger's file may have made long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
