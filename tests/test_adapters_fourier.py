"""FourierFT: peft's numbers, the formula, the even matrices, and entries that a file keeps."""

import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules, list_targets
from archzoo.contract import CHECKS, run_check
from archzoo.contract.measure import relative_error
from archzoo.linear import Linear

GOLDEN = Path(__file__).parent / "golden" / "adaptation_fourierft.safetensors"
MICRO = ("transformer_micro", "retnet_micro", "yuan_micro", "skywork_micro")
SHAPES = [(6, 6), (5, 7), (6, 5), (5, 6), (4, 1), (1, 4), (2, 2), (3, 2), (1, 1)]


def made(rows, columns, stack=(), **options):
    kind = "experts" if stack else "linear"
    target = Target(kind, "blocks.0.mixer.output.output", (*stack, rows, columns))
    fourier = archzoo.FourierFT(target, **options).double()
    nn.init.normal_(fourier.coefficients)
    return fourier


def cosines(fourier):
    """The change of each coefficient alone, (n, rows, columns), by the formula."""
    rows, columns = fourier.rows, fourier.columns
    u, v = torch.arange(rows)[:, None], torch.arange(columns)
    a, b = fourier.entries[:, :, None, None]
    turns = (u * a % rows).double() / rows + (v * b % columns).double() / columns
    return torch.cos(2 * math.pi * turns) * fourier.alpha / (rows * columns)


@pytest.mark.parametrize("case", ["sq", "wide", "tall"])
def test_pefts_numbers_and_gradients(case):
    """peft computes in float32 whatever the dtype; the file holds the formula's in float64, too."""
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()[f"{case}.config"])
    golden = {
        k.removeprefix(f"{case}."): v for k, v in load_file(GOLDEN).items() if k.startswith(case)
    }
    rows, columns = golden["weight"].shape
    options = {"frequencies": settings["n_frequency"], "alpha": settings["scaling"]}
    fourier = made(rows, columns, draw="all", **options)
    linear = Linear(columns, {"output": rows}).double()
    linear.attach("default", "output", fourier)
    x = golden["x"].clone().requires_grad_()
    with torch.no_grad():
        linear.weight.copy_(golden["weight"])
        fourier.start(linear.weight)
        assert torch.equal(linear(x), linear.product(x))
    fourier.load_state_dict({"coefficients": golden["spectrum"], "entries": golden["indices"]})
    y = linear(x)
    grads = torch.autograd.grad(y, (x, fourier.coefficients), golden["gy"])
    delta = fourier.delta(linear.weight)
    assert delta.shape == linear.weight.shape
    for got, name, own in (
        (y, "y", "y_f64"),
        (grads[0], "grad.x", "f64.grad.x"),
        (grads[1], "grad.spectrum", "f64.grad.spectrum"),
        (delta, "delta", "delta_f64"),
    ):
        assert relative_error(got, golden[name]) < 1e-6
        assert relative_error(got, golden[own]) < 1e-12
    assert relative_error(linear.effective_weight(), golden["merged"]) < 1e-6


@pytest.mark.parametrize("draw", ["half", "all"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_change_is_the_sum_of_cosines_and_even(rows, columns, draw):
    """All entries that there are: they span the even matrices, in half of the draws."""
    even = (rows * columns + (1 + (rows % 2 == 0)) * (1 + (columns % 2 == 0))) // 2
    n = even if draw == "half" else rows * columns
    fourier = made(rows, columns, frequencies=n, draw=draw)
    assert fourier.coefficients.numel() == n
    base = cosines(fourier)
    change = fourier.delta(base[0])
    want = torch.einsum("n,nuv->uv", fourier.coefficients, base)
    torch.testing.assert_close(change, want, atol=1e-13, rtol=1e-12)
    turned = change.flip(0, 1).roll((1, 1), (0, 1))  # [-u, -v]
    torch.testing.assert_close(change, turned, atol=1e-13, rtol=0)
    assert torch.linalg.matrix_rank(base.flatten(1)) == even
    with pytest.raises(ValueError, match=f"frequencies={n + 1} must be .* at most {n} for"):
        made(rows, columns, frequencies=n + 1, draw=draw)


def test_n_entries_span_n_dimensions():
    for n in (1, 9, 40):
        base = cosines(made(8, 12, frequencies=n))
        assert torch.linalg.matrix_rank(base.flatten(1)) == n
    twice = cosines(made(8, 12, frequencies=90, draw="all"))
    assert torch.linalg.matrix_rank(twice.flatten(1)) < 60


def test_experts_have_coefficients_of_their_own():
    fourier = made(6, 8, stack=(3,))
    assert fourier.coefficients.shape == (3, 14)
    change = fourier.delta(torch.zeros(3, 6, 8, dtype=torch.float64))
    want = torch.einsum("en,nuv->euv", fourier.coefficients, cosines(fourier))
    torch.testing.assert_close(change, want, atol=1e-13, rtol=1e-12)


def test_a_step_moves_a_wider_matrix_as_far():
    """The Frobenius norm of a step that moves each coefficient by one, and the default's scale."""
    norms = []
    for size in (16, 64, 128):
        fourier = made(size, 2 * size, frequencies=100)
        signs = torch.randint(2, (100,), dtype=torch.float64) * 2 - 1
        with torch.no_grad():
            fourier.coefficients.copy_(signs)
            norms.append(fourier.delta(signs).norm() / math.sqrt(50))
    assert max(norms) < 1.2
    assert min(norms) > 0.9


def test_targets_of_one_shape_share_entries_and_a_state_holds_them_once():
    adapter = functools.partial(
        archzoo.FourierFT, targets=["query", "key", "value", "up"], frequencies=20
    )
    net = archzoo.create_model("transformer_micro", vocab_size=20, adapter=adapter)
    held = {n: t for n, t in net.state_dict().items() if n.endswith("entries")}
    shapes = {(m.rows, m.columns) for _, m in adapter_modules(net)}
    assert {t.shape for t in held.values()} == {(2, 20)}
    assert len(held) == len(shapes) == 2
    learned = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert learned == 20 * len(list(adapter_modules(net)))
    again = archzoo.create_model("transformer_micro", vocab_size=20, adapter=adapter)
    for name, tensor in held.items():
        assert torch.equal(again.state_dict()[name], tensor)
    other = functools.partial(adapter, seed=7)
    other = archzoo.create_model("transformer_micro", vocab_size=20, adapter=other)
    assert not torch.equal(other.state_dict()[next(iter(held))], next(iter(held.values())))


def test_a_file_says_which_entries_whatever_the_seed():
    """Loaded, copied, cast: the entries are those that it was trained with."""
    adapter = functools.partial(archzoo.FourierFT, targets=["query", "key"])
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    for _, module in adapter_modules(net):
        nn.init.normal_(module.coefficients, std=0.3)
    tokens = torch.randint(20, (2, 9))
    want = net(tokens).logits
    other = functools.partial(adapter, seed=7)
    other = archzoo.create_model("retnet_micro", vocab_size=20, adapter=other).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(tokens).logits, want)
    other = copy.deepcopy(other)
    kept = [m.entries for _, m in adapter_modules(other) if m.shared is None]
    kept[0].copy_(kept[0].roll(1, 1))  # the copy's own, for all of its targets
    assert not torch.equal(other(tokens).logits, want)
    assert torch.equal(net(tokens).logits, want)
    assert {
        t.dtype for t in (m.entries for _, m in adapter_modules(net.bfloat16()) if not m.shared)
    } == {torch.int64}


def test_saved_alone_it_is_put_on_its_base_again(tmp_path):
    """In whatever order its targets were given: one of them keeps the entries of all."""
    base = archzoo.create_model("retnet_micro", vocab_size=20).eval()
    archzoo.save_pretrained(tmp_path / "base", base)
    tokens = torch.randint(20, (2, 9))
    for targets in (["up", "query", "key"], ["key", "up", "query"]):
        net, _ = archzoo.from_pretrained(tmp_path / "base")
        archzoo.adapt(net, archzoo.FourierFT(targets=targets, frequencies=9))
        for _, module in adapter_modules(net):
            nn.init.normal_(module.coefficients, std=0.3)
        for _, module in adapter_modules(net):
            if module.shared is None:  # as another generator would have drawn them
                module.entries.copy_(module.entries.flip(1))
        archzoo.save_adapter(tmp_path / "alone", net)
        held = load_file(tmp_path / "alone" / "adapter.safetensors")
        assert sum(name.endswith("entries") for name in held) == 2
        again, _ = archzoo.from_pretrained(tmp_path / "base")
        archzoo.load_adapter(tmp_path / "alone", again)
        assert torch.equal(again(tokens).logits, net(tokens).logits)


@pytest.mark.parametrize("rule", CHECKS["adapter"])
def test_fourierft_keeps_the_rules(rule):
    finding = run_check(archzoo.FourierFT, rule)
    assert finding.passed, finding.detail


@pytest.mark.parametrize("name", MICRO)
def test_merged_it_is_what_it_was_beside_every_weight(name):
    """All blocks of all Linears, routers and experts too, in both forms."""
    base = archzoo.create_model(name, vocab_size=20)
    paths = [p.target.path for p in list_targets(base) if p.target.kind in ("linear", "experts")]
    adapter = functools.partial(archzoo.FourierFT, targets=paths)
    net = archzoo.adapt(base.double().eval(), adapter)
    assert len(list(adapter_modules(net))) == len(paths)
    with torch.no_grad():
        for _, module in adapter_modules(net):
            module.coefficients.normal_(std=0.05)
        tokens = torch.randint(20, (2, 17))
        want = {form: net(tokens, form=form).logits for form in ("recurrent", "parallel")}
        archzoo.merge_adapters(net)
        for form, logits in want.items():
            assert relative_error(net(tokens, form=form).logits, logits) < 1e-12
            assert relative_error(logits, want["recurrent"]) < 1e-12


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frequencies": 0}, "frequencies=0 must be at least 1 and at most 514"),
        ({"frequencies": 515}, r"frequencies=515 must be .* for blocks\.0.*query, of 32 rows"),
        ({"alpha": 0.0}, "alpha=0.0 must be a number other than 0"),
        ({"draw": "hall"}, "draw='hall' is not valid; nearest: "),
        ({"n_frequency": 4}, "FourierFT has no argument 'n_frequency'; nearest: frequencies"),
    ],
)
def test_user_errors_are_answered_in_a_line(options, says):
    spec = {"class_path": "FourierFT", "init_args": {"targets": ["query"]} | options}
    with pytest.raises(ValueError, match=says):
        archzoo.create_model("retnet_micro", vocab_size=20, adapter=spec)
