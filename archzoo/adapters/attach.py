"""Adapters on a decoder: putting them on, merging them, taking them off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archzoo.adapters import Adapter
from archzoo.adapters.targets import Place, matching, resolved
from archzoo.adapters.targets import list_targets as list_targets
from archzoo.compiled import uncompiled
from archzoo.linear import Linear
from archzoo.names import nearest
from archzoo.parts import Spec, build, describe, describe_adapters, named_adapters
from archzoo.states import fork, leaves

if TYPE_CHECKING:
    from archzoo.decoder import Decoder


def adapt(decoder: Decoder, adapter: Any) -> Decoder:
    """Put adapters on a trained decoder, in place: they alone learn, from the weights as they are.

    Args:
        decoder: Without adapters.
        adapter: A class or a recipe of one (``LoRA(rank=4)``), its name or plain data; or a dict
            of several by name.

    Raises:
        ValueError: It has adapters already, nothing matches the targets, or the class cannot
            change what matches.
    """
    decoder = uncompiled(decoder)
    if not isinstance(decoder, nn.Module):
        kind = type(decoder).__name__
        raise TypeError(f"decoder is a {kind} and not a Decoder: call adapt(decoder, adapter)")
    if named_adapters(decoder.config):
        raise ValueError(
            "the model has adapters already: omit adapter to continue training them, or merge "
            "them first (archzoo adapter merge, archzoo.merge_adapter)"
        )
    several = isinstance(adapter, dict) and "class_path" not in adapter
    described = describe_adapters(adapter) if several else describe("adapter", adapter)
    decoder.config |= attach(decoder, described if several else {"default": described})
    for _, module in adapter_modules(decoder):
        module.to(decoder.device, decoder.dtype).train(decoder.training)
    try:
        start_adapters(decoder)
    except ValueError:  # a token that is not there, say: nothing has changed
        remove_adapters(decoder)
        raise
    return decoder


def attach(decoder: Decoder, entries: dict[str, Spec]) -> dict[str, Any]:
    """Put adapters on a decoder and let nothing else learn.

    Args:
        decoder: Without adapters of these names; others stay, and still learn.
        entries: Plain data by the adapters' names, as `archzoo.parts.named_adapters` gives it.

    Returns:
        The settings of `Decoder.config` that say so: paths instead of regular expressions.

    Raises:
        ValueError: Nothing matches the targets, or the class cannot change what matches; the
            message names both, and nothing has changed.
    """
    places = list_targets(decoder)
    found = {entry: matching(decoder, spec, places) for entry, spec in entries.items()}
    made = [
        (entry, place, build("adapter", entries[entry], place.target))
        for entry, matched in found.items()
        for place in matched
    ]
    before = attached(decoder)
    _check_together([*before, *made])  # all is refused before anything is changed
    for entry in entries:
        own = [adapter for name, _, adapter in made if name == entry]
        type(own[0]).connect(own)
    if not before:
        decoder.learned_before = {n for n, p in decoder.named_parameters() if p.requires_grad}
        for parameter in decoder.parameters():
            parameter.requires_grad_(False)
    for entry, place, adapter in made:
        if isinstance(place.module, Linear):
            place.module.attach(entry, place.name, adapter)
        else:
            name = "prompt" if place.name == "input" else "prefix"
            setattr(place.module, name, nn.ModuleDict({entry: adapter}))
            setattr(place.module, f"has_{name}", True)
    named = dict(named_adapters(decoder.config)) if before else {}
    named |= {entry: resolved(spec, found[entry]) for entry, spec in entries.items()}
    one = list(named) == ["default"]
    return {"adapter": named["default"] if one else None, "adapters": None if one else named}


def _check_together(made: list[tuple[str, Place, Adapter]]) -> None:
    """Refuse adapters of one place that cannot work together, by name."""
    before: dict[str, list[tuple[str, Adapter]]] = {}
    for entry, place, adapter in made:
        others = before.setdefault(place.target.path, [])
        if others and not isinstance(place.module, Linear):
            raise ValueError(
                f"the adapters {others[0][0]} and {entry} both change {place.target.path}: one "
                "decoder has one"
            )
        for name, other in others:
            beside = adapter.says("output") or adapter.says("input")
            if not beside and not other.says("delta"):
                raise ValueError(
                    f"{type(adapter).__name__} ({entry}) changes the weight of "
                    f"{place.target.path}, and {type(other).__name__} ({name}) before it has no "
                    f"delta(weight): put {entry} first"
                )
        others.append((entry, adapter))


def adapter_modules(decoder: Decoder) -> Iterator[tuple[str, Adapter]]:
    """Every adapter module of a decoder, with its path."""
    for path, module in decoder.named_modules():
        if isinstance(module, Adapter):
            yield path, module


def attached(decoder: Decoder) -> list[tuple[str, Place, Adapter]]:
    """Every adapter of a decoder, with its entry's name and its place, in the order of places."""
    found = []
    for place in list_targets(decoder):
        holder: Any = place.module
        entries: dict[str, Any] = {}
        if isinstance(holder, Linear):
            modules: Any = holder.entries()
            entries = {n: held[place.name] for n, held in modules.items() if place.name in held}
        else:
            entries = dict(getattr(holder, "prompt" if place.name == "input" else "prefix", {}))
        found += [(entry, place, adapter) for entry, adapter in entries.items()]
    return found


def start_adapters(decoder: Decoder) -> None:
    """Start every adapter from the weight that it changes, once that is loaded."""
    for module in decoder.modules():
        if isinstance(module, Linear):
            for name, adapter in module.adapters(off=True):
                with torch.no_grad():
                    adapter.start(module.base_weight()[..., module.rows(name), :])
    for prompt in getattr(decoder, "prompt", {}).values():
        with torch.no_grad():
            prompt.start(decoder.embedding.weight)
    if decoder.device.type != "meta":
        _start_prefixes(decoder)


@torch.no_grad()
def _start_prefixes(decoder: Decoder) -> None:
    """Start prefixes that say so at the state after their tokens.

    Raises:
        ValueError: A token that is not in the vocabulary, a stack that is applied several times,
            or an embedding that carries something on behind the tokens.
    """
    parts = [
        (block, name, adapter)
        for block in decoder.blocks
        for name in ("mixer", "convolution")
        for adapter in getattr(getattr(block, name), "prefix", {}).values()
        if adapter.tokens is not None
    ]
    states: dict[tuple[int, ...], Any] = {}
    for block, name, adapter in parts:
        tokens = tuple(adapter.tokens)
        if tokens not in states:
            states[tokens] = _state_after(decoder, tokens, type(adapter).__name__)
        state = states[tokens]["blocks"][[*decoder.blocks].index(block)]
        state = state if block.convolution is None else state[name]
        adapter.start_from({n: leaf[0] for n, leaf in state.items() if isinstance(leaf, Tensor)})


def _state_after(decoder: Decoder, tokens: tuple[int, ...], name: str) -> Any:
    """The state after tokens that the model has read without prompts and prefixes."""
    if max(tokens) >= decoder.vocab_size:
        raise ValueError(
            f"{name}: token {max(tokens)} is not one of the model's 0 to {decoder.vocab_size - 1}"
        )
    if decoder.loops > 1:
        raise ValueError(
            f"{name}: tokens leave a state in each of the {decoder.loops} iterations of this "
            "model's stack, and a prefix is one for all: omit tokens"
        )
    holders = [(holder, f"has_{name}") for holder, name in adapter_holders(decoder)]
    before = [getattr(holder, name) for holder, name in holders]
    try:
        for holder, has in holders:
            setattr(holder, has, False)
        begun = decoder.init_state(1)
        fresh = fork(begun["embedding"])
        read = torch.tensor([tokens], device=decoder.device)
        with decoder.evaluating():
            state = decoder(read, begun, logits_to_keep=0).state
    finally:
        for (holder, has), value in zip(holders, before, strict=True):
            setattr(holder, has, value)
    pairs = zip(leaves(fresh), leaves(state["embedding"]), strict=True)
    if not all(torch.equal(old, new) for (_, old), (_, new) in pairs):
        raise ValueError(
            f"{name}: {type(decoder.embedding).__name__} carries something on behind these tokens, "
            "such as a number that has not ended: end them with another token"
        )
    return decoder.copy_state(state)


def collapse_adapters(decoder: Decoder) -> Decoder:
    """Throw away what only the training of adapters needed, in place: it computes the same.

    The network that makes the vectors of `PTuning`, say, which leaves those vectors.
    """
    decoder = uncompiled(decoder)
    entries = named_adapters(decoder.config)
    for path, adapter in adapter_modules(decoder):
        arguments = adapter.collapse()
        entry = next(name for name in path.split(".") if name in entries)
        entries[entry] = entries[entry] | {
            "init_args": entries[entry].get("init_args", {}) | arguments
        }
    if entries:
        one = list(entries) == ["default"]
        decoder.config |= {"adapter" if one else "adapters": entries["default"] if one else entries}
    return decoder


def merge_adapter(decoder: Decoder) -> Decoder:
    """Put all adapters into the weights of a decoder, in place: a plain decoder again.

    It computes the same, to rounding, and all of it learns.

    Raises:
        ValueError: It has none, as one that is merged already; one cannot be merged; or one is
            switched off. The message names it, and nothing has changed.
    """
    decoder = uncompiled(decoder)
    if not named_adapters(decoder.config):
        raise ValueError(
            "the model has no adapter to merge: it is merged already, or never had one "
            "(archzoo.adapt puts one on)"
        )
    if off := ", ".join(sorted(decoder.adapters_off)):
        raise ValueError(
            f"the adapter {off} is switched off, and merged it would be on: switch it on "
            "(archzoo.enable_adapters) or take it off (archzoo.remove_adapters) first"
        )
    for module in decoder.modules():
        if isinstance(module, Linear) and module.adapted:
            module.check_mergeable()
    for _, place, adapter in attached(decoder):
        if not adapter.mergeable:
            raise ValueError(
                f"{type(adapter).__name__} at {place.target.path} cannot be merged: it stays "
                "beside the model, and archzoo adapter save writes it alone"
            )
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.merge()
    return _without(decoder, {})


merge_adapters = merge_adapter
"""Another name of `merge_adapter`."""


def remove_adapters(decoder: Decoder, *names: str) -> Decoder:
    """Take adapters off a decoder, in place.

    Args:
        decoder: With adapters.
        *names: Which; one alone is called "default". None: all, which leaves the base, bit for
            bit, and all of it learns.

    Raises:
        ValueError: There is none, or none of that name.
    """
    decoder = uncompiled(decoder)
    named = named_adapters(decoder.config)
    if not named:
        raise ValueError("the model has no adapter to remove: it is merged, or never had one")
    check_names(decoder, names)
    left = {entry: spec for entry, spec in named.items() if names and entry not in names}
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.detach_adapters(None if not left else names)
    for holder, name in adapter_holders(decoder):
        held = getattr(holder, name)
        if not left or set(held) & set(names):
            delattr(holder, name)
            setattr(holder, f"has_{name}", False)
    return _without(decoder, left)


def adapter_holders(decoder: Decoder) -> Iterator[tuple[Any, str]]:
    """The decoder and the mixers that hold a prompt or a prefix, and the attribute's name."""
    parts = [part for block in decoder.blocks for part in (block.mixer, block.convolution)]
    holders: list[tuple[Any, str]] = [(part, "prefix") for part in parts]
    for holder, name in [(decoder, "prompt"), *holders]:
        if hasattr(holder, name):
            yield holder, name


def check_names(decoder: Decoder, names: Iterable[str]) -> None:
    """Refuse names that no adapter of the decoder has.

    Raises:
        ValueError: The nearest names are given.
    """
    known = list(named_adapters(decoder.config))
    for name in names:
        if name not in known:
            raise ValueError(f"the model has no adapter {name!r}; {nearest(name, known)}")


def _without(decoder: Decoder, left: dict[str, Spec]) -> Decoder:
    """Say that these adapters alone are left; without any, the base learns again."""
    decoder.config |= {"adapter": None, "adapters": left or None}
    decoder.adapters_off &= left.keys()
    if not left:
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(name in decoder.learned_before)
    return decoder
