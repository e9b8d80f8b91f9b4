"""Products with changes of low rank beside them: in place against torch's own operations."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules
from archzoo.contract.measure import relative_error
from archzoo.linear import Linear
from archzoo.low_rank import Change, changed_product, kept_product, pack, softmax_of

ROWS, COLUMNS = {"query": 5, "key": 3, "value": 7}, 6


def drawn(dtype=torch.float64, bias=True, mixed=False):
    """X, W, b and changes: two of one block, of other ranks and scales, and none of another.

    With mixtures among them: two gated alike, one of other ranks and one by its best expert.
    """
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    x, weight = draw(2, 4, COLUMNS), draw(15, COLUMNS)
    places = ((0, 5, 2, 0.5), (8, 7, 3, -2.0), (0, 5, 1, 1.0))
    changes = [Change(b, draw(rank, COLUMNS), draw(n, rank), s) for b, n, rank, s in places]
    if mixed:
        kinds = ((0, 5, 4, 2, None), (5, 3, 4, 2, None), (8, 7, 6, 3, None), (8, 7, 6, 3, 2))
        changes[1:1] = [
            Change(b, draw(rank, COLUMNS), draw(n, rank), 0.5, draw(experts, COLUMNS), top_k)
            for b, n, rank, experts, top_k in kinds
        ]
    return x, weight, draw(15) if bias else None, changes


def plainly(x, weight, bias, changes):
    y = F.linear(x, weight, bias)
    for begin, first, second, scale, router, top_k in changes:
        hidden = F.linear(x, first)
        if router is not None:
            gates = softmax_of(F.linear(x, router), top_k)
            hidden = (hidden.unflatten(-1, (len(router), -1)) * gates[..., None]).flatten(-2)
        change = F.linear(hidden, second) * scale
        y = y + F.pad(change, (begin, len(weight) - begin - len(second)))
    return y


def leaves_of(x, weight, bias, changes):
    learn = [x, weight, *(t for change in changes for t in (change.first, change.second))]
    learn += [change.router for change in changes if change.router is not None]
    return learn if bias is None else [*learn, bias]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_computes_what_plain_operations_do(bias, frozen, mixed):
    given = drawn(bias=bias, mixed=mixed)
    if frozen:
        given[1].requires_grad_(False)
    learn = [leaf for leaf in leaves_of(*given) if leaf.requires_grad]
    got, want = changed_product(*given), plainly(*given)
    assert relative_error(got, want) < 1e-14
    outer = torch.randn_like(want)
    for mine, true in zip(
        torch.autograd.grad(got, learn, outer), torch.autograd.grad(want, learn, outer), strict=True
    ):
        assert relative_error(mine, true) < 1e-13
        assert mine.shape == true.shape
    with torch.no_grad():
        kept = pack(given[3], rows=len(given[1]))
        assert relative_error(kept_product(*given[:3], kept), want) < 1e-14


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_mixtures_alike_are_kept_for_few_tokens(bias, tokens):
    """Between rows that none changes, before them and behind."""
    torch.manual_seed(tokens)
    draw = partial(torch.randn, dtype=torch.float64)
    changes = [
        Change(begin, draw(6, 11), draw(rows, 6), 0.7, draw(3, 11), 2)
        for begin, rows in ((4, 5), (9, 2), (13, 7))
    ]
    given = draw(tokens, 11), draw(22, 11), draw(22) if bias else None
    kept = pack(changes, rows=22)
    with torch.no_grad():
        assert kept.kept is not None
        assert relative_error(kept_product(*given, kept), plainly(*given, changes)) < 1e-14
    for others in (
        changes[::-1],
        [*changes, changes[0]],
        [changes[0], changes[1]._replace(scale=1.0)],
    ):
        kept = pack(others, rows=22)
        assert kept.kept is None
        with torch.no_grad():
            assert relative_error(kept_product(*given, kept), plainly(*given, others)) < 1e-14


@pytest.mark.parametrize("mixed", [False, True])
def test_it_has_all_derivatives_and_transforms(mixed):
    x, weight, bias, changes = drawn(mixed=mixed)

    def compute(x, *factors):
        made = [
            c._replace(first=factors[2 * i], second=factors[2 * i + 1])
            for i, c in enumerate(changes)
        ]
        return changed_product(x, weight, bias, made)

    factors = [factor for change in changes for factor in (change.first, change.second)]
    assert torch.autograd.gradgradcheck(compute, (x, *factors))
    each = torch.func.vmap(torch.func.grad(lambda x: compute(x, *factors).square().sum()))(x)
    (whole,) = torch.autograd.grad(compute(x, *factors).square().sum(), x)
    assert relative_error(each, whole) < 1e-12
    compiled = torch.compile(compute, backend="eager", fullgraph=True)
    assert relative_error(compiled(x, *factors), compute(x, *factors)) < 1e-14


@pytest.mark.parametrize("cls", ["LoRA", "MoSLoRA", "PiSSA", "MoLoRA", "DoRA"])
def test_adapters_give_the_same_with_and_without_it(cls, monkeypatch):
    adapters = {"one": getattr(archzoo, cls)(rank=2, targets=["mixer"]), "two": "LoRA"}
    if cls == "DoRA":  # alone on a block, and beside another one
        adapters["two"] = archzoo.LoRA(rank=1, targets=["mixer.query", "router"])
    if cls == "MoLoRA":
        adapters["three"] = archzoo.MoLoRA(rank=1, experts=3, top_k=2, targets=["key"])
    net = archzoo.create_model("yuan_micro", vocab_size=20, adapters=adapters).double()
    for _, module in adapter_modules(net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(20, (2, 9))
    learn = [parameter for parameter in net.parameters() if parameter.requires_grad]
    found = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(Linear, "_of_low_rank", lambda *_: None)
        logits = net(tokens).logits
        found.append([logits, *torch.autograd.grad(logits.square().sum(), learn)])
    for mine, true in zip(*found, strict=True):
        assert relative_error(mine, true) < 1e-12


def test_dtypes_that_differ_and_autocast_are_seen_to():
    torch.manual_seed(0)
    linear = Linear(COLUMNS, ROWS, bias=True)
    lora = archzoo.LoRA(Target("linear", "value", (7, COLUMNS)), rank=2)
    nn.init.normal_(lora.second)
    linear.attach("default", "value", lora)
    x = torch.randn(4, COLUMNS)
    want = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), want) < 0.02
    y.float().square().sum().backward()
    assert lora.first.grad.dtype == torch.float32
    linear.bfloat16()
    lora.float()  # wider than its base
    y = linear(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), want) < 0.02


@pytest.mark.parametrize("cls", [archzoo.LoRA, archzoo.PiSSA, archzoo.MoSLoRA, archzoo.MoLoRA])
def test_autocast_rounds_no_product_of_factors(cls):
    """Of another dtype than the weight's they would be computed slowly, beside it."""
    torch.manual_seed(0)
    layer = Linear(12, {"query": 8}, bias=False)
    layer.attach("adapter", "query", cls(Target("linear", "query", (8, 12)), rank=2))
    adapters = layer._by_block(("query",))
    with torch.autocast("cpu", torch.bfloat16):
        (change,) = layer._low_rank_changes(("query",), adapters)
    (exact,) = layer._low_rank_changes(("query",), adapters)
    assert torch.equal(change.first, exact.first) and torch.equal(change.second, exact.second)


def test_what_overrides_what_is_added_is_not_of_low_rank():
    class Halved(archzoo.LoRA):
        def output(self, x, y):
            return super().output(x, y) / 2

    target = Target("linear", "value", (7, COLUMNS))
    assert Halved(target, rank=2).low_rank() is None
    assert archzoo.DoRA(target, rank=2).low_rank() is None
    weight = torch.randn(7, COLUMNS)
    assert archzoo.DoRA(target, rank=2).scaled_low_rank(weight) is not None
    assert archzoo.DoRA(target, rank=2, dropout=0.1).scaled_low_rank(weight) is None

    class Longer(archzoo.DoRA):
        def delta(self, weight):
            return 2 * super().delta(weight)

    assert Longer(target, rank=2).scaled_low_rank(weight) is None
    assert archzoo.LoRA(target, rank=2).low_rank() is not None
    assert archzoo.LoRA(target, rank=2, dropout=0.1).low_rank() is None
    assert archzoo.LoRA(target, rank=2, dropout=0.1).eval().low_rank() is not None


def test_a_mixture_is_put_together_once_for_decoding(monkeypatch):
    """Within `held` alone, without gradients; a router that is watched is called."""
    adapter = archzoo.MoLoRA(rank=2, experts=3, targets=["mixer", "feed_forward"])
    net = archzoo.create_model("transformer_micro", vocab_size=20, adapter=adapter).double().eval()
    for _, module in adapter_modules(net):
        nn.init.normal_(module.second)
    tokens = torch.randint(20, (2, 9))
    calls = []
    own = archzoo.MoLoRA.low_rank
    monkeypatch.setattr(archzoo.MoLoRA, "low_rank", lambda self: calls.append(1) or own(self))
    with torch.no_grad():
        want = net(tokens).logits
        assert calls
        with net.weights_held():
            calls.clear()
            assert relative_error(net(tokens).logits, want) < 1e-14
            assert not calls
            with torch.enable_grad():
                assert relative_error(net(tokens).logits, want) < 1e-14
            assert calls
            for _, module in adapter_modules(net):
                nn.init.zeros_(module.second)
        assert relative_error(net(tokens).logits, want) > 1e-3
    (adapted, *_), seen = [module for _, module in adapter_modules(net)], []
    adapted.router.register_forward_hook(lambda *_: seen.append(1))
    net(tokens)
    assert seen


def test_a_router_of_another_dtype_is_held_in_the_weight_s():
    adapter = archzoo.MoLoRA(rank=2, experts=3)
    net = archzoo.create_model("transformer_micro", vocab_size=20, adapter=adapter).eval()
    for _, module in adapter_modules(net):
        nn.init.normal_(module.second)
        module.router.double()
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        want = net(tokens).logits
        with net.weights_held():
            assert relative_error(net(tokens).logits, want) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_gains_scale_their_rows_alone_and_no_bias(bias):
    torch.manual_seed(0)
    linear = Linear(COLUMNS, ROWS, bias=bias).double()
    dora = archzoo.DoRA(Target("linear", "value", (7, COLUMNS)), rank=2).double()
    dora.start(linear.weight[linear.rows("value")])
    linear.attach("default", "value", dora)
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    with torch.no_grad():
        # A gain of 1 changes no bit. A bias is added before or behind rounding, as processors do.
        allowed = 1e-15 if bias else 0
        assert relative_error(linear(x), linear.product(x)) <= allowed
        dora.second.normal_()
        dora.magnitude.mul_(1.5)
    want = F.linear(x, linear.effective_weight(), linear.effective_bias())
    assert relative_error(linear(x), want) < 1e-14
    assert relative_error(linear.part(x, "key", "value"), want[:, 5:]) < 1e-14
    assert relative_error(linear(x)[:, :8], linear.product(x)[:, :8]) <= allowed
    half = linear.float().bfloat16()
    assert dora.magnitude.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert relative_error(half(x.bfloat16()).double(), want) < 0.02
