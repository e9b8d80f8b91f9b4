"""The public names of a package, which are imported when they are first used.

They are in one place, the package's ``__init__.pyi``, a line each. Type checkers and editors read
them there, and so does this, which imports nothing.
"""

from __future__ import annotations

import functools
import os


@functools.cache
def names_of(package: str) -> dict[str, str]:
    """Each public name of a package, and the module that defines it."""
    directory = os.path.join(os.path.dirname(__file__), *package.split(".")[1:])
    with open(os.path.join(directory, "__init__.pyi"), encoding="utf-8") as file:
        lines = [line.split() for line in file]  # from MODULE import NAME as NAME
    return {words[3]: words[1] for words in lines if words[:1] == ["from"]}
