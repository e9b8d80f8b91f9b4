"""The data sets: each brings its tokenizer, its batches and the metrics that fit it.

`Addition`, `Subtraction`, `Multiplication`, `BitwiseOr` and `Sorting` make problems out of thin
air, `Arithmetic` those of several of them, `Text` reads any UTF-8 file or folder, and `Mixed` puts
problems between its lines. All are Lightning data modules; a class of your own derives from `Task`
and writes `prepare`, `training_batch` and `evaluation_batch`.

The names are looked up when they are used: the tokenizers serve generation too, which must not
wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archzoo.tasks.arithmetic import (
        Addition,
        BitwiseOr,
        Multiplication,
        Subtraction,
        exact_match,
    )
    from archzoo.tasks.mixed import Mixed
    from archzoo.tasks.several import Arithmetic
    from archzoo.tasks.sorting import Sorting
    from archzoo.tasks.stream import Task, build, draw
    from archzoo.tasks.text import Text
    from archzoo.tasks.tokenizers import StreamDecoder, Tokenizer

__all__ = [
    "Addition",
    "Arithmetic",
    "BitwiseOr",
    "Mixed",
    "Multiplication",
    "Sorting",
    "StreamDecoder",
    "Subtraction",
    "Task",
    "Text",
    "Tokenizer",
    "build",
    "draw",
    "exact_match",
]

_HOMES = {
    "Addition": "arithmetic",
    "BitwiseOr": "arithmetic",
    "Multiplication": "arithmetic",
    "Subtraction": "arithmetic",
    "exact_match": "arithmetic",
    "Mixed": "mixed",
    "Arithmetic": "several",
    "Sorting": "sorting",
    "Task": "stream",
    "build": "stream",
    "draw": "stream",
    "Text": "text",
    "StreamDecoder": "tokenizers",
    "Tokenizer": "tokenizers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
