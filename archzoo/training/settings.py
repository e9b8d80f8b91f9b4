"""What settings may hold, wherever they come from: the command line, a YAML file, a checkpoint.

jsonargparse imports what a setting names, builds what looks like a class where a slot takes
anything, and calls a function where it takes a `Callable`. Here it is kept to the classes that are
imported already and of a kind that some slot takes; see archzoo/trust.py for the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jsonargparse
from jsonargparse import _common as jsonargparse_settings
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from archzoo.parts import SLOTS
from archzoo.tasks.stream import Task

#: What a setting may name: the classes of a kind.
KINDS: dict[str, tuple[type, ...]] = {
    **{f"model.{slot}": (kind,) for slot, kind in SLOTS.items()},
    "model.pattern": (SLOTS["mixer"],),
    "data": (Task,),
    "trainer.callbacks": (Callback,),
    "trainer.logger": (Logger,),
    "trainer.profiler": (Profiler,),
    "trainer.strategy": (Strategy,),
    "trainer.accelerator": (Accelerator,),
    "trainer.plugins": (FabricPrecision, ClusterEnvironment, CheckpointIO, LayerSync),
}


def kinds_of(key: str) -> tuple[type, ...]:
    """The kinds of class that a setting may name, wherever it is nested; none: no class."""
    last = key.rpartition(".")[2]
    return KINDS.get(key) or ((SLOTS[last],) if last in SLOTS else ())


@contextmanager
def imported_only() -> Iterator[None]:
    """Within it jsonargparse finds the classes of `KINDS` that are imported, and nothing else."""
    before = dict(jsonargparse_settings.parsing_settings)
    kinds = (kind for entry in KINDS.values() for kind in entry)
    allowed = {path for kind in kinds for cls in subclasses(kind) for path in _paths(cls)}
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=sorted(allowed),
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield
    finally:  # other users of jsonargparse in this process keep theirs
        jsonargparse_settings.parsing_settings.clear()
        jsonargparse_settings.parsing_settings.update(before)


def subclasses(kind: type) -> Iterator[type]:
    """A class and all that derive from it and are imported."""
    yield kind
    children: list[type] = type.__subclasses__(kind)
    for child in children:
        yield from subclasses(child)


def _paths(cls: type) -> Iterator[str]:
    """The import paths that a class may go by: its module's, and those of the packages above."""
    if not all(part.isidentifier() for part in f"{cls.__module__}.{cls.__qualname__}".split(".")):
        return  # it stands within a function
    names = cls.__module__.split(".")
    for count in range(1, len(names) + 1):
        yield ".".join([*names[:count], cls.__qualname__])
