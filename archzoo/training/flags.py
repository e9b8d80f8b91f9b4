"""Short flags of `fit` that stand for settings, and what they become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.pytorch.loggers.logger import Logger

from archzoo.checkpoint import directory_of
from archzoo.training import settings
from archzoo.training.averaging import AverageWeights
from archzoo.training.early_stopping import StopEarly
from archzoo.training.samples import SampleTexts
from archzoo.training.trackers import Tracked, make_trackers

Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio"]
SWITCH = "--find_learning_rate"
OPTIMIZER = ("--optimizer", "--model.optimizer")
ADAPTER = re.compile(r"--model\.adapters\.\w+(?=\.|$)")  # one of several, by name


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
    parser.add_argument(
        "--tracker",
        type=Tracker | list[Tracker] | None,
        default=None,
        help="Where else fit logs, beside metrics.csv: wandb, tensorboard, mlflow or trackio, or a "
        "list of them. WANDB_PROJECT, MLFLOW_TRACKING_URI and their like say more.",
    )
    parser.add_argument(
        "--sample_every",
        type=int | None,
        default=None,
        help="Optimizer steps from one sample of what the model writes to the next: on the screen, "
        "in samples.jsonl and in the trackers.",
    )
    parser.add_argument(
        "--sample_prompts",
        type=str | list[str] | None,
        default=None,
        help="What samples continue; default: the first of the validation data.",
    )
    parser.add_argument(
        "--ema",
        type=float | None,
        default=None,
        help="Decay of an exponential moving average of the weights, such as 0.999: it is what is "
        "validated and kept.",
    )
    parser.add_argument(
        "--early_stopping",
        type=int | None,
        default=None,
        help="End the run when so many validations in a row have not improved checkpoint.monitor.",
    )
    parser.add_argument(
        "--stopping_threshold",
        type=float | None,
        default=None,
        help="End the run when checkpoint.monitor has reached this value at a validation.",
    )
    parser.add_argument(
        "--find_learning_rate",
        type=bool,
        default=False,
        help="Train for 100 steps with a rising learning rate, suggest one, and write nothing.",
    )


def callbacks_of(config: Any, trackers: dict[str, Logger]) -> list[lightning.Callback]:
    """The callbacks that the flags ask for.

    Args:
        config: Of `fit`.
        trackers: As `make_trackers` gives them.
    """
    found: list[lightning.Callback] = []
    if config.ema is not None:
        found.append(AverageWeights(config.ema))
    if config.early_stopping is not None or config.stopping_threshold is not None:
        found.append(StopEarly(config.early_stopping, config.stopping_threshold))
    prompts = config.sample_prompts
    if config.sample_every is not None:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        found.append(SampleTexts(config.sample_every, prompts))
    elif prompts is not None:
        raise ValueError("--sample_prompts needs --sample_every N: after how many steps each")
    if trackers:
        found.append(Tracked(trackers, settings_of(config)))
    return found


def settings_of(config: Any) -> dict[str, Any]:
    """What trackers show of a run."""
    names = ("seed_everything", "model", "data", "trainer", "checkpoint", "ema")
    kept = {name: config[name] for name in names if config.get(name) is not None}
    plain = {n: v.as_dict() if hasattr(v, "as_dict") else v for n, v in kept.items()}
    return dict(json.loads(json.dumps(plain, default=str)))


def trackers_of(config: Any, directory: Path, resumed: str | None) -> dict[str, Logger]:
    """The loggers that --tracker asks for, by name.

    Args:
        config: Of `fit`.
        directory: The run's.
        resumed: The path of the checkpoint that it is resumed from, or None.
    """
    names = [config.tracker] if isinstance(config.tracker, str) else config.tracker or []
    return make_trackers(names, directory, directory_of(resumed) if resumed else None)


def move_flags(config: Any) -> None:
    """What a configuration file says by a flag becomes the setting that the flag stands for."""
    if config.optimizer is not None:
        if config.model.optimizer is None:
            config.model.optimizer = config.optimizer
        config.optimizer = None


def with_flags(arguments: list[str]) -> list[str]:
    """The arguments with a class and what is said of it as one setting; a switch is true.

    So it is for the optimizer, and for each adapter that goes by name.

    Raises:
        ValueError: An argument of a class that is not named.
    """
    found: list[str] = []
    named: dict[str, str] = {}  # by the setting that names a class
    given: dict[str, dict[str, Any]] = {}  # what is said of it
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if argument == SWITCH:  # alone it means true
            found.append(f"{SWITCH}=true")
            continue
        if argument in ("true", "false") and found and found[-1] == f"{SWITCH}=true":
            found[-1] = f"{SWITCH}={argument}"
            continue
        flag = next((f for f in OPTIMIZER if option == f or option.startswith(f"{f}.")), None)
        adapter = ADAPTER.match(option)
        if flag is None and adapter is None:
            found.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{option} needs a value")
        flag = flag or (adapter[0] if adapter else "")
        setting = OPTIMIZER[-1] if flag in OPTIMIZER else flag
        name = option.removeprefix(flag).removeprefix(".").removeprefix("init_args.")
        if name in ("", "class_path"):
            named[setting], given[setting] = value, {}
        else:
            said = settings.parse(f"{{value: {value}}}", option)["value"]
            given.setdefault(setting, {})[name] = said
    for setting, options in given.items():
        whole = named.get(setting, "{").startswith("{")
        if options and whole:
            name = next(iter(options))
            short = OPTIMIZER[0] if setting in OPTIMIZER else setting
            kind = "optimizer" if setting in OPTIMIZER else "adapter's class"
            raise ValueError(f"{short}.{name} needs the {kind} too: {short} NAME before it")
        spec = {"class_path": named[setting], "init_args": options}
        found += [setting, json.dumps(spec) if options else named[setting]]
    return found
