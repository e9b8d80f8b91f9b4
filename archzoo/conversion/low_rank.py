"""Relatives of LoRA as plain LoRAs, which every other program knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archzoo.adapters import Adapter
from archzoo.adapters.attach import attached
from archzoo.adapters.lora import LoRA
from archzoo.adapters.moslora import MoSLoRA
from archzoo.adapters.pissa import PiSSA
from archzoo.compiled import uncompiled
from archzoo.decoder import Decoder
from archzoo.numerics import without_autocast
from archzoo.parts import named_adapters


def low_rank_factors(adapter: Adapter) -> tuple[Tensor, Tensor, float] | None:
    """A, B and s where an adapter's change is ``s B A``, of the zoo's own classes; else None."""
    if type(adapter) not in (LoRA, MoSLoRA, PiSSA):
        return None
    known: Any = adapter
    with without_autocast(known.first.device):  # it would round what the files are to hold
        return *known.factors(), known.scale


@torch.no_grad()
def to_lora(decoder: Decoder) -> Decoder:
    """Make LoRAs of a decoder's adapters PiSSA and MoSLoRA, in place: it computes the same.

    A PiSSA becomes a LoRA of twice the rank, ``s [B, -B0] [A; A0]`` (Meng et al., arXiv
    2404.02948), in the form that `PiSSA.factors` gives it; of a MoSLoRA the mixer goes into A.
    Other adapters stay as they are. Trained on, a LoRA is not what it came from: a PiSSA's A0 and
    B0 would move, too.

    Raises:
        ValueError: Twice a PiSSA's rank is more than a matrix has; nothing has changed.
    """
    decoder = uncompiled(decoder)
    entries: dict[str, Any] = dict(named_adapters(decoder.config))
    made = []
    for name, place, adapter in attached(decoder):
        factors = None if type(adapter) is LoRA else low_rank_factors(adapter)
        if factors is None:
            continue
        first, second, scale = factors
        rank = first.shape[-2]
        given: dict[str, Any] = {"rank": rank, "alpha": scale * rank}
        if dropout := getattr(adapter, "dropout", 0.0):
            given["dropout"] = dropout
        lora = LoRA(place.target, **given).to(first.device, first.dtype)
        lora.first.copy_(first)
        lora.second.copy_(second)
        lora.train(adapter.training)
        made.append((name, place, lora, given))
    for name, place, lora, given in made:  # all is refused before anything is changed
        holder: Any = place.module
        holder.adapter_modules[name][place.name] = lora
        arguments = entries[name].get("init_args", {})
        where = {n: arguments[n] for n in ("targets", "layers") if n in arguments}
        entries[name] = {"class_path": "LoRA", "init_args": where | given}
    if made:
        one = list(entries) == ["default"]
        decoder.config |= {"adapter" if one else "adapters": entries["default"] if one else entries}
    return decoder
