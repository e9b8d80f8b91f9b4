"""An adapter alone as a directory: written by `save_adapter`, put beside its base again.

::

    sums/
      adapter.json          {"archzoo": version, "adapter": {...}, "base": {...}, "task": {...}}
      adapter.safetensors   its tensors, by the path of what they change

One directory holds one adapter; those of several directories go by names that are given to them.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archzoo._version import __version__
from archzoo.adapters.attach import attach, attached
from archzoo.checkpoint.archives import Stored, read_json
from archzoo.checkpoint.bases import Base, base_of, check_base, parse_base
from archzoo.checkpoint.building import FLOATS, shapes_of
from archzoo.checkpoint.checks import MISFIT, check_settings, check_task
from archzoo.checkpoint.digest import DIGEST, check_digest, weights_digest
from archzoo.checkpoint.pretrained import open_tensors, write_directory
from archzoo.compiled import own_name, uncompiled
from archzoo.decoder import Decoder
from archzoo.names import nearest
from archzoo.parts import Spec, find, named_adapters

ADAPTER, ADAPTER_WEIGHTS = "adapter.json", "adapter.safetensors"


def save_adapter(directory: str | os.PathLike[str], net: Decoder, name: str | None = None) -> None:
    """Write an adapter without the model that it changes.

    It is bound to the model's weights by their digest. What only its training needed is left out,
    such as the network that makes the vectors of `PTuning`. Everything is written beside the
    directory first and then moved in, as `save_pretrained` does.

    Args:
        directory: It is made where it is missing.
        net: A model with the adapter; what `torch.compile` made of one counts as the model.
        name: Of the adapter, where the model has several.

    Raises:
        TypeError: The arguments are in another order.
        ValueError: The model has no such adapter.
        OSError: The files cannot be written; nothing has changed.
    """
    net = uncompiled(net)
    _check_order("save_adapter", directory, net)
    name, spec = _chosen(net, name)
    _check_found_again(spec)
    tensors = {}
    paths = []
    arguments = {n: v for n, v in spec.get("init_args", {}).items() if n != "layers"}
    for entry, place, adapter in attached(net):
        if entry != name:
            continue
        paths.append(place.target.path)
        if adapter.says("collapse"):  # what only training needs is not handed on
            adapter = copy.deepcopy(adapter)
            arguments |= adapter.collapse()
        for inner, tensor in adapter.state_dict().items():
            own = f"{place.target.path}.{own_name(inner)}"
            tensors[own] = tensor.detach().clone(memory_format=torch.contiguous_format)
    content = {
        "archzoo": __version__,
        "adapter": {
            "class_path": spec["class_path"],
            "init_args": arguments | {"targets": paths},
        },
        "base": base_of(net)._asdict(),
        "vocab_size": net.vocab_size,
        "task": net.task,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    metadata = {DIGEST: weights_digest(tensors)}
    write_directory(directory, ADAPTER_WEIGHTS, tensors, metadata, {ADAPTER: text.encode()})


def load_adapter(
    directory: str | os.PathLike[str], net: Decoder, name: str | None = None
) -> Decoder:
    """Put the adapter of a directory on a model, in place: adapters alone learn.

    Those of several directories are put on one base by names, one call each.

    Args:
        directory: As `save_adapter` wrote it.
        net: The adapter's base, loaded as it is: it is known by its digest.
        name: Of the adapter in this model. None: default, or the directory's name where there is
            an adapter already.

    Returns:
        The model, whose task is the adapter's from now on.

    Raises:
        TypeError: The arguments are in another order.
        FileNotFoundError: The directory holds no adapter.
        ValueError: The model is another base, a file is damaged, or its tensors do not fit what
            it says; nothing has changed.
    """
    net = uncompiled(net)
    _check_order("load_adapter", directory, net)
    path = Path(directory)
    spec, base, task = read_adapter(path)
    check_base(net, base, path)
    name = _free_name(net, name, path)
    alone = {"adapter": None, "adapters": {name: spec}}
    config = json.loads(json.dumps(net.config | alone))
    model, _ = shapes_of(config, path)
    tensors = _read_tensors(path, model)
    _check_new(net, tensors, path)
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        net.config |= attach(net, {name: spec})
    for entry, place, adapter in attached(net):
        if entry == name:
            before = f"{place.target.path}."
            own = {n.removeprefix(before): t for n, t in tensors.items() if n.startswith(before)}
            own = {n: own[n] for n in adapter.state_dict()}
            for n, held in adapter.state_dict(keep_vars=True).items():
                if held.is_floating_point():  # never narrower than it was written
                    held.data = held.data.to(torch.promote_types(own[n].dtype, net.dtype))
            adapter.load_state_dict(own)
            adapter.to(net.device).train(net.training)
    net.task = task if task is not None else net.task
    return net


def read_adapter(path: Path) -> tuple[Spec, Base, dict[str, Any] | None]:
    """What a directory says of its adapter, held to what an adapter takes: spec, base and task."""
    try:
        content = read_json(path / ADAPTER)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(_no_adapter(path)) from None
    file = path / ADAPTER
    spec = content.get("adapter") if isinstance(content, dict) else None
    if not isinstance(spec, dict):
        raise ValueError(f"{file} is not a valid adapter of archzoo: it has no 'adapter'")
    check_settings({"adapter": spec}, file)
    base = parse_base(content.get("base"), file)
    check_task(content.get("task"), file)
    return spec, base, content.get("task")


def _no_adapter(path: Path) -> str:
    """Why a path is no directory of an adapter, and what is to be done."""
    if not path.exists():
        return f"there is no directory {path}: give one of archzoo.save_adapter"
    if path.is_file() or list(path.glob("*.ckpt")):
        return (
            f"{path} is a checkpoint and no adapter alone: archzoo adapter save {path} --out DIR "
            "writes the adapter that it may have"
        )
    if (path / "adapter_config.json").exists():
        return (
            f"{path} holds no {ADAPTER}, and is of peft: archzoo adapter import {path} "
            "--base CHECKPOINT --out DIR reads it"
        )
    if found := sorted(str(file.parent) for file in path.glob(f"*/{ADAPTER}"))[:3]:
        return f"{path} holds no {ADAPTER}, but those of several: give {' or '.join(found)}"
    return f"{path} holds no {ADAPTER}: give a directory of archzoo.save_adapter"


def _read_tensors(path: Path, model: Decoder) -> dict[str, Tensor]:
    """The tensors of a directory's adapter, once it is sure that they are what it says.

    Args:
        path: Of the directory.
        model: With that adapter alone, and without memory.
    """
    expected = {
        f"{place.target.path}.{name}": tensor
        for _, place, adapter in attached(model)
        for name, tensor in adapter.state_dict().items()
    }
    file = path / ADAPTER_WEIGHTS
    misfit = f"{path}: {MISFIT}"
    try:
        with open_tensors(file) as (opened, metadata, held):
            for verb, odd in (("miss", expected.keys() - held), ("have", held.keys() - expected)):
                if odd:
                    raise ValueError(f"{misfit}: they {verb} {shown_name(min(odd))}")
            for name, tensor in expected.items():
                _check_entry(name, tensor, held[name], misfit)
            tensors = {name: opened.get_tensor(name).clone() for name in expected}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} holds no {ADAPTER_WEIGHTS}: copy the whole directory again, or write it again "
            "with archzoo adapter save"
        ) from None
    check_digest(tensors, metadata.get(DIGEST), file)
    return tensors


def _check_new(net: Decoder, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse what a model has already, bit for bit, under whatever name."""
    own: dict[str, dict[str, Tensor]] = {}
    for entry, place, adapter in attached(net):
        held = {f"{place.target.path}.{n}": t for n, t in adapter.state_dict().items()}
        own.setdefault(entry, {}).update(held)
    for entry, held in own.items():
        if held.keys() == tensors.keys() and all(
            held[n].shape == t.shape and torch.equal(held[n].to(t.device, t.dtype), t)
            for n, t in tensors.items()
        ):
            raise ValueError(
                f"{path}: the model has this adapter already, by the name {entry!r}: what it "
                "changes would be doubled"
            )


def _check_entry(name: str, tensor: Tensor, entry: Stored, misfit: str) -> None:
    if entry.shape != tuple(tensor.shape):
        raise ValueError(
            f"{misfit}: {name} has shape {entry.shape} where {tuple(tensor.shape)} is expected"
        )
    wanted = FLOATS if tensor.is_floating_point() else (tensor.dtype,)
    if entry.dtype not in wanted:
        given, kind = (str(dtype).removeprefix("torch.") for dtype in (entry.dtype, wanted[0]))
        raise ValueError(f"{misfit}: {name} is {given} where {kind} or the like is expected")


def shown_name(name: str) -> str:
    """A tensor's name in a message: its beginning, if a stranger made it long."""
    return name if len(name) <= 200 else f"{name[:197]}..."


def _chosen(net: Decoder, name: str | None) -> tuple[str, Spec]:
    """The adapter of a name, and its plain data."""
    entries = named_adapters(net.config)
    if not entries:
        raise ValueError("the model has no adapter to save: archzoo.adapt puts one on it")
    if name is None:
        if len(entries) > 1:
            raise ValueError(
                f"the model has the adapters {', '.join(entries)}: name the one that is written, "
                "one a directory"
            )
        return next(iter(entries.items()))
    if name not in entries:
        raise ValueError(f"the model has no adapter {name!r}; {nearest(name, list(entries))}")
    return name, entries[name]


def _free_name(net: Decoder, name: str | None, path: Path) -> str:
    """The name that an adapter goes by in a model, where none goes by it yet."""
    taken = named_adapters(net.config)
    if name is None:
        name = path.resolve().name if taken else "default"
    if name in taken:
        raise ValueError(
            f"{path}: the model has an adapter {name!r} already: give another name for this one"
        )
    return name


def _check_found_again(spec: Spec) -> None:
    try:
        find("adapter", spec["class_path"])
    except ValueError as error:
        raise ValueError(f"{error}: define it at the top of a module, to save it") from None


def _check_order(function: str, directory: Any, net: Any) -> None:
    """Refuse arguments in another order, by what each of them is."""
    if not isinstance(directory, str | os.PathLike):
        kind, wanted = type(directory).__name__, "directory is a {} and not a path"
    elif not isinstance(net, Decoder):
        kind, wanted = type(net).__name__, "net is a {} and not a Decoder"
    else:
        return
    raise TypeError(f"{wanted.format(kind)}: call {function}(directory, net)")
