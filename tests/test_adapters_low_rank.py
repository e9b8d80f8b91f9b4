"""LoRA, DoRA, PiSSA and MoSLoRA: the golden numbers, and what each promises of its change."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules
from archzoo.cli import main
from archzoo.contract import examine
from archzoo.contract.measure import relative_error
from archzoo.linear import Linear
from archzoo.training.optim import decay_groups

GOLDEN = Path(__file__).parent / "golden"
FAMILY = (archzoo.LoRA, archzoo.DoRA, archzoo.PiSSA, archzoo.MoSLoRA)
PRESETS = ("transformer_micro", "retnet_micro", "yuan_micro", "skywork_micro")
#: Every matrix of the blocks, but for states: mixers, feed-forwards, experts and routers.
ALL = [r"blocks\..*\.(?!state$)\w+"]
TOKENS = torch.randint(20, (2, 13), generator=torch.Generator().manual_seed(1))


def read_golden(method, case):
    """Tensors without the case's name, and the settings."""
    path = GOLDEN / f"adaptation_{method}.safetensors"
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()[f"{case}.config"])
    start = f"{case}."
    return {
        k.removeprefix(start): v for k, v in load_file(path).items() if k[: len(start)] == start
    }, {
        "rank": settings["r"],
        "alpha": float(settings["lora_alpha"]),
        "rank_stabilised": settings.get("use_rslora", False),
    }


def on_golden_weight(cls, golden, settings, **options):
    """The adapter on a Linear of the golden weight and bias, started from it."""
    rows, columns = golden["weight"].shape
    linear = Linear(columns, {"value": rows}, bias="bias" in golden).to(golden["weight"].dtype)
    with torch.no_grad():
        linear.weight.copy_(golden["weight"])
        if "bias" in golden:
            linear.bias.copy_(golden["bias"])
    adapter = cls(Target("linear", "value", (rows, columns)), **settings, **options)
    adapter.to(linear.weight.dtype).start(linear.weight)
    linear.attach("default", "value", adapter)
    linear.weight.requires_grad_(False)
    return linear, adapter


def set_(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def gradients(linear, golden, *parameters):
    x = golden["x"].clone().requires_grad_()
    y = linear(x)
    return y, torch.autograd.grad(y, (x, *parameters), golden["gy"])


def adapted(preset, cls, targets=ALL, **options):
    torch.manual_seed(3)
    part = functools.partial(cls, targets=targets, **({"rank": 3} | options))
    net = archzoo.create_model(preset, vocab_size=20, init_std=0.2).double().eval()
    return archzoo.adapt(net, part)


def moved(net, by=0.1):
    """The adapters a little off where they start, as training would move them."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, module in adapter_modules(net):
            for p in module.parameters():
                p.add_(by * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return net


def logits(net, **options):
    with torch.no_grad():
        return net(TOKENS, **options).logits


# ---------------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize("case", ["sq", "tall", "wide"])
def test_dora_gives_the_golden_numbers(case):
    """peft's; with the norm in the graph the authors', which differ in A's and B's gradients."""
    golden, settings = read_golden("dora", case)
    linear, dora = on_golden_weight(archzoo.DoRA, golden, settings)
    assert relative_error(dora.magnitude, golden["magnitude_init"]) < 1e-12
    assert relative_error(linear(golden["x"]), golden["y_init"]) < 1e-12
    values = {"A": dora.first, "B": dora.second, "magnitude": dora.magnitude}
    for name, parameter in values.items():
        set_(parameter, golden[name])
    for detached, prefix in ((True, ""), (False, "full.")):
        dora.detach_norm = detached
        y, grads = gradients(linear, golden, *values.values())
        assert relative_error(y, golden["y"]) < 1e-12
        for name, got in zip(("x", *values), grads, strict=True):
            assert relative_error(got, golden[f"{prefix}grad.{name}"]) < 1e-12, (prefix, name)
    differs = [
        n for n in values if relative_error(golden[f"full.grad.{n}"], golden[f"grad.{n}"]) > 1e-9
    ]
    assert differs == ["A", "B"]
    with torch.no_grad():
        assert relative_error(linear.effective_weight(), golden["merged"]) < 1e-12
        linear.merge()
        assert relative_error(linear(golden["x"]), golden["y"]) < 1e-12


@pytest.mark.parametrize("case", ["sq", "tall", "wide"])
def test_pissa_gives_the_golden_numbers(case):
    """peft's, in float32; the signs of singular vectors are free, so s B A is compared."""
    golden, settings = read_golden("pissa", case)
    linear, pissa = on_golden_weight(archzoo.PiSSA, golden, settings)
    scale = golden["scaling"]
    assert pissa.scale == pytest.approx(scale.item())
    with torch.no_grad():
        principal = pissa.scale * pissa.second @ pissa.first
        assert relative_error(principal, scale * golden["B"] @ golden["A"]) < 1e-5
        assert relative_error(linear.weight - principal, golden["residual"]) < 1e-5
        assert torch.equal(linear(golden["x"]), linear.product(golden["x"]))
        assert relative_error(linear(golden["x"]), golden["y_init"]) < 1e-5
        for balanced in (pissa.first @ pissa.first.mT, pissa.second.mT @ pissa.second):
            assert relative_error(balanced, golden["A"] @ golden["A"].mT) < 1e-5
    for name, value in (("first", "A"), ("second", "B")):
        set_(getattr(pissa, f"{name}_start"), golden[value])
        set_(getattr(pissa, name), golden[f"{value}_moved"])
    y, grads = gradients(linear, golden, pissa.first, pissa.second)
    assert relative_error(y, golden["y"]) < 1e-5
    for got, name in zip(grads, ("x", "A_moved", "B_moved"), strict=True):
        assert relative_error(got, golden[f"grad.{name}"]) < 1e-5
    with torch.no_grad():
        assert relative_error(linear.effective_weight(), golden["merged"]) < 1e-5


@pytest.mark.parametrize("case", ["sq", "tall", "wide"])
def test_moslora_gives_the_golden_numbers(case):
    golden, settings = read_golden("moslora", case)
    linear, moslora = on_golden_weight(archzoo.MoSLoRA, golden, settings)
    assert relative_error(linear(golden["x"]), golden["y_init"]) < 1e-12
    values = {"A": moslora.first, "B": moslora.second, "mixer": moslora.mixer}
    for name, parameter in values.items():
        set_(parameter, golden[name])
    y, grads = gradients(linear, golden, *values.values())
    assert relative_error(y, golden["y"]) < 1e-12
    for got, name in zip(grads, ("x", *values), strict=True):
        assert relative_error(got, golden[f"grad.{name}"]) < 1e-12
    with torch.no_grad():
        assert relative_error(linear.effective_weight(), golden["merged"]) < 1e-12


def test_first_values_are_drawn_as_the_golden_ones():
    """Uniform within 1 / sqrt(columns), and the mixer within 1 / sqrt(rank); B is 0."""
    for method, cls in (("lora", archzoo.LoRA), ("dora", archzoo.DoRA)):
        golden, settings = read_golden(method, "tall")
        _, adapter = on_golden_weight(cls, golden, settings)
        bound = golden["weight"].shape[1] ** -0.5
        for drawn in (golden["A_init"], adapter.first):
            assert 0.9 * bound < drawn.abs().max() <= bound
        assert not adapter.second.any()
        assert not golden["B_init"].any()
    golden, settings = read_golden("moslora", "wide")
    _, adapter = on_golden_weight(archzoo.MoSLoRA, golden, settings)
    for drawn in (golden["mixer_init"], adapter.mixer):
        assert 0.8 * 5**-0.5 < drawn.abs().max() <= 5**-0.5


def test_counts_are_the_papers():
    counts = {}
    for cls in FAMILY:
        adapter = cls(Target("linear", "value", (20, 34)), rank=5)
        counts[cls.__name__] = sum(p.numel() for p in adapter.parameters())
    plain = 5 * (20 + 34)
    assert counts == {"LoRA": plain, "DoRA": plain + 20, "PiSSA": plain, "MoSLoRA": plain + 25}


# ---------------------------------------------------------------------------- on every family


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cls", FAMILY)
def test_every_matrix_of_every_family(preset, cls):
    """Nothing changes at the start; then forms agree, and merged and switched off it is exact."""
    net = adapted(preset, cls)
    base = archzoo.remove_adapters(copy.deepcopy(net))
    assert relative_error(logits(net), logits(base)) < 1e-12
    loss = net(TOKENS).logits.square().mean()
    loss.backward()
    alive = 0
    for path, module in adapter_modules(net):
        if module.second.grad.abs().max():  # else no token chose the expert
            alive += 1
        if cls is archzoo.PiSSA:
            assert bool(module.first.grad.any()) == bool(module.second.grad.any()), path
        else:
            assert not module.first.grad.any(), path
    assert alive
    learn = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learn, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        net(TOKENS).logits.square().mean().backward()
        optimizer.step()
    held = net.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in base.state_dict().items())
    want = logits(net)
    assert relative_error(want, logits(base)) > 1e-3
    assert relative_error(logits(net, form="recurrent"), want) < 1e-12
    removed = archzoo.remove_adapters(copy.deepcopy(net))
    assert torch.equal(logits(removed), logits(base))
    merged = archzoo.merge_adapters(net)
    assert relative_error(logits(merged), want) < 1e-12
    assert relative_error(logits(merged, form="recurrent"), want) < 1e-12


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (archzoo.DoRA, {"detach_norm": False, "rank": 2}),
        (archzoo.MoSLoRA, {"mixer_init": "orthogonal", "rank_stabilised": True}),
        (archzoo.PiSSA, {"alpha": 3.0, "rank": 5}),
    ],
)
def test_options_keep_the_rules(cls, options):
    report = examine(cls, **options)
    assert report.passed, report.failures


@pytest.mark.parametrize("cls", FAMILY)
def test_a_rank_above_the_matrix_is_refused_in_a_line(cls):
    """Of every expert's matrix, too; nothing has changed then."""
    name = cls.__name__
    net = archzoo.create_model("yuan_micro", vocab_size=20)
    for targets, path, shape in (
        (["output"], "blocks.0.mixer.output.output", "of 32 rows and 32 columns"),
        (["down"], "blocks.0.feed_forward.experts.down.down", "of 32 rows and "),
        (["router_key"], r"blocks.0.feed_forward.router.projection.router_key", "of 8 rows"),
    ):
        most = 8 if "router_key" in targets else 32
        part = functools.partial(cls, targets=targets, rank=33)
        says = rf"^{name}: rank=33 must be at least 1 and at most \d+ for {path}, {shape}"
        with pytest.raises(ValueError, match=says) as caught:
            archzoo.adapt(net, part)
        assert "\n" not in str(caught.value)
        assert not list(adapter_modules(net))
        if targets == ["router_key"]:
            archzoo.remove_adapters(
                archzoo.adapt(net, functools.partial(cls, targets=targets, rank=most))
            )
    with pytest.raises(ValueError, match=r"rank=0 must be at least 1 .*: take a higher one$"):
        archzoo.adapt(net, functools.partial(cls, targets=["output"], rank=0))
    with pytest.raises(ValueError, match="alpha="):
        archzoo.adapt(net, functools.partial(cls, targets=["output"], alpha=0.0))


@pytest.mark.parametrize("cls", FAMILY)
def test_experts_change_each_by_itself(cls):
    """A stack is what its experts would be alone."""
    torch.manual_seed(0)
    weight = torch.randn(3, 12, 7, dtype=torch.float64)
    stack = cls(Target("experts", "up", (3, 12, 7)), rank=2).double()
    stack.start(weight)
    net = nn.Module()
    net.only = stack
    x, before = torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 5, 12, dtype=torch.float64)
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    for expert in range(3):
        one = cls(Target("linear", "up", (12, 7)), rank=2).double()
        state = {}
        for name, tensor in stack.state_dict().items():
            state[name] = tensor.view(3, -1)[expert] if name == "magnitude" else tensor[expert]
        one.load_state_dict(state)
        with torch.no_grad():
            assert relative_error(stack.delta(weight)[expert], one.delta(weight[expert])) < 1e-12
            if cls is archzoo.DoRA:
                got = stack.output_beside(x, before, weight, None)[expert]
                want = one.output_beside(x, before[expert], weight[expert], None)
            else:
                got, want = stack.output(x, before)[expert], one.output(x, before[expert])
            assert relative_error(got, want) < 1e-12


# ---------------------------------------------------------------------------- LoRA


def test_the_change_of_a_lora_has_at_most_its_rank():
    torch.manual_seed(0)
    for cls in (archzoo.LoRA, archzoo.MoSLoRA):
        adapter = cls(Target("linear", "value", (20, 34)), rank=4).double()
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
        with torch.no_grad():
            assert torch.linalg.matrix_rank(adapter.delta(torch.zeros(20, 34))) == 4


# ---------------------------------------------------------------------------- DoRA


def test_rows_of_a_dora_have_the_norms_that_it_learned():
    net = moved(adapted("retnet_micro", archzoo.DoRA, ["query", "value", "up"]))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Linear) and module.adapted:
                weight = module.effective_weight()
                for name, dora in module.adapters():
                    got = weight[module.rows(name)].norm(dim=-1)
                    torch.testing.assert_close(got, dora.magnitude.abs())


def test_scaling_the_magnitude_scales_y_without_the_bias():
    torch.manual_seed(0)
    linear = Linear(9, {"a": 4, "b": 6}, bias=True).double()
    dora = archzoo.DoRA(Target("linear", "b", (6, 9)), rank=2).double()
    dora.start(linear.weight[4:])
    linear.attach("default", "b", dora)
    nn.init.normal_(dora.second)
    x = torch.randn(5, 9, dtype=torch.float64)
    with torch.no_grad():
        before = linear(x)
        dora.magnitude.mul_(3)
        after = linear(x)
        bias = linear.bias[4:]
        assert torch.equal(before[:, :4], after[:, :4])
        assert relative_error(after[:, 4:] - bias, 3 * (before[:, 4:] - bias)) < 1e-12
        assert torch.equal(linear.part(x, "b"), after[:, 4:])


def test_several_doras_on_one_matrix_are_what_they_are_one_after_the_other():
    """Their changes do not add up: each takes the norm of what those before it made."""
    torch.manual_seed(0)
    linear = Linear(9, {"b": 6}, bias=True).double()
    weight = linear.weight.detach().clone()
    for name in ("one", "two"):
        dora = archzoo.DoRA(Target("linear", "b", (6, 9)), rank=2).double()
        dora.start(linear.weight)
        for parameter in dora.parameters():
            nn.init.normal_(parameter)
        linear.attach(name, "b", dora)
        with torch.no_grad():
            changed = weight + dora.scale * dora.second @ dora.first
            weight = dora.magnitude[:, None] * changed / changed.norm(dim=-1, keepdim=True)
    x = torch.randn(5, 9, dtype=torch.float64)
    with torch.no_grad():
        want = x @ weight.T + linear.bias
        assert relative_error(linear(x), want) < 1e-12
        linear.merge()
        assert relative_error(linear(x), want) < 1e-12


def test_a_dora_sees_the_weight_behind_scalings_and_no_sums():
    """What those before it made of weight and bias; where that is not known it is refused."""

    class Scaled(archzoo.Adapter):
        mergeable = True

        def __init__(self, target, *, targets=None, layers=None):
            super().__init__(target)
            self.by = nn.Parameter(torch.full(target.shape[:1], 3.0))

        def reset_parameters(self):
            pass

        def output(self, x, y):
            return y * (self.by - 1)

        def delta(self, weight):
            return weight * (self.by - 1)[:, None]

        def bias_delta(self, bias):
            return bias * (self.by - 1)

    class Unknown(Scaled):
        mergeable = False
        delta = archzoo.Adapter.delta

    torch.manual_seed(0)
    linear = Linear(9, {"b": 6}, bias=True).double()
    target = Target("linear", "b", (6, 9))
    dora = archzoo.DoRA(target, rank=2).double()
    dora.start(linear.weight)
    linear.attach("one", "b", Scaled(target).double())
    linear.attach("two", "b", dora)
    nn.init.normal_(dora.second)
    x = torch.randn(5, 9, dtype=torch.float64)
    with torch.no_grad():
        changed = 3 * linear.weight + dora.scale * dora.second @ dora.first
        weight = dora.magnitude[:, None] * changed / changed.norm(dim=-1, keepdim=True)
        assert relative_error(linear(x), x @ weight.T + 3 * linear.bias) < 1e-12
    both = {"one": functools.partial(Unknown, targets=["value"]), "two": "DoRA"}
    with pytest.raises(ValueError, match=r"DoRA \(two\) changes the weight .* put two first"):
        archzoo.create_model("retnet_micro", vocab_size=20, adapters=both)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_row_of_zeros_stays_finite(detach_norm):
    weight = torch.randn(5, 7)
    weight[2] = 0
    dora = archzoo.DoRA(Target("linear", "b", (5, 7)), rank=2, detach_norm=detach_norm)
    dora.start(weight)
    change = dora.delta(weight)
    assert not change.any()
    change.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in dora.parameters())


def test_doras_dropout_is_of_all_that_is_added():
    """As the authors': E[y] is that without dropout."""
    torch.manual_seed(0)
    weight = torch.randn(6, 400)
    dora = archzoo.DoRA(Target("linear", "b", (6, 400)), rank=2, dropout=0.5)
    dora.start(weight)
    nn.init.normal_(dora.second)
    dora.magnitude.data.mul_(1.5)
    x = torch.randn(1, 400).expand(4000, 400) / 20
    y = x @ weight.T
    with torch.no_grad():
        dropped = dora.output_beside(x, y, weight, None)
        assert dropped.std(0).min() > 0.1
        whole = dora.eval().output_beside(x, y, weight, None)
    torch.testing.assert_close(dropped.mean(0), whole[0], atol=0.15, rtol=0)


def test_magnitudes_stay_in_float32_and_their_file_says_what_is(tmp_path):
    """Half precision has steps of 0.4 % there; A and B are the base's, after loading too."""
    net = adapted("yuan_micro", archzoo.DoRA).float().bfloat16()
    base = archzoo.remove_adapters(copy.deepcopy(net))
    assert torch.equal(logits(archzoo.adapt(copy.deepcopy(base), "DoRA")), logits(base))
    moved(net)
    archzoo.save_adapter(tmp_path, net)
    again = archzoo.load_adapter(tmp_path, base).eval()
    for model in (net, again):
        for _, module in adapter_modules(model):
            assert module.magnitude.dtype == torch.float32
            assert module.first.dtype == module.second.dtype == torch.bfloat16
    assert logits(net).dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(net))


def test_magnitudes_do_not_decay_those_of_experts_neither():
    net = adapted("yuan_micro", archzoo.DoRA)
    spared = {id(p) for group in decay_groups(net, 0.1)[1:] for p in group["params"]}
    for _, module in adapter_modules(net):
        assert [id(p) in spared for p in (module.first, module.second, module.magnitude)] == [
            False,
            False,
            True,
        ]


# ---------------------------------------------------------------------------- PiSSA


def test_a_pissa_takes_the_principal_part_of_the_weight():
    """What remains has the next singular value as its largest; of all ranks nothing remains."""
    torch.manual_seed(0)
    for shape, rank in (((20, 34), 4), ((34, 20), 7), ((12, 12), 12)):
        weight = torch.randn(shape, dtype=torch.float64)
        pissa = archzoo.PiSSA(Target("linear", "value", shape), rank=rank, alpha=5.0).double()
        pissa.start(weight)
        with torch.no_grad():
            principal = pissa.scale * pissa.second @ pissa.first
            values = torch.linalg.svdvals(weight)
            largest = torch.linalg.matrix_norm(weight - principal, 2)
            following = values[rank] if rank < min(shape) else torch.zeros((), dtype=torch.float64)
            torch.testing.assert_close(largest, following, atol=1e-12, rtol=1e-12)
            norms = pissa.first.square().sum(1), pissa.second.square().sum(0)
            for norm in norms:
                torch.testing.assert_close(norm, values[:rank] / pissa.scale)
            assert torch.equal(pissa.first, pissa.first_start)
            assert not pissa.delta(weight).any()


def test_a_pissas_signs_come_from_its_file(tmp_path, monkeypatch):
    """Another machine's decomposition may turn them: nothing is taken from one when loading."""
    part = functools.partial(archzoo.PiSSA, targets=ALL, rank=3)
    net = archzoo.create_model("yuan_micro", vocab_size=20, init_std=0.2, adapter=part).eval()
    moved(net)
    want = logits(net)
    archzoo.save_pretrained(tmp_path / "model", net)
    exact = torch.linalg.svd

    def turned(*arguments, **options):
        left, values, right = exact(*arguments, **options)
        return -left, values, -right

    monkeypatch.setattr(torch.linalg, "svd", turned)
    again, _ = archzoo.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again.eval()), want)
    fresh = archzoo.create_model("yuan_micro", vocab_size=20, adapter=part).eval()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(logits(fresh), want)


def test_a_run_of_a_pissa_goes_on_from_the_signs_of_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = ["--trainer.max_steps", "2", "--trainer.default_root_dir"]
    run = ["--data", "Addition", "--data.digits", "1", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--model.preset", "retnet_micro", *run, *steps, "base"]) == 0
    (base,) = tmp_path.glob("base/**/last.ckpt")
    pissa = ["--model.adapter", "PiSSA", "--model.adapter.targets", "[query,up]"]
    assert main(["fit", "--model.weights", str(base), *pissa, *steps, "run"]) == 0
    (path,) = tmp_path.glob("run/**/last.ckpt")
    exact, ended = torch.linalg.svd, []

    def turned(*arguments, **options):
        left, values, right = exact(*arguments, **options)
        return -left, values, -right

    for name, decomposition in (("same", exact), ("turned", turned)):
        monkeypatch.setattr(torch.linalg, "svd", decomposition)
        where = ["--trainer.max_steps", "3", "--trainer.default_root_dir", name]
        assert main(["fit", "--ckpt_path", str(path), *where]) == 0
        (last,) = tmp_path.glob(f"{name}/**/last.ckpt")
        ended.append(archzoo.from_pretrained(last)[0].state_dict())
    assert all(torch.equal(tensor, ended[1][name]) for name, tensor in ended[0].items())


def test_a_pissa_goes_back_on_its_base():
    """Its tensors alone, put on the base again, give the trained model."""
    net = moved(adapted("retnet_micro", archzoo.PiSSA))
    want = logits(net)
    own = {k: v.clone() for k, v in net.state_dict().items() if "adapter_modules" in k}
    base = archzoo.remove_adapters(net)
    part = functools.partial(archzoo.PiSSA, targets=ALL, rank=3)
    archzoo.adapt(base, part).load_state_dict(own, strict=False)
    assert torch.equal(logits(base), want)


def test_the_change_of_a_pissa_is_what_was_learned():
    torch.manual_seed(0)
    for shape in ((20, 34), (3, 12, 9)):
        kind = "linear" if len(shape) == 2 else "experts"
        weight = torch.randn(shape, dtype=torch.float64)
        pissa = archzoo.PiSSA(Target(kind, "value", shape), rank=4, alpha=9.0).double()
        pissa.start(weight)
        for parameter in pissa.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        with torch.no_grad():
            learned = pissa.second @ pissa.first - pissa.second_start @ pissa.first_start
            assert relative_error(pissa.delta(weight), pissa.scale * learned) < 1e-12


def test_pissas_do_not_decay_and_loras_do():
    for cls, decays in ((archzoo.PiSSA, False), (archzoo.LoRA, True), (archzoo.MoSLoRA, True)):
        groups = decay_groups(adapted("retnet_micro", cls), 0.1)
        assert [group["weight_decay"] for group in groups] == [0.1 if decays else 0.0]


def test_a_pissa_in_half_precision_starts_exactly():
    """B A and B0 A0 are rounded alike, on a wider adapter beside a narrow base as well."""
    net = archzoo.create_model("yuan_micro", vocab_size=20, init_std=0.2).bfloat16().eval()
    want = logits(net)
    archzoo.adapt(net, functools.partial(archzoo.PiSSA, targets=ALL, rank=3))
    assert torch.equal(logits(net), want)
    for _, module in adapter_modules(net):
        module.float()
    assert torch.equal(logits(net), want)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": -1.0}, "alpha=-1.0 must be above 0"),
        ({"dropout": 0.1}, "PiSSA has no argument 'dropout'"),
    ],
)
def test_what_a_pissa_cannot_do_is_said(options, says):
    with pytest.raises(ValueError, match=says):
        adapted("retnet_micro", archzoo.PiSSA, ["query"], **options)


# ---------------------------------------------------------------------------- MoSLoRA


def test_a_moslora_with_an_identity_is_a_lora_and_its_mixer_may_go_into_a():
    torch.manual_seed(0)
    target = Target("linear", "value", (20, 34))
    lora, mixed = (cls(target, rank=4).double() for cls in (archzoo.LoRA, archzoo.MoSLoRA))
    for parameter in mixed.parameters():
        nn.init.normal_(parameter)
    x, y = torch.randn(5, 34, dtype=torch.float64), torch.empty(0)
    with torch.no_grad():
        lora.second.copy_(mixed.second)
        lora.first.copy_(mixed.mixer @ mixed.first)
        assert relative_error(mixed.output(x, y), lora.output(x, y)) < 1e-12
        assert relative_error(mixed.delta(x), lora.delta(x)) < 1e-12
        mixed.mixer.copy_(torch.eye(4))
        lora.first.copy_(mixed.first)
        assert relative_error(mixed.output(x, y), lora.output(x, y)) < 1e-12


def test_at_the_first_step_b_alone_of_a_moslora_learns():
    net = adapted("transformer_micro", archzoo.MoSLoRA)
    net(TOKENS).logits.square().mean().backward()
    for _, module in adapter_modules(net):
        assert module.second.grad.any()
        assert not module.first.grad.any()
        assert not module.mixer.grad.any()


def test_a_mixer_starts_orthogonal_where_asked_and_never_at_zero():
    for shape in ((20, 34), (3, 20, 34)):
        kind = "linear" if len(shape) == 2 else "experts"
        target = Target(kind, "value", shape)
        mixer = archzoo.MoSLoRA(target, rank=5, mixer_init="orthogonal").mixer
        eye = torch.eye(5).expand(*shape[:-2], 5, 5)
        torch.testing.assert_close(mixer @ mixer.mT, eye)
    with pytest.raises(ValueError, match="mixer_init='zero' is neither kaiming nor orthogonal"):
        archzoo.MoSLoRA(target, mixer_init="zero")
