"""Hugging Face's Llama and Mixtral as oracles: what `archzoo convert` makes gives their logits."""

from pathlib import Path

import pytest
import torch

from archzoo.contract.measure import relative_error
from archzoo.conversion.command import convert

pytestmark = pytest.mark.extras
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 31, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
@torch.no_grad()
def test_logits(kind: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more, tie_word_embeddings=tied)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = convert(tmp_path / "theirs")
    tokens = torch.randint(31, (2, 13))
    assert relative_error(ours(tokens).logits, theirs(tokens).logits) < 1e-5
