"""What a path and a device mean, and all that a checkpoint holds for use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from archzoo.checkpoint.adapters import ADAPTER, ADAPTER_WEIGHTS, load_adapter, read_adapter
from archzoo.checkpoint.archives import Archive
from archzoo.checkpoint.bases import Base, find_base
from archzoo.checkpoint.building import Pretrained
from archzoo.checkpoint.pretrained import (
    CONFIG,
    WEIGHTS,
    named_tokenizer,
    read_config,
)
from archzoo.checkpoint.runs import LAST, WHOLE, check_run, names_base, read_whole
from archzoo.checkpoint.shards import is_sharded, make_whole
from archzoo.checkpoint.vocabulary import check_vocabulary, run_tokenizer
from archzoo.decoder import Decoder
from archzoo.parts import named_adapters

if TYPE_CHECKING:
    from archzoo.tasks.stream import Task
    from archzoo.tasks.tokenizers import Tokenizer


def from_pretrained(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """A model, in evaluation mode, and its tokenizer (None where it has none).

    Args:
        path: A directory written by `save_pretrained` or `save_adapter`, a Lightning checkpoint of
            a run, or a run's directory, which stands for its last.ckpt.
        device: Where the model goes; "auto": a GPU where there is one. None: the CPU.
        base: Where the base of an adapter lies, which neither its directory nor an adapted run's
            checkpoint holds. None: where it was when the adapter was trained, as long as that is
            under the current directory.

    Raises:
        FileNotFoundError: There is no such file, or none of ours in the directory.
        ValueError: A file is truncated, holds code, names unknown parts, or the weights do not fit
            the configuration.
    """
    found = load(path, device, base)
    return found.model, found.tokenizer


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a path means: of a run's directory its last.ckpt, else the path itself.

    Of a directory that DeepSpeed wrote it is the file in it that holds all of it; of a directory
    of shards such a file is made of them.

    Raises:
        TypeError: It is not a path.
        FileNotFoundError: There is nothing.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a checkpoint is given by its path, and this is a {type(path).__name__}")
    path = Path(path)
    if path.name in (CONFIG, WEIGHTS, ADAPTER, ADAPTER_WEIGHTS):
        path = path.parent
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    last = path / LAST
    ours = any((path / name).exists() for name in (CONFIG, ADAPTER))
    found = last if path.is_dir() and not ours and last.exists() else path
    if found.is_dir() and is_sharded(found):
        return make_whole(found)
    whole = found / WHOLE
    return whole if found.is_dir() and whole.is_file() else found


def holds_adapter(path: Path) -> bool:
    """Whether a directory is an adapter's alone."""
    return (path / ADAPTER).exists() and not (path / CONFIG).exists()


def device_of(name: torch.device | str | None) -> torch.device:
    """The device of a name; "auto": a GPU where there is one; None: the CPU.

    Raises:
        ValueError: It cannot be used here.
    """
    gpu = torch.cuda.is_available()
    found = ("cuda" if gpu else "cpu") if name == "auto" else name or "cpu"
    try:
        known = torch.device(found)
        if known.type == "cpu" and known.index:
            raise RuntimeError("there is one CPU, whose cores all compute")
        return torch.empty(0, device=known).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device={str(name)!r} cannot be used here, take {'cpu or cuda' if gpu else 'cpu'}: "
            f"{reason}"
        ) from None


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    base: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> Pretrained:
    """`from_pretrained`, with the task beside the model.

    Args:
        path: As for `from_pretrained`.
        device: The same.
        base: The same.
        **changes: Arguments of the decoder instead of the checkpoint's, such as `dropout`:
            the weights must fit them.
    """
    path, device = locate(path), device_of(device)
    if holds_adapter(path):
        found = _load_beside(path, base, changes)
    else:
        found = _load_whole(path, changes, base)
    return found._replace(model=found.model.to(device).eval())


def _load_whole(
    path: Path, changes: dict[str, Any], base: str | os.PathLike[str] | None = None
) -> Pretrained:
    if base is not None and (path.is_dir() or not names_base(path)):
        raise ValueError(f"{path} leaves no base out: omit base={str(base)!r}")
    found = read_whole(path, changes, None if base is None else locate(base))
    check_vocabulary(found.model, found.tokenizer, str(path))
    found.model.task = found.task
    if not named_adapters(found.model.config):
        found.model.base_path = str(path)
    return found


def _load_beside(
    path: Path, base: str | os.PathLike[str] | None, changes: dict[str, Any]
) -> Pretrained:
    """An adapter's directory on its base."""
    _, record, task = read_adapter(path)
    found = _load_whole(_place_of(record, base, path), changes)
    load_adapter(path, found.model)
    return found._replace(task=task if task is not None else found.task)


def _place_of(record: Base, base: str | os.PathLike[str] | None, path: Path) -> Path:
    """Where the base of a file's adapters lies, which holds none itself."""
    place = locate(find_base(record, base, path))
    if holds_adapter(place):
        raise ValueError(f"{path}: its base {place} is an adapter itself: name a whole model")
    return place


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
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any] | None, Tokenizer | None]:
    """What a model was trained on and its tokenizer, as `load` gives them; no weights are read.

    Args:
        path: As for `from_pretrained`.
        base: The same.
    """
    path = locate(path)
    if holds_adapter(path):
        _, record, task = read_adapter(path)
        of_base, tokenizer = read_task(_place_of(record, base, path))
        return of_base if task is None else task, tokenizer
    if path.is_dir():
        config = read_config(path)
        return config.get("task"), named_tokenizer(config.get("tokenizer"), path)
    with Archive(path) as archive:
        check_run(archive.content, path)
        return archive.content.get("task"), run_tokenizer(archive, path)
