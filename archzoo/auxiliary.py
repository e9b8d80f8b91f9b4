"""What a layer says beside its output: a record of tensors by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import register_dataclass


@dataclass(slots=True)
class Aux:
    """What a layer says beside its output: tensors by name, none of them where it is dense.

    Attributes:
        losses: Scalars that are added to the training loss, coefficient and all.
        metrics: Scalars without gradient, averaged and logged.
        sums: Summed over micro-batches and ranks, for `FeedForward.after_step`; without gradient.
        pools: Summed over ranks with their gradients, for `FeedForward.pooled_losses`.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    pools: dict[str, Tensor] = field(default_factory=dict)


register_dataclass(Aux)  # a pytree: `torch.func`, FSDP2 and compilers find the tensors in it


def check_aux(part: nn.Module, given: Any) -> Aux:
    """What a feed-forward gave as its aux; {} is short for nothing.

    Raises:
        TypeError: It is something else, such as the dict of "kind/name" that it once was.
    """
    if isinstance(given, Aux):
        return given
    if given == {}:
        return Aux()
    what = f"a dict of {list(given)}" if isinstance(given, dict) else f"a {type(given).__name__}"
    raise TypeError(
        f"{type(part).__name__} returns {what} as its aux: it must return an archzoo.block.Aux "
        '("loss/NAME" is now Aux(losses={"NAME": ...}), and so are metrics, sums and pools), or {} '
        "for nothing"
    )
