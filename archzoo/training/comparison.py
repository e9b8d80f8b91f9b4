"""Whether models compare: with their preset, and with what a checkpoint holds."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from archzoo.checkpoint import base_in
from archzoo.compiled import own_name
from archzoo.decoder import Decoder
from archzoo.parts import find
from archzoo.registry import count_parameters, get_preset
from archzoo.training.optimizers import title_of

# A swap is fair where the parameters agree to this; `match: parameters` keeps to it.
MATCHED = 0.01
# What may be replaced without making it another architecture.
SIZES = ("vocab_size", "dim", "depth", "heads", "tie_weights", "context_length")
MAY_DIFFER = ("context_length", "dropout", "init_std", "activation_checkpointing")


def describe_model(
    decoder: Decoder,
    preset: str | None,
    architecture: dict[str, Any],
    joining: Iterable[nn.Parameter] = (),
) -> str:
    """One line: which model, how many parameters, and whether a swap is a fair one.

    Args:
        decoder: The model.
        preset: What it was made from, if anything.
        architecture: What was given instead of the preset's arguments; None: nothing.
        joining: Parameters that are frozen at first and trained later.
    """
    count, learned = decoder.parameter_count(), learned_count(decoder)
    if learned < count:
        line = f"{count:,} parameters, of which {learned:,} learn: {learned / count:.1%}"
        later = sum(parameter.numel() for parameter in joining if not parameter.requires_grad)
        return f"{line}; {learned + later:,} in the end" if later else line
    if preset is None:
        return f"{count:,} parameters"
    swapped = [
        name
        for name, value in architecture.items()
        if value is not None and name not in (*SIZES, *MAY_DIFFER)
    ]
    if not swapped:
        return f"{preset}: {count:,} parameters"
    arguments = get_preset(preset).arguments
    sizes = {name: decoder.config[name] for name in SIZES}
    reference = count_parameters(arguments | sizes)
    difference = count / reference - 1
    verdict = "matched" if abs(difference) <= MATCHED else "NOT matched"
    return (
        f"{preset} with another {', '.join(swapped)}: {count:,} parameters against "
        f"{reference:,}, {difference:+.1%}: {verdict}"
    )


def learned_count(decoder: Decoder) -> int:
    """Parameters that are trained now, shared ones once."""
    return sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)


def check_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse to resume a run that has trained other parameters.

    Args:
        ours: What is said of freezing here.
        theirs: The checkpoint's settings.

    Raises:
        ValueError: A setting differs.
    """
    for name, value in ours.items():
        if value != theirs.get(name):
            raise ValueError(
                f"the checkpoint's run has {name}={theirs.get(name)}, and here it is {value}: "
                "resume with the same, or start a new run from it by --model.weights"
            )


def trained_by(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a run's checkpoint says of how it was trained, for `check_same_training`."""
    settings: dict[str, Any] = checkpoint["hyper_parameters"]
    held = checkpoint.get("objective")
    objective = held.get("name") if isinstance(held, dict) else None
    return settings | {"optimizer": title_of(settings.get("optimizer")), "objective": objective}


def check_same_model(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Refuse a checkpoint's configuration that is another model's.

    Args:
        ours: `Decoder.config`.
        theirs: The checkpoint's.

    Raises:
        ValueError: A setting differs.
    """
    for name, value in ours.items():
        if name not in MAY_DIFFER and _in_full(name, value) != _in_full(name, theirs.get(name)):
            hint = ""
            if name in ("adapter", "adapters"):
                hint = "; an adapter is put on a model by --model.weights instead of --ckpt_path"
            raise ValueError(
                f"the checkpoint holds another model: {name} is {theirs.get(name)} in it and "
                f"{value} here{hint}"
            )


def _in_full(name: str, value: Any) -> Any:
    """A setting of a decoder with every default written out, so that equal parts are equal."""
    if isinstance(value, list):
        return [_in_full("mixer", entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if name == "adapters":
        return {entry: _in_full("adapter", spec) for entry, spec in value.items()}
    if "class_path" not in value:  # a part's own argument that is a dict
        return value
    cls = find(name, value["class_path"])
    parameters = inspect.signature(cls).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    given = {n: _in_full(n, argument) for n, argument in value["init_args"].items()}
    return {"class_path": cls, "init_args": defaults | given}


def module_arguments(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make the module of a run's checkpoint again, by name.

    Those of a checkpoint that leaves out its base name the base instead of an architecture.
    """
    arguments: dict[str, Any] = checkpoint["hyper_parameters"]
    record = base_in(checkpoint, "the checkpoint")
    if record is None:
        return arguments
    known = inspect.signature(Decoder).parameters.keys() - {"adapter", "adapters", *MAY_DIFFER}
    kept = {name: value for name, value in arguments.items() if name not in known}
    return kept | {"weights": record.path}


def check_weights_fit(decoder: Decoder, theirs: Any, beside: Collection[str] = ()) -> None:
    """Refuse weights of other names and shapes than this model's.

    Args:
        decoder: The model.
        theirs: The weights of a run's checkpoint, each name with "decoder." before it.
        beside: The names of those that it may leave out.

    Raises:
        ValueError: The first that does not fit, or that there are none.
    """
    if not isinstance(theirs, dict):
        raise ValueError("the checkpoint holds no weights")
    theirs = {own_name(name): value for name, value in theirs.items()}
    theirs = {name: value for name, value in theirs.items() if name.startswith("decoder.")}
    ours = {f"decoder.{own_name(name)}": held for name, held in decoder.state_dict().items()}
    misfit = "the checkpoint's weights do not fit its settings: they"
    missing = ours.keys() - theirs - {f"decoder.{name}" for name in beside}
    for verb, odd in (("miss", missing), ("have", theirs.keys() - ours)):
        if odd:
            raise ValueError(f"{misfit} {verb} {min(odd).removeprefix('decoder.')}")
    for name, mine in ours.items():
        if name not in theirs:
            continue
        found = getattr(theirs[name], "shape", None)
        if found != mine.shape:
            raise ValueError(
                f"{misfit} have {name.removeprefix('decoder.')} of shape {tuple(found or ())} "
                f"where {tuple(mine.shape)} is expected"
            )
