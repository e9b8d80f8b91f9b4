"""RetNets of torchscale and of flash-linear-attention in the zoo, by two key maps.

torchscale's `RetNetDecoder`; it lays queries and keys out as here, pair by pair::

    embed_tokens                               embedding
    layers.N.retention_layer_norm              blocks.N.mixer_norm
    layers.N.retention.{q,k,v,g}_proj          blocks.N.mixer.query_key_value_gate, in this order
    layers.N.retention.out_proj                blocks.N.mixer.output
    layers.N.final_layer_norm                  blocks.N.feed_forward_norm
    layers.N.ffn.{fc1, gate}                   blocks.N.feed_forward.gate_up: fc1 is activated
    layers.N.ffn.fc2                           blocks.N.feed_forward.down
    layer_norm                                 norm
    output_projection                          head

flash-linear-attention's `RetNetForCausalLM`; its rotation is RoPE, of channels i and
i + head_dim/2, so rows are reordered as Llama's are, and the weight of each head's norm is put into
the columns of the output projection, where it does the same::

    model.embeddings                           embedding
    model.layers.N.attn_norm                   blocks.N.mixer_norm
    model.layers.N.attn.{q,k,v,g}_proj         blocks.N.mixer.query_key_value_gate
    model.layers.N.attn.o_proj, times
      attn.g_norm_swish_gate or attn.g_norm    blocks.N.mixer.output
    model.layers.N.mlp_norm                    blocks.N.feed_forward_norm
    model.layers.N.mlp.{gate,up}_proj          blocks.N.feed_forward.gate_up
    model.layers.N.mlp.down_proj               blocks.N.feed_forward.down
    model.norm                                 norm
    lm_head                                    head

Both scale a head's output otherwise before its norm, which removes the scale, all but its epsilon:
logits agree as far as that is small beside the mean square of a head's output.

Paper: Sun et al., Retentive Network, arXiv 2307.08621.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archzoo.conversion.llama import interleave

#: What torchscale's arguments must say; a wrong default would give wrong logits in silence.
TORCHSCALE = (
    "decoder_embed_dim",
    "decoder_value_embed_dim",
    "decoder_retention_heads",
    "decoder_ffn_embed_dim",
    "decoder_layers",
    "vocab_size",
    "activation_fn",
    "layernorm_eps",
    "no_scale_embedding",
    "decoder_normalize_before",
)
FLA = ("hidden_size", "num_heads", "num_hidden_layers", "vocab_size")


def _asked(config: Mapping[str, Any], wanted: Mapping[str, tuple[Any, Any]], what: str) -> None:
    """Refuse fields of other values than ours: {name: (value where it is not said, ours)}."""
    for name, (usual, ours) in wanted.items():
        given = config.get(name)
        given = usual if given is None else given
        if given != ours:
            raise ValueError(f"this {what} has {name}={given!r}; only {ours!r} can be loaded")


def _named(config: Mapping[str, Any], names: tuple[str, ...], what: str) -> list[Any]:
    for name in names:
        if config.get(name) is None:
            raise ValueError(f"this {what} has no {name}: its config.json must say it")
    return [config[name] for name in names]


def _arguments(
    sizes: tuple[int, int, int, int, int], value_factor: float, eps: float, activation: str
) -> dict[str, Any]:
    vocab_size, dim, depth, heads, width = sizes
    retention = {"value_factor": value_factor, "norm_eps": eps}
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "width": width,
        "mixer": {"class_path": "Retention", "init_args": retention},
        "feed_forward": {
            "class_path": "GatedFeedForward",
            "init_args": {"activation": activation.replace("swish", "silu")},
        },
        "norm": "rms",
        "norm_placement": "pre",
        "norm_eps": eps,
    }


def torchscale_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Decoder` for those of torchscale's `RetNetConfig`.

    Raises:
        ValueError: A size is missing, or something that has no equal here.
    """
    what = "torchscale RetNet"
    dim, values, heads, width, depth, vocab_size, activation, eps, _, _ = _named(
        config, TORCHSCALE, what
    )
    wanted = {
        "decoder_normalize_before": (True, True),
        "deepnorm": (False, False),
        "layernorm_embedding": (False, False),
        "moe_freq": (0, 0),
        "multiway": (False, False),
    }
    _asked(config, wanted, what)
    if activation not in ("swish", "silu", "gelu", "relu"):
        raise ValueError(f"this {what} has activation_fn={activation!r}: swish, gelu or relu are")
    tied = bool(config.get("share_decoder_input_output_embed"))
    if tied and not config["no_scale_embedding"]:
        raise ValueError(
            f"this {what} shares its embedding with the head and scales it in one place alone "
            "(no_scale_embedding=false): that cannot be loaded"
        )
    sizes = (vocab_size, dim, depth, heads, width)
    return _arguments(sizes, values / dim, eps, activation) | {"tie_weights": tied}


def torchscale_weights(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """A torchscale RetNet's weights under our names.

    Raises:
        ValueError: One is missing, or unexpected.
    """
    computed = ("retnet_rel_pos.angle", "retnet_rel_pos.decay")
    left = {
        name.removeprefix("decoder."): weight
        for name, weight in state_dict.items()
        if not name.endswith(computed)
    }
    take = _taker(left, "torchscale RetNet")
    embedding = take("embed_tokens.weight")
    tied = bool(config.get("share_decoder_input_output_embed"))
    if tied:
        left.pop("output_projection.weight", None)
        head = embedding
    else:
        head = take("output_projection.weight")
    if not config["no_scale_embedding"]:
        embedding = embedding * config["decoder_embed_dim"] ** 0.5
    weights = {"embedding.weight": embedding, "head.weight": head}
    weights["norm.weight"] = take("layer_norm.weight")
    for layer in range(config["decoder_layers"]):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        parts = [take(f"{theirs}.retention.{name}_proj.weight") for name in "qkvg"]
        weights |= {
            f"{ours}.mixer.query_key_value_gate.weight": torch.cat(parts),
            f"{ours}.mixer.output.weight": take(f"{theirs}.retention.out_proj.weight"),
            f"{ours}.mixer_norm.weight": take(f"{theirs}.retention_layer_norm.weight"),
            f"{ours}.feed_forward_norm.weight": take(f"{theirs}.final_layer_norm.weight"),
            f"{ours}.feed_forward.gate_up.weight": torch.cat(
                [take(f"{theirs}.ffn.{name}.weight") for name in ("fc1", "gate")]
            ),
            f"{ours}.feed_forward.down.weight": take(f"{theirs}.ffn.fc2.weight"),
        }
    _nothing_left(left, "torchscale RetNet")
    return weights


def fla_config(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The arguments of `Decoder` for the `config.json` of flash-linear-attention's RetNet.

    Args:
        config: Its content.
        width: Rows of its ``mlp.gate_proj``, which the configuration may leave open.

    Raises:
        ValueError: A size is missing, or something that has no equal here.
    """
    what = "flash-linear-attention RetNet"
    dim, heads, depth, vocab_size = _named(config, FLA, what)
    wanted = {
        "model_type": ("retnet", "retnet"),
        "expand_k": (1.0, 1.0),
        "feature_map": (None, None),
        "use_short_conv": (False, False),
        "use_output_gate": (True, True),
        "num_kv_heads": (heads, heads),
        "attn": (None, None),
    }
    _asked(config, wanted, what)
    activation = config.get("hidden_act") or "swish"
    if activation not in ("swish", "silu"):
        raise ValueError(f"this {what} has hidden_act={activation!r}; only 'swish' can be loaded")
    eps, values = config.get("norm_eps"), config.get("expand_v")
    sizes = (vocab_size, dim, depth, heads, width)
    arguments = _arguments(
        sizes, 2.0 if values is None else values, 1e-6 if eps is None else eps, activation
    )
    return arguments | {
        "rotary": "RotaryEmbedding",
        "context_length": config.get("max_position_embeddings"),
        "tie_weights": bool(config.get("tie_word_embeddings")),
    }


def fla_weights(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a flash-linear-attention RetNet under our names.

    Raises:
        ValueError: One is missing, or unexpected.
    """
    what, heads = "flash-linear-attention RetNet", config["num_heads"]
    left = {n: w for n, w in state_dict.items() if not n.endswith("rotary.inv_freq")}
    take = _taker(left, what)
    weights = {"embedding.weight": take("model.embeddings.weight")}
    if config.get("tie_word_embeddings"):
        left.pop("lm_head.weight", None)
        weights["head.weight"] = weights["embedding.weight"]
    else:
        weights["head.weight"] = take("lm_head.weight")
    weights["norm.weight"] = take("model.norm.weight")
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        q, k, v, g = (take(f"{theirs}.attn.{name}_proj.weight") for name in "qkvg")
        output = take(f"{theirs}.attn.o_proj.weight")
        for name in ("g_norm_swish_gate", "g_norm"):
            scale = left.pop(f"{theirs}.attn.{name}.weight", None)
            if scale is not None:
                output = output * scale.to(output.dtype).repeat(heads)
        parts = [interleave(q, heads), interleave(k, heads), v, g]
        weights |= {
            f"{ours}.mixer.query_key_value_gate.weight": torch.cat(parts),
            f"{ours}.mixer.output.weight": output,
            f"{ours}.mixer_norm.weight": take(f"{theirs}.attn_norm.weight"),
            f"{ours}.feed_forward_norm.weight": take(f"{theirs}.mlp_norm.weight"),
            f"{ours}.feed_forward.gate_up.weight": torch.cat(
                [take(f"{theirs}.mlp.{name}_proj.weight") for name in ("gate", "up")]
            ),
            f"{ours}.feed_forward.down.weight": take(f"{theirs}.mlp.down_proj.weight"),
        }
    _nothing_left(left, what)
    return weights


def _taker(left: dict[str, Tensor], what: str) -> Any:
    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"no {what}: the weight {name!r} is missing")
        return left.pop(name)

    return take


def _nothing_left(left: Mapping[str, Tensor], what: str) -> None:
    if left:
        raise ValueError(f"no plain {what}: nothing here takes the weight {next(iter(left))!r}")
