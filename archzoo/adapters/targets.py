"""What adapters of a decoder may change, by place and by meaning, and what they cannot."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from archzoo.adapters import Adapter, Kind, Target
from archzoo.block import Bias, FeedForward, Mixer, Router
from archzoo.convolution import ShortConvolution
from archzoo.linear import Linear
from archzoo.names import nearest
from archzoo.parts import Spec, find

if TYPE_CHECKING:
    from archzoo.decoder import Decoder

# What a module within is part of; the innermost counts. A convolution is a mixer, too.
PARTS: dict[str, type[nn.Module]] = {
    "convolution": ShortConvolution,
    "mixer": Mixer,
    "bias": Bias,
    "router": Router,
    "feed_forward": FeedForward,
}


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

    @property
    def meanings(self) -> tuple[str, ...]:
        """What it goes by beside its path: its name, its part and name, and its part."""
        part, name = self.target.part, self.name
        if self.target.kind not in ("linear", "experts"):
            return (name, f"{part}.{name}")
        parts = (part, "feed_forward") if part == "experts" else (part,)
        return (name, *(f"{of}.{name}" for of in parts), *parts)


def list_targets(decoder: Decoder) -> list[Place]:
    """All that adapters of a decoder may change, in the order of its modules."""
    target = Target("input", "embedding", (decoder.dim,), part="decoder")
    found = [Place(target, "input", decoder)]
    parts = {"head": "head"}
    for path, module in decoder.named_modules():
        owners = [part for part, cls in PARTS.items() if isinstance(module, cls)]
        above = parts.get(path.rpartition(".")[0], "")
        part = parts.setdefault(path, owners[0] if owners else above)
        inside = re.match(r"blocks\.(\d+)\.", path)
        layer = int(inside[1]) if inside else None
        if isinstance(module, Linear):
            kind: Kind = "linear" if module.stack is None else "experts"
            stack = () if module.stack is None else (module.stack,)
            for name, rows in module.blocks.items():
                target = Target(
                    kind,
                    f"{path}.{name}",
                    (*stack, rows, module.in_features),
                    layer,
                    heads=module.heads.get(name),
                    part="experts" if stack else part,
                )
                found.append(Place(target, name, module))
    for layer, block in enumerate(decoder.blocks):
        for part in ("mixer", "convolution"):
            mixer: Any = getattr(block, part)
            if mixer is not None:
                path, shapes = f"blocks.{layer}.{part}.state", mixer.prefix_shapes()
                target = Target("state", path, (decoder.dim,), layer, shapes, part=part)
                found.append(Place(target, "state", mixer))
    return found


def resolved(spec: Spec, matched: list[Place]) -> Spec:
    """The plain data of an adapter with paths instead of regular expressions and meanings.

    They are what is saved: a file of a stranger may hold no expression, which can take for ever,
    and what a meaning stands for may grow. Names of blocks stay.
    """
    arguments = spec.get("init_args", {})
    paths = [place.target.path for place in matched]
    known = {place.name for place in matched} | set(paths)
    if all(target in known for target in arguments.get("targets") or []):
        return spec
    return spec | {"init_args": arguments | {"targets": paths}}


def matching(decoder: Decoder, spec: Spec, places: list[Place]) -> list[Place]:
    """The places that an adapter's targets and layers name, each of a kind that it can change.

    They are in the decoder's order, whatever that of the targets is: what they share belongs to the
    first of them, and a file names its owner.

    Args:
        decoder: Without adapters.
        spec: Plain data of the adapter.
        places: As `list_targets` gives them.

    Raises:
        ValueError: Nothing has such a name (the nearest are given), or the class cannot change it.
    """
    cls: type[Adapter] = find("adapter", spec["class_path"])  # type: ignore[assignment]
    arguments = spec.get("init_args", {})
    _check_declared(cls)
    targets = arguments.get("targets")
    targets = list(cls.default_targets) if targets is None else targets
    listed = isinstance(targets, list | tuple) and all(isinstance(t, str) for t in targets)
    if not targets or not listed:
        raise ValueError(
            f"{cls.__name__}: targets={targets!r} must be a list of names of blocks, such as "
            f"[query, value], of what they are of (mixer, feed_forward.up), or of regular "
            f"expressions"
        )
    layers = arguments.get("layers")
    if layers is not None and not isinstance(layers, list | tuple | range):
        raise ValueError(f"{cls.__name__}: layers={layers!r} must be a list, such as [{layers}]")
    if layers is not None and not layers:
        raise ValueError(f"{cls.__name__}: layers={layers} names no block: omit it to change all")
    for layer in layers or []:
        number = isinstance(layer, int) and not isinstance(layer, bool)
        if not (number and 0 <= layer < decoder.depth):
            raise ValueError(
                f"{cls.__name__}: layer {layer!r} is not one of 0 to {decoder.depth - 1}"
            )
    found: dict[str, Place] = {}
    for wanted in dict.fromkeys(targets):
        named = _called(wanted, places, cls)
        hits = [p for p in named if layers is None or p.target.layer in (*layers, None)]
        if named and not hits:
            there = sorted({place.target.layer for place in named} - {None})  # type: ignore[type-var]
            raise ValueError(
                f"{cls.__name__}: {wanted!r} is not in the layers {layers}: it is in {there}"
            )
        if not hits:
            paths = wanted.count(".") > 1
            known = [place.target.path for place in places] if paths else _meanings(places)
            raise ValueError(
                f"{cls.__name__}: nothing here is called {wanted!r}; {nearest(wanted, known)}; or "
                f"give a regular expression for a whole path such as {places[1].target.path}"
            )
        found |= {place.target.path: place for place in hits}
    if arguments.get("targets") is None:  # of its own choice what it can change, in any family
        found = {n: p for n, p in found.items() if p.target.kind in cls.kinds} or found
    for place in found.values():
        _check_place(cls, place, decoder)
    return [place for place in places if place.target.path in found]


def _meanings(places: list[Place]) -> list[str]:
    return sorted({meaning for place in places for meaning in place.meanings})


def _called(wanted: str, places: list[Place], cls: type[Adapter]) -> list[Place]:
    """What a target names: blocks or paths; else by meaning; else what an expression matches."""
    named = [place for place in places if wanted in (place.name, place.target.path)]
    named = named or [place for place in places if wanted in place.meanings]
    if named:
        return named
    return [p for p in places if p.target.kind in cls.kinds and _matches(wanted, p)]


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
            f"{', '.join(cls.kinds)}; remove it from targets"
        )
    if isinstance(module, Linear):
        if place.target.part == "router" and not cls.takes_routers:
            raise ValueError(
                f"{cls.__name__} cannot change {path}: a router's rows are scores of experts and "
                "no channels; remove it from targets"
            )
        if module.weight_is_read and not cls.says("delta"):
            raise ValueError(
                f"{cls.__name__} cannot change {path}: its weight is read directly instead of by "
                "calling it, and the class has no delta(weight); remove it from targets"
            )
        if module is decoder.head and decoder.tie_weights:
            raise ValueError(
                f"{cls.__name__} cannot change {path}: the head is the embedding's table "
                "(tie_weights), which would change too; remove it from targets"
            )
    starts: list[Any] = [module] if kind == "state" else []
    if kind == "input":  # of a packed row each document starts behind the prompt
        starts = [part for block in decoder.blocks for part in (block.convolution, block.mixer)]
    for part in starts:
        if part is not None and part.prefix_shapes() is None:
            raise ValueError(
                f"{cls.__name__} cannot change {path}: {type(part).__name__} handles documents "
                "itself and has no prefix_shapes(), which says what it can start from"
            )
