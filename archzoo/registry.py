"""Presets by name: `register_model`, `create_model`, `list_models`."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from archzoo.decoder import Decoder
from archzoo.names import nearest
from archzoo.trust import load_installed, machine_memory


class Preset(NamedTuple):
    """A named configuration.

    Attributes:
        name: ``family_size``.
        arguments: Of `Decoder`.
        paper: Where the architecture is from.
        about: What it is made of: the docstring of its file.
    """

    name: str
    arguments: dict[str, Any]
    paper: str
    about: str


_presets: dict[str, Preset] = {}
_loaded = False  # whether the zoo's own presets are registered, or about to be


def register_model(
    name: str, arguments: dict[str, Any], *, paper: str = "", about: str = ""
) -> None:
    """Add a preset.

    Args:
        name: ``family_size``, such as ``retnet_tiny``.
        arguments: Of `Decoder`.
        paper: Where the architecture is from.
        about: What it is made of.

    Raises:
        ValueError: The name is taken, by another preset than this one.
    """
    _load()  # the zoo's own come first, and keep their names
    preset = Preset(name, dict(arguments), paper, about)
    if _presets.setdefault(name, preset) != preset:  # a notebook's cell may run again
        raise ValueError(f"model {name!r} is registered already: take another name")


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True  # first: what is imported here calls `register_model`
    for family in pkgutil.iter_modules([str(Path(__file__).parent / "models")]):
        importlib.import_module(f"archzoo.models.{family.name}")


def _load_all() -> None:
    """The zoo's presets, and those of installed packages."""
    _load()
    load_installed()


def list_models(pattern: str = "*") -> list[str]:
    """Names of presets that match a shell pattern, such as ``ret*``, in the order registered."""
    _load_all()
    return [name for name in _presets if fnmatch.fnmatch(name, pattern)]


def get_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: There is none; the nearest names are given.
    """
    if not isinstance(name, str):
        raise ValueError(
            f"{name!r} is not a model's name: give one of list_models(), such as 'retnet_tiny'"
        )
    _load_all()
    if name not in _presets:
        known = list(_presets)
        typo = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = "" if typo else "; one of your own is known once its module is: --import MODULE"
        raise ValueError(f"there is no model {name!r}; {nearest(name, known)}{hint}")
    return _presets[name]


def create_model(name: str, match: str | None = None, **overrides: Any) -> Decoder:
    """Build a preset, with some of its arguments replaced.

    ``create_model("retnet_tiny", vocab_size=64, mixer=archzoo.Attention)`` swaps one part and
    keeps everything else.

    Args:
        name: Of a preset; see `list_models`.
        match: "parameters": set the feed-forward's width so that the model holds as many
            parameters as the preset without the swapped parts, within 1 %.
        **overrides: Arguments of `Decoder`; None means the preset's value.

    Raises:
        ValueError: An unknown name, argument or part, or a match that cannot be had.
    """
    preset = get_preset(name)
    given = {key: value for key, value in overrides.items() if value is not None}
    if "mixer" in given and "pattern" not in given:
        given["pattern"] = None  # naming a mixer replaces a preset's pattern
    arguments = preset.arguments | given
    if match is None:
        return build_decoder(arguments)
    if match != "parameters":
        raise ValueError(f"match={match!r}: the only thing to match is 'parameters'")
    if "width" in given:
        raise ValueError(f"match='parameters' sets the width: omit width={given['width']}")
    sizes = {"vocab_size", "dim", "depth", "heads", "tie_weights", "context_length"}
    reference = preset.arguments | {key: given[key] for key in sizes & set(given)}
    return build_decoder(arguments | {"width": matching_width(arguments, reference)})


LARGEST_DEPTH = 10_000  # blocks: more would be built for minutes, whatever their size


def check_size(arguments: dict[str, Any]) -> None:
    """Refuse a decoder that the machine's memory could not hold; nothing is allocated.

    The count of parameters is linear in the depth, so two depths tell all. On the meta device,
    which takes no memory, the depth alone is looked at.

    Raises:
        ValueError: The message names the sizes and what they take.
    """
    sizes = {name: arguments.get(name) for name in ("vocab_size", "dim", "depth", "width")}
    numbers = {name: size for name, size in sizes.items() if isinstance(size, int)}
    depth, dim = numbers.get("depth", 1), numbers.get("dim", 1)
    if depth > LARGEST_DEPTH:
        raise ValueError(f"depth={depth} is more than {LARGEST_DEPTH:,} blocks")
    widest = max(numbers.get("width", 0), dim)
    small = max(numbers.get("vocab_size", 1), depth * widest) * dim < 2**27
    if small or torch.get_default_device().type == "meta":
        return
    shown = ", ".join(f"{name}={size}" for name, size in numbers.items())
    if max(numbers.values()) >= 2**40:
        raise ValueError(f"{shown}: no machine's memory holds a model of that size")
    period = len(arguments.get("pattern") or [1])
    with torch.device("meta"):
        first, second = (
            Decoder(**arguments | {"depth": times * period}).parameter_count() for times in (1, 2)
        )
    count = first + (second - first) * (depth - period) // period
    needed = count * torch.get_default_dtype().itemsize
    if needed > (memory := machine_memory()):
        raise ValueError(
            f"{shown}: {count:,} parameters take {needed / 1e9:,.0f} GB, and this machine has "
            f"{memory / 1e9:,.0f} GB of memory"
        )


def build_decoder(arguments: dict[str, Any]) -> Decoder:
    """`Decoder(**arguments)`, with unknown arguments answered by the nearest known ones."""
    known = list(Decoder.__init__.__annotations__)
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"a decoder has no argument {argument!r}; {nearest(argument, known)}")
    check_size(arguments)
    return Decoder(**arguments)


def count_parameters(arguments: dict[str, Any]) -> int:
    """How many parameters `Decoder(**arguments)` would hold; nothing is allocated."""
    with torch.device("meta"):
        return build_decoder(arguments).parameter_count()


def matching_width(arguments: dict[str, Any], reference: dict[str, Any]) -> int:
    """The feed-forward width at which two models hold the same number of parameters.

    The count is linear in the width, so two widths tell all. A multiple of 8 where that stays
    within 1 %.

    Raises:
        ValueError: No width brings the counts within 1 %.
    """
    target = count_parameters(reference)
    at_8, at_16 = (count_parameters(arguments | {"width": width}) for width in (8, 16))
    slope = (at_16 - at_8) / 8
    if not slope:
        raise ValueError("the feed-forward's width does not change the number of parameters")
    exact = 8 + (target - at_8) / slope
    for width in (8 * round(exact / 8), round(exact)):
        if width >= 1 and abs(at_8 + (width - 8) * slope - target) <= 0.01 * target:
            return width
    raise ValueError(
        f"no feed-forward width gives {target:,} parameters: "
        f"the rest of the model holds {round(at_8 - 8 * slope):,} already"
    )
