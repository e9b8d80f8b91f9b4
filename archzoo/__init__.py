"""archzoo: decoder-only transformers that share one block interface and swap the rest.

``import archzoo`` is light: every public name is imported when it is first used. The names are in
``__init__.pyi``; a part that is there goes by its name alone, in settings and in checkpoints.
"""

from __future__ import annotations

import importlib
from typing import Any

from archzoo._version import __version__ as __version__
from archzoo.public import names_of

__all__ = sorted(names_of(__name__))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'archzoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(names_of(__name__)[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
