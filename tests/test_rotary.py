"""RoPE's scalings against their formulas, their identities and Hugging Face's numbers; xPos."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MICRO, micro
from safetensors.torch import load_file

import archzoo
from archzoo.block import fork, make_context, reorder
from archzoo.conversion.llama import llama_config, llama_weights
from archzoo.conversion.rope import from_rope_parameters, scale_rotary
from archzoo.positions.rotary import (
    RotaryEmbedding,
    XPos,
    dynamic_ntk_base,
    llama3_frequencies,
    ntk_base,
    rotary_frequencies,
    yarn_attention_factor,
    yarn_frequencies,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "llama_tiny_mha.safetensors")

SCALED = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "ntk", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
    },
]


def ids(arguments):
    return arguments["rope_type"]


# ---------------------------------------------------------------------------- bases and identities


@pytest.mark.parametrize(
    ("rotary_dim", "factor", "base"),
    [
        (128, 4, 40889.94243248622),  # Yuan2.0-M32, which keeps the integer 40,890
        (256, 4, 40439.02),  # what its head size in place of its rotary size would give
        (128, 2, 20221.2617),
        (128, 8, 82684.6226),
        (64, 4, 41829.3659),
        (32, 4, 43872.9992),
    ],
)
def test_ntk_base(rotary_dim, factor, base):
    digits = len(str(base).split(".")[1])
    assert ntk_base(10_000, rotary_dim, factor) == pytest.approx(
        base, rel=1e-9, abs=0.5 / 10**digits
    )


def test_yuan_s_released_base():
    assert round(ntk_base(10_000, 128, 4)) == 40_890
    yuan = RotaryEmbedding(256, partial_rotary_factor=0.5, rope_type="ntk", factor=4.0)
    assert yuan.frequencies == rotary_frequencies(128, ntk_base(10_000, 128, 4))


@pytest.mark.parametrize("rotary_dim", [4, 16, 32, 64, 128])
@pytest.mark.parametrize("factor", [1.5, 2.0, 4.0, 8.0])
def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest_by_the_factor(rotary_dim, factor):
    plain = rotary_frequencies(rotary_dim)
    scaled = rotary_frequencies(rotary_dim, ntk_base(10_000, rotary_dim, factor))
    assert scaled[0] == 1
    assert plain[-1] / scaled[-1] == pytest.approx(factor, rel=1e-14)


def test_dynamic_ntk_is_unchanged_up_to_the_trained_length_and_then_overshoots():
    for length in (1, 100, 256):
        assert dynamic_ntk_base(10_000, 32, 4, length, 256) == 10_000
    slowest = rotary_frequencies(32)[-1]
    for ratio, divided in ((2, 5), (4, 13)):
        base = dynamic_ntk_base(10_000, 32, 4, 256 * ratio, 256)
        assert slowest / rotary_frequencies(32, base)[-1] == pytest.approx(divided, rel=1e-14)
    assert dynamic_ntk_base(10_000, 32, 1, 1024, 256) == ntk_base(10_000, 32, 4)


def test_a_factor_of_one_changes_no_bit():
    plain = RotaryEmbedding(32)
    for arguments in SCALED:
        scaled = RotaryEmbedding(32, **arguments | {"factor": 1.0})
        assert scaled.frequencies == plain.frequencies
        assert scaled.attention_factor == 1


def test_linear_divides_the_positions():
    scaled = RotaryEmbedding(32, rope_type="linear", factor=4.0)
    q = torch.randn(1, 5, 2, 32, dtype=torch.float64)
    positions = torch.arange(5)[None]
    got, _ = scaled(q, q, 4 * positions, positions)
    want, _ = RotaryEmbedding(32)(q, q, positions, positions)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("rotary_dim", "length", "low", "high"), [(32, 64, 0, 5), (128, 4096, 20, 46)]
)
def test_yarn_s_ramp(rotary_dim, length, low, high):
    plain = rotary_frequencies(rotary_dim)
    scaled = yarn_frequencies(rotary_dim, 10_000, 4.0, length)
    for index, (before, after) in enumerate(zip(plain, scaled, strict=True)):
        if index <= low:
            assert after == before
        elif index >= high:
            assert after == before / 4
        else:
            assert before / 4 < after < before


def test_yarn_s_attention_factor():
    for factor, want in ((2, 1.0693), (4, 1.1386), (8, 1.2079), (16, 1.2773)):
        assert yarn_attention_factor(factor) == pytest.approx(want, abs=5e-5)
    x = torch.randn(1, 3, 1, 16, dtype=torch.float64)
    positions = torch.arange(3)[None]
    q, k = RotaryEmbedding(16, **SCALED[2])(x, x, positions, positions)
    for turned in (q, k):
        longer = turned.norm(dim=-1) / x.norm(dim=-1)
        torch.testing.assert_close(longer, torch.full_like(longer, yarn_attention_factor(4)))
    own = RotaryEmbedding(16, **SCALED[2], attention_factor=1.5)
    assert own.attention_factor == 1.5


def test_llama3_keeps_41_pairs_and_divides_14():
    plain = rotary_frequencies(128)
    scaled = llama3_frequencies(128, 10_000, 8.0, 8192)
    kept = sum(a == b for a, b in zip(plain, scaled, strict=True))
    divided = sum(a / 8 == b for a, b in zip(plain, scaled, strict=True))
    assert (kept, divided) == (41, 14)


# ---------------------------------------------------------------------------- Hugging Face

# inv_freq and attention factor of transformers 5.23.0, ROPE_INIT_FUNCTIONS[type](LlamaConfig(
# head_dim=16, rope_parameters=...)) on the CPU; they are computed there in float32.
HUGGING_FACE = [
    (
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        "0.25 0.079056941 0.0250000004 0.00790569466 0.00249999994 0.000790569466 "
        "0.000250000012 7.90569466e-05",
        1.0,
    ),
    (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 2048,
        },
        "1.0 0.316227764 0.100000001 0.0247052945 0.00562499976 0.00108703296 "
        "0.000125000006 3.95284733e-05",
        1.2079441541679836,
    ),
    (
        {
            "rope_type": "yarn",
            "rope_theta": 500_000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        "1.0 0.19334285 0.022661468 0.00364633254 0.000707106723 0.000137124094 "
        "2.65914787e-05 5.15669262e-06",
        1.0693147180559945,
    ),
    (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "mscale": 0.7,
            "mscale_all_dim": 0.3,
        },
        "1.0 0.316227764 0.0812500045 0.0197642371 0.00437500002 0.000790569466 "
        "0.000250000012 7.90569466e-05",
        1.0532376815143234,
    ),
    (
        {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "partial_rotary_factor": 0.5,
        },
        "1.0 0.0749999955 0.00499999989 0.000250000012",
        1.138629436111989,
    ),
    (
        {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "1.0 0.316227764 0.0427511781 0.00395284733 0.00124999997 0.000395284733 "
        "0.000125000006 3.95284733e-05",
        1.0,
    ),
]


@pytest.mark.parametrize(("parameters", "frequencies", "attention_factor"), HUGGING_FACE)
def test_frequencies_of_hugging_face(parameters, frequencies, attention_factor):
    rotary = RotaryEmbedding(16, **from_rope_parameters({"rope_parameters": parameters}))
    want = [float(number) for number in frequencies.split()]
    assert rotary.frequencies == pytest.approx(want, rel=1e-6)
    assert rotary.attention_factor == pytest.approx(attention_factor, rel=1e-7)


# logits[1, 28, :6] of transformers' LlamaForCausalLM with the golden file's weights and tokens
# under each rope_parameters (float32, eager attention).
LOGITS = [
    ({"rope_type": "ntk", "factor": 4.0}, [1.1496127, 1.0235658, 0.3680882, 0.405876, 1.4710613]),
    (
        {"rope_type": "linear", "factor": 4.0},
        [0.6988547, 0.6945547, 0.1576185, 0.7488748, 1.1226686],
    ),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        [1.5104889, 0.8668544, -0.3267251, 0.8590869, 1.0182958],
    ),
    (
        {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32},
        [1.3380982, 0.8495241, -0.0962914, 0.7359938, 1.3424029],
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("arguments", "logits"), LOGITS)
def test_a_loaded_llama_scaled_gives_hugging_face_s_logits(arguments, logits):
    config = {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
    }
    weights = {name[6:]: w for name, w in GOLDEN.items() if name.startswith("state.")}
    model = archzoo.Decoder(**llama_config(config)).eval()
    model.load_state_dict(llama_weights(weights, heads=4))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    scale_rotary(model, **arguments)
    # Built from the configuration that Hugging Face has for the same rotation, it is the same.
    theirs = {"rope_parameters": model.blocks[0].mixer.rotary.rope_parameters()}
    read = archzoo.Decoder(**llama_config(config | theirs))
    assert read.blocks[1].mixer.rotary.frequencies == model.blocks[1].mixer.rotary.frequencies
    got = model(GOLDEN["input_ids"]).logits[1, 28, :5]
    torch.testing.assert_close(got, torch.tensor(logits), rtol=0, atol=1e-5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
    again = archzoo.Decoder(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(before)
    assert torch.equal(again(GOLDEN["input_ids"]).logits[1, 28, :5], got)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rope_type": "default"},
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
        *SCALED,
    ],
    ids=ids,
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_there_and_back(arguments, share):
    rotary = RotaryEmbedding(32, base=500.0, partial_rotary_factor=share, **arguments)
    parameters = json.loads(json.dumps(rotary.rope_parameters()))
    assert parameters["rope_type"] != "ntk"  # which Hugging Face does not have
    again = RotaryEmbedding(32, **from_rope_parameters({"rope_parameters": parameters}))
    assert again.frequencies == rotary.frequencies
    assert again.attention_factor == rotary.attention_factor
    assert again.rope_parameters() == parameters


def test_the_older_form_is_read():
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    for kind in ("rope_type", "type"):
        old = {"rope_theta": 5e5, "rope_scaling": {kind: "linear", "factor": 2.0}}
        assert from_rope_parameters(old) == from_rope_parameters(new)
    assert from_rope_parameters({"rope_theta": 5e5, "rope_scaling": None}) == {
        "rope_type": "default",
        "base": 5e5,
    }
    assert from_rope_parameters({}) == {"rope_type": "default"}
    # Dynamic scaling has its trained length elsewhere there.
    parameters = {"rope_type": "dynamic", "factor": 2.0}
    found = from_rope_parameters({"rope_parameters": parameters, "max_position_embeddings": 4096})
    assert found == parameters | {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "needs 'original_max_position_embeddings'"),
        ({"rope_type": "longrope", "factor": 2.0}, "'longrope' cannot be read: known are default"),
        ({"rope_type": "linear"}, "'linear' needs 'factor'"),
        ({"rope_type": "yarn", "factor": 2.0}, "needs 'original_max_position_embeddings'"),
        ({"full_attention": {"rope_type": "default"}}, "differ from layer to layer"),
    ],
)
def test_what_cannot_be_read_is_refused(parameters, words):
    with pytest.raises(ValueError, match=words):
        from_rope_parameters({"rope_parameters": parameters})


# ---------------------------------------------------------------------------- inside a model


@pytest.mark.parametrize("arguments", [{"rope_type": "default"}, *SCALED], ids=ids)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scores_depend_on_the_difference_of_positions_alone(arguments, share):
    rotary = RotaryEmbedding(16, partial_rotary_factor=share, **arguments)
    q, k = torch.randn(2, 1, 6, 1, 16, dtype=torch.float64)
    near = torch.arange(6)[None]

    def scores(positions):
        return torch.einsum("bthd,bshd->bts", *rotary(q, k, positions, positions))

    torch.testing.assert_close(scores(near + 1000), scores(near), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(scores(2 * near), scores(near))


@pytest.mark.parametrize("arguments", SCALED, ids=ids)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parallel_equals_step_under_every_scaling(arguments, dtype, tolerance):
    model = archzoo.create_model(
        "transformer_micro", rotary={"class_path": "RotaryEmbedding", "init_args": arguments}
    )
    model = model.to(dtype).eval()
    tokens = torch.randint(64, (2, 12))
    with torch.no_grad():
        whole = model(tokens).logits
        state, steps = model.init_state(2), []
        for t in range(12):
            output = model(tokens[:, t : t + 1], state)
            steps.append(output.logits)
            state = output.state
    error = (torch.cat(steps, 1) - whole).norm() / whole.norm()
    assert error < tolerance


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}


def dynamic(name="transformer_micro", **arguments):
    torch.manual_seed(3)
    spec = {"class_path": "RotaryEmbedding", "init_args": DYNAMIC | arguments}
    return micro(name, rotary=spec, init_std=0.2).double().eval()


@torch.no_grad()
def in_segments(model, tokens, sizes, capacity):
    state, found = model.init_state(len(tokens), capacity=capacity), []
    for segment in tokens.split(sizes, dim=1):
        output = model(segment, state)
        found.append(output.logits)
        state = output.state
    return torch.cat(found, 1)


def test_dynamic_scaling_rotates_each_position_by_the_base_of_the_length_so_far():
    rotary = RotaryEmbedding(8, **DYNAMIC)
    q = torch.randn(1, 30, 2, 8, dtype=torch.float64)
    got, _ = rotary.both(torch.cat([q, q], 2), 2, torch.arange(30).expand(1, 30))
    for at in (0, 6, 7, 8, 15, 29):
        base = dynamic_ntk_base(10_000, 8, 2.0, at + 1, 8)
        here = torch.tensor([[at]])
        want, _ = RotaryEmbedding(8, base=base)(q[:, at : at + 1], q[:, :1], here, here)
        torch.testing.assert_close(got[:, at : at + 1], want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="needs at least 4"):
        RotaryEmbedding(2, **DYNAMIC)


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_under_dynamic_scaling_a_text_is_read_as_it_is_alone(name):
    """Whatever lies beside it, however it is cut, and however long it may yet become."""
    model, tokens = dynamic(name), torch.randint(64, (2, 20))
    whole = model(tokens).logits
    for sizes in ([1] * 20, [15, 1, 4], [12, 8]):
        for capacity in (None, 20, 500):
            got = in_segments(model, tokens, sizes, capacity)
            torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-11)
    short = model(tokens[:1, :12]).logits
    torch.testing.assert_close(short, whole[:1, :12], rtol=1e-11, atol=1e-11)
    beside = torch.cat([torch.cat([tokens[:1, :8], tokens[:1, :12]], 1), tokens[1:]])
    documents = torch.tensor([[-1] * 8 + [0] * 12, [0] * 20])
    padded = model(beside, documents=documents).logits
    torch.testing.assert_close(padded[:1, 8:], short, rtol=1e-11, atol=1e-11)
    documents[0, :8] = 4
    packed = model(beside, documents=documents).logits
    torch.testing.assert_close(packed[:1, 8:], short, rtol=1e-11, atol=1e-11)
    # Up to the trained length nothing is scaled, and beyond it something is.
    plain = dynamic(name, rope_type="default")(tokens).logits
    torch.testing.assert_close(whole[:, :8], plain[:, :8], rtol=1e-11, atol=1e-11)
    assert (whole[:, 12:] - plain[:, 12:]).abs().max() > 1e-4


@torch.no_grad()
def test_under_dynamic_scaling_prompts_are_continued_as_alone():
    model = dynamic()
    prompts = [torch.randint(64, (size,)).tolist() for size in (3, 14, 7)]
    alone = [archzoo.generate(model, prompt, max_tokens=9).tokens[0] for prompt in prompts]
    assert archzoo.generate(model, prompts, max_tokens=9).tokens == alone
    assert archzoo.generate(model, prompts, max_tokens=4).tokens == [row[:4] for row in alone]


def test_dynamic_scaling_survives_what_is_done_to_states():
    model, tokens = dynamic(), torch.randint(64, (2, 20))
    documents = torch.tensor([[-1] * 3 + [0] * 17, [0] * 20])
    with torch.no_grad():
        whole = model(tokens, documents=documents).logits
        state = model.init_state(2)
        first = model(tokens[:, :9], state, documents=documents[:, :9])
        kept = reorder(fork(first.state), torch.tensor([1, 0]))
        rest = model(tokens[:, 9:].flip(0), kept, documents=documents[:, 9:].flip(0)).logits
    torch.testing.assert_close(rest.flip(0), whole[:, 9:], rtol=1e-11, atol=1e-11)


def test_pairs_are_rotated_beside_values_of_odd_width():
    """Queries and keys are a view of one projection, whose rows may have an odd length."""
    mixer = archzoo.Retention(6, 3, value_factor=0.5, gate=False, chunk_size=2)
    x = torch.randn(2, 5, 6)
    context, _ = make_context(2, 5)
    want, _ = mixer(x, None, context, "recurrent")
    for form in ("parallel", "chunkwise"):
        torch.testing.assert_close(mixer(x, None, context, form)[0], want)


def test_scaling_keeps_what_was_set_and_knows_the_trained_length():
    model = archzoo.create_model(
        "transformer_micro",
        rotary={"class_path": "RotaryEmbedding", "init_args": {"base": 500.0}},
    )
    scale_rotary(model, rope_type="yarn", factor=4.0)
    want = yarn_frequencies(16, 500.0, 4.0, 64)  # context_length is 64
    assert [block.mixer.rotary.frequencies for block in model.blocks] == [want, want]
    scale_rotary(model, rope_type="default")
    assert model.blocks[0].mixer.rotary.frequencies == rotary_frequencies(16, 500.0)
    with pytest.raises(ValueError, match="Retention rotates by RetentionRotation"):
        scale_rotary(archzoo.create_model("retnet_micro"), rope_type="linear", factor=2.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rope_type": "ntkk"}, "rope_type='ntkk' is not one of default, linear, ntk"),
        ({"factor": 0.5}, "factor=0.5 would shorten"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings=None"),
        ({"partial_rotary_factor": 0.05}, r"head_dim=16 \* 0.05 gives 0 channels"),
        ({"partial_rotary_factor": 0.2}, "gives 3 channels"),
        ({"low_freq_factor": 4.0}, "low_freq_factor=4.0 must be below"),
        ({"rope_type": "ntk", "partial_rotary_factor": 0.125}, "needs at least 4"),
    ],
)
def test_what_makes_no_rotation_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        RotaryEmbedding(16, **arguments)


# ---------------------------------------------------------------------------- xPos


def test_xpos_is_rope_times_a_factor_for_the_distance():
    torch.manual_seed(1)
    xpos, rope = XPos(8, scale_base=4.0), RotaryEmbedding(8)
    q, k = torch.randn(2, 1, 9, 1, 8, dtype=torch.float64)
    positions = torch.arange(9)[None]
    scaled = xpos(q, k, positions, positions)
    turned = rope(q, k, positions, positions)
    for t in range(9):
        for s in range(t + 1):
            want = 0.0
            for i in range(4):
                zeta = (2 * i / 8 + 0.4) / 1.4
                pair = slice(2 * i, 2 * i + 2)
                score = turned[0][0, t, 0, pair] @ turned[1][0, s, 0, pair]
                want += float(score) * zeta ** ((t - s) / 4)
            assert float(scaled[0][0, t, 0] @ scaled[1][0, s, 0]) == pytest.approx(want, rel=1e-12)


def test_xpos_counts_as_far_as_it_says():
    xpos = XPos(16)
    assert xpos.furthest == 32_768
    x = torch.ones(1, 1, 1, 16)
    far = torch.tensor([[xpos.furthest]])
    q, k = xpos(x, x, far, far)
    assert q.abs().min() > torch.finfo(torch.float32).tiny and k.isfinite().all()
    score = float((q.double() * k.double()).sum())
    assert math.isclose(score, 16.0, rel_tol=1e-6)


@pytest.mark.parametrize("rotary", ["RetentionRotation", "RotaryEmbedding", "XPos"])
def test_a_compiler_sees_no_complex_number(rotary: str) -> None:
    """It cannot fuse them; the rotation is the same without."""
    net = archzoo.create_model("transformer_micro", vocab_size=16, rotary=rotary)
    tokens, dtypes = torch.randint(0, 16, (2, 9)), set()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        dtypes.update(value.dtype for value in values if isinstance(value, torch.Tensor))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(tokens).logits, net(tokens).logits, atol=1e-6)
    assert torch.float32 in dtypes
    assert not any(dtype.is_complex for dtype in dtypes)
