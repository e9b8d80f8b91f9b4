"""The arms of a comparison: those of a file, those that commas make, and the product of both."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from archzoo.names import nearest

SECTIONS = ("model", "data", "trainer", "checkpoint")  # whose settings may be arms
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"


class Arm(NamedTuple):
    """One arm.

    Attributes:
        name: In tables and in the names of runs.
        arguments: What `archzoo fit` is given for it, after the configuration file.
        of_file: Which of the file's arms it is made of; "": the file as it is.
    """

    name: str
    arguments: tuple[str, ...]
    of_file: str = ""


def split(value: str) -> list[str]:
    """The arms that a setting's value names: its parts between commas.

    A comma within brackets, braces, parentheses or quotes belongs to the value, so that
    ``[0.9, 0.98]`` and ``{a: 1, b: 2}`` are one value. A value in quotes as a whole loses them.

    Raises:
        ValueError: A part is empty.
    """
    parts, depth, quote = [""], 0, ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES and (depth or not parts[-1].strip()):
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if quote or depth:  # not the YAML that it looks like: a value as it is
        return [value]
    parts = [part.strip() for part in parts] if len(parts) > 1 else parts
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"{value!r} has an empty part between its commas")
    return [_without_quotes(part) for part in parts]


def _without_quotes(part: str) -> str:
    quoted = len(part) > 1 and part[0] == part[-1] and part[0] in QUOTES
    return part[1:-1] if quoted and part[0] not in part[1:-1] else part


def make_arms(
    of_file: Mapping[str, Any] | None,
    chosen: list[str] | None,
    settings: Mapping[str, str],
    whose: str,
) -> list[Arm]:
    """Every arm: the file's times the values of every setting that lists several.

    Args:
        of_file: `arms` of the configuration file, if it has any.
        chosen: Names of those that are taken; None: all.
        settings: The command line's, by their full names (``model.mixer``).
        whose: For messages: the file's name.

    Raises:
        ValueError: An arm that the file does not have, or that is no settings, or two arms of one
            name.
    """
    names = list(map(str, of_file or {}))
    for name, says in (of_file or {}).items():
        if says is not None and not isinstance(says, dict):
            raise ValueError(
                f"{whose}: arms: {name} is {says!r}: it takes settings by name, as model.mixer: "
                "Retention; {} changes none"
            )
    for name in chosen or []:
        if name not in names:
            there = nearest(name, names) if names else "it has none"
            raise ValueError(f"--arms {name}: {whose} has no such arm; {there}")
    names = [name for name in names if chosen is None or name in chosen]
    listed = {key: split(value) for key, value in settings.items()}
    several = [key for key, values in listed.items() if len(values) > 1]
    arms = []
    for name, *values in itertools.product(names or [""], *listed.values()):
        given = dict(zip(listed, values, strict=True))
        labels = [name] if name else []
        labels += [_label(key, given[key], listed[key]) for key in several]
        arguments = ["--arm", name] if name else []
        for key, value in given.items():
            arguments += [f"--{key}", value]
        arms.append(Arm("+".join(labels) or "model", tuple(arguments), name))
    found = [arm.name for arm in arms]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the arm {twice} is given twice: an arm is compared with others")
    return arms


def _label(key: str, value: str, values: list[str]) -> str:
    """What an arm is called after a setting: its value, with its name where that says more."""
    last = key.rpartition(".")[2]
    words = [_short(entry) for entry in values]
    named = all(re.match(r"[A-Za-z]\w*$", word) for word in words)
    plain = not any(word in ("true", "false", "null", "none") for word in words)
    distinct = len(set(words)) == len(words)
    return _short(value) if named and plain and distinct else f"{last}={value}"


def _short(value: str) -> str:
    """A class by its own name, whatever module it is of, and whatever arguments it is given."""
    found = re.match(r"\{\s*['\"]?class_path['\"]?\s*:\s*['\"]?([\w.]+)['\"]?\s*\}$", value)
    name = found[1] if found else value
    dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name)
    return name.rpartition(".")[2] if dotted else name


def file_name(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.") or "arm"
