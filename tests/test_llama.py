"""A Hugging Face Llama's weights load by the key map and give its numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from archzoo.decoder import Decoder
from archzoo.generation import generate
from archzoo.models.llama import interleave, llama_config, llama_weights

GOLDEN = load_file(Path(__file__).parent / "golden" / "llama_tiny_mha.safetensors")
WEIGHTS = {
    name.removeprefix("state."): value for name, value in GOLDEN.items() if name[:6] == "state."
}
CONFIG = {
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
    model.load_state_dict(llama_weights(weights, heads=4))
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, WEIGHTS["model.embed_tokens.weight"])


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
