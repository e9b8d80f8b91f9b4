"""A decoding step of few kernels: `archzoo.kernels.decoding`, put together as a decoder is.

A layer is five launches: norm, projection and rotation; retention's step, or attention to the
cache; output (after head norm and gate) and residual; norm, gate and up, SwiGLU; down and
residual. The decoder's own step computes the same of any parts; this one knows Retention, Attention
and GatedFeedForward as the plain RetNet and transformer have them. A block's other half, such as a
mixture of experts, is called between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Block, Context, make_context
from archzoo.decoder import Decoder
from archzoo.embeddings.token import TokenEmbedding
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.kernels import cache_attention
from archzoo.kernels import decoding as kernels
from archzoo.kernels.decoding import Norm, Rotation
from archzoo.linear import Linear
from archzoo.mixers.attention import Attention, prefix_of
from archzoo.mixers.retention import Retention
from archzoo.norm import RMSNorm
from archzoo.numerics import constant
from archzoo.positions.rotary import NoRotation, RetentionRotation, RotaryEmbedding
from archzoo.states import State

#: Tokens (batch, 1) and a state of `Decoder.fixed_state` to logits (batch, vocab_size) and the
#: state, which is written into.
Step = Callable[[Tensor, State], tuple[Tensor, State]]

MAX_KEY_DIM = 1024  # of a head of retention, which one program holds


class Frequencies(NamedTuple):
    """A rotation by one angle a pair, and what it multiplies with besides."""

    theta: tuple[float, ...]
    amplitude: float


class _Here(NamedTuple):
    """What the layers of one step share.

    Attributes:
        positions: (batch,) int64.
        document: (batch, 1) int64, as the contexts of calls number them; None: one a row.
        tables: Of each rotation.
        context: For the parts that are called; None where there are none.
    """

    positions: Tensor
    document: Tensor | None
    tables: dict[Frequencies, Tensor]
    context: Context | None


#: Half a block: adds to x (batch, dim) in place.
Mix = Callable[[Tensor, State, _Here], State]
Feed = Callable[[Tensor, _Here], None]


def fused_step(model: Decoder) -> Step | None:
    """The step of a decoder by fused kernels, or None where it has no fused form.

    It computes what a call of one token in the recurrent form does, where no documents are given:
    each row continues the one it is in. Its own kernels never wait for the device, nor does what
    they are depend on data, so a graph may capture them. No gradients.

    Args:
        model: Any decoder, in evaluation mode. Its weights may change in place, its parts may not.
    """
    if not _is_plain_around(model):
        return None
    mixes = [_find_mix(block) for block in model.blocks]
    feeds = [_find_feed(block) for block in model.blocks]
    if not any([*mixes, *feeds]):
        return None
    calls = None in mixes or None in feeds
    layers: list[tuple[Mix, Feed]] = [
        (mix or partial(_call_mixer, block), feed or partial(_call_feed_forward, block))
        for block, mix, feed in zip(model.blocks, mixes, feeds, strict=True)
    ] * model.loops
    embedding, norm, head = model.embedding.weight, _norm_of(model.norm), _weight(model.head)
    device = embedding.device
    found = [_frequencies(block.mixer) for block in model.blocks]
    rotations = {
        each: constant(each.theta, device, torch.float64) for each in found if each is not None
    } or {Frequencies((), 1.0): constant((), device, torch.float64)}

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        place, context, tables = state["place"], None, {}
        positions, x = place["positions"], None
        document = (place["begun"] - 1)[:, None] if place["packed"] else None
        if calls:  # before the positions are counted on
            context, place = make_context(len(tokens), 1, cursor=place, device=device)
        for each, theta in rotations.items():
            if x is None:
                x, table = kernels.start(tokens, embedding, positions, theta, each.amplitude)
            else:
                table = kernels.rotation_table(positions, theta, each.amplitude)
            tables[each] = table
        assert x is not None  # there is a rotation, if only of no pairs
        here = _Here(positions, document, tables, context)
        blocks = []
        for (mix, feed), held in zip(layers, state["blocks"], strict=True):
            blocks.append(mix(x, held, here))
            feed(x, here)
        after = state | {"place": place | {"positions": positions}, "blocks": blocks}
        return kernels.linear(x, head, norm=norm), after

    return step


# ------------------------------------------------------------------------ halves of blocks


def _retain(
    mixer: Retention,
    norm: Norm,
    log_decay: Tensor,
    rotation: Frequencies,
    x: Tensor,
    held: State,
    here: _Here,
) -> State:
    width, values = mixer.heads * mixer.head_dim, mixer.heads * mixer.value_dim
    weight, scale = _weight(mixer.query_key_value_gate), mixer.head_dim**-0.5
    turn = Rotation(here.tables[rotation], mixer.head_dim, width, width, scale)
    projected = kernels.linear(x, weight, norm=norm, rotation=turn)
    q, k, v, gate = projected.split_with_sizes((width, width, values, values), 1)
    o = kernels.retain(q, k, v, log_decay, here.positions, held["memory"])
    of_heads = Norm(None, max(mixer.norm_eps, 1e-24), mixer.heads, gate)  # as Retention.finish
    kernels.linear(o, _weight(mixer.output), norm=of_heads, residual=x)
    return held


def _attend(
    mixer: Attention, norm: Norm, rotation: Frequencies, x: Tensor, held: State, here: _Here
) -> State:
    heads, kv_heads, size = mixer.heads, mixer.kv_heads, mixer.head_dim
    turn = Rotation(here.tables[rotation], size, heads * size, kv_heads * size)
    projected = kernels.linear(x, _weight(mixer.query_key_value), norm=norm, rotation=turn)
    heads_of_all = projected.unflatten(1, (-1, size))
    q, k, v = heads_of_all.split_with_sizes((heads, kv_heads, kv_heads), 1)
    cache = held["keys"], held["values"], held["length"], held["arrivals"]
    documents = None if here.document is None else held["documents"]
    if here.document is not None and (prefix := prefix_of(held)):  # which every document sees
        held["documents"][:, :prefix] = here.document
    early = kernels.begins_early(len(x), x.device)
    y = cache_attention.attend_cache(
        q, k, v, *cache, documents=documents, document=here.document, early=early
    )
    kernels.linear(y.flatten(1), _weight(mixer.output), residual=x)
    return held


def _feed(fed: GatedFeedForward, norm: Norm, x: Tensor, here: _Here) -> None:
    hidden = kernels.linear(x, _weight(fed.gate_up), norm=norm, paired=True)
    kernels.linear(hidden, _weight(fed.down), residual=x)


def _call_mixer(block: Block, x: Tensor, held: State, here: _Here) -> State:
    assert here.context is not None
    y, after = block.mix(block.mixer_norm(x[:, None]), held, here.context, "recurrent")
    assert after is not None  # one was given
    x.add_(y[:, 0])
    return after


def _call_feed_forward(block: Block, x: Tensor, here: _Here) -> None:
    assert here.context is not None
    y, _ = block.feed_forward(block.feed_forward_norm(x[:, None]), here.context)
    x.add_(y[:, 0])


# ------------------------------------------------------------------------ what is fused


def _is_plain_around(model: Decoder) -> bool:
    """Whether all around the halves of blocks is what `fused_step` computes."""
    if type(model) is not Decoder or type(model.embedding) is not TokenEmbedding:
        return False
    if model.injection != "none":
        return False
    if any(type(block) is not Block or block.post for block in model.blocks):
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    if hooked or torch.is_autocast_enabled(model.device.type):
        return False
    table = model.embedding.weight
    same = table.dtype == model.head.dtype and table.is_contiguous()
    return same and _is_rms(model.norm, table.dtype) and _is_weight(model.head, table.dtype)


def _find_mix(block: Block) -> Mix | None:
    """The fused form of a block's first half."""
    mixer: Any = block.mixer
    rotation = _frequencies(mixer)
    if type(mixer) not in (Retention, Attention) or block.convolution is not None:
        return None
    dtype = mixer.output.dtype
    if rotation is None or mixer.head_dim % 2:
        return None
    if not (_is_rms(block.mixer_norm, dtype) and _is_weight(mixer.output, dtype)):
        return None
    norm = _norm_of(block.mixer_norm)
    if type(mixer) is Attention:
        if mixer.bias is not None or mixer.head_dim > cache_attention.MAX_SIZE:
            return None
        fits = _is_weight(mixer.query_key_value, dtype)
        return partial(_attend, mixer, norm, rotation) if fits else None
    gated = mixer.head_norm == "rms" and len(mixer.widths) == 3
    if not gated or mixer.learnable or mixer.head_dim > MAX_KEY_DIM:
        return None
    log_decay = mixer.log_decay(mixer.output.weight)
    fits = _is_weight(mixer.query_key_value_gate, dtype)
    return partial(_retain, mixer, norm, log_decay, rotation) if fits else None


def _find_feed(block: Block) -> Feed | None:
    """The fused form of a block's second half."""
    fed = block.feed_forward
    if type(fed) is not GatedFeedForward or fed.activation is not F.silu:
        return None
    dtype = fed.down.dtype
    if not _is_rms(block.feed_forward_norm, dtype):
        return None
    fits = _is_weight(fed.gate_up, dtype) and _is_weight(fed.down, dtype)
    return partial(_feed, fed, _norm_of(block.feed_forward_norm)) if fits else None


def _frequencies(mixer: Any) -> Frequencies | None:
    """Of a rotation that the position alone determines, by one angle a pair; else None."""
    rotary = getattr(mixer, "rotary", None)
    if type(rotary) is NoRotation:
        return Frequencies((), 1.0)
    if type(rotary) is RetentionRotation or (
        type(rotary) is RotaryEmbedding and rotary.rope_parameters()["rope_type"] != "dynamic"
    ):
        return Frequencies(rotary.frequencies, rotary.attention_factor)
    return None


def _norm_of(norm: Any) -> Norm:
    return Norm(norm.weight, norm.eps or 0.0)


def _is_rms(norm: nn.Module, dtype: torch.dtype) -> bool:
    return type(norm) is RMSNorm and norm.weight.dtype == dtype


def _is_weight(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a Linear is its weight and nothing else, which the kernels take."""
    if type(linear) is not Linear or linear.one_weight() is None or linear.bias is not None:
        return False
    return linear.stack is None and linear.dtype == dtype and kernels.available(linear.weight)


def _weight(linear: Linear) -> Tensor:
    """What it multiplies with, which `_is_weight` has found to be one matrix."""
    weight = linear.one_weight()
    assert weight is not None
    return weight
