"""One clear line for what is misspelt in a configuration or on the command line.

jsonargparse says what it tried, type by type; a person wants to know which setting is meant, what
is wrong with it, and which names there are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

from archzoo.names import nearest
from archzoo.parts import SLOTS, list_parts
from archzoo.training.distillation import Distil
from archzoo.training.settings import kinds_of, subclasses
from archzoo.trust import find_class

DISTIL = "model.distil"  # whose settings are those of a dataclass
NOTHING = "Expected a <class 'NoneType'>"  # of every optional setting: says nothing
NOT_ACCEPTED = r"Option '([\w.]+)' is not accepted"
BY_CLASS = NOT_ACCEPTED + r" by (\w+), which has \[([\w, ]*)\]"  # as `with_class` has it


def explain(message: str, options: Iterable[str]) -> str:
    """One line from jsonargparse's many.

    Args:
        message: What it said.
        options: The settings there are, by their full names.
    """
    text = " ".join(message.split())
    settings = sorted({name for name in options if not name.endswith((".help", "+"))})
    found = re.search(r"(?:nrecognized arguments: --|does not accept option ')([\w.]+)", text)
    if found:
        return f"there is no setting {found[1]!r}; {nearest(found[1], settings)}"
    found = re.search(r"nrecognized arguments: ([^-\s]\S*)", text)
    if found:
        name = found[1]
        hint = "--NAME VALUE"
        if name.endswith((".yaml", ".yml")):
            hint = f"--config {name}"
        elif Path(name).exists():
            hint = f"--ckpt_path {name}"
        return f"{name!r} stands alone: settings are given as {hint}"
    found = re.search(r"arguments are required: (\w+)\.data", text)
    if found:
        name = "the name of a configuration (archzoo list --configurations shows them), "
        other = name if found[1] == "fit" else "--ckpt_path CHECKPOINT or "
        return f"{found[1]} needs data: give {other}--config FILE, or --data with a task"
    found = re.search(r'key "config".*File does not exist: \'([^\']+)\'', text)
    if found:
        return _no_configuration(Path(found[1]))

    found = re.search(r'Parser key "([\w.]+)": (.*)', text)
    key, text = found.groups() if found else ("", text)
    classes = _classes(key)
    if key == DISTIL and (said := _of_distil(text)):
        return said
    found = re.search(BY_CLASS, text)
    if found and classes:
        return _no_option(key, found[1], found[2], found[3].split(", "), classes)
    found = re.search(r"Importing '([^']+)' is not allowed", text)
    if found:
        return f"{key}: {_not_allowed(found[1], kinds_of(key))}"
    found = re.search(r"dot import path string: (\S+)", text)
    if found and classes:
        return f"{key}: there is no {found[1]!r}; {nearest(found[1], list(classes))}"

    if "expects a function or a callable class" in text:
        return _no_class(key, text)
    text = text.partition(" Not a valid subclass of ")[0].removesuffix(" -")

    found = re.fullmatch(
        r"(Expected an? (?:<class '\w+'>|typing\.Literal\[.*?\]))\. Got value: (.*)", text
    )
    if found and key:
        wanted, value = found.groups()
        wrong = f"{key}: {value!r} is not {_number(value, [_plain(wanted)])}"
        return wrong + _way_out(value, [wanted])

    # "... Errors: - what each type had against it - ... Given value type: ... Given value: ..."
    _, listed, errors = text.partition("Errors: - ")
    if not listed:
        return f"{key}: {text}" if key else text
    errors, _, value = errors.partition(" Given value type: ")
    reasons = [reason for reason in errors.split(" - ") if reason != NOTHING]
    value = value.partition("Given value: ")[2]
    within = re.fullmatch(r"(Expected .*?)\. Got value: (.*)", reasons[0] if reasons else "")
    if within and len(reasons) == 1:  # an entry of a list
        reasons, value = [within[1]], within[2]
    expected = [_plain(reason) for reason in reasons if reason.startswith("Expected")]
    if len(expected) == len(reasons):
        return f"{key}: {value!r} is not {_number(value, expected)}{_way_out(value, reasons)}"
    text = "; ".join(reason for reason in reasons if not reason.startswith("Expected"))
    if (within := re.match(r"(\w+): ", text)) and within[1] in SLOTS:  # of a class's own class
        return f"{key}.{text}".replace(f"--{within[1]} ", f"--{key}.{within[1]} ")
    return f"{key}: {text}" if key else text


def with_class(message: str, described: type, options: Iterable[str]) -> str:
    """What jsonargparse has against a class's option, with the class, which it does not name.

    Args:
        message: What it said; if it is of something else, it stays as it is.
        described: The class.
        options: What it takes, by name, those of classes within it after a dot.
    """
    own = sorted({name.rstrip("+") for name in options if "." not in name} - {"help", "config"})
    listed = rf"\g<0> by {described.__name__}, which has [{', '.join(own)}]"
    return re.sub(f"^{NOT_ACCEPTED}$", listed, " ".join(message.split()))


def _of_distil(text: str) -> str:
    """What is wrong with the settings of `Distil`, which is no class to choose; "": something else.

    Args:
        text: What jsonargparse has against them.
    """
    if found := re.search(NOT_ACCEPTED, text):
        known = [*Distil.__dataclass_fields__]
        return f"there is no setting {DISTIL}.{found[1]}; {nearest(found[1], known)}"
    if found := re.search(r"dot import path string: (\S+)", text):
        return f"{DISTIL}: {found[1]!r} stands alone: give --{DISTIL}.teacher CHECKPOINT"
    if "are required: teacher" in text:
        return f"{DISTIL} needs a teacher: --{DISTIL}.teacher CHECKPOINT"
    return ""


def _classes(key: str) -> dict[str, type]:
    """The classes that a setting may name, by name."""
    slot = key.removeprefix("model.")
    if slot in SLOTS:
        return dict(list_parts(slot))
    found = (cls for kind in kinds_of(key) for cls in subclasses(kind) if cls is not kind)
    return {cls.__name__: cls for cls in found if not cls.__name__.startswith("_")}


def _not_allowed(path: str, kinds: tuple[type, ...]) -> str:
    """Why a setting may not name what stands at an import path."""
    try:
        if kinds:
            find_class(path, kinds)
    except ValueError as error:
        return str(error)
    return f"{path!r} cannot be named here"


def _no_option(
    key: str, name: str, chosen: str, options: list[str], classes: dict[str, type]
) -> str:
    """What the class that a setting has chosen takes, and which others take the option.

    Args:
        key: The setting.
        name: The option.
        chosen: The class's name.
        options: Those that it has.
        classes: All that the setting may name.
    """
    given = ["dim", "heads", "width"]  # by the decoder
    if key.endswith("router"):
        given += ["experts", "top_k"]  # by the mixture
    options = [option for option in options if option and option not in given]
    said = f"{key}: {chosen} has no option {name!r}"
    others = [
        title
        for title, cls in classes.items()
        if name not in given and name in inspect.signature(cls).parameters
    ]
    unnamed = chosen in {kind.__name__ for kind in kinds_of(key)}
    if not others:
        if unnamed:
            return f"{key}: no class is named, and none has an option {name!r}: --{key} NAME"
        return f"{said}; {nearest(name, options)}"
    *most, last = others
    who = f"{', '.join(most)} and {last} have it" if most else f"{last} has it"
    if unnamed:
        return f"{key}: option {name!r} needs the class too; {who}: --{key} {others[0]}"
    has = f"it has {', '.join(options)}" if options else "it has none"
    return f"{said}; {has}; {who}: --{key} {others[0]}"


def _no_class(key: str, text: str) -> str:
    """What a class's place was given instead of one: its arguments alone, or something else."""
    kind = key.rpartition(".")[2]
    found = re.search(r"NestedArg\(key='([\w.]+)'", text)
    if found:
        return f"--{key}.{found[1]} needs the class too: --{key} NAME, with the options behind it"
    found = re.search(r"(?:but got|Got value:) (.*?)(?:\. Got value: .*| - Expected .*)?$", text)
    given = f"={found[1]}" if found else ""
    article = "an" if kind[:1] in "aeiou" else "a"
    return (
        f"{key}{given} is no class with its arguments: take the name of {article} {kind}, or in a "
        "file {class_path: NAME, init_args: {ARGUMENT: VALUE}}"
    )


def _way_out(value: str, reasons: list[str]) -> str:
    """How a value of the expected kind is written, where that is not plain."""
    expected = [_plain(reason) for reason in reasons]
    if "list" in expected:
        return f"; a list is written [{value}]"
    if "tuple" in expected:
        return f"; several values are written [{value}, ...]"
    if "dict" in expected:
        return f"; values by name are written {{NAME: {value}}}"
    return ""


def _number(value: str, expected: list[str]) -> str:
    """What was expected; a float's rule where the value is nan or inf, which YAML has as text."""
    if "float" in expected and value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return "a finite number"
    return " or ".join(expected)


def _no_configuration(path: Path) -> str:
    known = [str(file) for file in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    hint = f"; {nearest(str(path), known)}" if known else ""
    return f"configuration not found: {path}{hint}"


def _plain(reason: str) -> str:
    """What was expected: a class as its name alone, a Literal as its values."""
    reason = re.sub(r"^Expected (an? )?", "", reason)
    reason = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", reason)
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", reason)
    return f"one of {literal[1]}" if literal else reason
