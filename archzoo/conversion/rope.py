"""RoPE from outside and later: Hugging Face's configurations, and a trained decoder scaled anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from archzoo.positions.rotary import HUGGING_FACE_NAMES, RotaryEmbedding

if TYPE_CHECKING:
    from archzoo.decoder import Decoder

#: All keys that are read. Hugging Face's code does the same: a type ignores keys of other types.
_READ = frozenset(
    ["rope_type", "type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"]
).union(*HUGGING_FACE_NAMES.values())


def from_rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `RotaryEmbedding` for a Hugging Face model's `config.json`.

    Read are ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` with
    ``rope_type`` or ``type`` (transformers 4). Keys that a type does not use are left out.

    Raises:
        ValueError: A type or a key that is not known here, or a key that its type needs is
            missing.
    """
    older, newer = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    for name in older.keys() & newer.keys():
        if older[name] != newer[name]:
            raise ValueError(
                f"rope_scaling has {name}={older[name]!r}, and rope_parameters {newer[name]!r}: "
                "give one of the two"
            )
    found = {**older, **newer}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(
            "rope_parameters differ from layer to layer: build one rotation for each pattern entry"
        )
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "dynamic" and "max_position_embeddings" in config:
        found["original_max_position_embeddings"] = config["max_position_embeddings"]
    if kind not in HUGGING_FACE_NAMES:
        known = ", ".join(HUGGING_FACE_NAMES)
        raise ValueError(f"rope_type {kind!r} cannot be read: known are {known}")
    for name in found:
        if name not in _READ:
            raise ValueError(
                f"rope_parameters have {name}={found[name]!r}, which is not known here"
            )
    arguments: dict[str, Any] = {"rope_type": kind}
    theta = found.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        arguments["base"] = float(theta)
    fraction = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if fraction is not None and fraction != 1:
        arguments["partial_rotary_factor"] = fraction
    for name in HUGGING_FACE_NAMES[kind]:
        if found.get(name) is not None:
            arguments[name] = found[name]
    for name in ("factor", "original_max_position_embeddings"):
        if name in HUGGING_FACE_NAMES[kind] and name not in arguments:
            raise ValueError(f"rope_type {kind!r} needs {name!r}, and the configuration has none")
    if kind == "yarn" and found.get("attention_factor") is None:
        # DeepSeek's two keys; one number says the same.
        over, under = (found.get(name) or 0 for name in ("mscale", "mscale_all_dim"))
        if over and under:
            growth = 0.1 * math.log(found["factor"])
            arguments["attention_factor"] = (over * growth + 1) / (under * growth + 1)
    return arguments


def scale_rotary(decoder: Decoder, **arguments: Any) -> None:
    """Give a trained decoder another scaling, in place; it changes no weight.

    ``scale_rotary(model, rope_type="yarn", factor=4)``: the base, and whatever else was set,
    stays unless it is named; a length that the scaling needs is the decoder's `context_length`.

    Args:
        decoder: A `Decoder` whose mixers all rotate by `RotaryEmbedding`.
        **arguments: Of `RotaryEmbedding`.

    Raises:
        ValueError: A mixer that rotates in another way, or arguments that do not fit.
    """
    mixers: list[Any] = [block.mixer for block in decoder.blocks]
    for mixer in mixers:
        rotary = getattr(mixer, "rotary", None)
        if type(rotary) is not RotaryEmbedding:
            raise ValueError(
                f"{type(mixer).__name__} rotates by {type(rotary).__name__}: only "
                "RotaryEmbedding can be scaled"
            )
    config = decoder.config
    settled = (config["rotary"] or {}).get("init_args", {}) | arguments
    length = settled.get("original_max_position_embeddings") or config["context_length"]
    if settled.get("rope_type") in ("dynamic", "yarn", "llama3"):
        settled["original_max_position_embeddings"] = length
    made = [RotaryEmbedding(mixer.rotary.head_dim, **settled) for mixer in mixers]
    for mixer, rotary in zip(mixers, made, strict=True):
        mixer.rotary = rotary
    config["rotary"] = {"class_path": "RotaryEmbedding", "init_args": settled}
