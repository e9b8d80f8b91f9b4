"""Routers against loops, golden numbers and the properties their papers promise."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from archzoo import contract
from archzoo.block import make_context
from archzoo.contract import relative_error
from archzoo.decoder import Decoder
from archzoo.feedforward.balance import gate_ratios
from archzoo.feedforward.routers import AttentionRouter, LinearRouter, normalise_logits

GOLDEN = Path(__file__).parent / "golden"
ROUTERS = [LinearRouter, AttentionRouter]
OPTIONS = [
    {"logit_norm": 1.0},
    {"score": "sigmoid"},
    {"score": "sigmoid", "logit_norm": 2.0, "renormalise": False},
    {"renormalise": False},
    {"bias_rate": 1e-3},
    {"top_k": 1},
    {"top_k": 8},
]


def route(router, x):
    return router(x, make_context(*x.shape[:2])[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", contract.CHECKS["router"])
def test_every_option_keeps_the_contract(router, options, name):
    finding = contract.run_check(router, name, **options)
    assert finding.passed, finding.detail


# ---------------------------------------------------------------------------- Yuan


def naive_logits(weight, x, experts):
    """One token, one expert, one number at a time."""
    logits = []
    for token in x:
        numbers = [float(row @ token) for row in weight]
        q, k, v = (numbers[part * experts : (part + 1) * experts] for part in range(3))
        z = []
        for i in range(experts):
            raised = [math.exp(q[i] * k[j]) for j in range(experts)]
            z.append(sum(r * value for r, value in zip(raised, v, strict=True)) / sum(raised))
        logits.append(z)
    return torch.tensor(logits, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 5), (1, 1), (3, 1)])
def test_attention_router_against_loops(experts, top_k, dtype, allowed):
    router = AttentionRouter(16, experts, top_k).to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    routing = route(router, x)
    want = naive_logits(router.projection.weight.detach(), x.flatten(0, 1), experts)
    assert relative_error(routing.raw_logits, want) < allowed
    for token, logits in enumerate(want):
        best = sorted(range(experts), key=lambda e: -logits[e])[:top_k]
        assert routing.indices[token].tolist() == best
        chosen = logits[best].softmax(0) if top_k > 1 else logits.softmax(0)[best]
        assert torch.allclose(routing.weights[token].double(), chosen, atol=allowed)
    if top_k > 1:
        total = routing.weights.sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=allowed)


def test_attention_router_gives_the_golden_numbers():
    golden = load_file(GOLDEN / "yuan_router_f64.safetensors")
    router = AttentionRouter(32, 8).double()
    parts = [golden[f"weight.gate.{name}.weight"] for name in ("query", "key", "value")]
    router.load_state_dict({"projection.weight": torch.cat(parts)})
    routing = route(router, golden["x"])
    assert relative_error(routing.raw_logits, golden["router_logits_float64_formula"]) < 1e-12
    # The source computes the choice in float32.
    assert relative_error(routing.raw_logits, golden["router_logits"]) < 1e-5
    for kind in ("", "_megatron"):
        indices, weights = golden[f"topk_indices{kind}"], golden[f"topk_weights{kind}"]
        assert torch.equal(routing.indices, indices)
        assert relative_error(routing.weights, weights) < 1e-5


def test_no_other_token_is_seen():
    """At any length, which the source's reshape of heads over the sequence breaks."""
    router = AttentionRouter(16, 4).double()
    for time in (3, 16, 64):
        x = torch.randn(1, time, 16, dtype=torch.float64)
        other = torch.randn_like(x)
        other[:, 1] = x[:, 1]
        assert torch.equal(route(router, x).raw_logits[1], route(router, other).raw_logits[1])


def test_permuting_the_experts_permutes_the_logits():
    router, permuted = AttentionRouter(16, 6).double(), AttentionRouter(16, 6).double()
    order = torch.randperm(6)
    rows = torch.cat([order, 6 + order, 12 + order])
    permuted.load_state_dict({"projection.weight": router.projection.weight[rows]})
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    got, want = route(permuted, x).raw_logits, route(router, x).raw_logits[:, order]
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("options", [{}, {"logit_norm": 1.0}, {"score": "sigmoid"}])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_reach_every_part_of_the_projection(router, options):
    made = router(6, 4, 2, **options).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    weight = made.projection.weight.detach().clone().requires_grad_()

    def weights(w):
        return torch.func.functional_call(
            made, {"projection.weight": w}, (x, make_context(1, 5)[0])
        ).weights

    assert torch.autograd.gradcheck(weights, weight)
    (gradient,) = torch.autograd.grad(weights(weight).square().sum(), weight)
    for part in gradient.chunk(router.projections):
        assert part.abs().max() > 0


def test_the_attention_router_starts_at_unit_variance_in_a_decoder():
    mixture = {"class_path": "MixtureOfExperts", "init_args": {"router": "AttentionRouter"}}
    decoder = Decoder(vocab_size=9, dim=256, depth=1, heads=4, width=8, feed_forward=mixture)
    weight = decoder.blocks[0].feed_forward.router.projection.weight
    assert weight.std().item() * 256**0.5 == pytest.approx(1, rel=0.05)
    mixture["init_args"]["router"] = "LinearRouter"
    decoder = Decoder(vocab_size=9, dim=256, depth=1, heads=4, width=8, feed_forward=mixture)
    weight = decoder.blocks[0].feed_forward.router.projection.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)


# ---------------------------------------------------------------------------- Skywork


@pytest.mark.parametrize("target", [1.0, 2.0])
def test_normalised_gate_gives_the_golden_numbers(target):
    golden = load_file(GOLDEN / "skywork_gating.safetensors")
    name = f"lam{target:.0f}_sample"
    for renormalise, chosen in ((True, "top2_renorm"), (False, "top2_prob")):
        router = LinearRouter(32, 16, 2, logit_norm=target, renormalise=renormalise).double()
        router.load_state_dict({"projection.weight": golden["W"]})
        routing = route(router, golden["x"][None])
        assert relative_error(routing.raw_logits, golden["z"]) < 1e-12
        # The report's formula has no epsilon beside the variance.
        assert relative_error(routing.probabilities, golden[f"probs_{name}"]) < 1e-5
        assert torch.equal(routing.indices, golden[f"top2_idx_{name}"])
        assert relative_error(routing.weights, golden[f"{chosen}_{name}"]) < 1e-5


def test_the_norm_really_can_be_off():
    golden = load_file(GOLDEN / "skywork_gating.safetensors")
    router = LinearRouter(32, 16).double()
    router.load_state_dict({"projection.weight": golden["W"]})
    routing = route(router, golden["x"][None])
    assert relative_error(routing.probabilities, golden["probs_plain"]) < 1e-12


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0])
def test_normalised_logits_have_the_wanted_deviation(target):
    z = torch.randn(50, 16)
    normed = normalise_logits(z, target)
    assert torch.allclose(normed.std(dim=-1), torch.tensor(target).expand(50), rtol=1e-5)
    assert torch.allclose(normed.mean(dim=-1), torch.zeros(50), atol=1e-5)
    centred = z - z.mean(dim=-1, keepdim=True)
    assert torch.allclose(normed, target * centred / z.std(dim=-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_normalised_sigmoid_gate_is_finite_and_between_its_bounds(router, offset):
    """However far from 0 the logits lie together; at the start of an attention router, too."""
    made = router(64, 16, 2, logit_norm=1.0, score="sigmoid")
    logits = made.logits
    made.logits = lambda projected: logits(projected) - offset
    routing = route(made, torch.randn(4, 25, 64))
    for found in (routing.probabilities, routing.weights):
        assert found.isfinite().all()
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(100))
    # Logits of deviation 1: some expert is above the mean, and none is without a score.
    assert (routing.probabilities.amax(-1) > 1.01 / 16).all()
    assert (routing.probabilities > 1e-4).all()


def test_a_positive_affine_change_of_the_logits_changes_nothing():
    z = torch.randn(50, 16)
    want = normalise_logits(z, 1.0).softmax(-1)
    assert torch.allclose(normalise_logits(7 * z - 3, 1.0).softmax(-1), want, atol=1e-5)


def test_equal_logits_are_finite_forward_and_backward():
    router = LinearRouter(16, 8, logit_norm=1.0)
    torch.nn.init.zeros_(router.projection.weight)
    x = torch.randn(2, 3, 16, requires_grad=True)
    routing = route(router, x)
    assert torch.equal(routing.probabilities, torch.full((6, 8), 1 / 8))
    routing.weights.square().sum().backward()
    assert router.projection.weight.grad.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("experts", "target", "first", "second"),
    [
        (8, 0.5, 1.39, None),
        (16, 0.5, 1.31, 1.17),
        (32, 0.5, 1.26, None),
        (8, 1.0, 2.04, None),
        (16, 1.0, 1.81, 1.40),
        (32, 1.0, 1.66, None),
        (16, 2.0, 4.3, 2.19),
    ],
)
def test_gate_ratios_of_gaussian_logits(experts, target, first, second):
    """How sharp an untrained gate is, by lambda: measured apart from this code."""
    z = torch.randn(60_000, experts)
    ratios = gate_ratios(normalise_logits(z, target).softmax(-1))
    assert ratios["max1_max2"].item() == pytest.approx(first, rel=0.03)
    if second:
        assert ratios["max2_max3"].item() == pytest.approx(second, rel=0.03)


# ---------------------------------------------------------------------------- options


def test_softmax_then_choice_is_choice_then_softmax():
    """Renormalised weights are the softmax of the chosen logits."""
    router = LinearRouter(16, 8, 3).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    routing = route(router, x)
    chosen = routing.probabilities.gather(-1, routing.indices)
    assert relative_error(routing.weights, chosen / chosen.sum(-1, keepdim=True)) < 1e-12
    plain = LinearRouter(16, 8, 3, renormalise=False).double()
    plain.load_state_dict(router.state_dict())
    assert relative_error(route(plain, x).weights, chosen) < 1e-12


def test_sigmoid_scores():
    router = LinearRouter(16, 8, score="sigmoid", renormalise=False).double()
    routing = route(router, torch.randn(2, 5, 16, dtype=torch.float64))
    scores = routing.raw_logits.sigmoid()
    assert relative_error(routing.weights, scores.gather(-1, routing.indices)) < 1e-12
    assert torch.equal(routing.indices, scores.topk(2).indices)


def test_a_single_choice_keeps_the_routers_gradient():
    router = LinearRouter(16, 8, 1)
    route(router, torch.randn(2, 5, 16)).weights.sum().backward()
    assert router.projection.weight.grad.abs().max() > 0


def test_the_bias_moves_the_choice_and_not_the_weights():
    router = LinearRouter(16, 8, bias_rate=0.1)
    x = torch.randn(2, 50, 16)
    before = route(router, x)
    router.expert_bias[3] = 10.0
    after = route(router, x)
    assert (after.indices == 3).any(-1).all(), "the favoured expert is always chosen"
    assert torch.equal(after.probabilities, before.probabilities)
    chosen = after.probabilities.gather(-1, after.indices)
    assert torch.allclose(after.weights, chosen / chosen.sum(-1, keepdim=True))


def test_the_bias_steps_towards_even_load():
    router = LinearRouter(16, 4, bias_rate=0.25)
    router.after_step({"assignments": torch.tensor([10, 4, 6, 4])})
    # By -1, 1, 0 and 1 quarters, less their mean, which would only drift.
    want = torch.tensor([-0.3125, 0.1875, -0.0625, 0.1875])
    assert torch.equal(router.expert_bias, want)
    router.after_step({"assignments": torch.tensor([6, 6, 6, 6])})
    assert torch.equal(router.expert_bias, want)


def test_the_bias_evens_out_a_lopsided_router():
    torch.manual_seed(1)
    router = LinearRouter(16, 8, bias_rate=0.001)
    with torch.no_grad():
        router.projection.weight.copy_(0.5 * torch.randn(8, 16))
    x = torch.randn(1, 400, 16) + 0.5
    spread = []
    for _ in range(600):
        with torch.no_grad():
            counts = route(router, x).indices.flatten().bincount(minlength=8)
        spread.append(counts.max().item() / 100 - 1)
        router.after_step({"assignments": counts})
    assert spread[0] > 0.7 and spread[-1] < 0.2


def test_autocast_reaches_no_router():
    for router in ROUTERS:
        made, x = router(32, 8), torch.randn(2, 5, 32)
        want = route(made, x)
        with torch.autocast("cpu", torch.bfloat16):
            got = route(made, x)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top_k": 9}, "top_k=9 must lie between 1 and experts=8"),
        ({"top_k": 0}, "top_k=0"),
        ({"score": "relu"}, "score='relu' is neither"),
        ({"logit_norm": 0.0}, "logit_norm=0.0 must be above 0"),
        ({"experts": 2, "logit_norm": 1.0}, "take 3 experts"),
        ({"bias_rate": -1.0}, "bias_rate=-1.0"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        LinearRouter(16, **({"experts": 8} | arguments))
    assert "\n" not in str(caught.value)
