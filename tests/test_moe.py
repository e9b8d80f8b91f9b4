"""Mixture of experts: all ways to compute it are one, and nothing else than the router decides."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import archzoo
from archzoo import contract
from archzoo.block import Aux, make_context
from archzoo.contract import relative_error
from archzoo.feedforward import moe
from archzoo.feedforward.moe import (
    BACKENDS,
    Experts,
    MixtureOfExperts,
)
from archzoo.kernels.experts import collect_rows, loop_experts, make_dispatch, spread_rows
from archzoo.parts import describe
from archzoo.registry import get_preset

GOLDEN = Path(__file__).parent / "golden" / "yuan_router_f64.safetensors"
DOUBLE = torch.float64
NORMED = {"class_path": "LinearRouter", "init_args": {"logit_norm": 1.0}}
OPTIONS = [
    {"router": "AttentionRouter", "balance": "none"},
    {"router": NORMED, "balance": "squared_mean", "adaptive": True},
    {"shared_experts": 2, "z_coefficient": 1e-3},
    {"experts": 3, "top_k": 3},
    {"experts": 4, "top_k": 1},
    {"width": 36},  # no multiple of 8
    {"router": {"class_path": "AttentionRouter", "init_args": {"bias_rate": 1e-3}}},
    {"balance_over": "ranks", "z_coefficient": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", contract.CHECKS["feed_forward"])
def test_every_option_keeps_the_contract(options, name):
    finding = contract.run_check(MixtureOfExperts, name, **options)
    assert finding.passed, finding.detail


# ---------------------------------------------------------------------------- the numbers


def naive(experts, x, weights, indices):
    """Token by token and choice by choice."""
    width = experts.width
    y = torch.zeros_like(x)
    for t, token in enumerate(x):
        for weight, e in zip(weights[t], indices[t].tolist(), strict=True):
            both = experts.gate_up.weight[e] @ token
            hidden = F.silu(both[:width]) * both[width:]
            y[t] = y[t] + weight * (experts.down.weight[e] @ hidden)
    return y


def test_yuans_experts_give_the_golden_numbers():
    golden = load_file(GOLDEN)
    mixture = MixtureOfExperts(32, 24, experts=8, router="AttentionRouter").double()
    gate = [golden[f"weight.gate.{name}.weight"] for name in ("query", "key", "value")]
    stacked = {
        name: torch.stack([golden[f"weight.experts.{e}.{old}.weight"] for e in range(8)])
        for name, old in (("gate_up", "w1"), ("down", "w2"))
    }
    weights = {f"experts.{name}.weight": weight for name, weight in stacked.items()}
    mixture.load_state_dict({"router.projection.weight": torch.cat(gate), **weights})
    y, _ = mixture(golden["x"], make_context(2, 9)[0])
    # The source rounds its weights to float32 on the way.
    assert relative_error(y, golden["moe_out"]) < 1e-6
    given = golden["topk_weights"].double(), golden["topk_indices"]
    y = mixture.experts(golden["x"].flatten(0, 1), *given)
    assert relative_error(y.view_as(golden["moe_out"]), golden["moe_out"]) < 1e-12


def problem(dtype, dim=16, width=24, experts=6, tokens=11, k=2, last=None):
    """Experts and what they are given; of experts from `last` on nobody is chosen."""
    made = Experts(dim, width, experts).to(dtype)
    x = torch.randn(tokens, dim, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    indices = torch.rand(tokens, last or experts).topk(k).indices
    return made, x, torch.rand(tokens, k, dtype=wide), indices


def run(experts, x, weights, indices, backend, cotangent=None):
    """Y, and the gradients of x, the weights and the experts' matrices."""
    x, weights = (tensor.detach().clone().requires_grad_() for tensor in (x, weights))
    experts.zero_grad()
    y = experts(x, weights, indices, backend)
    y.backward(torch.randn_like(y) if cotangent is None else cotangent)
    return [
        y.detach(),
        x.grad,
        weights.grad,
        *(parameter.grad.clone() for parameter in experts.parameters()),
    ]


SHAPES = {
    "plain": {},
    "empty experts": {"last": 3},
    "one token": {"tokens": 1},
    "no token": {"tokens": 0},
    "top 1": {"k": 1},
    "all experts": {"k": 6},
    "one expert": {"experts": 1, "k": 1},
    "odd sizes": {"dim": 13, "width": 7},
    "multiples of 4": {"dim": 12, "width": 20},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "allowed"), [(DOUBLE, 1e-12), (torch.float32, 1e-5)])
def test_all_ways_are_one(shape, dtype, allowed):
    made, x, weights, indices = problem(dtype, **SHAPES[shape])
    # float64 and rows of no multiple of 16 bytes are what grouped products refuse.
    grouped = dtype == torch.float32 and shape != "odd sizes"
    want = naive(made, x, weights, indices)
    cotangent = torch.randn_like(x)
    reference = run(made, x, weights, indices, "loop", cotangent)
    assert relative_error(reference[0], want) < allowed
    for backend in BACKENDS:
        if backend == "grouped" and not grouped:
            continue
        found = run(made, x, weights, indices, backend, cotangent)
        for got, expected in zip(found, reference, strict=True):
            assert relative_error(got, expected) < allowed, backend
        with torch.no_grad():
            assert relative_error(made(x, weights, indices, backend), want) < allowed


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_all_ways_are_one_where_some_is_dropped(dtype, monkeypatch):
    """And what is dropped is not computed: grouped products end before it."""
    called, original = [], F.grouped_mm

    def grouped_mm(a, b, *, offs):
        y = original(a, b, offs=offs)
        called.append(offs[-1].item())
        return y.index_fill(
            0, torch.arange(offs[-1], len(y)), float("nan")
        )  # anything may be there

    monkeypatch.setattr(moe.F, "grouped_mm", grouped_mm)
    made, x, weights, indices = problem(dtype, tokens=17)
    kept, cotangent = torch.rand(17, 2) < 0.6, torch.randn_like(x)
    want = naive(made, x, weights * kept, indices)
    runs = {}
    for backend in BACKENDS:
        if backend == "grouped" and dtype == DOUBLE:
            continue
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weights)]
        made.zero_grad()
        y = made(*leaves, indices, backend, kept=kept)
        y.backward(cotangent)
        runs[backend] = [y, *(leaf.grad for leaf in leaves), *(p.grad for p in made.parameters())]
        runs[backend] = [tensor.detach().clone() for tensor in runs[backend]]
        assert relative_error(y, want) < 1e-5
        assert (leaves[1].grad[~kept] == 0).all()
    for found in runs.values():
        for got, expected in zip(found, runs["loop"], strict=True):
            assert relative_error(got, expected) < (1e-12 if dtype == DOUBLE else 1e-5)
    assert dtype == DOUBLE or called == [kept.sum().item()] * 2


def test_grouped_products_in_bfloat16_are_the_loop():
    made, x, weights, indices = problem(torch.bfloat16, last=4)
    cotangent = torch.randn_like(x)
    loop, grouped = (run(made, x, weights, indices, way, cotangent) for way in ("loop", "grouped"))
    for got, want in zip(grouped, loop, strict=True):
        assert relative_error(got, want) < 2e-2
    assert torch.equal(grouped[0], loop[0])


@pytest.mark.parametrize("shape", ["plain", "empty experts", "no token", "odd sizes"])
def test_the_loop_is_an_operator_too(shape):
    """Which compilers take, as they do not see how many rows an expert has."""
    made, x, _, indices = problem(DOUBLE, **SHAPES[shape])
    dispatch = make_dispatch(indices, made.experts, torch.rand(indices.shape) < 0.8)
    rows = spread_rows(x, dispatch, indices.shape[1], DOUBLE)
    inputs = [y.detach().requires_grad_() for y in (rows, made.gate_up.weight, made.down.weight)]
    grad = torch.randn_like(rows)
    runs = []
    for loop in (made.loop, loop_experts):
        y = loop(*inputs, dispatch.ends)
        runs.append([y, *torch.autograd.grad(y, inputs, grad)])
    for got, want in zip(runs[1], runs[0], strict=True):
        assert relative_error(got, want) < 1e-12
    torch.library.opcheck(
        torch.ops.archzoo.loop_experts.default,
        (*inputs, dispatch.ends),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_experts_without_tokens_get_zero_gradients():
    """Not None: ranks that chose other experts must have the same parameters to reduce."""
    for backend in BACKENDS:
        made, x, weights, indices = problem(torch.float32, last=3)
        *_, gate_up, down = run(made, x, weights, indices, backend)
        for gradient in (gate_up, down):
            assert (gradient[3:] == 0).all() and (gradient[:2] != 0).any()


def test_gradients_are_the_derivative():
    made, x, weights, indices = problem(DOUBLE, dim=3, width=2, experts=3, tokens=4)
    matrices = [parameter.detach().requires_grad_() for parameter in made.parameters()]
    names = [name for name, _ in made.named_parameters()]

    def function(x, weights, *matrices):
        given = dict(zip(names, matrices, strict=True))
        return torch.func.functional_call(made, given, (x, weights, indices, "loop"))

    inputs = (x.requires_grad_(), weights.requires_grad_(), *matrices)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("k", [1, 3])
def test_spreading_and_collecting_is_the_identity(k):
    indices = torch.rand(7, 5).topk(k).indices
    dispatch = make_dispatch(indices, 5)
    chosen = indices.flatten()
    assert torch.equal(chosen[dispatch.order], chosen.sort(stable=True).values)
    assert torch.equal(dispatch.order, chosen.argsort(stable=True)), "tokens keep their order"
    assert torch.equal(dispatch.ends, chosen.bincount(minlength=5).cumsum(0).int())
    x = torch.randn(7, 4, dtype=DOUBLE, requires_grad=True)
    weights = torch.rand(7, k, dtype=DOUBLE, requires_grad=True)
    rows = spread_rows(x, dispatch, k, DOUBLE)
    assert torch.equal(rows, x.repeat_interleave(k, 0)[dispatch.order])
    back = collect_rows(rows, weights, dispatch)
    assert relative_error(back, x * weights.sum(1, keepdim=True)) < 1e-15
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, dispatch, k, DOUBLE), x)
    rows = torch.randn(7 * k, 4, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: collect_rows(*a, dispatch), (rows, weights))


# ---------------------------------------------------------------------------- the choice


def test_the_way_is_chosen_by_facts():
    aligned, odd = Experts(64, 32, 4), Experts(64, 36, 4)
    cpu, many = torch.device("cpu"), 1000
    assert aligned.choose_backend(many, torch.bfloat16, cpu) == "grouped"
    assert odd.choose_backend(many, torch.bfloat16, cpu) == "loop"
    for dtype in (torch.float32, torch.float16, DOUBLE):
        assert aligned.choose_backend(many, dtype, cpu) == "loop"
    assert aligned.choose_backend(2, torch.float32, cpu) == "loop", "gradients are on"
    with torch.no_grad():
        assert aligned.choose_backend(2, torch.float32, cpu) == "gather"
        assert aligned.choose_backend(many, torch.float32, cpu) == "loop"
    with pytest.raises(ValueError, match="backend 'fast' is not one of loop, grouped, gather"):
        aligned(torch.randn(2, 64), torch.rand(2, 1), torch.zeros(2, 1, dtype=int), "fast")


def spy(monkeypatch):
    """What grouped products are called with."""
    called, original = [], F.grouped_mm

    def grouped_mm(a, b, **options):
        called.append((a.dtype, b.dtype, options["offs"].dtype))
        return original(a, b, **options)

    monkeypatch.setattr(moe.F, "grouped_mm", grouped_mm)
    return called


def test_mixed_precision_takes_the_fused_way(monkeypatch):
    """Grouped products are not known to autocast: float32 weights must be cast by hand."""
    called = spy(monkeypatch)
    mixture = MixtureOfExperts(32, 16)
    x = torch.randn(2, 20, 32, requires_grad=True)
    context, _ = make_context(2, 20)
    want, _ = mixture(x, context)
    assert not called
    with torch.autocast("cpu", torch.bfloat16):
        got, aux = mixture(x, context)
        (got.square().mean() + aux.losses["balance"]).backward()
    assert called == [(torch.bfloat16, torch.bfloat16, torch.int32)] * 2
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 2e-2
    for parameter in mixture.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().max() > 0


def test_the_fused_way_asks_no_device_for_a_number():
    """On the meta device there are no numbers to ask for."""
    options = {"router": NORMED, "balance": "squared_mean", "adaptive": True}
    with torch.device("meta"):
        mixture = MixtureOfExperts(32, 16, **options).bfloat16()
        documents = torch.zeros((2, 20), dtype=torch.int64)
    x = torch.empty(2, 20, 32, device="meta", dtype=torch.bfloat16)
    for given in (None, documents):
        y, aux = mixture(x, make_context(2, 20, documents=given, device="meta")[0])
        assert y.device.type == "meta" and aux.losses["balance"].dim() == 0


def test_the_same_bits_every_time():
    mixture = MixtureOfExperts(32, 16)
    x, context = torch.randn(2, 20, 32), make_context(2, 20)[0]
    runs = []
    for _ in range(2):
        mixture.zero_grad()
        leaf = x.clone().requires_grad_()
        mixture(leaf, context)[0].square().sum().backward()
        runs.append([leaf.grad, *(p.grad.clone() for p in mixture.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("router", ["LinearRouter", "AttentionRouter"])
def test_permuting_experts_with_their_routers_rows_changes_nothing(router):
    mixture = MixtureOfExperts(16, 8, experts=5, router=router).double()
    other = MixtureOfExperts(16, 8, experts=5, router=router).double()
    order = torch.randperm(5)
    weights = mixture.state_dict()
    rows = weights["router.projection.weight"].unflatten(0, (-1, 5))
    weights["router.projection.weight"] = rows[:, order].flatten(0, 1)
    for name in ("gate_up", "down"):
        weights[f"experts.{name}.weight"] = weights[f"experts.{name}.weight"][order]
    other.load_state_dict(weights)
    x, context = torch.randn(2, 9, 16, dtype=DOUBLE), make_context(2, 9)[0]
    (y, aux), (want, wanted) = other(x, context), mixture(x, context)
    assert relative_error(y, want) < 1e-12
    assert torch.equal(aux.sums["assignments"], wanted.sums["assignments"][order])


def test_equal_experts_are_one_dense_feed_forward():
    """Weights sum to 1, so a mixture of copies is what was copied, shared experts added."""
    dense = archzoo.GatedFeedForward(16, 8).double()
    mixture = MixtureOfExperts(16, 8, experts=5, top_k=3, shared_experts=1).double()
    with torch.no_grad():
        mixture.experts.gate_up.weight.copy_(dense.gate_up.weight.expand(5, -1, -1))
        mixture.experts.down.weight.copy_(dense.down.weight.expand(5, -1, -1))
    x, context = torch.randn(2, 9, 16, dtype=DOUBLE), make_context(2, 9)[0]
    y, _ = mixture(x, context)
    want = dense(x, context)[0] + mixture.shared(x, context)[0]
    assert relative_error(y, want) < 1e-12
    assert mixture.experts.similarity().item() == pytest.approx(1, abs=1e-6)


def test_similarity_of_unlike_experts():
    experts = Experts(4, 2, 2)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[0], parameter[1] = 1.0, -1.0
    assert experts.similarity().item() == pytest.approx(-1, abs=1e-6)
    assert abs(Experts(64, 64, 8).similarity().item()) < 0.02


def test_parameters_that_a_token_does_not_meet():
    mixture = MixtureOfExperts(16, 8, experts=6, top_k=2, shared_experts=3)
    count = sum(p.numel() for p in mixture.parameters())
    assert count == 6 * 16 + (6 + 3) * 3 * 16 * 8
    assert count - mixture.inactive_parameters == 6 * 16 + (2 + 3) * 3 * 16 * 8


def test_dropping_everything_leaves_shared_experts_alone():
    """A dropped assignment adds nothing, and the others keep their weights."""
    mixture = MixtureOfExperts(16, 8, experts=4, top_k=1, drop="position", capacity_factor=0.1)
    x, context = torch.randn(1, 12, 16), make_context(1, 12)[0]
    y, aux = mixture(x, context)
    chosen = mixture.router(x, context).indices[:, 0].tolist()
    first = {chosen.index(expert) for expert in set(chosen)}  # one place for each expert
    for t in range(12):
        assert (y[0, t].abs().max() > 0) == (t in first)
    assert aux.sums["dropped"] == 12 - len(first)
    whole, _ = mixture.eval()(x, context)
    for t in first:
        assert torch.allclose(whole[0, t], y[0, t], atol=1e-6)
    assert (whole.abs().amax(-1) > 0).all(), "nothing is dropped in evaluation"


def test_room_for_all_drops_nothing():
    mixture = MixtureOfExperts(16, 8, experts=4, drop="position", capacity_factor=4.0)
    x, context = torch.randn(2, 12, 16), make_context(2, 12)[0]
    y, aux = mixture(x, context)
    assert aux.sums["dropped"] == 0
    assert torch.equal(y, mixture.eval()(x, context)[0])


def test_decoding_pays_for_no_statistics():
    mixture = MixtureOfExperts(16, 8).eval()
    x, context = torch.randn(2, 1, 16), make_context(2, 1)[0]
    with torch.no_grad():
        assert mixture(x, context)[1] == Aux()
        assert mixture.train()(x, context)[1].sums


POOLED = {"class_path": "MixtureOfExperts", "init_args": {"balance_over": "ranks"}}


@pytest.mark.parametrize(
    ("name", "part"), [("yuan_micro", None), ("skywork_micro", None), ("skywork_micro", POOLED)]
)
def test_recomputing_blocks_changes_neither_gradients_nor_counts(name, part):
    tokens, runs = torch.randint(64, (2, 24)), []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = archzoo.create_model(
            name, feed_forward=part, activation_checkpointing=recompute
        ).train()
        output = net(tokens)
        pools = [layer.pools for layer in output.aux]
        assert all(bool(mine) == (part is not None) for mine in pools)
        layers = output.aux + net.pooled_losses(pools)
        losses = [value for layer in layers for value in layer.losses.values()]
        loss = output.logits.square().mean() + sum(losses)
        loss.backward()
        counts = dict(enumerate(layer.sums["assignments"] for layer in output.aux))
        runs.append((loss, counts, [p.grad for p in net.parameters()]))
    (loss, counts, gradients), (again, recounted, regradients) = runs
    assert torch.equal(loss, again)
    assert all(torch.equal(counts[name], recounted[name]) for name in counts)
    assert sum(value.sum().item() for value in counts.values()) == 2 * 2 * 24 * 2
    for a, b in zip(gradients, regradients, strict=True):
        assert relative_error(a, b) < 1e-6


def test_experts_start_as_the_decoders_matrices():
    net = archzoo.create_model("yuan_tiny")
    experts = net.blocks[0].feed_forward.experts
    assert experts.gate_up.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert experts.down.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.02)


@pytest.mark.parametrize("size", ["micro", "tiny", "small", "base"])
@pytest.mark.parametrize("family", ["yuan", "skywork"])
def test_the_families_are_sized_like_the_baseline(family, size):
    preset = get_preset(f"{family}_{size}")
    dense = get_preset(f"transformer_{size}").arguments
    for name in ("vocab_size", "dim", "depth", "heads", "context_length", "tie_weights"):
        assert preset.arguments.get(name) == dense.get(name), name


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("family", ["yuan", "skywork"])
def test_a_token_meets_as_many_parameters_as_in_the_transformer(family, size):
    from archzoo.analysis.listing import active_parameters

    with torch.device("meta"):
        mixture = archzoo.create_model(f"{family}_{size}")
        dense = archzoo.create_model(f"transformer_{size}")
    assert active_parameters(dense) == dense.parameter_count()
    # The routers come on top: 1 % in the narrowest.
    assert active_parameters(mixture) == pytest.approx(dense.parameter_count(), rel=0.012)
    assert mixture.parameter_count() > 2 * dense.parameter_count()


def test_a_swap_is_one_word():
    """Every cross of router, norm and balance is plain data, in Python as in YAML."""
    for router in ("AttentionRouter", NORMED, archzoo.AttentionRouter):
        mixture = MixtureOfExperts(16, 8, router=router)
        assert mixture(torch.randn(1, 3, 16), make_context(1, 3)[0])[0].isfinite().all()
    spec = {"class_path": "MixtureOfExperts", "init_args": {"router": NORMED, "top_k": 1}}
    net = archzoo.create_model("retnet_micro", feed_forward=spec)
    assert archzoo.Decoder(**net.config).config == net.config
    assert net.blocks[0].feed_forward.router.logit_norm == 1.0


def test_a_router_is_named_in_any_way():
    """A class, a partial, a name, plain data: one configuration, which is plain data."""
    want = {"class_path": "LinearRouter", "init_args": {"logit_norm": 1.0}}
    for router in (NORMED, functools.partial(archzoo.LinearRouter, logit_norm=1.0)):
        part = functools.partial(MixtureOfExperts, router=router)
        assert describe("feed_forward", part)["init_args"]["router"] == want
    for router in (archzoo.AttentionRouter, "AttentionRouter", "archzoo.AttentionRouter"):
        part = functools.partial(MixtureOfExperts, router=router)
        described = describe("feed_forward", part)["init_args"]["router"]
        assert described == {"class_path": "AttentionRouter", "init_args": {}}


RUN = """
seed_everything: 0
model:
  preset: yuan_micro
  schedule: constant # which a run ended early shares with the whole one
  warmup_steps: 0
  feed_forward: {class_path: MixtureOfExperts, init_args: {experts: 4, adaptive: true}}
data: {class_path: Addition, init_args: {digits: 1, batch_size: 4}}
trainer: {accelerator: cpu, limit_val_batches: 1, log_every_n_steps: 1, accumulate_grad_batches: 2}
"""


def test_a_run_moves_its_biases_and_resumes_them(tmp_path, monkeypatch):
    """From the command line, over micro-batches, and on from a checkpoint as if never ended."""
    from archzoo.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    router = "--model.feed_forward.router"
    fit = ["fit", "--config", "run.yaml", router, "AttentionRouter", f"{router}.bias_rate", "0.25"]
    for name, steps, more in (
        ("whole", "4", []),
        ("parts", "2", []),
        ("parts", "4", ["--ckpt_path", "last"]),
    ):
        assert main([*fit, "--name", name, "--trainer.max_steps", steps, *more]) == 0
    saved = [
        torch.load(f"runs/{name}/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "parts")
    ]
    for name, value in saved[0].items():
        assert torch.equal(value, saved[1][name]), name
    biases = [value for name, value in saved[0].items() if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(bias.abs().max() > 0 for bias in biases)
    header = (tmp_path / "runs/whole/metrics.csv").read_text().splitlines()[0]
    metrics = "balance coefficient max_violation entropy unused drop_rate max1_max2 max2_max3"
    assert {column for column in header.split(",") if column[-2:] in ("/0", "/1")} == {
        f"train/{kind}/{name}/{layer}"
        for kind, names in {"loss": "balance", "metric": metrics}.items()
        for name in names.split()
        for layer in range(2)
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"experts": 0}, "experts=0 must be an integer"),
        ({"top_k": 2.0}, "top_k=2.0 must be an integer"),
        ({"top_k": 9}, "top_k=9 must lie between 1 and experts=8"),
        ({"shared_experts": -1}, "shared_experts=-1"),
        ({"drop": "random"}, "drop='random' is neither none nor position"),
        ({"router": "AttentoinRouter"}, "nearest: AttentionRouter"),
        ({"router": "Attention"}, "no router 'Attention'; nearest: AttentionRouter"),
        (
            {"router": {"class_path": "LinearRouter", "init_args": {"top_k": 1}}},
            "top_k belongs to MixtureOfExperts",
        ),
        (
            {"router": {"class_path": "LinearRouter", "init_args": {"norm": 1}}},
            "LinearRouter has no argument 'norm'; nearest: logit_norm",
        ),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        MixtureOfExperts(16, 8, **arguments)
    assert "\n" not in str(caught.value)


RANKS = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import archzoo
from archzoo.block import make_context

torch.set_num_threads(1)
rank, ranks, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=ranks)
torch.manual_seed(0)
router = {"class_path": "LinearRouter", "init_args": {"bias_rate": 1e-6}}
mixture = archzoo.MixtureOfExperts(
    8, 16, experts=4, router=router, balance="squared_mean", coefficient=0.01, adaptive=True
).double()
# The sign of the first channel says which half of the experts a token goes to.
x = torch.randn(4, 6, 8, dtype=torch.float64)
x[:2, :, 0], x[2:, :, 0] = 5.0, -5.0
with torch.no_grad():
    mixture.router.projection.weight[:, 0] = torch.tensor([2.0, 2.0, -2.0, -2.0])
mine = x.chunk(ranks)[rank]
net = DistributedDataParallel(mixture) if ranks > 1 else mixture
optimizer = torch.optim.SGD(mixture.parameters(), lr=0.1)
chosen = set()
for _ in range(3):
    y, aux = net(mine, make_context(len(mine), 6)[0])
    optimizer.zero_grad()
    y.square().mean().backward()  # without the loss that is convex in the tokens of a rank
    optimizer.step()
    counts = aux.sums["assignments"]
    chosen |= set(counts.nonzero().flatten().tolist())
    if ranks > 1:
        dist.all_reduce(counts)
    mixture.after_step({"assignments": counts})
torch.save({"state": mixture.state_dict(), "chosen": sorted(chosen)}, f"{path}.{ranks}.{rank}")
"""


def test_two_ranks_whose_tokens_share_no_expert_train_as_one(tmp_path):
    """Idle experts have gradients on every rank, and coefficients and biases stay equal."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = os.environ | {"PYTHONPATH": str(Path(archzoo.__file__).parent.parent)}
    command = [sys.executable, str(script)]
    jobs = [
        subprocess.Popen([*command, rank, ranks, str(tmp_path / "out")], env=environment)
        for rank, ranks in (("0", "1"), ("0", "2"), ("1", "2"))
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0, 0]
    alone, first, second = (
        torch.load(tmp_path / f"out.{kind}", weights_only=True) for kind in ("1.0", "2.0", "2.1")
    )
    assert first["chosen"] == [0, 1] and second["chosen"] == [2, 3]
    assert alone["chosen"] == [0, 1, 2, 3]
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        assert relative_error(first["state"][name], value) < 1e-12, name
    assert first["state"]["balance.alpha"] < 0.01, "the load of both together is even"
