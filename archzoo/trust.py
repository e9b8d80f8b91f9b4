"""What a file may name and read, and how a user allows more.

A checkpoint or a configuration may come from a stranger, and importing what it names would run the
stranger's code. So nothing is imported because a file names it: a class is looked for among those
that are imported already, which are the zoo's own, Lightning's, those of installed packages that
declare an entry point in the group ``archzoo``, and those of the modules that the user imports:
with `import` in Python, with ``--import MODULE`` on the command line.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import re
import site
import sys
import sysconfig
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from glob import glob
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, Union
from weakref import WeakValueDictionary

from archzoo.names import nearest

#: Modules that the user had imported by ``--import``, to say them again.
user_imports: list[str] = []

ENTRY_POINTS = "archzoo"  # the group that an installed package declares
CORPORA = ("shakespeare.txt", "three_kingdoms.txt")  # in data/, beside train.py


#: Modules whose parts moved, and where they are now; files written before name the old ones.
MOVED = {
    "archzoo.positions.abacus": "archzoo.embeddings.abacus",
    "archzoo.positions.coupling": "archzoo.embeddings.coupling",
    "archzoo.positions.embedding": "archzoo.embeddings.token",
    "archzoo.positions.learned": "archzoo.embeddings.learned",
}
_OLD_PATH = re.compile(rf"\b({'|'.join(map(re.escape, MOVED))})(?=\.[A-Z]\w*\b)")


def with_moved(text: str) -> str:
    """A text in which every class that moved goes by its path of today."""
    return _OLD_PATH.sub(lambda found: MOVED[found[0]], text)


def find_class(path: str, kind: type | tuple[type, ...] = object) -> type:
    """The class at an import path, if its module is imported already and it is of a kind.

    Args:
        path: Such as ``my_module.MyMixer``.
        kind: The class, or one of the classes, that it must be or derive from.

    Raises:
        ValueError: It is not imported, there is no such class, or it is of another kind. The
            message begins with the path.
    """
    if not isinstance(path, str):
        raise ValueError(f"{path!r} is not a class's name")
    path = with_moved(path)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    found = _imported(path)
    if found is None:
        found = _others.get(path)
    if found is None and WITHIN in path:
        plain = path.partition("#")[0]  # numbers are of the process that gave them
        found = next((cls for cls in _last_first(kinds) if _path(cls) == plain), None)
    if found is not None:
        if not inspect.isclass(found) or not issubclass(found, kind):
            wanted = " or ".join(entry.__name__ for entry in kinds)
            article = "an" if wanted[0] in "AEIOU" else "a"
            raise ValueError(
                f"{path!r} is not {article} {wanted}: name a class that derives from one"
            )
        return found
    module_name = path.rpartition(".")[0]
    if WITHIN in path:
        raise ValueError(
            f"{path!r} is defined in a function that has not run here: run it first, or define the "
            "class at the top of a module"
        )
    if module_name == "__main__":
        raise ValueError(
            f"{path!r} was defined in a notebook or a prompt and is not defined here: define it "
            "first, or put it into a module of its own"
        )
    if module_name in sys.modules:
        raise ValueError(f"{path!r} is not there: {module_name} has no class of that name")
    raise ValueError(
        f"{path!r} is not imported, and nothing is imported because a file or a setting names it: "
        f"if you trust that module, give --import {module_name or path} (in Python: import it)"
    )


WITHIN = ".<locals>."  # in the path of a class that a function defines

# Classes that no module leads to, by the name that they were given: those defined in a function,
# and those that were defined anew since.
_others: WeakValueDictionary[str, type] = WeakValueDictionary()


def name_of(cls: type) -> str:
    """The name under which plain data holds a class, and `find_class` finds it again.

    It is the import path. A class of the script that is run goes by the script's name, under which
    another program can import it. A class that no module leads to, as one defined in a function,
    is found in this process, for as long as it lives; where two have one path, the second goes by
    a number too.
    """
    path = _path(cls)
    if _imported(path) is cls:
        return path
    names = chain([] if _imported(path) else [path], (f"{path}#{number}" for number in count(2)))
    name = next(name for name in names if _others.get(name, cls) is cls)
    _others[name] = cls
    return name


def _path(cls: type) -> str:
    # The second: in a process that multiprocessing has started.
    of_script = cls.__module__ in ("__main__", "__mp_main__")
    return f"{(of_script and _script()) or cls.__module__}.{cls.__qualname__}"


def _script() -> str | None:
    """The name under which the script that runs could be imported; None: there is none."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = str(spec.name) if spec else Path(getattr(main, "__file__", None) or "").stem
    usable = all(map(str.isidentifier, name.split("."))) and name not in sys.modules
    return name if usable else None


def _imported(path: str) -> Any:
    """What a module that is imported holds at a path; None: there is no such thing."""
    names, script = path.split("."), _script()
    for length in range(len(names) - 1, 0, -1):
        name = ".".join(names[:length])
        module = sys.modules.get("__main__" if name == script else name)
        if module is None:
            continue
        found: Any = module
        for name in names[length:]:
            # Through `vars`, for a module's own __getattr__ may import.
            found = vars(found).get(name) if found is module or inspect.isclass(found) else None
        return found
    return None


def _last_first(kinds: Iterable[type]) -> Iterator[type]:
    """All classes that derive from some, those defined last first."""
    for kind in kinds:
        children: list[type] = type.__subclasses__(kind)
        for child in reversed(children):
            yield child
            yield from _last_first([child])


def import_for_user(name: str) -> types.ModuleType:
    """Import a module because the user names it, looking in the current directory too.

    Args:
        name: The module's, such as ``my_module`` or ``my_package.mixers``.

    Raises:
        ValueError: It is not a module's name, or it cannot be imported.
    """
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        stem = name.removesuffix(".py").replace(os.sep, ".").strip(".")
        hint = f", such as {stem}" if stem != name else ""
        raise ValueError(f"{name!r} is not a module's name{hint}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module raises
        reason = str(error) or type(error).__name__
        if not isinstance(error, ImportError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"module {name!r} cannot be imported: {reason}") from error


@functools.cache
def load_installed() -> None:
    """Import what installed packages declare under the entry points ``archzoo``, once.

    Only where packages are installed is looked at: a directory that happens to be the current one
    is on Python's path, and may be a stranger's.
    """
    places = {*site.getsitepackages(), site.getusersitepackages()}
    places |= {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    on_path = {os.path.realpath(entry) for entry in sys.path if entry}
    installed = [path for path in sorted(places) if os.path.realpath(path) in on_path]
    seen = set()
    for distribution in importlib.metadata.distributions(path=installed):
        for point in distribution.entry_points:
            if point.group != ENTRY_POINTS or point in seen:
                continue
            seen.add(point)
            try:
                point.load()
            except Exception as error:  # whatever the package raises: the zoo works without it
                warnings.warn(
                    f"the entry point {point.name} = {point.value} of an installed package cannot "
                    f"be loaded: {error}",
                    stacklevel=2,
                )


def check_arguments(cls: type, arguments: Mapping[str, Any], whose: str) -> None:
    """Refuse plain data that a class does not take: unknown names, values of another type.

    Raises:
        ValueError: The message names the argument, the value and what is expected.
    """
    known, takes_any = parameters_of(cls)
    for name, value in arguments.items():
        if name not in known and not takes_any:
            raise ValueError(f"{whose} has no argument {name!r}; {nearest(str(name), list(known))}")
        hint = known.get(name, Any)
        if not _fits(value, hint):
            raise ValueError(f"{whose}: {name}={shown(value)} is not {_title(hint)}")


def parameters_of(cls: type) -> tuple[dict[str, Any], bool]:
    """A class's arguments and their types, and whether it takes any others.

    Where `__init__` hands ``**arguments`` on, those of the class it derives from count too.
    """
    found: dict[str, Any] = {}
    for owner in cls.__mro__:
        function = vars(owner).get("__init__")
        if not inspect.isfunction(function):
            continue
        try:
            hints = typing.get_type_hints(function)
        except Exception:  # a name that only type checkers know
            hints = {}
        parameters = [*inspect.signature(function).parameters.values()][1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return found, False
    return found, True


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data is of a type; classes and callables are not looked into."""
    origin, within = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, entry) for entry in within)
    if origin is Literal:
        return any(value == entry and type(value) is type(entry) for entry in within)
    if hint in (None, type(None)):
        return value is None
    if hint in (int, float):  # where a number is expected, true is a user error
        kinds = (int, float) if hint is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if (origin or hint) in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        each = [entry for entry in within if entry is not Ellipsis]
        if (origin is tuple and len(within) == len(each)) and each and len(each) != len(value):
            return False
        return not each or all(
            _fits(entry, each[min(index, len(each) - 1)]) for index, entry in enumerate(value)
        )
    if (origin or hint) is dict:
        if not isinstance(value, Mapping):
            return False
        return not within or all(
            _fits(key, within[0]) and _fits(entry, within[1]) for key, entry in value.items()
        )
    return True


def _title(hint: Any) -> str:
    """A type as a message says it: ``int or None``."""
    origin, within = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_title, within))
    if origin is Literal:
        return f"one of {', '.join(map(repr, within))}"
    if hint is type(None):
        return "null"
    return hint.__name__ if inspect.isclass(hint) and not within else str(hint)


def shown(value: Any) -> str:
    """A value in a message: its beginning, if it is long, as a stranger's file may make it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------------------- sizes


def machine_memory() -> int:
    """Bytes of memory that this process may come to hold, as far as the system says."""
    found = [2**63]
    with suppress(AttributeError, ValueError, OSError):  # not on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(ValueError, OSError):  # a container's own limit, where there is one
            found.append(int(Path(name).read_text()))
    return min(size for size in found if size > 0)


# ---------------------------------------------------------------------------- paths


def strings(value: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text in nested plain data, with the names that lead to it."""
    if isinstance(value, str):
        yield above, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from strings(entry, (*above, str(name)))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from strings(entry, above)


def check_path(text: str, *, always: bool = False) -> None:
    """Refuse a path of a stranger's file that leads out of the current directory.

    What it leads to is looked at, through symbolic links: of a folder or a pattern, every file.
    The corpora that come with the zoo may be read from anywhere.

    Args:
        text: Any text of a checkpoint or a configuration.
        always: It is known to be a path; otherwise a text that looks like none is let through.

    Raises:
        ValueError: The message begins with the text, and says what is wrong.
    """
    if "\0" in text:
        raise ValueError(f"{shown(text)} is not a path")
    here = Path.cwd()
    path = Path(text).expanduser()
    if not (always or os.sep in text or text.startswith(("~", "..")) or os.path.lexists(path)):
        return
    if "://" in text:
        raise ValueError(f"{shown(text)} is an address, which no file may send to")
    _check_file(path, text, here)  # before what is in it, which may be a whole disk
    if path.is_dir():
        inside: Iterable[Path] = path.rglob("*")
    else:
        inside = map(Path, glob(text) if always else ())
    for file in inside:
        _check_file(file, text, here)


def _check_file(file: Path, text: str, here: Path) -> None:
    resolved = file.resolve()
    if not resolved.is_relative_to(here.resolve()) and resolved not in _corpora():
        raise ValueError(
            f"{shown(text)} leads to {resolved}, which does not lie under the current directory"
        )
    if resolved.exists() and not (resolved.is_file() or resolved.is_dir()):
        raise ValueError(f"{shown(text)} leads to {resolved}, which is not a regular file")


def _corpora() -> set[Path]:
    """The texts that come with a copy of the zoo's source."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "train.py").is_file():  # installed without them
        return set()
    return {root / "data" / name for name in CORPORA}
