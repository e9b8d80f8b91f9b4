"""A decoding step of few kernels: `archzoo.kernels.decoding`, put together as a decoder is.

A layer is five launches: norm, projection and rotation; retention's step, or attention to the
cache; output (after head norm and gate) and residual; norm, gate and up, SwiGLU; down and
residual. The decoder's own step computes the same of any parts; this one knows those of the plain
RetNet and transformer, and hybrids of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archzoo.block import Block, Mixer, Rotary
from archzoo.decoder import Decoder
from archzoo.embeddings.token import TokenEmbedding
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.kernels import cache_attention
from archzoo.kernels import decoding as kernels
from archzoo.kernels.decoding import Norm, Rotation
from archzoo.linear import Linear
from archzoo.mixers.attention import Attention
from archzoo.mixers.retention import Retention
from archzoo.norm import RMSNorm
from archzoo.numerics import constant
from archzoo.positions.rotary import NoRotation, RetentionRotation, RotaryEmbedding
from archzoo.states import State

#: Tokens (batch, 1) and a state of `Decoder.fixed_state` to logits (batch, vocab_size) and the
#: state, which is written into.
Step = Callable[[Tensor, State], tuple[Tensor, State]]
Frequencies = tuple[tuple[float, ...], float]  # of a rotation, and its amplitude

MAX_KEY_DIM = 1024  # of a head, which one program holds


def fused_step(model: Decoder) -> Step | None:
    """The step of a decoder by fused kernels, or None where some part has no fused form.

    It computes what a call of one token in the recurrent form does, where no documents are given:
    each row continues the one it is in. It never waits for the device and launches nothing that
    depends on data, so a graph may capture it. No gradients.

    Args:
        model: Any decoder, in evaluation mode; its weights may change in place, not its parts.
    """
    if not (_plain(model) and all(map(_fits, model.blocks))):
        return None
    found: list[Any] = [_frequencies(block.mixer) for block in model.blocks]
    rotations = list(dict.fromkeys(found))
    attends = any(type(block.mixer) is Attention for block in model.blocks)
    # What follows reads attributes of the parts that were found.
    blocks: list[Any] = list(model.blocks)
    embedding, norm, head = model.embedding.weight, _norm(model.norm), model.head.weight

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        place = state["place"]
        positions = place["positions"]
        # A row continues its last document, as the contexts of calls number them.
        document = (place["begun"] - 1)[:, None] if place["packed"] and attends else None
        tables = []
        for index, (frequencies, amplitude) in enumerate(rotations):
            theta = constant(frequencies, positions.device, torch.float64)
            if index == 0:
                x, table = kernels.start(tokens, embedding, positions, theta, amplitude)
            else:
                table = kernels.rotation_table(positions, theta, amplitude)
            tables.append(table)
        for block, rotation, held in zip(blocks, found, state["blocks"], strict=True):
            table = tables[rotations.index(rotation)]
            if type(block.mixer) is Retention:
                _retain(block.mixer, _norm(block.mixer_norm), x, held, positions, table)
            else:
                _attend(block.mixer, _norm(block.mixer_norm), x, held, document, table)
            fed = block.feed_forward
            gate_up, of_it = fed.gate_up.weight, _norm(block.feed_forward_norm)
            hidden = kernels.linear(x, gate_up, norm=of_it, paired=True)
            kernels.linear(hidden, fed.down.weight, residual=x)
        return kernels.linear(x, head, norm=norm), state

    return step


def _retain(
    mixer: Retention, norm: Norm, x: Tensor, held: State, positions: Tensor, table: Tensor
) -> None:
    """Add a retention layer of one token to x (batch, dim), in place."""
    width = mixer.heads * mixer.head_dim
    scale = mixer.head_dim**-0.5
    projected = kernels.linear(
        x,
        mixer.query_key_value_gate.weight,
        norm=norm,
        rotation=Rotation(table, mixer.head_dim, width, width, scale),
    )
    values = mixer.heads * mixer.value_dim
    q, k, v, gate = projected.split_with_sizes((width, width, values, values), 1)
    log_decay = mixer.log_decay(x)
    o = kernels.retain(q, k, v, log_decay, positions, held["memory"])
    of_heads = Norm(None, max(mixer.norm_eps, 1e-24), mixer.heads, gate)
    kernels.linear(o, mixer.output.weight, norm=of_heads, residual=x)


def _attend(
    mixer: Attention, norm: Norm, x: Tensor, held: State, document: Tensor | None, table: Tensor
) -> None:
    """Add an attention layer of one token to x (batch, dim), in place."""
    width, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    projected = kernels.linear(
        x,
        mixer.query_key_value.weight,
        norm=norm,
        rotation=Rotation(table, mixer.head_dim, width, keys),
    )
    q, k, v = projected.unflatten(1, (-1, mixer.head_dim)).split_with_sizes(
        (mixer.heads, mixer.kv_heads, mixer.kv_heads), 1
    )
    y = cache_attention.attend_cache(
        q, k, v, held["keys"], held["values"], held["length"], held["arrivals"],
        documents=None if document is None else held["documents"], document=document,
    )  # fmt: skip
    kernels.linear(y.flatten(1), mixer.output.weight, residual=x)


def _norm(norm: Any) -> Norm:
    return Norm(norm.weight, norm.eps or 0.0)


def _plain(model: Decoder) -> bool:
    """Whether all around the blocks is what `fused_step` computes."""
    if type(model) is not Decoder or type(model.embedding) is not TokenEmbedding:
        return False
    if model.loops > 1 or model.injection == "layer" or model.has_prompt:
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    if hooked or torch.is_autocast_enabled(model.device.type):
        return False
    table = model.embedding.weight
    same = all(weight.dtype == table.dtype for weight in model.parameters())
    return same and table.is_contiguous() and _is_rms(model.norm) and _reads(model.head)


def _fits(block: Block) -> bool:
    """Whether `fused_step` computes this block."""
    if type(block) is not Block or block.post or block.convolution is not None:
        return False
    mixer, fed = block.mixer, block.feed_forward
    if type(fed) is not GatedFeedForward or fed.activation is not F.silu:
        return False
    norms = _is_rms(block.mixer_norm) and _is_rms(block.feed_forward_norm)
    mixes = _fits_retention(mixer) or _fits_attention(mixer)
    return norms and mixes and _reads(fed.gate_up) and _reads(fed.down)


def _fits_retention(mixer: Mixer) -> bool:
    if type(mixer) is not Retention or mixer.has_prefix or mixer.learnable:
        return False
    if mixer.head_norm != "rms" or len(mixer.widths) < 3 or mixer.head_dim > MAX_KEY_DIM:
        return False
    if _frequencies(mixer) is None or mixer.head_dim % 2:
        return False
    return _reads(mixer.query_key_value_gate) and _reads(mixer.output)


def _fits_attention(mixer: Mixer) -> bool:
    if type(mixer) is not Attention or mixer.has_prefix or mixer.bias is not None:
        return False
    if _frequencies(mixer) is None or mixer.head_dim % 2:
        return False
    if mixer.head_dim > cache_attention.MAX_SIZE:
        return False
    return _reads(mixer.query_key_value) and _reads(mixer.output)


def _frequencies(mixer: Any) -> Frequencies | None:
    """Of a rotation that a position alone determines by one angle a pair; else None."""
    rotary: Rotary = mixer.rotary
    if type(rotary) is NoRotation:
        return (), 1.0
    if type(rotary) is RotaryEmbedding and rotary.rope_parameters()["rope_type"] == "dynamic":
        return None
    if type(rotary) not in (RotaryEmbedding, RetentionRotation):
        return None
    found: Any = rotary
    return found.frequencies, found.attention_factor


def _is_rms(norm: nn.Module) -> bool:
    return type(norm) is RMSNorm and norm.weight is not None


def _reads(linear: nn.Module) -> bool:
    """Whether a Linear is its weight and nothing else, and the kernels take that."""
    if type(linear) is not Linear or linear.adapted or linear.bias is not None:
        return False
    return linear.stack is None and kernels.available(linear.weight)
