"""The `archzoo` command: a table of subcommands, each imported when it runs and not before.

So `archzoo --help` answers at once, without torch.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

from archzoo.training.ending import Ended


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        about: One line for the help.
        module: Where it is defined.
        function: Its name there. What it takes is read off its signature and docstring.
        actions: Instead of both: the commands that its next word names.
    """

    about: str
    module: str = ""
    function: str = ""
    actions: dict[str, Command] = {}  # noqa: RUF012, which no one writes into


COMMANDS = {
    "fit": Command("train a model: fit addition, or fit --config FILE", "training.command", ""),
    "new": Command("make a directory to start from: settings, parts", "starting", "new_command"),
    "validate": Command("evaluate a checkpoint on the validation data", "training.command", ""),
    "test": Command("evaluate a checkpoint on the test data", "training.command", ""),
    "predict": Command(
        "write what a checkpoint predicts for the test data", "training.command", ""
    ),
    "generate": Command("continue a text", "generation", "generate_command"),
    "read": Command(
        "read a long text into a state, which generate continues", "generation", "read_command"
    ),
    "list": Command(
        "show the models of the zoo, or its configurations", "analysis.listing", "list_command"
    ),
    "show": Command(
        "show one model: its architecture, parts and sizes", "analysis.listing", "show_command"
    ),
    "demo": Command(
        "show two models decode one prompt side by side, with their states", "demo", "demo_command"
    ),
    "adapter": Command(
        "save, merge, export or import an adapter",
        actions={
            "save": Command(
                "write the adapter of a run alone", "conversion.adapters", "save_command"
            ),
            "merge": Command(
                "put an adapter into the weights of its base: a plain model",
                "conversion.adapters",
                "merge_command",
            ),
            "export": Command(
                "write an adapter in the files of another library",
                "conversion.adapters",
                "export_command",
            ),
            "import": Command(
                "read an adapter from the files of another library",
                "conversion.adapters",
                "import_command",
            ),
        },
    ),
    "merge": Command(
        "make one model of several that were trained from one checkpoint",
        "conversion.merge",
        "merge_command",
    ),
    "upcycle": Command(
        "make a mixture of experts of a dense checkpoint, or of several",
        "conversion.upcycle",
        "upcycle_command",
    ),
    "binarise": Command(
        "make a model of 1 bit a weight of a checkpoint",
        "conversion.binarise",
        "binarise_command",
    ),
    "export": Command(
        "write a model as one file of PyTorch, or for transformers",
        "export.command",
        "export_command",
    ),
    "convert": Command(
        "read another library's weights as a model of the zoo",
        "conversion.command",
        "convert_command",
    ),
    "router": Command(
        "show what a checkpoint's routers do, layer by layer", "analysis.routing", "router_command"
    ),
    "grid": Command(
        "exact match of a checkpoint at every size of problem, drawn",
        "analysis.grid",
        "grid_command",
    ),
    "eval": Command(
        "evaluate a checkpoint on the tasks of lm-eval", "evaluation.command", "eval_command"
    ),
    "barrier": Command(
        "draw the loss between two checkpoints, or in the plane of three",
        "analysis.barrier",
        "barrier_command",
    ),
    "compare": Command(
        "train arms with several seeds and learning rates, and say which is better",
        "analysis.compare.command",
        "compare_command",
    ),
    "curves": Command(
        "compare a metric over the steps of several runs", "analysis.curves", "curves_command"
    ),
    "extend": Command(
        "read texts longer than a checkpoint's, with its RoPE scaled",
        "analysis.extend",
        "extend_command",
    ),
    "bench": Command(
        "time models side by side, against length", "analysis.bench.command", "bench_command"
    ),
    "cache": Command(
        "show or remove the encoded texts that are kept", "tasks.cache", "cache_command"
    ),
    "check": Command(
        "check that a class of yours implements the interface", "contract", "check_command"
    ),
}

# Errors that the user can fix, which need no traceback.
USER_ERRORS = (ValueError, OSError, ArithmeticError)

SECTIONS = ("model", "data", "trainer", "checkpoint")  # of the settings of `fit`

LONGEST = 1_000  # characters of an error's line

# What commands import first, and so what is missing where the environment was not entered.
DEPENDENCIES = ("torch", "lightning", "docstring_parser", "jsonargparse", "rich")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; its exit status.

    A user error is reported in one line on stderr. ARCHZOO_DEBUG=1 in the environment shows the
    traceback as well.

    Args:
        arguments: What follows the program's name; None: `sys.argv`.
    """
    try:
        status = _main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, where it is seen that no one reads
        return status
    except BrokenPipeError:  # `| head` has read enough
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for what Python writes at its end
        return 128 + 13  # as a shell says of a program that SIGPIPE ended


def _main(given: list[str]) -> int:
    try:
        modules, given = split_imports(given)
        # Where it is loaded it may hold those of an earlier command in this process.
        if modules or "archzoo.trust" in sys.modules:
            from archzoo.trust import import_for_user, user_imports

            user_imports[:] = modules
            for module in modules:
                import_for_user(module)
    except USER_ERRORS as error:
        return complain(error)
    name, *rest = given or [""]
    if not rest and name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name == "--version":
        from archzoo import __version__

        print(f"archzoo {__version__}")
        return 0
    try:
        return dispatch(name, rest)
    except BrokenPipeError:
        raise  # an OSError, but not a user error
    except USER_ERRORS as error:
        return complain(error)
    except ModuleNotFoundError as error:
        if error.name is None:  # raised by hand, by a library that says what it needs
            return complain(error)
        if error.name not in DEPENDENCIES or os.environ.get("ARCHZOO_DEBUG"):
            raise
        return complain(
            ImportError(
                f"{error.name} is not installed for {sys.executable}; where make has set up .venv, "
                "`source .venv/bin/activate` enters it"
            )
        )
    except Ended as end:
        print(end, file=sys.stderr)
        return end.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def split_imports(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The modules of every ``--import MODULE``, wherever it is, and the other arguments."""
    modules, others = [], []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if argument == "--":
            others += [argument, *rest]
        elif option != "--import":
            others.append(argument)
        elif module := value if equals else next(rest, ""):
            modules.append(module)
        else:
            raise ValueError("--import needs a module's name: --import my_module")
    return modules, others


def dispatch(name: str, arguments: list[str]) -> int:
    """Import a command and run it."""
    command = _named(name, COMMANDS, "archzoo")
    if command.actions:
        action, *arguments = arguments or [""]
        if action in ("", "-h", "--help"):
            print(usage_of(name))
            return 0 if action else 2
        command, name = _named(action, command.actions, f"archzoo {name}"), f"{name} {action}"
    if not command.function:
        # Threads that wait by spinning slow small steps several times where cores are shared.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from archzoo.training.ending import SIGNALS

        with SIGNALS:
            status: int = _import("archzoo.training.command").run(name, arguments)
            return status
    module = _import(f"archzoo.{command.module}")
    return call(getattr(module, command.function), f"archzoo {name}", arguments)


def _import(name: str) -> ModuleType:
    """A command's module, by its whole name.

    What importing makes is there to stay: looking for garbage in it, again and again, took a third
    of a command's start.
    """
    if name in sys.modules:
        return sys.modules[name]
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _named(name: str, commands: dict[str, Command], program: str) -> Command:
    """The command of a name; where there is none, the nearest are named."""
    if name in commands:
        return commands[name]
    import difflib

    near = difflib.get_close_matches(name, commands, n=2, cutoff=0.4)
    hint = f"nearest: {' or '.join(near)}" if near else f"there are {', '.join(commands)}"
    within = "" if program == "archzoo" else f" of {program}"
    raise ValueError(f"there is no command {name!r}{within}; {hint}")


def call(function: Callable[..., Any], program: str, arguments: list[str]) -> int:
    """Call a function with what a command line gives for its parameters.

    Parameters without a default are positional, and so are those that Python says are; a list
    takes all arguments that follow, and none only where it has a default. Booleans are switches:
    the name alone means true, and true or false may follow. An option that takes several texts is
    given once for each, or, after all positional ones where those are a list, with all of them; one
    that takes several numbers is given with all of them. A function that takes `**settings` is
    given those of `archzoo fit` by their full names, as texts.

    Args:
        function: Its signature and docstring are the command's arguments and help.
        program: What the usage line calls it.
        arguments: Of the command line, after the program's name.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    import docstring_parser
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    from archzoo.names import nearest

    class Paragraphs(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            fill = super()._fill_text
            return "\n\n".join(fill(part, width, indent) for part in text.split("\n\n"))

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            text = " ".join(message.split())
            unknown = text.partition("nrecognized arguments: --")[2].partition(" ")[0]
            if unknown:
                options = [o for a in self._actions for o in a.option_strings if o[:2] == "--"]
                text = f"there is no option --{unknown}; {nearest(f'--{unknown}', options)}"
            elif alone := text.partition("nrecognized arguments: ")[2].partition(" ")[0]:
                text = f"{alone!r} stands alone: options are given as --NAME VALUE"
            elif "Does not validate against" in text or ": Expected a" in text:
                from archzoo.training.user_errors import explain

                text = explain(text, ())
            raise ValueError(f"{text} (see {self.prog} --help)")

    docstring = docstring_parser.parse(function.__doc__ or "")
    parser = Parser(
        prog=program,
        description="\n\n".join(
            filter(None, [docstring.short_description, docstring.long_description])
        ),
        formatter_class=Paragraphs,
    )
    parameters = inspect.signature(function, eval_str=True).parameters
    positional = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.default is parameter.empty
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    optional: list[Any] = []
    help_of = {entry.arg_name: entry.description or "" for entry in docstring.params}
    for name, parameter in positional.items():
        several = parameter.annotation in (list[str], list[str] | None)
        options: dict[str, Any] = {"type": str if several else parameter.annotation}
        if several:
            options["nargs"] = "+"
        elif parameter.default is not parameter.empty:
            options |= {"nargs": "?", "default": parameter.default}
        action = parser.add_argument(name, help=help_of.get(name, ""), **options)
        if several and parameter.default is not parameter.empty:
            optional.append(action)
    settings: dict[str, str] = {}
    rest = {name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD}
    if rest:
        settings, arguments = split_settings(arguments)
    parser.add_function_arguments(function, skip={*positional, *rest})
    switches = {f"--{name}" for name, p in parameters.items() if p.annotation is bool}
    others = {n: p for n, p in parameters.items() if n not in positional}
    lists = {f"--{n}" for n, p in others.items() if p.annotation == list[str] | None}
    numbers = {f"--{n}" for n, p in others.items() if p.annotation == list[float] | None}
    leading = next((i for i, a in enumerate(arguments) if a.startswith("--")), len(arguments))
    a_list = any(p.annotation in (list[str], list[str] | None) for p in positional.values())
    ended = a_list and leading >= len(positional)  # what follows cannot be positional
    arguments = _set(switches, arguments)
    arguments = _together(lists, numbers, arguments, ended)
    try:
        parsed = parser.parse_args(arguments)
    except ValueError as error:
        left_out = [a for a in optional if f"are required: {a.dest}" in str(error)]
        if not left_out:
            raise
        for action in left_out:  # "*" from the start would take nothing before an option
            action.nargs, action.required = "*", False
        parsed = parser.parse_args(arguments)
    given = parser.instantiate_classes(parsed).as_dict()
    first = [given.pop(name) for name in positional]
    return int(function(*first, **given, **settings) or 0)


def split_settings(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The settings of `archzoo fit` among arguments, by their full names, and the others.

    Raises:
        ValueError: One has no value.
    """
    found, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        section = option.removeprefix("--").partition(".")[0]
        if not option.startswith("--") or section not in SECTIONS:
            others.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{option} needs a value")
        found[option.removeprefix("--")] = value
    return found, others


def _set(switches: set[str], arguments: list[str]) -> list[str]:
    """The arguments with every switch's value after an equals sign; without one it is true."""
    found: list[str] = []
    for argument in arguments:
        if argument in ("true", "false") and found and found[-1] in switches:
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return [f"{a}=true" if a in switches else a for a in found]


def _together(lists: set[str], numbers: set[str], arguments: list[str], ended: bool) -> list[str]:
    """The arguments with the values of an option that takes several as one list.

    Args:
        lists: Options that take texts, and are given once for each.
        numbers: Options that take numbers.
        arguments: Of the command line.
        ended: All positional ones have come, so that a text after an option's is another of its.
    """
    values: dict[str, list[str]] = {}
    others: list[str] = []
    rest = deque(arguments)
    while rest:
        argument = rest.popleft()
        option, equals, value = argument.partition("=")
        if argument == "--":
            others += [argument, *rest]
            break
        if option not in lists | numbers:
            others.append(argument)
            continue
        found = [value] if equals else []
        if not equals and rest and not rest[0].startswith("--"):
            found.append(rest.popleft())
        if not any(found):
            raise ValueError(f"{option} needs a value")
        while rest and (_is_number(rest[0]) if option in numbers else ended):
            if rest[0].startswith("--"):
                break
            found.append(rest.popleft())
        if option in numbers:
            found = [part for text in found for part in text.strip("[]").replace(",", " ").split()]
        values.setdefault(option, []).extend(found)
    written = []
    for option, texts in values.items():
        inner = f"[{', '.join(texts)}]" if option in numbers else json.dumps(texts)
        written.append(f"{option}={inner}")
    return [*written, *others]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def usage_of(name: str) -> str:
    """The help of a command whose next word names another."""
    command = COMMANDS[name]
    return "\n".join(
        [
            f"usage: archzoo {name} COMMAND ...",
            "",
            f"{command.about[0].upper()}{command.about[1:]}.",
            "",
            *_listed(command.actions),
            "",
            f"archzoo {name} COMMAND --help says what a command takes.",
        ]
    )


def _listed(commands: dict[str, Command]) -> list[str]:
    width = max(map(len, commands))
    return [f"  {name:<{width}}  {command.about}" for name, command in commands.items()]


def usage() -> str:
    """The help of the command as a whole."""
    return "\n".join(
        [
            "usage: archzoo COMMAND ...",
            "",
            "Decoder-only language models that share one block interface and swap the rest.",
            "",
            *_listed(COMMANDS),
            "",
            "--import MODULE, before or after COMMAND, imports a module of yours first, from the",
            "current directory too; then its mixers, tasks, presets and callbacks can be named.",
            "Nothing else is imported because a setting, a file or a checkpoint names it.",
            "",
            "archzoo COMMAND --help says what a command takes.",
        ]
    )


def complain(error: BaseException) -> int:
    """Print an error as one line; the exit status."""
    if os.environ.get("ARCHZOO_DEBUG"):
        import traceback

        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST:  # it quotes what was given; its end says the way out
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    print(f"error: {text}", file=sys.stderr)
    return 1
