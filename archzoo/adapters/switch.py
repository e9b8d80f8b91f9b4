"""Adapters switched on and off: a state of use, which no file holds."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from archzoo.adapters.attach import adapter_holders, check_names
from archzoo.compiled import uncompiled
from archzoo.linear import Linear
from archzoo.parts import named_adapters

if TYPE_CHECKING:
    from archzoo.decoder import Decoder


class Switched:
    """What `enable_adapters` and `disable_adapters` give: a ``with`` block undoes it at its end.

    Args:
        decoder: As it is now.
        before: The adapters that were off.
    """

    def __init__(self, decoder: Decoder, before: frozenset[str]) -> None:
        self.decoder, self.before = decoder, before

    def __enter__(self) -> Decoder:
        return self.decoder

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _switch(self.decoder, self.before & named_adapters(self.decoder.config).keys())


def enable_adapters(decoder: Decoder, *names: str) -> Switched:
    """Switch adapters on, and all others off: ``enable_adapters(net, "sums")``.

    It holds until it is switched again, or to the end of a ``with`` block. What is off computes
    nothing and learns nothing; it stays part of the model and of what is saved.

    Args:
        decoder: With adapters.
        *names: Which; one alone is called "default". None: all are on.

    Raises:
        ValueError: There is none of that name.
    """
    decoder = uncompiled(decoder)
    check_names(decoder, names)
    known = named_adapters(decoder.config).keys()
    return _switch(decoder, frozenset(known - set(names)) if names else frozenset())


def disable_adapters(decoder: Decoder, *names: str) -> Switched:
    """Switch adapters off, and leave the others as they are: without names the base computes.

    Args:
        decoder: With adapters, or without any.
        *names: Which. None: all.

    Raises:
        ValueError: There is none of that name.
    """
    decoder = uncompiled(decoder)
    check_names(decoder, names)
    return _switch(
        decoder, decoder.adapters_off | (set(names) or named_adapters(decoder.config).keys())
    )


def _switch(decoder: Decoder, off: frozenset[str]) -> Switched:
    before, decoder.adapters_off = decoder.adapters_off, frozenset(off)
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.switch_off(off)
    for holder, name in adapter_holders(decoder):
        setattr(holder, f"has_{name}", not off & set(getattr(holder, name)))
    return Switched(decoder, before)
