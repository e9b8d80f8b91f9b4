"""Retention against numbers of the authors' own code, and against the recurrence in plain floats.

The golden files are described in tests/golden/README.md.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from archzoo.block import FORMS, make_context
from archzoo.contract import relative_error
from archzoo.kernels.retention.reference import inverse_root_sum
from archzoo.mixers.retention import Retention, log_decays

GOLDEN = Path(__file__).parent / "golden"
EXACT, WITH_EPSILON, SINGLE = (
    f"retention_e32h4v64_t37c10_{kind}.safetensors" for kind in ("eps0_f64", "f64", "f32")
)
# torchscale's parallel form divides by row sums, which shifts what the norm's epsilon sees: 1e-4.
TOLERANCE = {EXACT: 1e-12, WITH_EPSILON: 1e-4, SINGLE: 1e-4}
STACKED = ("q_proj", "k_proj", "v_proj", "g_proj")  # the order inside query_key_value_gate


def load(name):
    """The golden tensors, and a Retention with their weights."""
    golden = load_file(GOLDEN / name)
    mixer = Retention(
        32, 4, value_factor=2.0, norm_eps=0.0 if name == EXACT else 1e-6, chunk_size=10
    ).to(golden["x"].dtype)
    stacked = torch.cat([golden[f"weight.{part}.weight"] for part in STACKED])
    mixer.load_state_dict(
        {
            "query_key_value_gate.weight": stacked,
            "output.weight": golden["weight.out_proj.weight"],
        }
    )
    return golden, mixer


def run(mixer, x, form, keep=False):
    state = mixer.init_state(len(x), dtype=x.dtype) if keep else None
    return mixer(x, state, make_context(*x.shape[:2])[0], form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOLERANCE)
def test_output(name, form):
    golden, mixer = load(name)
    y, _ = run(mixer, golden["x"], form)
    assert relative_error(y, golden["parallel.out"]) < TOLERANCE[name]


@pytest.mark.parametrize("form", FORMS)
def test_output_against_the_paper_alone(form):
    golden, mixer = load(EXACT)
    y, _ = run(mixer, golden["x"], form)
    assert relative_error(y, golden["paper.out_eps0"]) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOLERANCE)
def test_gradients(name, form):
    golden, mixer = load(name)
    x = golden["x"].clone().requires_grad_()
    y, _ = run(mixer, x, form)
    (y * golden["grad_out"]).sum().backward()
    stacked = torch.cat([golden[f"parallel.grad.{part}.weight"] for part in STACKED])
    for what, got, want in (
        ("x", x.grad, golden["parallel.grad_x"]),
        ("q, k, v, gate", mixer.query_key_value_gate.weight.grad, stacked),
        ("output", mixer.output.weight.grad, golden["parallel.grad.out_proj.weight"]),
    ):
        assert relative_error(got, want) < TOLERANCE[name], what


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TOLERANCE)
def test_final_state(name, form):
    golden, mixer = load(name)
    _, state = run(mixer, golden["x"], form, keep=True)
    tolerance = 1e-12 if golden["x"].dtype == torch.float64 else 1e-5
    assert relative_error(state["memory"], golden["paper.final_state"]) < tolerance
    # torchscale keeps S^T / sqrt(s_n) instead of S.
    scale = golden["recurrent.final_scale"].sqrt()[:, None, None]
    theirs = (golden["recurrent.final_prev_key_value"] * scale).mT
    assert relative_error(state["memory"], theirs) < tolerance


@pytest.mark.parametrize("form", FORMS)
def test_hand_off_continues_the_golden_text(form):
    golden, mixer = load(EXACT)
    x, state, place, segments = golden["x"], mixer.init_state(2, dtype=torch.float64), None, []
    for begin, end in ((0, 17), (17, 18), (18, 37)):
        context, place = make_context(2, end - begin, cursor=place)
        y, state = mixer(x[:, begin:end], state, context, form)
        segments.append(y)
    assert relative_error(torch.cat(segments, dim=1), golden["parallel.out"]) < 1e-12


def test_intermediate_values():
    """Rotation, scale, decay and normaliser, each for itself: a wrong pair could cancel out."""
    golden, mixer = load(EXACT)
    context, _ = make_context(2, 37)
    qk, v, gate = mixer.project(golden["x"])
    q, k, v = mixer.widen(qk, v, context, torch.float64)
    scaled = k * mixer.head_dim**-0.5
    for what, got, want in (
        ("q", q.transpose(1, 2), golden["q_rot"]),
        ("k", scaled.transpose(1, 2), golden["k_rot"]),
        ("v", v.transpose(1, 2), golden["v_heads"]),
        ("gate", torch.nn.functional.silu(gate), golden["gate"]),
    ):
        assert relative_error(got, want) < 1e-12, what
    decay = torch.tensor(log_decays("default", 4), dtype=torch.float64)
    assert relative_error(decay, golden["decay_log"]) < 1e-14
    assert relative_error(decay.exp(), golden["gamma"]) < 1e-14
    # Entry (n, n) of torchscale's mask is gamma^0 / sqrt(s_n).
    normaliser = inverse_root_sum(decay, context.positions)[0].T
    assert relative_error(normaliser, golden["parallel.mask"].diagonal(dim1=1, dim2=2)) < 1e-12


def test_layouts_are_the_same_up_to_a_permutation_of_rows():
    """Half-split rotation (fla's layout) on permuted rows of q and k is interleaved rotation."""
    golden, mixer = load(EXACT)
    size = mixer.head_dim
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])

    def permute(weight):
        return weight.unflatten(0, (4, size))[:, order].flatten(0, 1)

    context, _ = make_context(2, 37)
    angles = torch.arange(37.0, dtype=torch.float64)[:, None] * torch.tensor(
        mixer.rotary.frequencies, dtype=torch.float64
    )
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))

    def half_split(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    q_weight, k_weight = (golden[f"weight.{part}.weight"] for part in STACKED[:2])
    x = golden["x"]
    q, k = (
        half_split((x @ permute(weight).T).unflatten(-1, (4, size)))
        for weight in (q_weight, k_weight)
    )
    qk, v, _ = mixer.project(x)
    want_q, want_k, _ = mixer.widen(qk, v, context, torch.float64)
    scores, want = (torch.einsum("bqhd,bkhd->bhqk", a, b) for a, b in ((q, k), (want_q, want_k)))
    assert relative_error(scores, want) < 1e-12
    assert relative_error(q, want_q[..., order]) < 1e-12
