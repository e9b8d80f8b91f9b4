"""archzoo: decoder-only transformers that share one block interface and swap the rest.

``import archzoo`` is light: every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from archzoo._version import __version__ as __version__

# Public name: the module that defines it.
_NAMES = {
    "create_model": "registry",
    "list_models": "registry",
    "register_model": "registry",
    "Decoder": "decoder",
    "Output": "decoder",
    "Context": "block",
    "Mixer": "block",
    "FeedForward": "block",
    "Router": "block",
    "Embedding": "block",
    "Rotary": "block",
    "Bias": "block",
    "Block": "block",
    "Attention": "mixers.attention",
    "FilteredAttention": "mixers.filtered",
    "Retention": "mixers.retention",
    "GatedFeedForward": "feedforward.dense",
    "PlainFeedForward": "feedforward.dense",
    "MixtureOfExperts": "feedforward.moe",
    "TopKRouter": "feedforward.routers",
    "LinearRouter": "feedforward.routers",
    "AttentionRouter": "feedforward.routers",
    "TokenEmbedding": "embeddings.token",
    "RotaryEmbedding": "positions.rotary",
    "RetentionRotation": "positions.rotary",
    "NoRotation": "positions.rotary",
    "XPos": "positions.rotary",
    "AbacusEmbedding": "embeddings.abacus",
    "PositionCoupling": "embeddings.coupling",
    "LearnedPositions": "embeddings.learned",
    "RandomisedPositions": "embeddings.learned",
    "ALiBi": "positions.biases",
    "T5Bias": "positions.biases",
    "KERPLE": "positions.biases",
    "FIRE": "positions.biases",
    "generate": "generation",
    "save_pretrained": "checkpoint",
    "from_pretrained": "checkpoint",
    "check": "contract",
}

__all__ = sorted([*_NAMES, "__version__"])

# What stands below is for type checkers and editors, which cannot look into _NAMES.
# ruff: noqa: F401
if TYPE_CHECKING:
    from archzoo.block import (
        Bias,
        Block,
        Context,
        Embedding,
        FeedForward,
        Mixer,
        Rotary,
        Router,
    )
    from archzoo.checkpoint import from_pretrained, save_pretrained
    from archzoo.contract import check
    from archzoo.decoder import Decoder, Output
    from archzoo.embeddings.abacus import AbacusEmbedding
    from archzoo.embeddings.coupling import PositionCoupling
    from archzoo.embeddings.learned import LearnedPositions, RandomisedPositions
    from archzoo.embeddings.token import TokenEmbedding
    from archzoo.feedforward.dense import GatedFeedForward, PlainFeedForward
    from archzoo.feedforward.moe import MixtureOfExperts
    from archzoo.feedforward.routers import AttentionRouter, LinearRouter, TopKRouter
    from archzoo.generation import generate
    from archzoo.mixers.attention import Attention
    from archzoo.mixers.filtered import FilteredAttention
    from archzoo.mixers.retention import Retention
    from archzoo.positions.biases import FIRE, KERPLE, ALiBi, T5Bias
    from archzoo.positions.rotary import NoRotation, RetentionRotation, RotaryEmbedding, XPos
    from archzoo.registry import create_model, list_models, register_model


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'archzoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"archzoo.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
