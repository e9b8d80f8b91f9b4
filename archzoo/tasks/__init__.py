"""The data sets: each brings its tokenizer, its batches and the metrics that fit it.

`Addition`, `Subtraction`, `Multiplication`, `BitwiseOr` and `Sorting` make problems out of thin
air, `Arithmetic` those of several of them, `Text` reads any UTF-8 file or folder, and `Mixed` puts
problems between its lines. Mixers differ most on `Recall`, `NoisyRecall`, `FuzzyRecall`,
`Memorisation`, `Copying`, `SelectiveCopying`, `Induction` and `StateTracking`; `KeyValues` says how
much a small change of a trained model can hold. All are Lightning data modules; a class of your own
derives from `Task` and writes `prepare`, `training_batch` and `evaluation_batch`.

The names are in ``__init__.pyi`` and are looked up when they are used: the tokenizers serve
generation too, which must not wait for Lightning.
"""

from importlib import import_module
from typing import Any

from archzoo.public import names_of

__all__ = sorted(names_of(__name__))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(names_of(__name__)[name]), name)
