"""Weights of other libraries by their key maps: against their formulas, written plainly here."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import archzoo
from archzoo.cli import main
from archzoo.contract.measure import relative_error
from archzoo.conversion.command import convert
from archzoo.conversion.mixtral import mixtral_config, mixtral_weights

DIM, HEADS, WIDTH, DEPTH, WORDS = 16, 2, 24, 2, 19
TORCHSCALE = {
    "decoder_embed_dim": DIM,
    "decoder_value_embed_dim": 2 * DIM,
    "decoder_retention_heads": HEADS,
    "decoder_ffn_embed_dim": WIDTH,
    "decoder_layers": DEPTH,
    "vocab_size": WORDS,
    "activation_fn": "gelu",
    "layernorm_eps": 1e-6,
    "no_scale_embedding": False,
    "decoder_normalize_before": True,
}
FLA = {
    "model_type": "retnet",
    "hidden_size": DIM,
    "num_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "vocab_size": WORDS,
    "norm_eps": 1e-6,
}
TOKENS = torch.randint(WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
THEIRS = {  # what each calls its layers' weights: (torchscale, flash-linear-attention)
    "q": ("retention.q_proj", "attn.q_proj"),
    "k": ("retention.k_proj", "attn.k_proj"),
    "v": ("retention.v_proj", "attn.v_proj"),
    "g": ("retention.g_proj", "attn.g_proj"),
    "o": ("retention.out_proj", "attn.o_proj"),
    "norm": ("retention_layer_norm", "attn_norm"),
    "active": ("ffn.fc1", "mlp.gate_proj"),
    "linear": ("ffn.gate", "mlp.up_proj"),
    "down": ("ffn.fc2", "mlp.down_proj"),
    "second": ("final_layer_norm", "mlp_norm"),
}
OUTER = {
    "embedding": ("embed_tokens", "model.embeddings"),
    "last": ("layer_norm", "model.norm"),
    "head": ("output_projection", "lm_head"),
}
SIZES = {
    "q": (DIM, DIM), "k": (DIM, DIM), "v": (2 * DIM, DIM), "g": (2 * DIM, DIM), "o": (DIM, 2 * DIM),
    "norm": (DIM,), "second": (DIM,), "active": (WIDTH, DIM), "linear": (WIDTH, DIM),
    "down": (DIM, WIDTH), "embedding": (WORDS, DIM), "head": (WORDS, DIM), "last": (DIM,),
}  # fmt: skip


def weights_of(library: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {f"{names[library]}.weight": drawn(*SIZES[n]) for n, names in OUTER.items()}
    before = ("layers", "model.layers")[library]
    for layer in range(DEPTH):
        for n, names in THEIRS.items():
            found[f"{before}.{layer}.{names[library]}.weight"] = drawn(*SIZES[n])
        if library:
            found[f"{before}.{layer}.attn.g_norm_swish_gate.weight"] = drawn(2 * DIM // HEADS)
    return found


def normed(x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def formula(weights: dict[str, torch.Tensor], library: int) -> torch.Tensor:
    """Logits as the library defines them: o_n = sum_m gamma^(n-m) (q_n . k_m) v_m, and its norm."""
    outer = {n: weights[f"{names[library]}.weight"] for n, names in OUTER.items()}
    x = outer["embedding"][TOKENS] * (1 if library else DIM**0.5)
    time, size = TOKENS.shape[1], DIM // HEADS
    pairs = size // 2
    steps = [i / (pairs if library else pairs - 1) for i in range(pairs)]
    angles = torch.arange(time)[:, None] * 10_000.0 ** -torch.tensor(steps, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    n = torch.arange(time)
    for layer in range(DEPTH):
        before = f"{('layers', 'model.layers')[library]}.{layer}"
        w = {name: weights[f"{before}.{names[library]}.weight"] for name, names in THEIRS.items()}
        h = normed(x, w["norm"])
        q, k, v = ((h @ w[name].T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv")

        def rotated(y: torch.Tensor) -> torch.Tensor:  # torchscale: pairs side by side
            a, b = y.chunk(2, -1) if library else (y[..., ::2], y[..., 1::2])
            return torch.complex(a, b) * turn

        scores = (rotated(q) @ rotated(k).mH).real * size**-0.5
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
        decay = gamma[:, None, None] ** (n[:, None] - n).clamp(min=0)
        o = (scores * decay.tril()) @ v
        scale = weights[f"{before}.attn.g_norm_swish_gate.weight"] if library else 1.0
        o = normed(o, scale).transpose(1, 2).flatten(2)
        x = x + (F.silu(h @ w["g"].T) * o) @ w["o"].T
        h = normed(x, w["second"])
        act = F.silu if library else F.gelu
        x = x + (act(h @ w["active"].T) * (h @ w["linear"].T)) @ w["down"].T
    return normed(x, outer["last"]) @ outer["head"].T


def write(directory: Path, config: dict, weights: dict) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({n: w.contiguous() for n, w in weights.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(("library", "config"), [(0, TORCHSCALE), (1, FLA)])
@torch.no_grad()
def test_a_retnet_computes_its_librarys_formula(library: int, config: dict, tmp_path: Path) -> None:
    weights = weights_of(library)
    model = convert(write(tmp_path / "theirs", config, weights))
    assert model.dtype == torch.float64
    wanted = formula(weights, library)
    # The norm's epsilon meets outputs of another scale.
    assert relative_error(model(TOKENS).logits, wanted) < 1e-5
    assert relative_error(model(TOKENS, form="recurrent").logits, wanted) < 1e-5


def test_the_command_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "theirs", FLA, weights_of(1))
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) == 0
    assert "parameters" in capsys.readouterr().out
    model, _ = archzoo.from_pretrained(tmp_path / "ours")
    assert torch.equal(model(TOKENS).logits, convert(source)(TOKENS).logits)
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) != 0  # it exists


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mamba2"}, "model_type='mamba2' cannot be converted: known are llama"),
        (FLA | {"use_short_conv": True}, "use_short_conv=True; only False"),
        (FLA | {"expand_k": 0.5}, r"expand_k=0\.5; only 1\.0"),
        (FLA | {"num_kv_heads": 1}, "num_kv_heads=1; only 2"),
        (FLA | {"hidden_size": None}, "has no hidden_size"),
        (TORCHSCALE | {"deepnorm": True}, "deepnorm=True; only False"),
        (TORCHSCALE | {"activation_fn": None}, "has no activation_fn"),
        (TORCHSCALE | {"share_decoder_input_output_embed": True}, "shares its embedding"),
        ([], "is not a valid configuration"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(
    config: dict, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = 0 if "decoder_embed_dim" in config else 1
    source = write(tmp_path / "theirs", config, weights_of(library))
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) != 0
    said = capsys.readouterr().err.strip()
    assert re.search(words, said) and "\n" not in said


def test_weights_that_are_odd_or_missing_are_named(tmp_path: Path) -> None:
    for number, (library, config) in enumerate(((0, TORCHSCALE), (1, FLA))):
        weights = weights_of(library)
        more = weights | {"extra.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"nothing here takes the weight 'extra\.weight'"):
            convert(write(tmp_path / f"more{number}", config, more))
        name = next(n for n in weights if "k_proj" in n)
        del weights[name]
        with pytest.raises(ValueError, match=f"the weight '{re.escape(name)}' is missing"):
            convert(write(tmp_path / f"less{number}", config, weights))


MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}


def test_what_a_mixtral_leaves_out_is_mixtral_s_default() -> None:
    arguments = mixtral_config(MIXTRAL)
    assert arguments["norm_eps"] == 1e-5
    assert arguments["rotary"]["init_args"]["base"] == 1e6
    said = {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}, "rms_norm_eps": 0.5}
    arguments = mixtral_config(MIXTRAL | said)
    assert arguments["norm_eps"] == 0.5 and arguments["rotary"]["init_args"]["base"] == 10.0
    scaled = {"rope_theta": 20.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert mixtral_config(MIXTRAL | scaled)["rotary"]["init_args"]["base"] == 20.0


def test_a_mixtral_is_refused_by_its_own_name() -> None:
    with pytest.raises(ValueError, match="this Mixtral has sliding_window=64, which a plain Mix"):
        mixtral_config(MIXTRAL | {"sliding_window": 64})
    with pytest.raises(ValueError, match=r"no Mixtral: the weight 'model\.embed_tokens"):
        mixtral_weights({}, 2)
