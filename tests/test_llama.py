"""A Hugging Face Llama's weights load by the key map and give its numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from archzoo.conversion.llama import interleave, llama_config, llama_weights
from archzoo.decoder import Decoder
from archzoo.generation import generate

GOLDEN = load_file(Path(__file__).parent / "golden" / "llama_tiny_mha.safetensors")
WEIGHTS = {
    name.removeprefix("state."): value for name, value in GOLDEN.items() if name[:6] == "state."
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
}


@pytest.fixture
def llama() -> Decoder:
    model = Decoder(**llama_config(CONFIG))
    model.load_state_dict(llama_weights(WEIGHTS, heads=4))
    return model.eval()


def largest(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max())


@torch.no_grad()
def test_logits(llama: Decoder) -> None:
    logits = llama(GOLDEN["input_ids"]).logits
    assert largest(logits, GOLDEN["logits"]) < 1e-5
    assert largest(logits, GOLDEN["logits_sdpa"]) < 1e-5
    # Hugging Face's float64 run still rounds its rotation and its norms to float32.
    assert largest(llama.double()(GOLDEN["input_ids"]).logits, GOLDEN["logits_f64"]) < 1e-5


@torch.no_grad()
def test_loss(llama: Decoder) -> None:
    tokens = GOLDEN["input_ids"]
    logits = llama(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert largest(loss, GOLDEN["loss_labels_eq_input"]) < 1e-5


@torch.no_grad()
def test_hidden_states_of_every_layer(llama: Decoder) -> None:
    seen: list[Tensor] = []
    llama.embedding.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    llama.blocks[0].register_forward_hook(lambda *call: seen.append(call[-1][0]))
    llama.norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    llama(GOLDEN["input_ids"])
    assert len(seen) == 3
    for layer, hidden in enumerate(seen):
        assert largest(hidden, GOLDEN[f"hidden.{layer}"]) < 1e-5


@torch.no_grad()
def test_left_padding(llama: Decoder) -> None:
    seen = GOLDEN["attention_mask_leftpad"].bool()
    logits = llama(GOLDEN["input_ids"], documents=seen.long() - 1).logits
    assert largest(logits[seen], GOLDEN["logits_leftpad"][seen]) < 1e-5
    # The pads did something: the padded row differs from the same row without padding.
    assert largest(logits[1, 5:], GOLDEN["logits"][1, 5:]) > 1e-2


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_greedy_continuation(llama: Decoder, form: str) -> None:
    expected = GOLDEN["greedy_ids"][0].tolist()
    found = generate(llama, [expected[:8]], max_tokens=12, form=form)
    assert found.tokens == [expected[8:]]


@torch.no_grad()
def test_grouped_queries_equal_their_expansion() -> None:
    """kv_heads < heads: each key and value head repeated for the query heads that it serves."""
    grouped = dict(WEIGHTS)
    expanded = dict(WEIGHTS)
    for layer in range(2):
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            two = WEIGHTS[key].view(4, 8, 32)[:2]
            grouped[key] = two.reshape(16, 32)
            expanded[key] = two[[0, 0, 1, 1]].reshape(32, 32)
    small = Decoder(**llama_config(CONFIG | {"num_key_value_heads": 2}))
    small.load_state_dict(llama_weights(grouped, heads=4, kv_heads=2))
    large = Decoder(**llama_config(CONFIG))
    large.load_state_dict(llama_weights(expanded, heads=4))
    tokens = GOLDEN["input_ids"]
    assert largest(small(tokens).logits, large(tokens).logits) < 1e-5
    assert largest(large(tokens).logits, GOLDEN["logits"]) > 1e-2


def test_interleave_moves_each_pair_together() -> None:
    rows = torch.arange(12.0)[:, None]  # two heads of 6 channels
    assert interleave(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_tied_weights() -> None:
    weights = {name: value for name, value in WEIGHTS.items() if name != "lm_head.weight"}
    model = Decoder(**llama_config(CONFIG | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is missing: .* give tied=True"):
        llama_weights(weights, heads=4)  # an untied model would get another head in silence
    model.load_state_dict(llama_weights(weights, heads=4, tied=True))
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, WEIGHTS["model.embed_tokens.weight"])


def test_fields_that_change_no_logit_are_known() -> None:
    """As released: Llama 2, Llama 3.2 and what transformers 5 writes."""
    llama_2 = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
    }
    llama_3 = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 8,
        "mlp_bias": False,
        "quantization_config": None,
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
    }
    assert llama_config(CONFIG | llama_2)["context_length"] == 4096
    llama_config(CONFIG | llama_2 | llama_3 | {"dtype": "bfloat16", "pad_token_id": None})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "granite"}, "model_type='granite': only 'llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map="),
        ({"qk_layernorm": True}, "qk_layernorm=True"),
        ({"vocab_size": None}, "has no vocab_size"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling has rope_type"),
    ],
)
def test_every_field_is_known_or_refused_by_its_name(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        llama_config(CONFIG | change)


def test_heads_that_do_not_fit_the_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="heads=4 and kv_heads=2 do not fit q_proj"):
        llama_weights(WEIGHTS, heads=4, kv_heads=2)


def test_what_does_not_fit_is_refused() -> None:
    missing = {name: value for name, value in WEIGHTS.items() if "1.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        llama_weights(missing, heads=4)
    with pytest.raises(ValueError, match="nothing here takes the weight 'extra'"):
        llama_weights(WEIGHTS | {"extra": torch.zeros(1)}, heads=4)
    for change in (
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"head_dim": 16},
        {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    ):
        with pytest.raises(ValueError, match=r"this Llama has \w+=.*; only .* can be loaded"):
            llama_config(CONFIG | change)
