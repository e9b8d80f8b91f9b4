"""How far back each head of a model reads: half-lives, and where a cache outgrows the state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from archzoo.decoder import Decoder
from archzoo.registry import build_decoder
from archzoo.states import nbytes


class HeadWindow(NamedTuple):
    """How a head forgets: n tokens later a token weighs gamma^n of what it weighed when new.

    Attributes:
        layer: Counted from 0.
        head: Counted from 0.
        half_life: Tokens after which a token weighs half, log 2 / -log gamma; infinite at gamma 1.
            None: the head's mixer has no decay, as attention has none.
        one_percent: Tokens after which it weighs 1 %, log 100 / -log gamma; likewise.
        gamma: The decay of a token, in (0, 1]; likewise None.
    """

    layer: int
    head: int
    half_life: float | None
    one_percent: float | None
    gamma: float | None


def windows(model: Decoder) -> list[HeadWindow]:
    """Every head of a model, layer by layer; learnable decays are taken as they are now.

    A mixer with decays has ``log_decay(like)``, the log of each head's gamma, as `Retention` has.
    On the meta device learnable decays have no values, and are taken as they start.

    Args:
        model: Any decoder.
    """
    found = []
    for layer, block in enumerate(model.blocks):
        logs = _log_decays(block.mixer)
        if logs is None:
            found += [HeadWindow(layer, head, None, None, None) for head in range(model.heads)]
            continue
        for head, log in enumerate(logs):
            half, hundredth = (_after(share, log) for share in (0.5, 0.01))
            found.append(HeadWindow(layer, head, half, hundredth, math.exp(log)))
    return found


def outgrown(model: Decoder) -> int | None:
    """The first length, in tokens, at which attention's cache takes more bytes than the state.

    Attention's is the same decoder with attention in every layer, in the same dtype; both hold one
    text. None: the cache never does, as where the model is attention itself.

    Args:
        model: Any decoder.
    """
    with torch.device("meta"):
        own = build_decoder(model.config)
        # As many heads and channels; what only the mixers of before could take stays behind.
        swap = {"mixer": "Attention", "pattern": None, "rotary": None, "bias": None}
        cached = build_decoder(model.config | swap | {"adapter": None, "adapters": None})

    def excess(length: int) -> int:
        states = (
            part.init_state(1, capacity=length, device="meta", dtype=model.dtype)
            for part in (cached, own)
        )
        cache, state = map(nbytes, states)
        return cache - state

    # Both are linear in the length, so two lengths tell all.
    at_none, a_token = excess(0), excess(1) - excess(0)
    if at_none > 0:
        return 0
    return None if a_token <= 0 else math.floor(-at_none / a_token) + 1


def print_windows(model: Decoder, console: Console) -> None:
    """The table of `archzoo show --window`; layers alike share their lines.

    Args:
        model: Any decoder.
        console: Where to.
    """
    heads = windows(model)
    decaying = [window for window in heads if window.gamma is not None]
    if not decaying:
        mixers = dict.fromkeys(type(block.mixer).__name__ for block in model.blocks)
        console.print(f"no window: {' and '.join(mixers)} has no decay")
        return
    table = Table(box=None, header_style="bold")
    for heading in ("layer", "head", "gamma", "half-life", "1 % after"):
        table.add_column(heading, justify="right")
    for layers, mine in _alike(decaying):
        for window in mine:
            lengths = [_tokens(window.half_life), _tokens(window.one_percent)]
            table.add_row(layers, str(window.head), f"{window.gamma:.6g}", *lengths)
    console.print(table)
    console.print(
        "n tokens later a token weighs gamma^n of what it weighed when new:\n"
        "half after the half-life, 1 % where gamma^n = 0.01"
    )
    length = outgrown(model)
    if length is None:
        console.print("attention's cache, of the same shape, never outgrows the state")
    else:
        console.print(
            f"attention's cache, of the same shape, outgrows the state at {length:,} tokens"
        )


def _log_decays(mixer: Any) -> list[float] | None:
    """The log of each head's gamma; None where a mixer has none."""
    if not hasattr(mixer, "log_decay"):
        return None
    with torch.no_grad():
        logs = mixer.log_decay(torch.empty(0, dtype=torch.float64))
    return list(mixer.fixed_log_decay) if logs.is_meta else logs.tolist()


def _after(share: float, log_gamma: float) -> float:
    """Tokens after which gamma^n is that share."""
    return math.log(share) / log_gamma if log_gamma else math.inf


def _alike(heads: list[HeadWindow]) -> Iterator[tuple[str, list[HeadWindow]]]:
    """Consecutive layers whose heads decay alike, by a name such as 0-3, and the heads of one."""
    layers = [list(group) for _, group in groupby(heads, key=lambda window: window.layer)]
    for _, group in groupby(layers, key=lambda layer: [window.gamma for window in layer]):
        same = list(group)
        first, last = same[0][0].layer, same[-1][0].layer
        yield (str(first) if first == last else f"{first}-{last}"), same[0]


def _tokens(length: float | None) -> str:
    assert length is not None
    return "never" if math.isinf(length) else f"{length:,.0f}" if length >= 10 else f"{length:.1f}"
