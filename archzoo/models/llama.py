"""Llama's released weights in our transformer: a key map, and no architecture of its own.

Llama is `archzoo/models/transformer.py` at other sizes. Four things differ in how Hugging Face's
`LlamaForCausalLM` lays its weights out:

* ``model.layers.N.self_attn.{q,k,v}_proj`` are rows of one matrix here, in this order:
  ``blocks.N.mixer.query_key_value``
* its rotation pairs channel i of a head with channel i + head_dim/2, ours 2i with 2i + 1; the
  angles are the same, so reordering each head's rows of q and k turns one into the other, and the
  scores q . k do not change
* ``mlp.gate_proj`` and ``mlp.up_proj`` are one matrix, gate first: ``feed_forward.gate_up``
* names::

      model.embed_tokens            embedding
      input_layernorm               mixer_norm
      self_attn.o_proj              mixer.output
      post_attention_layernorm      feed_forward_norm
      mlp.down_proj                 feed_forward.down
      model.norm                    norm
      lm_head                       head (left out where it is the embedding's table)

::

    model = Decoder(**llama_config(json.loads(Path("config.json").read_text())))
    model.load_state_dict(llama_weights(load_file("model.safetensors"), heads=32, kv_heads=8))

Paper: Touvron et al., LLaMA, arXiv 2302.13971; grouped queries: Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from archzoo.positions.rotary import from_rope_parameters

RENAMED = {
    "input_layernorm": "mixer_norm",
    "self_attn.o_proj": "mixer.output",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.down_proj": "feed_forward.down",
}
STACKED = {
    "mixer.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Decoder` for a Hugging Face Llama's `config.json`.

    Raises:
        ValueError: The configuration asks for what this transformer does not have (biases, another
            activation or head size, a rotation of another kind): its logits would be wrong in
            silence.
    """
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    rotation = from_rope_parameters(config)
    wanted: dict[str, tuple[Any, Any]] = {  # what: (what the configuration says, what we have)
        "attention_bias": (config.get("attention_bias") or False, False),
        "mlp_bias": (config.get("mlp_bias") or False, False),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "head_dim": (config.get("head_dim") or dim // heads, dim // heads),
        # `interleave` takes all channels of a head to be rotated.
        "partial_rotary_factor": (rotation.get("partial_rotary_factor", 1.0), 1.0),
    }
    for name, (given, ours) in wanted.items():
        if given != ours:
            raise ValueError(f"this Llama has {name}={given!r}; only {ours!r} can be loaded")
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        "vocab_size": config["vocab_size"],
        "dim": dim,
        "depth": config["num_hidden_layers"],
        "heads": heads,
        "width": config["intermediate_size"],
        "context_length": config.get("max_position_embeddings"),
        "mixer": {"class_path": "Attention", "init_args": {"kv_heads": kv_heads}},
        "feed_forward": "GatedFeedForward",
        "rotary": {"class_path": "RotaryEmbedding", "init_args": rotation},
        "norm": "rms",
        "norm_placement": "pre",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_weights": bool(config.get("tie_word_embeddings", False)),
    }


def llama_weights(
    state_dict: Mapping[str, Tensor], heads: int, kv_heads: int | None = None
) -> dict[str, Tensor]:
    """A Hugging Face Llama's weights under our names, for `Decoder.load_state_dict`.

    Args:
        state_dict: Of `LlamaForCausalLM`; matrices are (out, in).
        heads: Its ``num_attention_heads``.
        kv_heads: Its ``num_key_value_heads``. None: as many as heads.

    Raises:
        ValueError: A weight that has no place here, or one that is missing.
    """
    # Old checkpoints hold the rotation's frequencies, which are no weights.
    left = {name: w for name, w in state_dict.items() if not name.endswith("rotary_emb.inv_freq")}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"no Llama: the weight {name!r} is missing")
        return left.pop(name)

    rows = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads or heads}
    layers = {int(name.split(".")[2]) for name in left if name.startswith("model.layers.")}
    weights = {"embedding.weight": take("model.embed_tokens.weight")}
    for layer in range(max(layers, default=-1) + 1):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for old, new in RENAMED.items():
            weights[f"{ours}.{new}.weight"] = take(f"{theirs}.{old}.weight")
        for new, parts in STACKED.items():
            matrices = [take(f"{theirs}.{part}.weight") for part in parts]
            for index, part in enumerate(parts):
                if part in rows:
                    matrices[index] = interleave(matrices[index], rows[part])
            weights[f"{ours}.{new}.weight"] = torch.cat(matrices)
    weights["norm.weight"] = take("model.norm.weight")
    tied = "lm_head.weight" not in left
    weights["head.weight"] = weights["embedding.weight"] if tied else take("lm_head.weight")
    if left:
        raise ValueError(f"no plain Llama: nothing here takes the weight {next(iter(left))!r}")
    return weights


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from (i, i + head_dim/2) pairs to (2i, 2i + 1) pairs.

    Args:
        weight: (heads * head_dim, dim), a projection to queries or keys.
        heads: Of this projection.
    """
    return rearrange(weight, "(h two p) d -> (h p two) d", h=heads, two=2)
