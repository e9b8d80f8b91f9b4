"""A decoder from its configuration and the weights of a file, each loaded once.

It is built on the meta device, without memory, and drawn only where a part of the user's needs it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from archzoo.checkpoint.archives import Stored
from archzoo.checkpoint.checks import MISFIT, check_settings, check_sizes, first_line
from archzoo.checkpoint.digest import check_digest
from archzoo.compiled import own_name
from archzoo.decoder import Decoder
from archzoo.numerics import KeepsFloat32
from archzoo.registry import build_decoder

if TYPE_CHECKING:
    from archzoo.tasks.tokenizers import Tokenizer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def build_with(
    config: dict[str, Any],
    held: Mapping[str, Stored],
    read: Callable[[str], Tensor],
    sources: dict[str, str],
    path: Path,
    digest: str | None,
    signed: Collection[str] | None = None,
) -> Decoder:
    """The decoder of a configuration with the weights of a file, in their dtypes.

    Args:
        config: Arguments of `Decoder`.
        held: What the file holds, by name.
        read: One of its tensors, in memory of its own.
        sources: Under which of those names each weight is stored: a shared one once.
        path: For messages.
        digest: Of the weights, where the file has one.
        signed: The names of those weights that the digest is of. None: all.
    """
    model, made = expected_of(config, held, sources, path)
    expected = model.state_dict(keep_vars=True)
    misfit = f"{path}: {MISFIT}"
    if digest is None:
        _check_dtypes(model, {name: held[sources[name]].dtype for name in expected}, misfit)
    loaded = {source: read(source) for source in dict.fromkeys(sources[n] for n in expected)}
    weights = {name: loaded[sources[name]] for name in expected}
    signed = weights.keys() if signed is None else signed
    check_digest({n: w for n, w in weights.items() if n in signed}, digest, path)
    for names in names_of_each(expected):
        first = names[0]
        for name in names[1:]:
            if sources[name] != sources[first] and not same_bits(weights[name], weights[first]):
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


def expected_of(
    config: dict[str, Any], held: Mapping[str, Stored], sources: dict[str, str], path: Path
) -> tuple[Decoder, _Made | None]:
    """The decoder of a configuration, without its weights, once it is sure that they fit it.

    Beside it stands what `shapes_of` gives.

    Args:
        config: As for `build_with`, and so are the others.
        held: The same.
        sources: The same; the other names of shared weights are added.
        path: The same.
    """
    check_settings(config, path)
    check_sizes(config, held, path)
    model, made = shapes_of(config, path)
    expected = model.state_dict(keep_vars=True)
    misfit = f"{path}: {MISFIT}"
    # A tensor of several names may be stored under one, or under each: other tools write both.
    for names in names_of_each(expected):
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


def names_of_each(tensors: Mapping[str, Tensor]) -> list[list[str]]:
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
        raise ValueError(f"{path}: {first_line(error)}") from error
    except Exception as error:  # a part can fail at wrong settings in any way
        raise ValueError(f"{path} describes no decoder: {first_line(error)}") from error


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


def shapes_of(config: dict[str, Any], path: Path) -> tuple[Decoder, _Made | None]:
    """The decoder of a configuration without memory for its weights, and what was made for it.

    None where a part of the user's needs its weights' values: the decoder has memory then.
    """
    try:
        with torch.device("meta"), _Made() as made:
            return _decoder(config, path), made
    except ValueError:
        if all(_is_zoos(name) for name in _class_paths(config)):
            raise  # with memory it would fail in the same way, and after taking it
        return _decoder(config, path), None


def _class_paths(value: Any) -> Iterator[str]:
    """Every class that nested settings name."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _class_paths(entry)


def _is_zoos(name: str) -> bool:
    return "." not in name or name.startswith("archzoo.")


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
    """Replace the weights on the meta device by those given, laid out as the model lays them.

    A parameter of several names, such as a tied head's, stays one.
    """
    made: dict[int, Tensor] = {}
    used: set[int] = set()
    names = model.state_dict(keep_vars=True)
    for name, old in names.items():
        if id(old) not in made:
            new = weights[name]
            if new.stride() != old.stride() or id(new) in used:
                new = torch.empty_strided(old.shape, old.stride(), dtype=new.dtype).copy_(new)
            used.add(id(weights[name]))
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            made[id(old)] = new
    model.load_state_dict({name: made[id(old)] for name, old in names.items()}, assign=True)


def names_in_float32(model: Decoder) -> set[str]:
    """The names of the weights that stay float32 where the others take less."""
    return {
        own_name(f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        if isinstance(module, KeepsFloat32)
        for name in module.float32_names
    }


def _check_dtypes(model: Decoder, dtypes: Mapping[str, torch.dtype], misfit: str) -> None:
    """Refuse foreign weights of several dtypes, but for those that stay float32 in any model."""
    kept = names_in_float32(model)
    usual = dtypes["head.weight"]
    for name, dtype in dtypes.items():
        if dtype not in (usual, torch.float32 if name in kept else usual) and dtype in FLOATS:
            given, others = (str(d).removeprefix("torch.") for d in (dtype, usual))
            raise ValueError(f"{misfit}: {name} is {given} where head.weight is {others}")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, nan included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(one, other)
