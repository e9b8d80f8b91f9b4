"""What of a decoder is trained, and what stays: parameters by the names of what they belong to.

Names mean parts, and are never looked for inside of other names:

* ``all``: every parameter of the base (adapters always learn);
* ``top.2``: the upper two blocks, the final norm and the head; ``top.0``: the last two alone;
* ``bottom.2``: the embedding and the lower two blocks;
* ``norms``: every norm, wherever it stands;
* a whole path, such as ``embedding``, ``blocks.3``, ``norm`` (the final one) or ``head``;
* what stands inside of others, wherever it does: ``mixer``, ``router``, ``experts.down``, ``bias``.

A head that is tied to the table is the table: it goes by the embedding's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from torch import nn

from archzoo.adapters import Adapter
from archzoo.linear import Linear
from archzoo.names import nearest
from archzoo.norm import RMSNorm
from archzoo.parts import named_adapters

if TYPE_CHECKING:
    from archzoo.decoder import Decoder

ENDS = re.compile(r"(top|bottom)\.(\d+)")
NORMS = (RMSNorm, nn.LayerNorm, nn.GroupNorm)


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter of a module by name but those of adapters; a shared one has several names."""
    if isinstance(module, Adapter):
        return
    for name, parameter in module.named_parameters(prefix, recurse=False):
        yield name, parameter
    for name, child in module.named_children():
        yield from base_parameters(child, f"{prefix}.{name}".lstrip("."))


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, beside adapters', and none of them is trained.

    Then what an optimizer step moves beside parameters, such as experts' biases, stays as well.
    """
    trained = [parameter.requires_grad for _, parameter in base_parameters(module)]
    return bool(trained) and not any(trained)


def parameters_called(decoder: Decoder, name: str) -> set[str]:
    """The names of all base parameters that one of the names above stands for.

    Args:
        decoder: Whose.
        name: As this file's beginning says.

    Raises:
        ValueError: Nothing goes by that name; the nearest names are given.
    """
    every = _own_parameters(decoder)
    if name == "all":
        return set(every)
    if ends := ENDS.fullmatch(name):
        return _at_an_end(decoder, ends[1], int(ends[2]))
    modules = dict(decoder.named_modules())
    if name == "norms":
        held = {path for path, module in modules.items() if isinstance(module, NORMS)}
        return {path for path in every if path.rpartition(".")[0] in held}
    if decoder.tie_weights and (name == "head" or name.startswith("head.")):
        raise ValueError(
            "the head is the embedding's table (tie_weights): name embedding, which is both"
        )
    if name in modules or name in every:  # a whole path: norm is the final one alone
        found = {path for path in every if f"{path}.".startswith(f"{name}.")}
    else:
        found = {path for path in every if f".{name}." in f".{path}."}
    if not found:
        raise ValueError(_unknown(decoder, name, list(every)))
    return found


def _own_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Every base parameter once: a tied head goes by the table's name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in base_parameters(decoder):
        found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def _at_an_end(decoder: Decoder, end: str, count: int) -> set[str]:
    """The parameters of ``top.N`` or ``bottom.N``."""
    if count > decoder.depth:
        raise ValueError(
            f"{end}.{count}: there are {decoder.depth} blocks: take at most {end}.{decoder.depth}"
        )
    layers = range(decoder.depth)
    within = layers[decoder.depth - count :] if end == "top" else layers[:count]
    parts = [f"blocks.{layer}." for layer in within]
    parts += ["norm.", "head."] if end == "top" else ["embedding."]
    return {name for name in _own_parameters(decoder) if name.startswith(tuple(parts))}


def _unknown(decoder: Decoder, name: str, every: list[str]) -> str:
    """Why a name stands for nothing."""
    for path, module in decoder.named_modules():
        if isinstance(module, Linear) and name in module.blocks:
            return (
                f"{name!r} is a block of rows of {path}, which is one parameter: name "
                f"{path.rpartition('.')[2]}"
            )
    if name in dict(decoder.named_modules()):
        return f"{name!r} has no parameters"
    parts = chain.from_iterable(path.split(".")[:-1] for path in every)
    known = {part for part in parts if not part.isdecimal()}
    known |= {f"blocks.{layer}" for layer in range(decoder.depth)}
    return f"nothing here is called {name!r}; " + nearest(
        name, ["all", "norms", f"top.{decoder.depth}", f"bottom.{decoder.depth}", *sorted(known)]
    )


class Freezing:
    """What of a decoder is trained from which step on.

    Args:
        decoder: All that is trained in it now may be frozen; an adapter has frozen its base.
        freeze: Names of what stays; beside an adapter "all" alone.
        unfreeze: Names of what is trained all the same.
        every: Layer by layer: after this many optimizer steps the highest block that is frozen is
            trained too, after as many more the next one, and the embedding at last; the final norm
            and the head from the start. None: what is frozen stays so.

    Attributes:
        stages: The names of parameters that are trained from the start, and of those that join
            at each step that is a multiple of `every`.

    Raises:
        ValueError: An unknown name, one that would do nothing, or nothing is left to train.
    """

    def __init__(
        self,
        decoder: Decoder,
        freeze: Sequence[str] = (),
        unfreeze: Sequence[str] = (),
        every: int | None = None,
    ) -> None:
        self.every = every
        own = _own_parameters(decoder)
        adapted = bool(named_adapters(decoder.config))
        base = {name for name, parameter in own.items() if parameter.requires_grad}
        if adapted:
            base = decoder.learned_before & own.keys()
        if adapted and list(freeze) not in ([], ["all"]):
            raise ValueError(
                f"freeze={list(freeze)}: an adapter freezes all of the base: omit freeze, and say "
                "by unfreeze what is trained beside it"
            )
        frozen = set(base) if adapted else set()
        for name in freeze:
            frozen |= self._named(decoder, "freeze", name) & base
        for name in unfreeze:
            found = self._named(decoder, "unfreeze", name)
            if not found & frozen:
                raise ValueError(f"unfreeze={list(unfreeze)}: {name!r} is not frozen")
            frozen -= found
        if every is not None and not frozen:
            raise ValueError(f"unfreeze_every={every}: nothing is frozen; say freeze: all")
        self.stages = [base - frozen]
        if every is not None:
            first, *later = [unit & frozen for unit in _from_the_top(decoder)]
            self.stages[0] |= first
            self.stages += [unit for unit in later if unit]
            if not (adapted or self.stages[0]):  # a tied head, and no norm before it
                del self.stages[0]
        if not (adapted or self.stages[0]):
            raise ValueError(
                f"freeze={list(freeze)} leaves nothing to train: give an adapter, or say by "
                "unfreeze what is trained, such as unfreeze: top.1"
            )

    @staticmethod
    def _named(decoder: Decoder, option: str, name: str) -> set[str]:
        try:
            return parameters_called(decoder, name)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None

    def stage_at(self, step: int) -> int:
        """Which of `stages` is the last to have joined after that many optimizer steps."""
        return 0 if self.every is None else min(step // self.every, len(self.stages) - 1)

    def apply(self, decoder: Decoder, stage: int) -> None:
        """Let learn what learns at a stage, and nothing else of the base."""
        learns = set().union(*self.stages[: stage + 1])
        for name, parameter in _own_parameters(decoder).items():
            parameter.requires_grad_(name in learns)

    def joining(self, decoder: Decoder) -> list[nn.Parameter]:
        """The parameters that are frozen at the start, and trained later."""
        later = set().union(*self.stages[1:])
        return [entry for name, entry in _own_parameters(decoder).items() if name in later]


def _from_the_top(decoder: Decoder) -> list[set[str]]:
    """All base parameters in the order in which they are unfrozen, a block at a time."""
    units = [parameters_called(decoder, "top.0")]
    units += [_at_an_end(decoder, "top", n) for n in range(1, decoder.depth + 1)]
    units.append(parameters_called(decoder, "all"))
    return [units[0], *(unit - below for below, unit in pairwise(units))]
