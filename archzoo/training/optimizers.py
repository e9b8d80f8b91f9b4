"""Which optimizer moves the weights: AdamW, Muon, any of torch's, or a class of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from archzoo.decoder import Decoder
from archzoo.names import nearest
from archzoo.training.muon import Muon, muon_groups
from archzoo.training.optim import decay_groups
from archzoo.training.ranks import ZERO
from archzoo.trust import check_arguments, find_class, load_installed, name_of, parameters_of

USUAL = "AdamW"
# What the model's settings say of any optimizer, by the names of an optimizer's arguments.
OF_THE_MODEL = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas"}
REFUSED = {
    "SparseAdam": "takes sparse gradients, and here all are dense: take another",
    "LBFGS": "computes the loss several times a step, and here a step is one gradient: take "
    "another",
    "ZeroRedundancyOptimizer": "shares out the state of another: name that one, and take "
    f"--trainer.strategy {ZERO}",
}

Spec = dict[str, Any]


def known_optimizers() -> dict[str, type[Optimizer]]:
    """Those that go by their name alone: torch's, and Muon for a whole decoder."""
    found = {
        name: cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
        if name not in REFUSED
    }
    return found | {"Muon": Muon}


def describe_optimizer(given: Any) -> Spec | None:
    """An optimizer as plain data, class_path and init_args; None: AdamW as it is.

    Nothing is looked up, so that a checkpoint's can be read where its class is not imported.

    Args:
        given: A class, its name or import path, or such data.

    Raises:
        ValueError: It is none of these.
    """
    if inspect.isclass(given):
        given = name_of(given)
    if isinstance(given, str):
        given = {"class_path": given}
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("class_path"), str):
        raise ValueError(
            f"optimizer={given!r} is not an optimizer: give a name, such as Muon, or class_path "
            "and init_args"
        )
    odd = sorted(set(given) - {"class_path", "init_args"})
    arguments = given.get("init_args") or {}
    if odd or not isinstance(arguments, dict):
        what = f"{odd[0]} stands beside class_path" if odd else f"init_args is {arguments!r}"
        raise ValueError(f"optimizer: {what}: arguments go by name under init_args")
    name = given["class_path"]
    if name.startswith("torch.optim.") and name.count(".") == 2:
        name = name.rpartition(".")[2]
    if name == USUAL and not arguments:
        return None
    return {"class_path": name, "init_args": dict(arguments)}


def title_of(given: Any) -> str:
    """An optimizer in a message, with its arguments: ``SGD(momentum=0.9)``."""
    spec = describe_optimizer(given)
    if spec is None:
        return USUAL
    arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(spec["init_args"].items()))
    return f"{spec['class_path']}({arguments})" if arguments else spec["class_path"]


def find_optimizer(spec: Spec | None) -> type[Optimizer]:
    """The class that plain data names, and that takes the arguments beside it.

    Raises:
        ValueError: There is none, it is not imported, it is no optimizer, or an argument is not
            its own, or one that the model's settings give.
    """
    name, arguments = (USUAL, {}) if spec is None else (spec["class_path"], spec["init_args"])
    known = known_optimizers()
    if name in REFUSED:
        raise ValueError(f"optimizer {name} {REFUSED[name]}")
    cls = known.get(name)
    if cls is None and "." not in name:
        raise ValueError(f"there is no optimizer {name!r}; {nearest(name, list(known))}")
    if cls is None:
        load_installed()
        try:
            cls = find_class(name, Optimizer)
        except ValueError as error:
            raise ValueError(f"optimizer {error}") from None
    accepted, takes_any = parameters_of(cls)
    own = [n for n in accepted if n not in (*OF_THE_MODEL, "params", "groups")]
    for argument in arguments:
        if argument in OF_THE_MODEL:
            setting = OF_THE_MODEL[argument]
            raise ValueError(
                f"optimizer {name}: {argument} is the setting model.{setting}: give "
                f"--model.{setting} {arguments[argument]}"
            )
        if argument not in own and not takes_any:
            raise ValueError(
                f"optimizer {name} has no argument {argument!r}; {nearest(argument, own)}"
            )
    check_arguments(cls, arguments, f"optimizer {name}")
    return cls


def build_optimizer(
    spec: Spec | None,
    decoder: Decoder,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    joining: Iterable[nn.Parameter] = (),
    fused: bool = False,
    sharded: bool = False,
) -> Optimizer:
    """The optimizer that plain data describes, of a decoder's parameters.

    Args:
        spec: As `describe_optimizer` gives it.
        decoder: Whose parameters.
        learning_rate: Its peak.
        weight_decay: Of matrices, see `decay_groups`.
        betas: Where the optimizer takes them.
        joining: As for `decay_groups`.
        fused: Take one kernel for all parameters, where torch has one.
        sharded: Share its state out to the ranks, see `ShardedOptimizer`.

    Raises:
        ValueError: See `find_optimizer`; or the class refuses its arguments.
    """
    cls = find_optimizer(spec)
    arguments = {} if spec is None else dict(spec["init_args"])
    accepted = parameters_of(cls)[0]
    groups = decay_groups(decoder, weight_decay, joining)
    if issubclass(cls, Muon):
        groups = muon_groups(decoder, groups)
    if "betas" in accepted:
        arguments["betas"] = tuple(betas)
    ours = cls.__module__.startswith("torch.") or issubclass(cls, Muon)
    if fused and ours and "fused" in accepted and not arguments.get("foreach"):
        arguments.setdefault("fused", True)
    try:
        make: Any = cls  # each takes other arguments
        if sharded:
            from archzoo.training.zero import ShardedOptimizer  # takes a while to import

            make = partial(ShardedOptimizer, optimizer_class=cls)
        made: Optimizer = make(groups, lr=learning_rate, **arguments)
        return made
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {cls.__name__}: {error}") from error
