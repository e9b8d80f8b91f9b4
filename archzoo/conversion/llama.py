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

with ``tied=True`` where the configuration says ``tie_word_embeddings``.

Paper: Touvron et al., LLaMA, arXiv 2302.13971; grouped queries: Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from archzoo.conversion.rope import from_rope_parameters

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


NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
#: Fields of a `config.json` that change no logit: what the model was made with and is called,
#: how it starts and drops out in training, which special tokens it has, how it is sampled from.
WITHOUT_EFFECT = frozenset(
    """
    _name_or_path name_or_path _commit_hash transformers_version architectures dtype torch_dtype
    use_bfloat16 torchscript use_cache cache_implementation attn_implementation
    _attn_implementation _attn_implementation_autoset output_attentions output_hidden_states
    return_dict tf_legacy_loss is_decoder chunk_size_feed_forward pretraining_tp
    initializer_range attention_dropout max_sequence_length model_max_length
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    tokenizer_class prefix task_specific_params problem_type finetuning_task id2label label2id
    num_labels unsloth_fixed unsloth_version
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff
    eta_cutoff penalty_alpha repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences
    output_scores output_logits return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens renormalize_logits max_time
    """.split()  # noqa: SIM905
)
#: Fields that a plain Llama may hold, if they say nothing: what they could say is not computed.
EMPTY = frozenset(
    """
    auto_map quantization_config compression_config per_layer_config pruned_heads sliding_window
    use_sliding_window is_encoder_decoder tie_encoder_decoder add_cross_attention
    cross_attention_hidden_size num_experts num_local_experts
    """.split()  # noqa: SIM905
)


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Decoder` for a Hugging Face Llama's `config.json`.

    Every field is read: known and used, known to change no logit, or refused by its name. Past the
    trained length a rotation of type "dynamic" gives what Hugging Face's code gives where it reads
    token by token.

    Raises:
        ValueError: The configuration is of another family, or asks for what this transformer does
            not have (biases, multipliers, another activation or head size, a rotation of another
            kind): its logits would be wrong in silence.
    """
    left = dict(config)

    def take(name: str, default: Any = None) -> Any:
        value = left.pop(name, None)
        return default if value is None else value

    family = take("model_type")
    if family != "llama":
        raise ValueError(
            f"model_type={family!r}: only 'llama' can be loaded, since other families compute "
            "otherwise under the same names; if this is a Llama, set its model_type"
        )
    architectures = take("architectures", ["LlamaForCausalLM"])
    if architectures != ["LlamaForCausalLM"]:
        raise ValueError(
            f"architectures={architectures!r}: only ['LlamaForCausalLM'] can be loaded"
        )
    for name in NEEDED:
        if config.get(name) is None:
            raise ValueError(f"this Llama has no {name}: its config.json must say it")
    heads, dim = take("num_attention_heads"), take("hidden_size")
    rotation = from_rope_parameters(config)
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        left.pop(name, None)
    depth = take("num_hidden_layers")
    wanted: dict[str, tuple[Any, Any]] = {  # what: (what the configuration says, what we have)
        "attention_bias": (take("attention_bias", False), False),
        "mlp_bias": (take("mlp_bias", False), False),
        "hidden_act": (take("hidden_act", "silu").replace("swish", "silu"), "silu"),
        "head_dim": (take("head_dim", dim // heads), dim // heads),
        # `interleave` takes all channels of a head to be rotated.
        "partial_rotary_factor": (rotation.get("partial_rotary_factor", 1.0), 1.0),
        "layer_types": (
            take("layer_types", ["full_attention"] * depth),
            ["full_attention"] * depth,
        ),
    }
    left.pop("partial_rotary_factor", None)
    for name, (given, ours) in wanted.items():
        if given != ours:
            raise ValueError(f"this Llama has {name}={given!r}; only {ours!r} can be loaded")
    kv_heads = take("num_key_value_heads", heads)
    arguments = {
        "vocab_size": take("vocab_size"),
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "width": take("intermediate_size"),
        "context_length": take("max_position_embeddings"),
        "mixer": {"class_path": "Attention", "init_args": {"kv_heads": kv_heads}},
        "feed_forward": "GatedFeedForward",
        "rotary": {"class_path": "RotaryEmbedding", "init_args": rotation},
        "norm": "rms",
        "norm_placement": "pre",
        "norm_eps": take("rms_norm_eps", 1e-6),
        "tie_weights": bool(take("tie_word_embeddings", False)),
    }
    for name, value in left.items():
        if name in WITHOUT_EFFECT or (name in EMPTY and not value):
            continue
        raise ValueError(
            f"this Llama has {name}={value!r}, which a plain Llama does not have and this "
            "transformer does not compute: its logits would be wrong; if the field changes no "
            "logit, remove it"
        )
    return arguments


def llama_weights(
    state_dict: Mapping[str, Tensor],
    heads: int,
    kv_heads: int | None = None,
    *,
    tied: bool = False,
) -> dict[str, Tensor]:
    """A Hugging Face Llama's weights under our names, for `Decoder.load_state_dict`.

    Args:
        state_dict: Of `LlamaForCausalLM`; matrices are (out, in).
        heads: Its ``num_attention_heads``.
        kv_heads: Its ``num_key_value_heads``. None: as many as heads.
        tied: Its ``tie_word_embeddings``: the head is the embedding's table, whatever else the
            file holds.

    Raises:
        ValueError: An unexpected weight, one that is missing, or heads that do not fit.
    """
    # Old state dicts hold the rotation's frequencies, which are not weights.
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
            if new == "mixer.query_key_value":
                _check_heads(matrices[0], matrices[1], heads, kv_heads or heads)
            for index, part in enumerate(parts):
                if part in rows:
                    matrices[index] = interleave(matrices[index], rows[part])
            weights[f"{ours}.{new}.weight"] = torch.cat(matrices)
    weights["norm.weight"] = take("model.norm.weight")
    if tied:
        left.pop("lm_head.weight", None)
    elif "lm_head.weight" not in left:
        raise ValueError(
            "the weight 'lm_head.weight' is missing: where config.json has tie_word_embeddings, "
            "give tied=True"
        )
    weights["head.weight"] = weights["embedding.weight"] if tied else take("lm_head.weight")
    if left:
        raise ValueError(f"no plain Llama: nothing here takes the weight {next(iter(left))!r}")
    return weights


def _check_heads(queries: Tensor, keys: Tensor, heads: int, kv_heads: int) -> None:
    """Refuse numbers of heads that would reorder rows across heads, and give no error later."""
    head_dim, rest = divmod(queries.shape[1], heads)
    if rest or queries.shape[0] != heads * head_dim or keys.shape[0] != kv_heads * head_dim:
        raise ValueError(
            f"heads={heads} and kv_heads={kv_heads} do not fit q_proj {tuple(queries.shape)} and "
            f"k_proj {tuple(keys.shape)}: take num_attention_heads and num_key_value_heads of "
            "config.json"
        )


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from (i, i + head_dim/2) pairs to (2i, 2i + 1) pairs.

    Args:
        weight: (heads * head_dim, dim), a projection to queries or keys.
        heads: Of this projection.
    """
    return rearrange(weight, "(h two p) d -> (h p two) d", h=heads, two=2)
