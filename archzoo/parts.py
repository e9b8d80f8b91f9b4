"""Naming parts: a class, a partial of one, a name, or plain data; all become plain data.

Plain data is ``{"class_path": ..., "init_args": {...}}``, which is what YAML, `config.json` and
checkpoints hold, so that nothing but data is ever stored. Parts of the zoo go by their class name
alone; others by their import path.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from archzoo import block
from archzoo.adapters import Adapter
from archzoo.convolution import ShortConvolution
from archzoo.linear import Linear
from archzoo.names import nearest
from archzoo.public import names_of
from archzoo.trust import find_class, load_installed, name_of, parameters_of

SLOTS: dict[str, type[nn.Module]] = {
    "convolution": ShortConvolution,  # a mixer too, which is checked as what it is first
    "mixer": block.Mixer,
    "feed_forward": block.FeedForward,
    "router": block.Router,
    "embedding": block.Embedding,
    "rotary": block.Rotary,
    "bias": block.Bias,
    "linear": Linear,
    "adapter": Adapter,
}

# Where the zoo's own parts are defined: the modules of these packages that have a public name.
HOMES = (
    *("mixers", "feedforward", "embeddings", "positions", "adapters", "convolution"),
    *("linear", "linears"),
)
MODULES = tuple(dict.fromkeys(m for m in names_of("archzoo").values() if m.split(".")[1] in HOMES))

#: The part that stands for "none" in a slot; without a bias there is no part, which the decoder
#: knows, and the other slots cannot be empty.
NONE = {"rotary": "NoRotation"}

#: Arguments of a Linear that the part says which has it.
OF_A_PARTS_LINEAR = ("stack", "bias", "residual_projection")

Spec = dict[str, Any]
Part = str | int | type | functools.partial[Any] | Spec | Callable[..., nn.Module]


def list_parts(slot: str) -> dict[str, type[nn.Module]]:
    """The zoo's own classes that fit a slot, by name."""
    found = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name, value in vars(module).items():
            mine = inspect.isclass(value) and value.__module__ == path
            whole = mine and not name.startswith("_") and not inspect.isabstract(value)
            if whole and issubclass(value, SLOTS[slot]):
                found[name] = value
    return found


def find(slot: str, name: str) -> type[nn.Module]:
    """The class that a name or import path stands for; nothing is imported to find it.

    Raises:
        ValueError: No such part (the nearest names are given), one that is not imported, or one
            that fits another slot.
    """
    if not isinstance(name, str):
        raise ValueError(f"{slot} {name!r} is not a class's name")
    known = list_parts(slot)
    own, _, attribute = name.rpartition(".")
    if name in known or (own == "archzoo" and attribute in known):
        return known[attribute]
    if not own:
        raise ValueError(f"there is no {slot} {name!r}; {nearest(name, list(known))}")
    if own == "archzoo":  # a part of another slot: where it stands it is imported
        name = f"{names_of(own).get(attribute, own)}.{attribute}"
    try:
        load_installed()
        return find_class(name, SLOTS[slot])
    except ValueError as error:
        raise ValueError(f"{slot} {error}") from None


def describe(slot: str, part: Part) -> Spec:
    """A part as plain data, checked: ``{"class_path": ..., "init_args": {...}}``."""
    arguments: dict[str, Any] = {}
    named: Any = NONE[slot] if part == "none" and slot in NONE else part
    if slot == "convolution" and isinstance(part, int):
        named, arguments = ShortConvolution, {"taps": part}
    if isinstance(part, functools.partial):
        # jsonargparse hands over partial(instantiator, class, **arguments).
        classes = [entry for entry in (part.func, *part.args) if inspect.isclass(entry)]
        if len(classes) != 1:
            raise ValueError(
                f"{slot} {part!r} is not a partial of a class: take partial(Class, ...)"
            )
        if inspect.isclass(part.func) and part.args:
            raise ValueError(f"{slot} {part!r} holds positional arguments: give them by name")
        named, arguments = classes[0], dict(part.keywords)
    elif isinstance(part, dict):
        unknown = set(part) - {"class_path", "init_args"}
        if unknown or "class_path" not in part:
            raise ValueError(f"{slot} {part!r} must hold class_path and may hold init_args")
        named, given = part["class_path"], part.get("init_args") or {}
        if not isinstance(given, dict):
            raise ValueError(f"{slot} {part!r}: init_args must be a mapping of arguments by name")
        arguments = dict(given)
    cls = find(slot, named) if isinstance(named, str) else named
    if not inspect.isclass(cls) or not issubclass(cls, SLOTS[slot]):
        kind = SLOTS[slot].__name__
        article = "an" if kind[0] in "AEIOU" else "a"
        raise ValueError(f"{slot} {cls!r} is not {article} {kind}: name a class that is")
    alone = cls is SLOTS[slot] and cls not in (Linear, ShortConvolution)
    if alone or inspect.isabstract(cls):
        raise ValueError(
            f"{slot} {cls.__name__} is the interface alone: name a class that derives from it; "
            f"{nearest(cls.__name__, list(list_parts(slot)))}"
        )
    accepted, takes_any = parameters_of(cls)
    for name in arguments:
        if name not in accepted and not takes_any:
            raise ValueError(
                f"{cls.__name__} has no argument {name!r}; "
                f"{nearest(name, [n for n in accepted if n not in ('dim', 'heads')])}"
            )
    if slot == "linear":  # what a part says of each of its own; a parser gives the defaults
        for name in OF_A_PARTS_LINEAR:
            if name in arguments and not arguments[name]:
                del arguments[name]
    for name in SLOTS:  # an argument that goes by a slot's name holds a part: a mixture's router
        if slot == "linear":
            continue  # whose bias is a vector
        if arguments.get(name) is not None:
            arguments[name] = describe(name, arguments[name])
    own = list_parts(slot).get(cls.__name__) is cls
    path = cls.__name__ if own else name_of(cls)
    return {"class_path": path, "init_args": _plain(arguments)}


def describe_adapters(adapters: dict[str, Part]) -> dict[str, Spec]:
    """Several adapters by name, as plain data.

    Raises:
        ValueError: A name that cannot be part of a parameter's, or no adapter under it.
    """
    if not isinstance(adapters, dict) or not adapters or "class_path" in adapters:
        raise ValueError(f"adapters {adapters!r} must hold adapters by name; adapter takes one")
    for name in adapters:
        if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"adapter name {name!r} is not valid: take letters, digits and _, for it becomes "
                "part of the parameters' names"
            )
    return {name: describe("adapter", part) for name, part in adapters.items()}


def check_one_of(adapter: Any, adapters: Any) -> None:
    """Refuse an adapter beside several by name, and a dict that holds none.

    Raises:
        ValueError: The message says how both are given, or none.
    """
    if adapter is not None and adapters is not None:
        name, names = describe("adapter", adapter)["class_path"], ", ".join(map(str, adapters))
        raise ValueError(
            f"adapter={name} and adapters={{{names}}} are both given: put {name} among adapters, "
            "by a name of its own, or omit one"
        )
    if adapters == {}:
        raise ValueError("adapters={} holds none: omit it, or name some, as {first: LoRA}")


def named_adapters(config: dict[str, Any]) -> dict[str, Spec]:
    """The adapters of `Decoder.config` by name, in order; one alone goes by the name "default"."""
    one, several = config.get("adapter"), config.get("adapters")
    return several or ({"default": one} if one else {})


def build(slot: str, spec: Spec, *sizes: Any, **given: Any) -> Any:
    """The part that plain data describes, at the sizes its slot is built with.

    Args:
        slot: Which.
        spec: As `describe` gives it.
        *sizes: What the slot is built with, by position.
        **given: What else whoever builds it gives, by name; not for init_args to set.

    Raises:
        ValueError: An argument that the class needs is missing, or one that is not init_args'.
    """
    cls, arguments = find(slot, spec["class_path"]), spec.get("init_args", {})
    for name in given:
        if name in arguments:
            raise ValueError(f"{slot} {cls.__name__}: {name} is set by the part that contains it")
    try:
        inspect.signature(cls).bind(*sizes, **given, **arguments)
    except TypeError as error:
        raise ValueError(f"{slot} {cls.__name__}: {error}: give it in init_args") from None
    return cls(*sizes, **given, **arguments)


def _plain(value: Any) -> Any:
    """Namespaces, tuples and the like as dicts and lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    raise ValueError(f"the argument {value!r} is not plain data, so no checkpoint could hold it")
