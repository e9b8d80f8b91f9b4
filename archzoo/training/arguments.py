"""What a command line says before it is parsed: files are read, and a run is found by its name.

Whatever files of settings hold is checked here, before LightningCLI sees it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from archzoo import shipped
from archzoo.checkpoint import CONFIG, locate
from archzoo.names import nearest
from archzoo.tasks.stream import since
from archzoo.training import settings
from archzoo.training.ending import say
from archzoo.trust import user_imports

FILES = ("--model", "--trainer", "--checkpoint", "--data")  # a section may be a file of its own
# What a variant may set.
IN_VARIANTS = ("model", "data", "trainer", "checkpoint", "objective", "seed_everything")
WHOLE = ("data", "objective", "seed_everything")  # of those, what may be given without a part


def value_of(arguments: list[str], name: str) -> str | None:
    """The value of an option before anything is parsed: ``--name value`` or ``--name=value``."""
    names = (name, "-c") if name == "--config" else (name,)
    for index, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key in names:
            following = arguments[index + 1 : index + 2]
            return value if equals else (following[0] if following else None)
    return None


def without(arguments: list[str], name: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, skipped = [], False
    for argument in arguments:
        if skipped or argument.startswith(f"{name}="):
            skipped = False
        elif argument == name:
            skipped = True
        else:
            kept.append(argument)
    return kept


def names_configuration(arguments: list[str]) -> bool:
    """Whether a configuration's name comes first, without --config."""
    return bool(arguments) and not arguments[0].startswith("-")


def says_all(arguments: list[str]) -> bool:
    """Whether the arguments name a task, and need no settings of the run that they resume."""
    return names_configuration(arguments) or any(
        value_of(arguments, name) for name in ("--config", "--data", "--model.weights")
    )


def run_name(arguments: list[str]) -> str | None:
    """The name of a run that is given none: its configuration's, and its variant's."""
    config, variant = value_of(arguments, "--config"), value_of(arguments, "--arm")
    if not config or not Path(config).is_file():
        return None
    return Path(config).stem + (f"_{variant}" if variant else "")


def typed(command: str) -> list[str]:
    """What was typed up to the subcommand, such as `python train.py fit`, with its imports."""
    words = sys.orig_argv
    program = words[: words.index(command)] if command in words[1:4] else ["archzoo"]
    if len(program) == 2 and Path(program[1]).name == "archzoo":
        program = ["archzoo"]  # the script that pip made, which names its Python
    imports = [word for module in user_imports for word in ("--import", module)]
    if "--import" in program[1:] or any(word.startswith("--import=") for word in program):
        imports = []  # it is there
    return [*program, command, *imports]


def with_files_read(arguments: list[str]) -> list[str]:
    """The arguments with every file's name replaced by its content, checked.

    After the first configuration come the settings of --arm, a variant among its `arms`.
    """
    variant = value_of(arguments, "--arm")
    found: list[str] = []
    configurations = 0
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if argument.startswith("-c") and argument != "-c":  # -cFILE
            option, equals, value = "-c", "=", argument[2:].removeprefix("=")
        if option not in ("--config", "-c", *FILES):
            found.append(argument)
            continue
        value = value if equals else next(rest, "")
        if option in ("--config", "-c"):
            content = _content(value, "--config")
            settings.check(content, value)
            found += ["--config", settings.written(content)]
            if not configurations:
                found += _settings_of(variant, content, value)
            configurations += 1
        elif option == "--data" and not value.endswith((".yaml", ".yml", ".json")):
            found += [option, value]  # a class
        else:
            content = {option.lstrip("-"): _content(value, option)}
            settings.check(content, value)
            found += ["--config", settings.written(content)]
    if variant is not None and not configurations:
        raise ValueError(
            f"--arm {variant} needs --config FILE: a variant is one of a file's `arms`"
        )
    return found


def _content(value: str, option: str) -> dict[str, Any]:
    """What a file holds, or the text itself where the command line gives the content."""
    if value.lstrip().startswith("{"):
        return settings.parse(value, option)
    if not value:
        raise ValueError(f"{option} needs a YAML file")
    content = settings.read(Path(value))
    data = content.get("data")
    if isinstance(data, dict) and (later := since(data)):
        # What a run's own file means by the arguments that came after it.
        content["data"] = data | {"init_args": later | (data.get("init_args") or {})}
    return content


def _settings_of(variant: str | None, content: dict[str, Any], whose: str) -> list[str]:
    """The settings of a variant as arguments."""
    if variant is None:
        return []
    variants = content.get("arms")
    if not isinstance(variants, dict) or not isinstance(variants.get(variant), dict):
        names = ", ".join(map(str, variants)) if isinstance(variants, dict) and variants else "none"
        raise ValueError(f"--arm {variant}: the variants of {whose} are {names}")
    found = []
    for name, value in variants[variant].items():
        section, _, rest = str(name).partition(".")
        if (not rest and section not in WHOLE) or section not in IN_VARIANTS:
            allowed = ", ".join(IN_VARIANTS)
            raise ValueError(f"{whose}: the variant {variant} sets {name!r}: it takes {allowed}")
        settings.check({name: value}, f"{whose}: the variant {variant}")
        found += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return found


def settings_beside(path: Path, given: list[str]) -> str:
    """The settings of the config.yaml beside a checkpoint, which came with it: a stranger's, too.

    What they name is held to the rules of any file, and what they read and write to the current
    directory. `cache_dir` is not taken from them.
    """
    content = _content(str(path), "--config")
    settings.check(content, str(path))
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("init_args"), dict):
        data["init_args"].pop("cache_dir", None)
    options = [argument.partition("=")[0].lstrip("-") for argument in given]
    otherwise = f"or --config {path} if you trust all of that file"
    settings.check_paths(content, str(path), options, otherwise)
    settings.check_loggers(content, str(path), options, otherwise)
    if content.get("tracker") and "tracker" not in options:
        say(f"{path} logs to {content['tracker']} as well: --tracker null leaves that out")
    return settings.written(content)


def of_named_run(command: str, path: str | None, arguments: list[str]) -> str | None:
    """The checkpoint's path where --name alone says of which run it is.

    Args:
        command: Such as fit.
        path: What --ckpt_path says.
        arguments: All of them.
    """
    name = value_of(arguments, "--name")
    run = Path(value_of(arguments, "--trainer.default_root_dir") or "runs", name or "")
    if command == "fit" and value_of(arguments, "--resume") == "auto":
        found = run / "last.ckpt"
        return str(found) if name and found.exists() and not says_all(arguments) else path
    if path not in ("last", "best"):
        return path
    if not name:
        raise ValueError(f"--ckpt_path {path} needs --name, --config or a path: of which run?")
    found = run / f"{path}.ckpt"
    return file_of(str(found))


def file_of(path: str) -> str:
    """The checkpoint that --ckpt_path means: a file, or that of a run's directory."""
    if Path(path).exists() and (found := locate(path)).is_file():
        return str(found)
    if Path(path).is_dir():
        inside = sorted(map(str, Path(path).glob("*.ckpt")), reverse=True)  # last before best
        hint = f": give {' or '.join(inside[:2])}" if inside else " and holds no .ckpt file"
        if (Path(path) / CONFIG).exists():  # of save_pretrained
            hint += f": give --model.weights {path} instead of --ckpt_path"
        raise FileNotFoundError(f"{path} is a directory{hint}")
    if Path(path).is_file():  # a file of save_pretrained, of which `locate` gives the directory
        raise FileNotFoundError(f"{path} is no .ckpt file of a run: give --model.weights {path}")
    known = sorted(map(str, Path().glob("runs/*/*.ckpt")))
    hint = f"; {nearest(path, known)}" if known else ""
    raise FileNotFoundError(f"there is no checkpoint {path}{hint}")


def objective_of(command: str, arguments: list[str]) -> str | None:
    """The objective that settings name, which says what they may be: the last word on it.

    That of the files, of a variant of the first, of the config.yaml beside the run that is resumed,
    or of the command line.
    """
    shipped_one = command == "fit" and names_configuration(arguments)
    files = [str(shipped.configuration(arguments[0]))] if shipped_one else []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            files.append(value if equals else next(rest, ""))
    path = value_of(arguments, "--ckpt_path")
    if command == "fit" and not files:
        path = of_named_run(command, path, arguments)
        if path and path not in ("last", "best"):
            beside = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.yaml"
            files = [str(beside)] if beside.is_file() else []
    found, variant = None, value_of(arguments, "--arm")
    for number, file in enumerate(files):
        content = _content(file, "--config")
        found = content.get("objective", found)
        variants = content.get("arms")
        if not number and isinstance(variants, dict) and isinstance(variants.get(variant), dict):
            found = variants[variant].get("objective", found)
    found = value_of(arguments, "--objective") or found
    if found is not None and not isinstance(found, str):
        raise ValueError(f"objective is {found!r}, and not a name, such as Policy")
    return None if found in ("null", "None") else found
