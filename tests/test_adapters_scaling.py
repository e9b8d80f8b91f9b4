"""(IA)^3, MoV and MoLoRA: golden numbers, what they are made of, what they refuse, entropies."""

import csv
import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules
from archzoo.adapters.mixture import SoftRouter, gate_entropies
from archzoo.cli import main
from archzoo.contract import CHECKS, run_check
from archzoo.contract.measure import relative_error
from archzoo.linear import Linear
from archzoo.training.log import mean_entropies
from archzoo.training.optim import decay_groups

HERE = Path(__file__).parent / "golden"
SCALINGS = HERE / "adaptation_ia3.safetensors"
MIXTURES = HERE / "adaptation_mov_molora.safetensors"
METHODS = (archzoo.IA3, archzoo.MoV, archzoo.MoLoRA)
MIXED = (archzoo.MoV, archzoo.MoLoRA)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("rule", CHECKS["adapter"])
def test_they_keep_the_rules(cls, rule):
    finding = run_check(cls, rule)
    assert finding.passed, finding.detail


@pytest.mark.parametrize("cls", MIXED)
@pytest.mark.parametrize("rule", ["identity at start", "gradients", "forms equal"])
def test_mixtures_keep_them_with_few_experts_a_token(cls, rule):
    finding = run_check(cls, rule, experts=5, top_k=2)
    assert finding.passed, finding.detail


# ---------------------------------------------------------------------------- golden numbers


def golden_of(file, case):
    tensors = load_file(file).items()
    return {k.removeprefix(f"{case}."): v for k, v in tensors if k.startswith(f"{case}.")}


def put(values):
    """Set parameters, given as pairs with what they shall be."""
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)


@pytest.mark.parametrize("case", ["output_sq", "output_wide", "input_tall"])
def test_ia3_gives_the_golden_numbers_and_gradients(case):
    golden = golden_of(SCALINGS, case)
    rows, columns = golden["weight"].shape
    name = "down" if case.startswith("input") else "value"
    linear = Linear(columns, {name: rows}, bias="bias" in golden).double()
    scaling = archzoo.IA3(Target("linear", f"part.{name}", (rows, columns))).double()
    linear.attach("default", name, scaling)
    put([(linear.weight, golden["weight"]), (scaling.scale, golden["l"])])
    if "bias" in golden:
        put([(linear.bias, golden["bias"])])
    x = golden["x"].clone().requires_grad_()
    y = linear(x)
    assert relative_error(y, golden["y"]) < 1e-12
    grads = torch.autograd.grad(y, (x, scaling.scale), golden["gy"])
    for got, of in zip(grads, ("x", "l"), strict=True):
        assert relative_error(got, golden[f"grad.{of}"]) < 1e-12
    linear.merge()
    assert relative_error(linear.weight, golden["merged"]) < 1e-12
    if "bias" in golden:
        assert relative_error(linear.bias, golden["merged_bias"]) < 1e-12
    assert relative_error(linear(x), golden["y"]) < 1e-12


def mov_of(golden, heads=None, **options):
    *_, experts, width = golden["l"].shape
    rows = width * (heads or 1)
    path = "part.down" if heads is None else "part.value"
    target = Target("linear", path, (rows, rows), heads=heads)
    mov = archzoo.MoV(target, experts=experts, **options).double()
    put([(mov.vectors, golden["l"]), (mov.router.weight, golden["router"].T)])
    return mov


def expect_gradients(golden, y, x, mov):
    grads = torch.autograd.grad(y, (x, mov.vectors, mov.router.weight), golden["gy"])
    wanted = (golden["grad.x"], golden["grad.mov_scaling"], golden["grad.router"].T)
    for got, want in zip(grads, wanted, strict=True):
        assert relative_error(got, want) < 1e-12


def test_mov_gives_the_golden_numbers_and_gradients():
    golden = golden_of(MIXTURES, "mov")
    mov = mov_of(golden)
    x = golden["x"].clone().requires_grad_()
    y = x + mov.input(x)
    assert relative_error(y, golden["y"]) < 1e-12
    expect_gradients(golden, y, x, mov)


def test_mov_of_heads_gives_the_golden_numbers_and_gradients():
    golden = golden_of(MIXTURES, "mov_attention")
    heads = golden["x"].shape[2]
    mov = mov_of(golden, heads)
    x = golden["x"].clone().requires_grad_()
    z = x.flatten(-2)
    y = (z + mov.output(z, z)).view_as(x)
    assert relative_error(y, golden["y"]) < 1e-12
    expect_gradients(golden, y, x, mov)


def test_movs_top_k_sums_to_1_where_the_released_codes_does_not():
    """Theirs is ours times what the softmax gave to the chosen: less than z from the start."""
    golden = golden_of(MIXTURES, "mov_top2")
    mov = mov_of(golden, top_k=2)
    x = golden["x"].clone().requires_grad_()
    y = x + mov.input(x)
    logits = x @ mov.router.weight.T
    chosen = torch.softmax(logits, -1).topk(2).values.sum(-1, keepdim=True)
    assert (chosen < 0.999).any()
    assert relative_error(y * chosen, golden["y"]) < 1e-12
    expect_gradients(golden, y * chosen, x, mov)
    nn.init.ones_(mov.vectors)
    assert torch.equal(x + mov.input(x), x)


def test_molora_gives_the_golden_numbers_and_gradients():
    golden = golden_of(MIXTURES, "molora")
    experts, columns, rank = golden["A"].shape
    rows = golden["B"].shape[-1]
    molora = archzoo.MoLoRA(
        Target("linear", "part.value", (rows, columns)), experts=experts, rank=rank
    ).double()
    assert molora.scale == golden["scaling"].item()
    put([(molora.router.weight, golden["router"].T), (molora.first, golden["A"].mT)])
    x = golden["x"].clone().requires_grad_()
    y = torch.zeros_like(golden["y"])
    assert torch.equal(molora.output(x, y), golden["y_init"])
    put([(molora.second, golden["B"].permute(2, 0, 1))])
    added = molora.output(x, y)
    assert relative_error(added, golden["y"]) < 1e-12
    learned = (x, molora.first, molora.second, molora.router.weight)
    grads = torch.autograd.grad(added, learned, golden["gy"])
    wanted = (
        golden["grad.x"],
        golden["grad.lora_A"].mT,
        golden["grad.lora_B"].permute(2, 0, 1),
        golden["grad.router"].T,
    )
    for got, want in zip(grads, wanted, strict=True):
        assert relative_error(got, want) < 1e-12


# ---------------------------------------------------------------------------- properties

OUTPUT = Target("linear", "part.output", (12, 8))
VALUE = Target("linear", "part.value", (12, 8), heads=3)
DOWN = Target("linear", "part.down", (12, 8))


def random(module, seed=0):
    """The module in float64 with parameters away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def changed(module, x, w):
    """``y = W x`` with an adapter on it."""
    moved = module.input(x)
    y = (x if moved is None else x + moved) @ w.T
    change = module.output(x, y)
    return y if change is None else y + change


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).double() for shape in ((2, 5, 8), (12, 8))]


@pytest.mark.parametrize("target", [OUTPUT, VALUE, DOWN])
def test_mov_with_one_expert_is_ia3(target, given):
    mov, scaling = random(archzoo.MoV(target, experts=1)), random(archzoo.IA3(target))
    put([(scaling.scale, mov.vectors.flatten())])
    assert relative_error(changed(mov, *given), changed(scaling, *given)) < 1e-12


def test_molora_with_one_expert_is_lora_of_alpha_16(given):
    molora, lora = (
        random(cls(OUTPUT, rank=3, **options))
        for cls, options in ((archzoo.MoLoRA, {"experts": 1}), (archzoo.LoRA, {"alpha": 16.0}))
    )
    put([(lora.first, molora.first[0]), (lora.second, molora.second[:, 0])])
    assert relative_error(changed(molora, *given), changed(lora, *given)) < 1e-12


@pytest.mark.parametrize(
    ("cls", "target"),
    [(archzoo.MoV, OUTPUT), (archzoo.MoV, VALUE), (archzoo.MoV, DOWN), (archzoo.MoLoRA, OUTPUT)],
)
def test_equal_experts_give_their_router_no_gradient(cls, target, given):
    mixture = random(cls(target, experts=4))
    axes = {"vectors": -2, "first": 0, "second": 1}
    for name, parameter in mixture.named_parameters():
        if name in axes:
            put([(parameter, parameter.narrow(axes[name], 0, 1).clone().expand_as(parameter))])
    y = changed(mixture, *given)
    weight = mixture.router.weight
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    assert grad.abs().max() < 1e-10 * y.square().sum()
    fresh = cls(target, experts=40).router.weight.detach()
    assert fresh.std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(
    ("cls", "target"),
    [(archzoo.MoV, OUTPUT), (archzoo.MoV, VALUE), (archzoo.MoV, DOWN), (archzoo.MoLoRA, OUTPUT)],
)
def test_the_order_of_experts_changes_nothing(cls, target, top_k, given):
    mixture = random(cls(target, experts=4, top_k=top_k))
    want = changed(mixture, *given)
    order = torch.tensor([2, 0, 3, 1])
    axes = {"router.weight": 0, "vectors": -2, "first": 0, "second": 1}
    for name, parameter in mixture.named_parameters():
        put([(parameter, parameter.index_select(axes[name], order))])
    assert relative_error(changed(mixture, *given), want) < 1e-12


@pytest.mark.parametrize("cls", [archzoo.IA3, archzoo.MoV])
def test_a_value_of_0_cuts_the_branch_off(cls):
    net = archzoo.create_model("transformer_micro", vocab_size=20, adapter=cls).double()
    mixer = net.blocks[0].mixer
    context, _ = archzoo.block.make_context(2, 5)
    x = torch.randn(2, 5, net.dim, dtype=torch.float64)
    before, _ = mixer(x, None, context)
    adapter = mixer.query_key_value.adapter_modules["default"]["value"]
    nn.init.zeros_(adapter.scale if cls is archzoo.IA3 else adapter.vectors)
    y, _ = mixer(x, None, context)
    assert y.abs().max() <= 1e-14 * before.abs().max()


def count(net):
    return sum(p.numel() for _, module in adapter_modules(net) for p in module.parameters())


@pytest.mark.parametrize("preset", ["transformer_micro", "retnet_micro"])
def test_they_hold_as_many_parameters_as_they_say(preset):
    net = archzoo.create_model(preset, vocab_size=20)
    linear = next(m for p, m in net.named_modules() if ".query_key_value" in p)
    keys, values = linear.blocks["key"], linear.blocks["value"]
    width = net.blocks[0].feed_forward.down.in_features
    mixer = net.blocks[0].mixer
    heads = getattr(mixer, "kv_heads", mixer.heads)

    def made(adapter):
        return count(archzoo.create_model(preset, vocab_size=20, adapter=adapter)) / net.depth

    assert made("IA3") == keys + values + width
    of_heads = keys // heads + values // heads
    experts = 3
    mov = functools.partial(archzoo.MoV, experts=experts)
    assert made(mov) == experts * (keys + values + width) + experts * (of_heads + width)
    molora = functools.partial(archzoo.MoLoRA, experts=experts, rank=2, targets=["value"])
    assert made(molora) == experts * 2 * (net.dim + values) + experts * net.dim


@pytest.mark.parametrize("preset", ["retnet_micro", "yuan_micro"])
def test_ia3_leaves_gates_and_queries_alone_and_scales_each_expert(preset):
    net = archzoo.create_model(preset, vocab_size=20, adapter="IA3")
    shapes = {path.rpartition(".")[2]: tuple(m.scale.shape) for path, m in adapter_modules(net)}
    assert shapes.keys() == {"key", "value", "down"}
    if preset == "yuan_micro":
        experts = net.blocks[0].feed_forward.experts
        assert shapes["down"] == (experts.experts, experts.width)


@pytest.mark.parametrize("cls", [archzoo.IA3, archzoo.MoV])
@pytest.mark.parametrize("preset", ["transformer_micro", "skywork_micro"])
def test_scales_do_not_decay_and_keep_their_dtype(cls, preset):
    targets = ["key", "value", "down"] if cls is archzoo.IA3 else ["key", "value"]
    adapter = functools.partial(cls, targets=targets)
    net = archzoo.create_model(preset, vocab_size=20, adapter=adapter)
    assert [group["weight_decay"] for group in decay_groups(net, 0.1)] == [0.0]
    for _, module in adapter_modules(net.bfloat16()):
        for name in module.float32_names:
            assert getattr(module, name).dtype == torch.float32  # 1 + 0.004 is 1 in bfloat16
    assert net(torch.randint(20, (2, 9))).logits.dtype == torch.bfloat16


def test_ia3_merges_where_the_feed_forward_has_no_gate():
    net = archzoo.create_model(
        "transformer_micro", vocab_size=20, feed_forward="PlainFeedForward", adapter="IA3"
    ).double()
    for _, module in adapter_modules(net):
        nn.init.normal_(module.scale, mean=1, std=0.3)
    tokens = torch.randint(20, (2, 9))
    block = net.blocks[0].feed_forward
    x = torch.randn(3, net.dim, dtype=torch.float64)
    scale = block.down.adapter_modules["default"]["down"].scale
    hidden = nn.functional.gelu(x @ block.up.weight.T) * scale
    context, _ = archzoo.block.make_context(1, 3)
    assert relative_error(block(x[None], context)[0][0], hidden @ block.down.weight.T) < 1e-12
    want = net(tokens).logits
    assert relative_error(archzoo.merge_adapters(net)(tokens).logits, want) < 1e-12


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"class_path": "IA3", "init_args": {"targets": ["router_value"]}}, "IA3 .*router"),
        ({"class_path": "MoV", "init_args": {"targets": ["router_value"]}}, "MoV .*router"),
        ({"class_path": "MoLoRA", "init_args": {"targets": ["router_value"]}}, "MoLoRA .*router"),
        ({"class_path": "MoV", "init_args": {"targets": ["down"]}}, "MoV .*down, of the kind 'exp"),
        ({"class_path": "MoLoRA", "init_args": {"targets": ["up"]}}, "MoLoRA .* 'experts'"),
        ({"class_path": "MoV", "init_args": {"experts": 0, "targets": ["key"]}}, "experts=0"),
        (
            {"class_path": "MoLoRA", "init_args": {"experts": 2, "top_k": 3}},
            "top_k=3 must lie between 1 and experts=2",
        ),
        ({"class_path": "MoLoRA", "init_args": {"rank": 0}}, "MoLoRA: rank=0 must be at least 1"),
        ({"class_path": "MoLoRA", "init_args": {"rank": 99}}, "rank=99 must be .* at most 32"),
        ({"class_path": "MoLoRA", "init_args": {"alpha": 0.0}}, "alpha=0.0 must be a number"),
    ],
)
def test_what_they_cannot_do_is_refused_in_a_line(adapter, says):
    with pytest.raises(ValueError, match=says) as refused:
        archzoo.create_model("yuan_micro", vocab_size=20, adapter=adapter)
    assert "\n" not in str(refused.value)


def test_by_itself_mov_leaves_stacked_experts_out():
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapter="MoV")
    assert {path.split(".")[-1] for path, _ in adapter_modules(net)} == {"key", "value"}


@pytest.mark.parametrize("cls", MIXED)
def test_merging_a_mixture_is_refused_by_name(cls):
    adapter = functools.partial(cls, targets=["value"])
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapter=adapter)
    with pytest.raises(ValueError, match=f"{cls.__name__} at .* cannot be merged"):
        archzoo.merge_adapters(net)


# ---------------------------------------------------------------------------- entropies


def test_gates_are_watched_without_padding_and_only_within():
    adapter = functools.partial(archzoo.MoV, experts=4, targets=["value", "down"])
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).double().eval()
    for _, module in adapter_modules(net):
        nn.init.normal_(module.router.weight)
    tokens = torch.randint(20, (2, 9))
    documents = torch.tensor([[0] * 9, [-1] * 4 + [0] * 5])
    with torch.no_grad(), gate_entropies(net) as sums:
        net(tokens, documents=documents)
    after = {path: entry.clone() for path, entry in sums.items()}
    net(tokens)
    assert all(torch.equal(after[path], entry) for path, entry in sums.items())
    assert len(sums) == 2 * net.depth
    for path, (total, number, most) in sums.items():
        heads = net.blocks[0].mixer.heads if "value" in path else 1
        assert number == 14 * heads
        assert most == pytest.approx(number * math.log(4))
        assert 0 < total < most
    first = next(p for p in sums if "value" in p)
    with torch.no_grad(), gate_entropies(net) as alone:
        net(tokens[1:, 4:])
    with torch.no_grad(), gate_entropies(net) as whole:
        net(tokens[:1])
    assert alone[first] + whole[first] == pytest.approx(after[first])


def test_the_entropy_of_a_router_is_at_most_that_of_its_top_k():
    router = SoftRouter(8, 5, top_k=2)
    router.reset_parameters()
    gates = router(torch.randn(7, 8))
    assert ((gates > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(7))
    assert torch.special.entr(gates).sum(-1).max() <= router.most + 1e-6
    assert router.most == pytest.approx(math.log(2))
    assert SoftRouter(8, 5, top_k=5).most == pytest.approx(math.log(5))


@pytest.mark.parametrize("cls", ["MoV", "MoLoRA"])
def test_the_log_tells_how_evenly_routers_blend(cls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = ["--model.adapter", cls, "--model.adapter.experts", "3"]
    run = ["--model.preset", "retnet_micro", "--data", "Addition", "--data.digits", "1"]
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", "run"]
    assert main(["fit", *run, *adapter, *steps, *cpu]) == 0
    (path,) = tmp_path.glob("run/**/metrics.csv")
    rows = list(csv.DictReader(path.open()))
    (row,) = [row for row in rows if row["validation/loss"]]
    got = {n.removeprefix("validation/"): float(v) for n, v in row.items() if "gate_entropy" in n}
    assert got["gate_entropy_maximum"] == pytest.approx(math.log(3))
    assert got.keys() == {
        "gate_entropy",
        "gate_entropy_maximum",
        "gate_entropy/0",
        "gate_entropy/1",
    }
    assert 0.5 < got["gate_entropy"] <= math.log(3) + 1e-6  # R is small at the start
    assert got["gate_entropy"] == pytest.approx((got["gate_entropy/0"] + got["gate_entropy/1"]) / 2)
    assert not any("entropy" in n for n in row if n.startswith("train/"))


def test_the_entropies_of_all_ranks_are_one_mean():
    """Of ranks that saw other numbers of tokens, or none."""
    path = "blocks.{}.mixer.query_key_value.adapter_modules.default.value.router"
    ranks = [[3.0, 6.0, 6 * math.log(3)], [0.0, 0.0, 0.0], [2.0, 2.0, 2 * math.log(3)]]
    summed = torch.tensor(ranks, dtype=torch.float64).sum(0)
    row = mean_entropies({path.format(0): summed, path.format(1): 2 * summed})
    assert row["gate_entropy"] == row["gate_entropy/1"] == pytest.approx(5 / 8)
    assert row["gate_entropy_maximum"] == pytest.approx(math.log(3))
    off = torch.zeros(3, dtype=torch.float64)
    assert mean_entropies({path.format(0): summed, path.format(1): off}).keys() == {
        "gate_entropy",
        "gate_entropy_maximum",
        "gate_entropy/0",
    }
    assert mean_entropies({path.format(0): off}) == {}
