"""Short flags of `fit` that stand for settings, and what they become."""

from __future__ import annotations

import json
from typing import Any

from archzoo.training import settings

OPTIMIZER = ("--optimizer", "--model.optimizer")


def add_flags(parser: Any) -> None:
    """Add them to the parser of the subcommands."""
    parser.add_argument(
        "--optimizer",
        type=str | dict[str, Any] | None,
        default=None,
        help="Short for --model.optimizer: Muon, any of torch.optim, or the path of a class of "
        "yours; --optimizer.NAME VALUE gives its arguments, as --optimizer SGD "
        "--optimizer.momentum 0.9.",
    )


def move_flags(config: Any) -> None:
    """What a configuration file says by a flag becomes the setting that the flag stands for."""
    if config.optimizer is not None:
        if config.model.optimizer is None:
            config.model.optimizer = config.optimizer
        config.optimizer = None


def with_optimizer(arguments: list[str]) -> list[str]:
    """The arguments with the optimizer, and what is said of it, as one setting.

    Raises:
        ValueError: An argument of an optimizer that is not named.
    """
    found: list[str] = []
    given: dict[str, Any] = {}
    named: str | None = None
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        flag = next((f for f in OPTIMIZER if option == f or option.startswith(f"{f}.")), None)
        if flag is None:
            found.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{option} needs a value")
        name = option.removeprefix(flag).removeprefix(".").removeprefix("init_args.")
        if name in ("", "class_path"):
            named, given = value, {}
        else:
            given[name] = settings.parse(f"{{value: {value}}}", option)["value"]
    if given and (named is None or named.startswith("{")):
        name = next(iter(given))
        raise ValueError(f"--optimizer.{name} needs the optimizer too: --optimizer NAME")
    if named is not None:
        spec = json.dumps({"class_path": named, "init_args": given}) if given else named
        found += ["--model.optimizer", spec]
    return found
