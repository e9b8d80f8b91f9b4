"""What docstrings say of arguments: they are the reference, and the help of the command line."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import archzoo

# Device code, what needs an extra, and one file whose import is the program.
NOT_IMPORTED = re.compile(r"\.(triton|gluon\w*|evaluation\.harness|__main__)$")

# What these take are the fields of Inputs, Problem, Direction and Plan, which are explained there;
# and what plain forms take is what the zoo's parts of the same names do, in a file of few lines.
UNSAID = (
    *(f"archzoo.kernels.retention.{name}" for name in ("launch.", "plans.", "available")),
    "archzoo.export.plain.",
)


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions and methods of archzoo; a method that overrides one is documented there."""
    for entry in pkgutil.walk_packages(archzoo.__path__, "archzoo."):
        if NOT_IMPORTED.search(entry.name):
            continue
        module = importlib.import_module(entry.name)
        mine = [
            (n, v) for n, v in vars(module).items() if getattr(v, "__module__", "") == entry.name
        ]
        for name, value in mine:
            if inspect.isfunction(value) and not name.startswith("_"):
                yield f"{entry.name}.{name}", value
            if not inspect.isclass(value) or name.startswith("_"):
                continue
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)
                inherited = any(method in vars(base) for base in value.__mro__[1:])
                if inspect.isfunction(function) and not method.startswith("_") and not inherited:
                    yield f"{entry.name}.{name}.{method}", function


def test_a_function_of_three_arguments_or_more_says_what_each_is() -> None:
    silent, wrong = [], []
    for name, function in functions():
        arguments = inspect.signature(function).parameters.values()
        names = [str(p).partition(":")[0].partition("=")[0] for p in arguments]
        names = [n for n in names if n not in ("self", "cls", "ctx")]
        _, found, section = (inspect.getdoc(function) or "").partition("Args:\n")
        if not found:
            silent += [name] if len(names) >= 3 else []
            continue
        section = re.split(r"\n\S", section)[0]
        said = [
            n
            for line in re.findall(r"^    (\*{0,2}\w.*?): ", section, re.M)
            for n in line.split(", ")
        ]
        wrong += [name] if said != names else []
    silent = [name for name in silent if not name.startswith(UNSAID)]
    assert not silent + wrong
