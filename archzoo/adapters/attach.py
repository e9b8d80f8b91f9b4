"""Adapters on a decoder: which targets match, putting them on, merging, taking them off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from archzoo.adapters import Adapter, Kind, Target
from archzoo.compiled import uncompiled
from archzoo.linear import Linear
from archzoo.names import nearest
from archzoo.parts import Spec, build, describe, describe_adapters, find, named_adapters

if TYPE_CHECKING:
    from archzoo.decoder import Decoder


PLAIN = re.compile(r"[\w.]+")  # a block's name or a whole path


class Place(NamedTuple):
    """A target with the module that holds it.

    Attributes:
        target: As adapters are built with.
        name: Of the block of rows; "input" or "state".
        module: The `Linear`, the decoder or the mixer.
    """

    target: Target
    name: str
    module: nn.Module


def list_targets(decoder: Decoder) -> list[Place]:
    """All that adapters of a decoder may change, in the order of its modules."""
    found = [Place(Target("input", "embedding", (decoder.dim,)), "input", decoder)]
    for path, module in decoder.named_modules():
        inside = re.match(r"blocks\.(\d+)\.", path)
        layer = int(inside[1]) if inside else None
        if isinstance(module, Linear):
            kind: Kind = "linear" if module.stack is None else "experts"
            stack = () if module.stack is None else (module.stack,)
            for name, rows in module.blocks.items():
                shape = (*stack, rows, module.in_features)
                heads = module.heads.get(name)
                target = Target(kind, f"{path}.{name}", shape, layer, heads=heads)
                found.append(Place(target, name, module))
    for layer, block in enumerate(decoder.blocks):
        mixer: Any = block.mixer
        target = Target("state", f"blocks.{layer}.mixer.state", (), layer, mixer.prefix_shapes())
        found.append(Place(target, "state", mixer))
    return found


def adapt(decoder: Decoder, adapter: Any) -> Decoder:
    """Put adapters on a trained decoder, in place: they alone learn, from the weights as they are.

    Args:
        decoder: Without adapters.
        adapter: A class, a partial of one, its name or plain data; or a dict of several by name.

    Raises:
        ValueError: It has adapters already, nothing matches the targets, or the class cannot
            change what matches.
    """
    decoder = uncompiled(decoder)
    if named_adapters(decoder.config):
        raise ValueError(
            "the model has adapters already: omit adapter to continue training them, or merge "
            "them first (archzoo.merge_adapters)"
        )
    several = isinstance(adapter, dict) and "class_path" not in adapter
    described = describe_adapters(adapter) if several else describe("adapter", adapter)
    decoder.config |= attach(decoder, described if several else {"default": described})
    for _, module in adapter_modules(decoder):
        module.to(decoder.device, decoder.dtype).train(decoder.training)
    start_adapters(decoder)
    return decoder


def attach(decoder: Decoder, entries: dict[str, Spec]) -> dict[str, Any]:
    """Put adapters on a decoder and let nothing else learn.

    Args:
        decoder: Without adapters.
        entries: Plain data by the adapters' names, as `archzoo.parts.named_adapters` gives it.

    Returns:
        The settings of `Decoder.config` that say so: paths instead of regular expressions.

    Raises:
        ValueError: Nothing matches the targets, or the class cannot change what matches; the
            message names both, and nothing has changed.
    """
    places = list_targets(decoder)
    found = {entry: _matching(decoder, spec, places) for entry, spec in entries.items()}
    made = [
        (entry, place, build("adapter", entries[entry], place.target))
        for entry, matched in found.items()
        for place in matched
    ]
    _check_together(made)  # all is refused before anything is changed
    for entry in entries:
        own = [adapter for name, _, adapter in made if name == entry]
        type(own[0]).connect(own)
    decoder.learned_before = {n for n, p in decoder.named_parameters() if p.requires_grad}
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    for entry, place, adapter in made:
        if isinstance(place.module, Linear):
            place.module.attach(entry, place.name, adapter)
        else:
            name = "prompt" if place.name == "input" else "prefix"
            setattr(place.module, name, nn.ModuleDict({entry: adapter}))
            setattr(place.module, f"has_{name}", True)
    named = {entry: _resolved(spec, found[entry]) for entry, spec in entries.items()}
    one = list(named) == ["default"]
    return {"adapter": named["default"] if one else None, "adapters": None if one else named}


def _resolved(spec: Spec, matched: list[Place]) -> Spec:
    """The plain data of an adapter with paths instead of regular expressions.

    They are what is saved: a file of a stranger may hold no expression, which can take for ever.
    """
    arguments = spec.get("init_args", {})
    targets = arguments.get("targets")
    if targets is None or all(PLAIN.fullmatch(name) for name in targets):
        return spec
    paths = [place.target.path for place in matched]
    return spec | {"init_args": arguments | {"targets": paths}}


def _check_together(made: list[tuple[str, Place, Adapter]]) -> None:
    """Refuse adapters of one place that cannot work together, by name."""
    before: dict[str, list[tuple[str, Adapter]]] = {}
    for entry, place, adapter in made:
        others = before.setdefault(place.target.path, [])
        if others and not isinstance(place.module, Linear):
            raise ValueError(
                f"the adapters {others[0][0]} and {entry} both change {place.target.path}: one "
                "decoder has one"
            )
        for name, other in others:
            beside = adapter.says("output") or adapter.says("input")
            if not beside and not other.says("delta"):
                raise ValueError(
                    f"{type(adapter).__name__} ({entry}) changes the weight of "
                    f"{place.target.path}, and {type(other).__name__} ({name}) before it has no "
                    f"delta(weight): put {entry} first"
                )
        others.append((entry, adapter))


def _matching(decoder: Decoder, spec: Spec, places: list[Place]) -> list[Place]:
    """The places that an adapter's targets and layers name, each of a kind that it can change."""
    cls: type[Adapter] = find("adapter", spec["class_path"])  # type: ignore[assignment]
    arguments = spec.get("init_args", {})
    _check_declared(cls)
    targets = arguments.get("targets")
    targets = list(cls.default_targets) if targets is None else targets
    if isinstance(targets, str) or not targets:
        raise ValueError(
            f"{cls.__name__}: targets={targets!r} must be a list of names of blocks, such as "
            f"[query, value], or of regular expressions"
        )
    layers = arguments.get("layers")
    for layer in layers or []:
        if not 0 <= layer < decoder.depth:
            raise ValueError(
                f"{cls.__name__}: layer {layer} is not one of 0 to {decoder.depth - 1}"
            )
    found: dict[str, Place] = {}
    for wanted in dict.fromkeys(targets):
        named = [place for place in places if wanted in (place.name, place.target.path)]
        if not named:  # a regular expression, of what the class can change
            named = [p for p in places if p.target.kind in cls.kinds and _matches(wanted, p)]
        hits = [p for p in named if layers is None or p.target.layer in (*layers, None)]
        if not hits:
            names = sorted({place.name for place in places})
            within = "" if layers is None or not named else f" in the layers {layers}"
            raise ValueError(
                f"{cls.__name__}: nothing here is called {wanted!r}{within}; "
                f"{nearest(wanted, names)}; or give a regular expression for a whole path such as "
                f"{places[1].target.path}"
            )
        found |= {place.target.path: place for place in hits}
    for place in found.values():
        _check_place(cls, place, decoder)
    return list(found.values())


def _matches(pattern: str, place: Place) -> bool:
    try:
        return re.fullmatch(pattern, place.target.path) is not None
    except re.error as error:
        raise ValueError(f"target {pattern!r} is not a valid regular expression: {error}") from None


def _check_declared(cls: type[Adapter]) -> None:
    """What the class says of itself must be there.

    Raises:
        ValueError: It declares a kind whose method it lacks, or is mergeable without `delta`.
    """
    linear = {"linear", "experts"} & set(cls.kinds)
    if linear and not any(cls.says(method) for method in ("output", "input", "delta")):
        raise ValueError(
            f"{cls.__name__} changes a Linear: it needs output(x, y), input(x) or delta(weight)"
        )
    if cls.mergeable and not cls.says("delta"):
        raise ValueError(f"{cls.__name__} is declared mergeable: it needs delta(weight)")
    for kind, method in (("input", "prompt"), ("state", "prefix")):
        if kind in cls.kinds and not cls.says(method):
            raise ValueError(f"{cls.__name__} declares the kind {kind!r}: it needs {method}()")


def _check_place(cls: type[Adapter], place: Place, decoder: Decoder) -> None:
    """Refuse what a class cannot change, by name."""
    kind, path, module = place.target.kind, place.target.path, place.module
    if kind not in cls.kinds:
        raise ValueError(
            f"{cls.__name__} cannot change {path}, of the kind {kind!r}: it declares "
            f"{', '.join(cls.kinds)}"
        )
    if isinstance(module, Linear):
        if ".router." in path and not cls.takes_routers:
            raise ValueError(
                f"{cls.__name__} cannot change {path}: a router's rows are scores of experts and "
                "no channels; remove it from targets"
            )
        if module.weight_is_read and not cls.says("delta"):
            raise ValueError(
                f"{cls.__name__} cannot change {path}: its weight is read directly instead of by "
                "calling it, and the class has no delta(weight)"
            )
        if module is decoder.head and decoder.tie_weights:
            raise ValueError(
                f"{cls.__name__} cannot change {path}: the head is the embedding's table "
                "(tie_weights), which would change too; remove it from targets"
            )
    if kind == "state" and place.target.state is None:
        raise ValueError(
            f"{cls.__name__} cannot change {path}: {type(module).__name__} handles documents "
            "itself and has no prefix_shapes(), which says what it can start from"
        )


def adapter_modules(decoder: Decoder) -> Iterator[tuple[str, Adapter]]:
    """Every adapter module of a decoder, with its path."""
    for path, module in decoder.named_modules():
        if isinstance(module, Adapter):
            yield path, module


def attached(decoder: Decoder) -> list[tuple[str, Place, Adapter]]:
    """Every adapter of a decoder, with its entry's name and its place, in the order of places."""
    found = []
    for place in list_targets(decoder):
        holder: Any = place.module
        entries: dict[str, Any] = {}
        if isinstance(holder, Linear) and holder.adapted:
            modules: Any = holder.adapter_modules
            entries = {n: held[place.name] for n, held in modules.items() if place.name in held}
        elif not isinstance(holder, Linear):
            name = "prompt" if place.name == "input" else "prefix"
            entries = dict(getattr(holder, name)) if getattr(holder, f"has_{name}") else {}
        found += [(entry, place, adapter) for entry, adapter in entries.items()]
    return found


def start_adapters(decoder: Decoder) -> None:
    """Start every adapter from the weight that it changes, once that is loaded."""
    for module in decoder.modules():
        if isinstance(module, Linear):
            for name, adapter in module.adapters():
                with torch.no_grad():
                    adapter.start(module.base_weight()[..., module.rows(name), :])
    if decoder.has_prompt:
        for prompt in decoder.prompt.values():
            with torch.no_grad():
                prompt.start(decoder.embedding.weight)  # type: ignore[operator]


def collapse_adapters(decoder: Decoder) -> Decoder:
    """Throw away what only the training of adapters needed, in place: it computes the same.

    The network that makes the vectors of `PTuning`, say, which leaves those vectors.
    """
    decoder = uncompiled(decoder)
    entries = named_adapters(decoder.config)
    for path, adapter in adapter_modules(decoder):
        arguments = adapter.collapse()
        entry = next(name for name in path.split(".") if name in entries)
        entries[entry] = entries[entry] | {
            "init_args": entries[entry].get("init_args", {}) | arguments
        }
    if entries:
        one = list(entries) == ["default"]
        decoder.config |= {"adapter" if one else "adapters": entries["default"] if one else entries}
    return decoder


def merge_adapters(decoder: Decoder) -> Decoder:
    """Put all adapters into the weights of a decoder, in place: a plain decoder again.

    It computes the same, to rounding, and all of it learns.

    Raises:
        ValueError: It has none, or one that cannot be merged; the message names it, and nothing
            has changed.
    """
    decoder = uncompiled(decoder)
    if not named_adapters(decoder.config):
        raise ValueError("this decoder has no adapter to merge")
    for module in decoder.modules():
        if isinstance(module, Linear) and module.adapted:
            module.check_mergeable()
    for path, adapter in adapter_modules(decoder):
        if not adapter.mergeable:
            raise ValueError(
                f"{type(adapter).__name__} at {path} cannot be merged: it stays beside the model"
            )
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.merge()
    return _plain(decoder)


def remove_adapters(decoder: Decoder) -> Decoder:
    """Take all adapters off a decoder, in place: the base again, bit for bit; all of it learns."""
    decoder = uncompiled(decoder)
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.detach_adapters()
    holders: list[tuple[Any, str]] = [(block.mixer, "prefix") for block in decoder.blocks]
    for holder, name in [(decoder, "prompt"), *holders]:
        if getattr(holder, f"has_{name}"):
            delattr(holder, name)
            setattr(holder, f"has_{name}", False)
    return _plain(decoder)


def _plain(decoder: Decoder) -> Decoder:
    decoder.config |= {"adapter": None, "adapters": None}
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name in decoder.learned_before)
    return decoder
