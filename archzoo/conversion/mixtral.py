"""Mixtral's released weights in the zoo: Llama's key map, and a mixture of experts.

Beside what `archzoo.conversion.llama` maps::

    block_sparse_moe.gate                      feed_forward.router.projection
    block_sparse_moe.experts.E.{w1, w3}        feed_forward.experts.gate_up, expert E, w1 first
    block_sparse_moe.experts.E.w2              feed_forward.experts.down, expert E

and the same as transformers 5 names it in memory: ``mlp.gate``, ``mlp.experts.gate_up_proj`` and
``mlp.experts.down_proj``.

Paper: Jiang et al., Mixtral of Experts, arXiv 2401.04088, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from archzoo.conversion.llama import llama_config, llama_weights

#: Of training alone.
WITHOUT_EFFECT = ("output_router_logits", "router_jitter_noise")


def mixtral_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Decoder` for a Hugging Face Mixtral's `config.json`.

    Raises:
        ValueError: Of another family, or a field that `llama_config` refuses.
    """
    left = dict(config)
    family = left.pop("model_type", None)
    if family != "mixtral":
        raise ValueError(f"model_type={family!r}: this reads 'mixtral'")
    architectures = left.pop("architectures", None) or ["MixtralForCausalLM"]
    if architectures != ["MixtralForCausalLM"]:
        raise ValueError(
            f"architectures={architectures!r}: only ['MixtralForCausalLM'] can be loaded"
        )
    experts, top_k = (left.pop(name, None) for name in ("num_local_experts", "num_experts_per_tok"))
    for name, value in (("num_local_experts", experts), ("num_experts_per_tok", top_k)):
        if value is None:
            raise ValueError(f"this Mixtral has no {name}: its config.json must say it")
    coefficient = left.pop("router_aux_loss_coef", None)
    for name in WITHOUT_EFFECT:
        left.pop(name, None)
    mixture = {
        "experts": experts,
        "top_k": top_k,
        "router": {"class_path": "LinearRouter", "init_args": {"renormalise": True}},
        "balance": "switch",
        "coefficient": 0.001 if coefficient is None else coefficient,
    }
    part = {"class_path": "MixtureOfExperts", "init_args": mixture}
    if left.get("rms_norm_eps") is None:
        left["rms_norm_eps"] = 1e-5  # Mixtral's defaults, which are not Llama's
    rotations = (left, left.get("rope_parameters") or {}, left.get("rope_scaling") or {})
    if all(rotation.get("rope_theta") is None for rotation in rotations):
        left["rope_theta"] = 1e6
    with _as_mixtral():
        return llama_config({"model_type": "llama"} | left) | {"feed_forward": part}


@contextmanager
def _as_mixtral() -> Iterator[None]:
    """What Llama's map refuses is a Mixtral's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("Llama", "Mixtral")) from None


def mixtral_weights(
    state_dict: Mapping[str, Tensor],
    heads: int,
    kv_heads: int | None = None,
    *,
    tied: bool = False,
) -> dict[str, Tensor]:
    """A Hugging Face Mixtral's weights under our names, for `Decoder.load_state_dict`.

    Args:
        state_dict: Of `MixtralForCausalLM`.
        heads: Its ``num_attention_heads``.
        kv_heads: Its ``num_key_value_heads``. None: as many as heads.
        tied: Its ``tie_word_embeddings``.

    Raises:
        ValueError: An unexpected weight, one that is missing, or heads that do not fit.
    """
    left = dict(state_dict)
    weights: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"no Mixtral: the weight {name!r} is missing")
        return left.pop(name)

    layers = {int(name.split(".")[2]) for name in left if name.startswith("model.layers.")}
    for layer in sorted(layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}.feed_forward"
        if f"{theirs}.mlp.gate.weight" in left:
            gate = take(f"{theirs}.mlp.gate.weight")
            gate_up = take(f"{theirs}.mlp.experts.gate_up_proj")
            down = take(f"{theirs}.mlp.experts.down_proj")
        else:
            gate = take(f"{theirs}.block_sparse_moe.gate.weight")
            each = [f"{theirs}.block_sparse_moe.experts.{expert}" for expert in range(len(gate))]
            gate_up = torch.stack(
                [torch.cat([take(f"{e}.w1.weight"), take(f"{e}.w3.weight")]) for e in each]
            )
            down = torch.stack([take(f"{e}.w2.weight") for e in each])
        weights[f"{ours}.router.projection.weight"] = gate
        weights[f"{ours}.experts.gate_up.weight"] = gate_up
        weights[f"{ours}.experts.down.weight"] = down
        # What the dense map asks for in their place, and gives back below.
        for name in ("gate_proj", "up_proj", "down_proj"):
            left[f"{theirs}.mlp.{name}.weight"] = gate.new_zeros((1, 1))
    with _as_mixtral():
        dense = llama_weights(left, heads, kv_heads, tied=tied)
    return weights | {n: w for n, w in dense.items() if ".feed_forward." not in n}
