"""Floating-point operations and bytes that a model needs, and what GPUs can do at most.

Model FLOPs utilisation (MFU; Chowdhery et al., PaLM, arXiv 2204.02311, appendix B) is the part of
a GPU's peak that the operations which the model needs would take, whatever a program computes
beside: a recomputed activation or a masked key counts nothing. So a higher MFU is a faster
step, and never a more wasteful one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from archzoo.decoder import Decoder
from archzoo.mixers.attention import Attention
from archzoo.mixers.retention import Retention
from archzoo.states import nbytes

#: Dense bf16 operations a second, from NVIDIA's data sheets (which give those of H100 and later
#: with sparsity, twice as many). The words of a GPU's name; the first line that fits is taken.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2_250e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("GH200",), 989e12),
    (("H100", "PCIe"), 756e12),
    (("H100", "NVL"), 835e12),
    (("H100", "HBM3"), 989e12),  # SXM
    (("A100",), 312e12),
    (("A30",), 165e12),
    (("A40",), 150e12),
    (("A10",), 125e12),
    (("A10G",), 70e12),
    (("L40S",), 362e12),
    (("L40",), 181e12),
    (("L4",), 121e12),
    (("RTX", "A6000"), 155e12),
    (("RTX", "5090"), 210e12),
    (("RTX", "4090"), 165e12),
    (("RTX", "3090"), 71e12),
)
NOT_WHOLE = {"MIG", "Laptop", "D", "Max"}  # parts of a GPU, and slower ones of the same name


def peak_operations(name: str) -> float | None:
    """Dense bf16 operations a second of a GPU at most; None: it is not in `PEAKS`.

    Args:
        name: As `torch.cuda.get_device_name` gives it.
    """
    words = set(re.split(r"[\s-]+", name))
    if words & NOT_WHOLE:
        return None
    return next((peak for known, peak in PEAKS if words >= set(known)), None)


def peak_of(device: torch.device | str) -> float | None:
    """`peak_operations` of a device; None for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    return peak_operations(torch.cuda.get_device_name(device))


def utilisation(operations: float, tokens_per_second: float, peak: float) -> float:
    """MFU, a fraction: ``operations * tokens_per_second / peak``.

    Args:
        operations: A token's, as `training_operations` gives them.
        tokens_per_second: Of all GPUs together.
        peak: Of all of them, as `peak_of` gives it for one.
    """
    return operations * tokens_per_second / peak


class Multiplied(NamedTuple):
    """Parameters that a token is multiplied by.

    Attributes:
        active: N: those of the blocks, as often as the stack is applied, and of the head, tied or
            not. Of experts those that a token goes to. Embeddings are looked up and count
            nothing.
        trained: Those of them that learn: beside adapters the others do not.
    """

    active: int
    trained: int


def multiplied_parameters(decoder: Decoder) -> Multiplied:
    """What a token of this decoder is multiplied by."""

    def count(module: nn.Module, trained: bool) -> int:
        found = (p for p in module.parameters() if p.requires_grad or not trained)
        return sum(parameter.numel() for parameter in found)

    def multiplied(trained: bool) -> int:
        stack = 0
        for block in decoder.blocks:
            part: Any = block.feed_forward
            inactive = getattr(part, "inactive_parameters", 0)
            # Experts that do not learn are not among those counted.
            stack += count(block, trained) - (inactive if count(part, trained) > inactive else 0)
        return decoder.loops * stack + count(decoder.norm, trained) + count(decoder.head, trained)

    return Multiplied(multiplied(False), multiplied(True))


def attention_operations(heads: int, head_dim: int, time: int) -> float:
    """A token's in causal attention, forward, over the projections: ``2 heads head_dim (T + 1)``.

    Token n takes n products with keys and n sums of values, each of ``2 head_dim`` operations a
    head; the mean of n is (T + 1) / 2. PaLM's ``12 L H Q T`` of forward and backward counts the
    masked half too: twice as many.

    Args:
        heads: Query heads.
        head_dim: Channels of each.
        time: T, tokens of a text.
    """
    return 2.0 * heads * head_dim * (time + 1)


def retention_operations(heads: int, key_dim: int, value_dim: int, time: int) -> float:
    """A token's in retention, forward, over the projections: the fewer of two forms.

    ``4 heads key_dim value_dim`` in the recurrent form, which adds an outer product to the state
    and reads it with the query; ``heads (key_dim + value_dim) (T + 1)`` in the parallel form, as
    in attention (Sun et al., arXiv 2307.08621, section 2). Chunks take more than the first, and
    the decay less than a hundredth of it, which is left out.

    Args:
        heads: Heads.
        key_dim: Channels of a query and a key.
        value_dim: Of a value.
        time: T, tokens of a text.
    """
    recurrent = 4.0 * heads * key_dim * value_dim
    return min(recurrent, 1.0 * heads * (key_dim + value_dim) * (time + 1))


def mixing_operations(mixer: nn.Module, time: int) -> float:
    """A token's in a mixer, forward, over those of its parameters.

    Args:
        mixer: One of the zoo's; one of your own says by a method ``operations(time)``, else it
            has none.
        time: T, tokens of a text, which is taken to be one document.
    """
    own: Any = getattr(mixer, "operations", None)
    if callable(own):
        return float(own(time))
    if isinstance(mixer, Attention):
        return attention_operations(mixer.heads, mixer.head_dim, time)
    if isinstance(mixer, Retention):
        return retention_operations(mixer.heads, mixer.head_dim, mixer.value_dim, time)
    return 0.0


def training_operations(decoder: Decoder, time: int, multiplied: Multiplied | None = None) -> float:
    """Operations that training needs for a token, forward and backward.

    ``6 N + 3 sum over layers of mixing_operations(mixer, T)``: a parameter takes 2 operations
    (a product and a sum) forward, 2 for the gradient of its input and 2 for its own (Kaplan et
    al., arXiv 2001.08361, section 2.1). A parameter that does not learn takes 4.

    Args:
        decoder: Of which model.
        time: T, tokens of a text.
        multiplied: N, where the decoder cannot be asked any more: its parameters are sharded.
    """
    active, trained = multiplied or multiplied_parameters(decoder)
    mixed = sum(mixing_operations(block.mixer, time) for block in decoder.blocks)
    return 4.0 * active + 2.0 * trained + 3.0 * decoder.loops * mixed


def decoding_bytes(decoder: Decoder, batch: int, length: int) -> int:
    """The fewest bytes of memory that a step of decoding moves: weights once, and every state.

    A state of constant size is read and written, a KV cache read and one token of it written.

    Args:
        decoder: On any device, in the dtype that it decodes in.
        batch: Rows.
        length: Tokens before the step.
    """
    with torch.device("meta"):
        sizes = [
            nbytes(decoder.init_state(1, capacity=tokens, device="meta", dtype=decoder.dtype))
            for tokens in (0, 1, length)
        ]
    none, one, held = sizes
    weights = multiplied_parameters(decoder).active * decoder.dtype.itemsize
    return weights + batch * (held + one if one > none else 2 * held)
