"""What settings may hold, wherever they come from: the command line, a YAML file, a checkpoint.

jsonargparse imports what a setting names, builds what looks like a class where a slot takes
anything, and calls a function where it takes a `Callable`. Here it is kept to the classes that are
imported already and of a kind that some slot takes; see archzoo/trust.py for the rule. Files are
read here too, never by jsonargparse: what they hold is plain data of a bounded size, checked before
anything is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import _common as jsonargparse_settings
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins import Precision as FabricPrecision
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from archzoo import shipped
from archzoo.names import nearest
from archzoo.parts import SLOTS
from archzoo.tasks.stream import Task, known_tasks
from archzoo.training.distillation import Distil
from archzoo.trust import (
    check_arguments,
    check_path,
    find_class,
    machine_memory,
    parameters_of,
    shown,
    strings,
)

#: What a setting may name: the classes of a kind.
KINDS: dict[str, tuple[type, ...]] = {
    **{f"model.{slot}": (kind,) for slot, kind in SLOTS.items()},
    "model.pattern": (SLOTS["mixer"],),
    "model.optimizer": (Optimizer,),
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
    allowed |= set(_paths(Distil))  # which jsonargparse names itself, for settings by name
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
        return  # it is within a function
    names = cls.__module__.split(".")
    for count in range(1, len(names) + 1):
        yield ".".join([*names[:count], cls.__qualname__])


# ---------------------------------------------------------------------------- reading

ARGUMENTS = ("init_args", "dict_kwargs")  # beside a class_path; the second: for its **kwargs
SECTIONS = ("model", "trainer", "checkpoint")  # which hold settings by name
FILE_LARGEST = 1_000_000  # bytes of a configuration file
EXPANDED_LARGEST = 100_000  # values of one, its aliases written out
NESTED_DEEPEST = 64


def read(path: Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file, plain data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not one, too large, nested too deeply, or gives a key twice.
    """
    if not path.exists():
        files = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
        known = [str(file) for file in files]
        hint = f"; {nearest(str(path), known)}" if known else ""
        if path.stem in shipped.configurations():
            hint += f"; archzoo fit {path.stem} takes the one that comes with archzoo"
        raise FileNotFoundError(f"configuration not found: {path}{hint}")
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise ValueError(f"{path} is {kind}: --config takes a YAML file")
    with open(path, "rb") as file:
        content = file.read(FILE_LARGEST + 1)
    if len(content) > FILE_LARGEST:
        raise ValueError(f"{path} has more than {FILE_LARGEST:,} bytes: too long to be valid")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    return parse(text, str(path))


def parse(text: str, whose: str) -> dict[str, Any]:
    """The settings of a text in YAML, of which JSON is a part.

    Args:
        text: What a file holds.
        whose: For messages: the file's name.

    Raises:
        ValueError: As `read`.
    """
    try:
        _check_nesting(text, whose)
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise ValueError(f"{whose} is empty: it holds model:, data: and trainer: at least")
        _expanded(node, {}, whose)
        found = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        said = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{whose} is not valid YAML{where}: {said}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{whose} holds {shown(found)}: settings by name are expected, as model:")
    if "__path__" in found:  # the parser's own mark, which it would take in silence
        raise ValueError(f"{whose}: there is no setting '__path__'")
    for section in SECTIONS:
        if section in found and found[section] is None:
            found[section] = {}  # a heading alone
        if not isinstance(found.get(section, {}), dict):
            raise ValueError(
                f"{whose}: {section} is {shown(found[section])}, and not settings by name"
            )
    return found


class _Loader(get_yaml_default_loader()):  # type: ignore[misc]
    """The parser's own reader of YAML (1e-3 is a number), which takes no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            merge = key.tag == "tag:yaml.org,2002:merge"
            if not (merge or key.tag == "tag:yaml.org,2002:str"):
                raise yaml.YAMLError(f"the key {shown(name)} is not a name, line {line}")
            if name in seen and not merge:
                raise yaml.YAMLError(f"the key {name!r} is given twice, line {line}")
            seen.add(name)
        return dict(super().construct_mapping(node, deep=deep))


def _plain_only(loader: Any, node: Any) -> Any:
    raise yaml.YAMLError(
        f"{node.tag.rpartition(':')[2]} is not a plain value, line {node.start_mark.line + 1}"
    )


for _tag in ("binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _plain_only)


def _check_nesting(text: str, whose: str) -> None:
    """Refuse what is nested deeply, which reading it into values would follow to the end."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > NESTED_DEEPEST:
            raise ValueError(f"{whose} is nested more than {NESTED_DEEPEST} deep")


def _expanded(node: Any, known: dict[int, int], whose: str) -> int:
    """How many values a part of a file stands for, where aliases are written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"{whose}: an alias refers to itself")
        return known[id(node)]
    known[id(node)] = 0  # not known yet
    inner: Iterable[Any] = ()
    if isinstance(node, yaml.MappingNode):
        inner = (entry for pair in node.value for entry in pair)
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    total = 1
    for entry in inner:
        total += _expanded(entry, known, whose)
        if total > EXPANDED_LARGEST:
            raise ValueError(
                f"{whose}: its aliases stand for more than {EXPANDED_LARGEST:,} values"
            )
    known[id(node)] = total
    return total


class _Dumper(yaml.SafeDumper):
    """Writes every text in quotes, so that it is read as a text again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def written(settings: Mapping[str, Any]) -> str:
    """Settings as one text for the parser, which reads the same from it."""
    text: str = yaml.dump(
        dict(settings),
        Dumper=_Dumper,
        allow_unicode=True,
        default_flow_style=True,
        width=1 << 20,
        sort_keys=False,
    )
    return text


# ---------------------------------------------------------------------------- checking


def check(settings: Mapping[str, Any], whose: str) -> None:
    """Refuse settings of a file that name anything but imported classes of their slot's kind.

    Raises:
        ValueError: The message begins with `whose`, and names the setting.
    """
    try:
        for name, value in settings.items():
            if name != "arms":  # the variants, which are checked when one is run
                check_value(str(name), value)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from None


def check_value(key: str, value: Any) -> None:
    """`check` for one setting, by its full name such as ``model.mixer``."""
    kinds = kinds_of(key)
    if isinstance(value, str) and kinds and "." in value:
        _found(key, value, kinds)
    elif isinstance(value, list):
        for entry in value:
            check_value(key, entry)
    elif isinstance(value, dict):
        if "class_path" in value or "init_args" in value:
            _check_class(key, value, kinds)
            for named in ARGUMENTS:
                for name, entry in (value.get(named) or {}).items():
                    check_value(f"{key}.{name}", entry)
        elif key == "model.adapters":  # by name
            for name, entry in value.items():
                if not isinstance(entry, str | dict):
                    raise ValueError(f"{key}.{name}: {shown(entry)} is not an adapter")
                check_value("model.adapter", entry)
        elif kinds and key != "data":
            raise ValueError(
                f"{key} is {shown(value)}: it takes a class's name, or class_path and init_args"
            )
        else:
            for name, entry in value.items():
                check_value(f"{key}.{name}", entry)


def _check_class(key: str, value: dict[str, Any], kinds: tuple[type, ...]) -> None:
    """A class and its arguments: the class must be imported, and no argument name a function."""
    beside = [str(name) for name in value if name not in ("class_path", *ARGUMENTS)]
    if beside:
        raise ValueError(
            f"{key}: {', '.join(beside)} stands beside class_path: arguments go under init_args"
        )
    for named in ARGUMENTS:
        if not isinstance(value.get(named) or {}, dict):
            raise ValueError(f"{key}: {named} is {shown(value[named])}, not arguments by name")
    name, arguments = value.get("class_path"), value.get("init_args") or {}
    if name is None and key == "data":
        return  # those of the class that another file or the command line names
    if not isinstance(name, str):
        raise ValueError(f"{key}: class_path is {shown(name)}, not a class's name")
    every = tuple(kind for entry in KINDS.values() for kind in entry)
    cls = _found(key, name, kinds or every)
    for argument, hint in (parameters_of(cls)[0] if cls else {}).items():
        given = arguments.get(argument)
        if "Callable" in str(hint) and argument not in SLOTS and isinstance(given, str | dict):
            raise ValueError(
                f"{key}: {argument}={shown(given)} names a function, and a file may not name one"
            )


def _found(key: str, name: str, kinds: tuple[type, ...]) -> type | None:
    """The class of a name; None where no class of that short name is there."""
    if "." in name:
        ours = name.startswith("archzoo.")  # the public names are looked up when they are used
        own = name.removeprefix("archzoo.").removeprefix("tasks.") if ours else name
        if "." in own:
            try:
                return find_class(name, kinds)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        name = own
    found = (cls for kind in kinds for cls in subclasses(kind) if cls.__name__ == name)
    return next(found, None)


def check_amounts(data: Any) -> None:
    """Refuse a task of the zoo whose batches or problems would not fit into the machine's memory.

    Args:
        data: Its class_path and init_args.

    Raises:
        ValueError: The message names the setting, and what it takes.
    """
    cls = known_tasks().get(str(data.class_path))
    if cls is None or not cls.__module__.startswith("archzoo.tasks."):
        return
    given = data.get("init_args")
    arguments = given.as_dict() if given is not None else {}
    check_arguments(cls, arguments, "data")  # jsonargparse lets null pass for any type
    task = cls(**arguments)  # nothing is made yet
    for name in ("batch_size", "validation_examples", "test_examples", "ood_examples"):
        rows = task.arguments.get(name) or 0
        needed = rows * task.context_length * 3 * 8  # tokens, labels and numbers of examples
        if needed > (memory := machine_memory()):
            raise ValueError(
                f"data.{name}={rows}: that many rows of {task.context_length} tokens take "
                f"{needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB of memory"
            )


def check_paths(
    settings: Mapping[str, Any], whose: str, given: Iterable[str], otherwise: str
) -> None:
    """Refuse settings of a stranger's file that lead out of the current directory.

    Args:
        settings: As `read` gives them.
        whose: For messages: the file's name.
        given: Settings that the command line gives instead, by their full names.
        otherwise: How the whole file is trusted, for messages.

    Raises:
        ValueError: The message names the setting, the path, and what allows it.
    """
    instead = tuple(given)
    for key_path, text in strings(settings):
        key = ".".join(name for name in key_path if name not in ARGUMENTS)
        if key in instead or key_path[-1] == "class_path":
            continue
        try:
            check_path(text, always=key_path[-1] == "path")
        except ValueError as error:
            raise ValueError(f"{whose}: {key}={error}: give --{key} {text}, {otherwise}") from None


#: Lightning's loggers that write under the run's directory; others may send what they are given.
LOCAL_LOGGERS = {"CSVLogger", "TensorBoardLogger"}


def check_loggers(
    settings: Mapping[str, Any], whose: str, given: Iterable[str], otherwise: str
) -> None:
    """Refuse loggers of a stranger's file that may send a run to an account of the stranger's.

    `tracker` is not one of them: where it logs is said by the user's own login and environment.

    Args:
        settings: As `read` gives them.
        whose: For messages: the file's name.
        given: Settings that the command line gives instead, by their full names.
        otherwise: How the whole file is trusted, for messages.

    Raises:
        ValueError: The message names the logger, and what allows it.
    """
    trainer = settings.get("trainer")
    loggers = trainer.get("logger") if isinstance(trainer, Mapping) else None
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        name = logger.get("class_path") if isinstance(logger, Mapping) else logger
        kind = str(name).rpartition(".")[2]
        if (
            name
            and name is not True
            and kind not in LOCAL_LOGGERS
            and "trainer.logger" not in given
        ):
            raise ValueError(
                f"{whose}: trainer.logger={kind} may send the run to another machine: give "
                f"--trainer.logger false, {otherwise}"
            )
