"""The kernels around the experts' products, and routers', against their references in float64.

Without a GPU they run through Triton's interpreter.
"""

import functools
import math

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import keystr, tree_flatten_with_path

from archzoo.block import Routing, make_context
from archzoo.contract import relative_error
from archzoo.derivatives import transformed
from archzoo.feedforward import balance, moe
from archzoo.feedforward.balance import Balance
from archzoo.feedforward.moe import MixtureOfExperts
from archzoo.kernels import experts as kernels
from archzoo.kernels import launching, routers

define_kernels("archzoo.kernels.experts.triton")
define_kernels("archzoo.kernels.routers.triton")
define_kernels("archzoo.kernels.swiglu.triton")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def compare(function, *inputs, allowed, used=None):
    """Outputs and gradients of a function by kernels, and by plain PyTorch in float64.

    The function is told which of them is wanted.
    """
    cotangent, found = None, []
    for wide in (False, True):
        leaves = [x.detach().double() if wide else x.detach().clone() for x in inputs]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(not wide, *leaves)
        if cotangent is None:
            assert launching.fused(y), "else the reference would be compared with itself"
            cotangent = torch.randn_like(y)
        picked = slice(None) if used is None else used
        if used is not None:  # rows that are never read may hold anything
            cotangent = cotangent.masked_fill(~used[:, None], 0.0)
        y.backward(cotangent.to(y.dtype))
        found.append([y.detach()[picked], *(leaf.grad for leaf in leaves)])
    for got, want in zip(*found, strict=True):
        assert relative_error(got.double(), want) < allowed


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "k"), [(16, 2), (40, 1), (33, 3)])
@pytest.mark.parametrize("drops", [False, True])
def test_rows(dtype, width, k, drops):
    tokens, experts = 9, 5
    indices = torch.rand(tokens, experts, device=DEVICE).topk(k).indices
    kept = torch.rand(tokens, k, device=DEVICE) < 0.6 if drops else None
    dispatches = [
        kernels.make_dispatch(indices, experts, kept, kernels=by_kernels)
        for by_kernels in (False, True)
    ]
    plain, dispatch = dispatches
    assert torch.equal(plain.inverse, dispatch.inverse) and torch.equal(plain.ends, dispatch.ends)
    x = torch.randn(tokens, width, device=DEVICE).to(dtype)
    weights = torch.rand(tokens, k, device=DEVICE)
    computed = torch.arange(tokens * k, device=DEVICE) < dispatch.ends[-1]
    assert not drops or not computed.all()
    allowed = TOLERANCE[dtype]

    def spread(way, x):
        return kernels.spread_rows(x, dispatches[way], k, dtype if way else torch.float64)

    compare(spread, x, allowed=allowed, used=computed)
    compare(spread, x.float(), allowed=allowed, used=computed)  # cast on the way
    rows = torch.randn(tokens * k, width, device=DEVICE).to(dtype)
    rows[~computed] = float("nan")  # as products leave them

    def collected(way, rows, weights):
        y = kernels.collect_rows(rows, weights, dispatches[way])
        if drops:  # the gradient of rows that are not computed is not written
            rows.register_hook(lambda grad: grad.masked_fill(~computed[:, None], 0.0))
        return y

    compare(collected, rows, weights, allowed=allowed)


@pytest.mark.parametrize(
    ("tokens", "experts"), [(70, 8), (3, 5), (9, 32), (3, 64), (2, 100), (1, 1), (130, 2)]
)
def test_attention_among_experts(tokens, experts):
    projected = 2 * torch.randn(tokens, 3 * experts, device=DEVICE)
    compare(lambda _, projected: routers.attend_experts(projected), projected, allowed=1e-5)


@pytest.fixture
def any_tokens(monkeypatch):
    """The router's product by kernels for few tokens, too."""
    monkeypatch.setattr(routers, "MIN_TOKENS", 1)


HOPPER = not GPU or torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="no other GPU was measured")


@needs_hopper
@pytest.mark.parametrize(
    ("tokens", "dim", "columns"),
    [(1, 16, 1), (70, 40, 24), (130, 33, 5), (300, 136, 96), (9, 200, 140), (2, 20, 200)],
)
@pytest.mark.parametrize("again", [True, False], ids=["for experts, too", "alone"])
def test_a_router_multiplies(tokens, dim, columns, again, any_tokens):
    """Its product with x, and x again: their gradients meet in one kernel."""
    x, weight = torch.randn(tokens, dim, device=DEVICE), torch.randn(columns, dim, device=DEVICE)

    def both(way, x, weight):
        assert routers._splits(x, weight) == way
        projected, passed = routers.project(x, weight)
        assert torch.equal(passed, x)
        return torch.cat([projected, 3 * passed], dim=1) if again else projected

    compare(both, x, weight, allowed=1e-6)


@needs_hopper
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_a_router_multiplies_as_exactly_as_float32(scale, any_tokens):
    """Numbers of tf32's 11 bits would be off by 1e-4."""
    x, weight = torch.randn(150, 512, device=DEVICE) + 1, torch.randn(24, 512, device=DEVICE)
    cotangent = torch.randn(150, 24, device=DEVICE) * scale
    errors = []
    for function in (routers.project, lambda x, w: (torch.nn.functional.linear(x, w), x)):
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [x.clone().to(dtype), weight.clone().to(dtype)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            y = (function if dtype == torch.float32 else routers.project)(*leaves)[0]
            y.backward(cotangent.to(dtype))
            found.append([y.detach().double(), *(leaf.grad.double() for leaf in leaves)])
        errors.append([relative_error(*pair) for pair in zip(*found, strict=True)])
    for ours, exact in zip(*errors, strict=True):
        assert ours < max(3 * exact, 5e-7), errors


@needs_hopper
def test_a_router_multiplies_deterministically_and_keeps_nan(any_tokens):
    x = torch.randn(700, 64, device=DEVICE)
    weight = torch.randn(6, 64, device=DEVICE)
    x[5, 3] = float("nan")
    x[6, 3] = float("inf")
    runs = []
    for _ in range(2):
        leaf = weight.clone().requires_grad_()
        y, _ = routers.project(x, leaf)
        y[8:].sum().backward()
        runs.append((y.detach(), leaf.grad))
    assert torch.equal(runs[0][0].nan_to_num(), runs[1][0].nan_to_num())
    assert torch.equal(runs[0][1].nan_to_num(), runs[1][1].nan_to_num())
    bad = ~runs[0][0].isfinite()
    assert bad[5:7].all() and bad.sum() == 12


@needs_hopper
def test_a_router_on_few_tokens_multiplies_plainly():
    weight = torch.randn(8, 16, device=DEVICE)
    few, many = torch.zeros(2, routers.MIN_TOKENS, 16, device=DEVICE)
    assert routers._splits(many, weight)
    assert not routers._splits(few[:-1], weight)
    assert not routers._splits(many.bfloat16(), weight.bfloat16())
    assert not routers._splits(many, torch.randn(routers.MAX_COLUMNS + 1, 16, device=DEVICE))


@pytest.mark.skipif(not GPU or not HOPPER, reason="real sizes need a Hopper GPU")
@pytest.mark.parametrize("columns", [8, 24, 32, 64, 96, 192])
def test_a_router_multiplies_at_real_sizes(columns):
    x, weight = torch.randn(16_384, 1024, device=DEVICE), torch.randn(columns, 1024, device=DEVICE)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    cotangents = torch.randn(16_384, columns, device=DEVICE), torch.randn_like(x)
    y, again = routers.project(x, weight)
    torch.autograd.backward([y, again], list(cotangents))
    wide, plain = weight.detach().double(), x.detach().double()
    errors = [
        relative_error(y.double(), plain @ wide.T),
        relative_error(x.grad.double(), cotangents[0].double() @ wide + cotangents[1].double()),
        relative_error(weight.grad.double(), cotangents[0].double().T @ plain),
    ]
    assert max(errors) < 1e-6, errors


@pytest.mark.parametrize(
    ("tokens", "experts", "drops"),
    [(5000, 7, False), (5000, 7, True), (2048, 3, True), (4097, 350, False)],
)
def test_rows_of_many_assignments(tokens, experts, drops):
    """More than a program takes at once, and more counts than one reads at once."""
    indices = torch.randint(experts, (tokens, 1), device=DEVICE)
    kept = torch.rand(tokens, 1, device=DEVICE) < 0.8 if drops else None
    plain, dispatch = (
        kernels.make_dispatch(indices, experts, kept, kernels=by_kernels)
        for by_kernels in (False, True)
    )
    assert torch.equal(plain.inverse, dispatch.inverse) and torch.equal(plain.ends, dispatch.ends)


def test_weights_are_cast_and_their_gradients_back():
    weight = torch.randn(3, 50, 40, device=DEVICE, requires_grad=True)
    lower = kernels.cast_weight(weight, torch.bfloat16)
    assert torch.equal(lower, weight.bfloat16())
    for cotangent in (torch.randn_like(lower), torch.randn_like(lower.mT).mT):
        weight.grad = None
        lower.backward(cotangent, retain_graph=True)
        assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, cotangent.float())


@needs_hopper
@pytest.mark.parametrize("sizes", [[3, 0, 70, 1], [0, 0, 5], [130]])
@pytest.mark.parametrize(("width", "out"), [(16, 24), (136, 160)])
def test_the_gradient_of_experts_weights_is_float32(sizes, width, out):
    """Also behind the last expert, where rows may hold anything."""
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).int()
    rows = torch.randn(sum(sizes) + 7, width, device=DEVICE).bfloat16()
    cotangent = torch.randn(len(rows), out, device=DEVICE).bfloat16()
    rows[ends[-1] :] = float("nan")
    weight = torch.randn(len(sizes), out, width, device=DEVICE, requires_grad=True)
    rows.requires_grad_()
    assert kernels._widens(rows, weight)
    matrices = kernels.cast_weight(weight, torch.bfloat16)
    y = kernels.multiply(rows, matrices, weight, ends)
    y.backward(cotangent.index_fill(0, torch.arange(ends[-1], len(rows), device=DEVICE), torch.nan))
    segments, gradients = [], []
    starts = [0, *ends.tolist()]
    for expert, matrix in enumerate(matrices.detach().double()):
        part = slice(starts[expert], starts[expert + 1])
        segments.append(rows.detach()[part].double() @ matrix.T)
        gradients.append(cotangent[part].double().T @ rows.detach()[part].double())
    used = slice(0, starts[-1])
    back = torch.cat([
        cotangent[starts[e] : starts[e + 1]].double() @ matrix
        for e, matrix in enumerate(matrices.detach().double())
    ])  # fmt: skip
    assert relative_error(y[used].double(), torch.cat(segments)) < 1e-2
    assert relative_error(rows.grad[used].double(), back) < 1e-2
    assert weight.grad.dtype == torch.float32
    assert relative_error(weight.grad.double(), torch.stack(gradients)) < 1e-6


@needs_hopper
def test_who_makes_the_gradient_of_experts_weights_is_chosen_by_facts():
    weight = torch.randn(2, 8, 16, device=DEVICE, requires_grad=True)
    rows = torch.zeros(4, 16, device=DEVICE, dtype=torch.bfloat16)
    assert kernels._widens(rows, weight)
    assert not kernels._widens(rows.float(), weight)
    assert not kernels._widens(rows, weight.detach())
    assert not kernels._widens(rows, weight.bfloat16())
    assert not kernels._widens(rows.expand(kernels.MAX_ROWS, 4, 16).reshape(-1, 16), weight)
    with torch.no_grad():
        assert not kernels._widens(rows, weight)


@needs_hopper
def test_a_whole_mixture_in_mixed_precision(monkeypatch, any_tokens):
    """Experts whose weights' gradients are float32 products, against plain PyTorch."""
    mixture = MixtureOfExperts(16, 8, experts=5, router="AttentionRouter").to(DEVICE)
    x, context = torch.randn(1, 40, 16, device=DEVICE), make_context(1, 40, device=DEVICE)[0]
    runs, cotangent, made = [], torch.randn_like(x), []
    original = kernels._experts_gradient
    monkeypatch.setattr(
        kernels, "_experts_gradient", lambda *given: made.append(1) or original(*given)
    )
    for by_kernels in (True, False):
        if not by_kernels:
            for module in (kernels, routers, moe, balance):
                monkeypatch.setattr(module, "fused", lambda *given: False)
        mixture.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y, _ = mixture(leaf, context)
        y.backward(cotangent)
        runs.append([y.detach(), leaf.grad, *(p.grad.clone() for p in mixture.parameters())])
    assert len(made) == 2, "gate_up and down"
    for got, want in zip(*runs, strict=True):
        assert got.dtype == want.dtype and relative_error(got, want) < 2e-2


@pytest.mark.skipif(not GPU or not HOPPER, reason="real sizes need a Hopper GPU")
@pytest.mark.parametrize(("experts", "out", "width"), [(32, 4096, 1024), (64, 512, 1024)])
def test_the_gradient_of_experts_weights_at_real_sizes(experts, out, width):
    sizes = torch.rand(experts).square()
    ends = (sizes.cumsum(0) / sizes.sum() * 32_768).int().to(DEVICE)
    grad = torch.randn(32_768, out, device=DEVICE, dtype=torch.bfloat16)
    rows = torch.randn(32_768, width, device=DEVICE, dtype=torch.bfloat16)
    found, start = kernels._experts_gradient(grad, rows, ends), 0
    for expert, end in enumerate(ends.tolist()):
        want = grad[start:end].double().T @ rows[start:end].double()
        assert relative_error(found[expert].double(), want) < 1e-5
        start = end
    assert torch.equal(found, kernels._experts_gradient(grad, rows, ends))


@pytest.mark.parametrize(("tokens", "n", "k"), [(70, 8, 2), (3, 5, 3), (40, 64, 8), (1, 1, 1)])
def test_the_largest(tokens, n, k):
    x = torch.randn(tokens, n, device=DEVICE)
    assert launching.fused(x), "else topk would be compared with itself"
    values, indices = routers.largest(x, k)
    assert torch.equal(values, x.topk(k).values) and torch.equal(indices, x.topk(k).indices)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "n", "k"), [(70, 8, 2), (3, 5, 5), (40, 64, 8), (1, 1, 1)])
def test_a_choice(tokens, n, k, biased, renormalise, sigmoid):
    logits = min(n, 4) * torch.randn(tokens, n, device=DEVICE)
    bias = torch.randn(n, device=DEVICE) if biased else None
    options = {"sigmoid": sigmoid, "renormalise": renormalise}
    chosen = []

    def decide(used, _, logits):
        weights, indices, probabilities = routers.choose(logits, k, bias, **options)
        chosen.append(indices)
        found = {"weights": weights, "probabilities": probabilities}
        return torch.cat([found[name] for name in used], dim=1)

    for used in (["weights"], ["probabilities"], ["weights", "probabilities"]):
        if renormalise and k == 1 and used == ["weights"]:
            continue  # always 1, without a gradient
        compare(functools.partial(decide, used), logits, allowed=1e-5)
    assert all(torch.equal(indices, chosen[0]) for indices in chosen)


def test_a_choice_keeps_weights_that_underflow():
    """Of experts whose probabilities do not differ from 0."""
    logits = torch.full((2, 6), -200.0, device=DEVICE)
    logits[:, 4], logits[:, 2], logits[:, 1] = 0.0, -120.0, -121.0
    bias = torch.tensor([-9.0, 0, 0, -9, -9, -9], device=DEVICE)
    weights, indices, _ = routers.choose(logits, 2, bias, sigmoid=False, renormalise=True)
    assert indices.sort().values.tolist() == [[1, 2]] * 2
    assert weights.sort().values[0].tolist() == pytest.approx(
        [1 / (1 + math.e), 1 / (1 + 1 / math.e)]
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter refuses rows of nan alone")
def test_the_largest_of_nan_does_not_point_outside():
    x = torch.full((40, 8), float("nan"), device=DEVICE)
    _, indices = routers.largest(x, 2)
    assert (indices >= 0).all() and (indices < 8).all()
    _, indices, _ = routers.choose(x, 2, None, sigmoid=False, renormalise=True)
    assert (indices >= 0).all() and (indices < 8).all()


def entries(aux):
    """All tensors of an aux by kind and name, whatever order they were put in."""
    return {keystr(path): value for path, value in tree_flatten_with_path(aux)[0]}


@pytest.mark.parametrize("kind", ["none", "switch", "squared_mean"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1500, 5, 2), (70, 8, 7), (9, 40, 3), (130, 2, 1), (3, 1, 1)]
)
def test_load(kind, adaptive, tokens, experts, k, monkeypatch):
    """A mixture's balance by kernels, and by the formulas."""
    if kind == "none" and adaptive:
        return
    part = Balance(
        experts,
        kind=kind,
        coefficient=0.3,
        adaptive=adaptive,
        z_coefficient=0.0,
        capacity_factor=1.25,
    ).to(DEVICE)
    logits = 3 * torch.randn(tokens, experts, device=DEVICE) + torch.randn(experts, device=DEVICE)
    context = make_context(1, tokens, device=DEVICE)[0]
    found = []
    for by_kernels in (True, False):
        leaf = logits.clone() if by_kernels else logits.double()
        leaf.requires_grad_()
        weights, indices, probabilities = routers.choose(
            leaf, k, None, sigmoid=False, renormalise=True
        )
        if not by_kernels:
            monkeypatch.setattr(balance, "fused", lambda *given: False)
        assert balance.fused(probabilities) == by_kernels
        aux = part(Routing(weights, indices, probabilities, leaf), context)
        gradient = None
        if adaptive:
            part.alpha.fill_(0.7)  # as a step would: the backward pass must not see it
        if kind != "none":
            (3 * aux.losses["balance"]).backward()
            gradient = leaf.grad.double()
            if adaptive:
                part.alpha.fill_(0.3)
        found.append((entries(aux), gradient))
    (ours, gradient), (plain, wanted) = found
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        assert ours[name].dtype == (value.float() if value.is_floating_point() else value).dtype
        assert relative_error(ours[name].double(), value.double()) < 1e-5, name
    assert kind == "none" or experts == 1 or relative_error(gradient, wanted) < 1e-5


def test_load_is_summed_in_the_same_order_every_time():
    logits = torch.randn(3000, 6, device=DEVICE)
    runs = []
    for _ in range(2):
        probabilities = logits.softmax(dim=1).requires_grad_()
        indices = routers.largest(logits, 2)[1]
        _, loss, seen = routers.summarise_load(probabilities, indices, "switch", 0.01, 1200)
        loss.backward()
        runs.append([loss.detach(), probabilities.grad, *seen.values()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("drop", ["none", "position"])
@pytest.mark.parametrize("router", ["LinearRouter", "AttentionRouter"])
def test_a_whole_mixture(drop, router, monkeypatch, any_tokens):
    mixture = MixtureOfExperts(16, 8, experts=5, router=router, drop=drop, capacity_factor=0.6).to(
        DEVICE
    )
    x, context = torch.randn(1, 40, 16, device=DEVICE), make_context(1, 40, device=DEVICE)[0]
    runs, cotangent = [], torch.randn_like(x)
    for by_kernels in (True, False):
        if not by_kernels:
            for module in (kernels, routers, moe, balance):
                monkeypatch.setattr(module, "fused", lambda *given: False)
        mixture.zero_grad()
        leaf = x.clone().requires_grad_()
        y, aux = mixture(leaf, context)
        torch.autograd.backward([y, aux.losses["balance"]], [cotangent, torch.ones(()).to(DEVICE)])
        runs.append([y.detach(), leaf.grad, *(p.grad.clone() for p in mixture.parameters())])
        runs[-1] += [v.detach().float() for _, v in sorted(entries(aux).items())]
    for got, want in zip(*runs, strict=True):
        assert relative_error(got, want) < 1e-5
    assert drop == "none" or aux.sums["dropped"] > 0


def test_no_token_needs_no_kernel():
    assert not launching.fused(torch.empty(0, 4, device=DEVICE))
    assert not launching.fused(torch.empty(2, 4, device=DEVICE, dtype=torch.float64))


# ---------------------------------------------------------------------------- further derivatives


def second(function, inputs, by_kernels):
    """Two derivatives of a function: the gradient of a product with its first one."""
    leaves = [x.detach().clone() if by_kernels else x.detach().double() for x in inputs]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    torch.manual_seed(1)
    outputs = function(by_kernels, *leaves)
    cotangents = [torch.randn(y.shape, device=DEVICE).to(y.dtype) for y in outputs]
    cotangents = [cotangent.requires_grad_() for cotangent in cotangents]
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    along = [torch.randn(x.shape, device=DEVICE).to(x.dtype) for x in leaves]
    every = [*leaves, *cotangents]
    found = torch.autograd.grad(first, every, along, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(every, found, strict=True)]
    return [*(g.detach() for g in first), *zeros]


def transform_all(function, inputs):
    """By torch.func: values and gradients under grad, jvp, vmap and a vmapped backward."""
    inputs = tuple(x.detach() for x in inputs)

    def total(*given):
        return sum(y.square().sum() for y in function(True, *given))

    slopes = torch.func.grad(total, tuple(range(len(inputs))))(*inputs)
    along = tuple(torch.ones_like(x) for x in inputs)
    slope = torch.func.jvp(total, inputs, along)[1]
    stacked = tuple(torch.stack([x, 2 * x]) for x in inputs)
    mapped = torch.func.vmap(total)(*stacked)
    return [*slopes, slope, *mapped]


def expect_all_derivatives(function, *inputs, allowed=1e-4):
    """Those of the kernels' functions are those of the plain forms in float64."""
    pairs = zip(*(second(function, inputs, way) for way in (True, False)), strict=True)
    for got, want in pairs:
        assert relative_error(got.double(), want) < allowed
    # Under a transform the plain forms run: as exactly as they do.
    plain = transform_all(lambda _, *given: function(False, *given), inputs)
    for got, want in zip(transform_all(function, inputs), plain, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("drops", [False, True])
def test_rows_have_all_derivatives(drops):
    tokens, experts, k, width = 5, 4, 2, 8
    indices = torch.rand(tokens, experts, device=DEVICE).topk(k).indices
    kept = torch.rand(tokens, k, device=DEVICE) < 0.6 if drops else None
    plain, dispatch = (
        kernels.make_dispatch(indices, experts, kept, kernels=way) for way in (False, True)
    )
    used = torch.arange(tokens * k, device=DEVICE)[:, None] < dispatch.ends[-1]

    def spread(way, x):
        # A dispatch for kernels is made where they run, so a transform's is the plain one.
        ways = dispatch if way and not transformed() else plain
        rows = kernels.spread_rows(x, ways, k, x.dtype)
        return (rows.masked_fill(~used, 0.0),)

    def collect(way, rows, weights):
        ways = dispatch if way and not transformed() else plain
        return (kernels.collect_rows(rows, weights, ways),)

    expect_all_derivatives(spread, torch.randn(tokens, width, device=DEVICE))
    rows = torch.randn(tokens * k, width, device=DEVICE).masked_fill(~used, 0.0)
    expect_all_derivatives(collect, rows, torch.rand(tokens, k, device=DEVICE))


def test_casts_have_all_derivatives():
    def cast(way, x):
        return (kernels.cast_weight(x, torch.bfloat16 if way else x.dtype).to(x.dtype).square(),)

    expect_second = (torch.randn(3, 8, device=DEVICE),)
    for got, want in zip(*(second(cast, expect_second, w) for w in (True, False)), strict=True):
        assert relative_error(got.double(), want) < 2e-2


def test_a_product_of_experts_has_a_second_derivative():
    ends = torch.tensor([16, 16, 48], dtype=torch.int32, device=DEVICE)

    def multiply(way, rows, weight):
        if not way:
            segments = rows.split([16, 0, 32])
            return (torch.cat([x @ w.T for x, w in zip(segments, weight, strict=True)]),)
        lower = rows.bfloat16()
        assert kernels._widens(lower, weight)
        y = kernels.multiply(lower, kernels.cast_weight(weight, torch.bfloat16), weight, ends)
        return (y.float(),)

    inputs = torch.randn(48, 16, device=DEVICE), torch.randn(3, 16, 16, device=DEVICE)
    for got, want in zip(*(second(multiply, inputs, w) for w in (True, False)), strict=True):
        assert relative_error(got.double(), want) < 3e-2


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_a_router_has_all_derivatives(sigmoid, renormalise, any_tokens):
    def choose(_, logits):
        weights, _, probabilities = routers.choose(
            logits, 2, None, sigmoid=sigmoid, renormalise=renormalise
        )
        return weights, probabilities

    expect_all_derivatives(choose, torch.randn(5, 6, device=DEVICE))
    attend = torch.randn(4, 9, device=DEVICE)
    expect_all_derivatives(lambda _, x: (routers.attend_experts(x),), attend)
    x, weight = torch.randn(8, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
    expect_all_derivatives(lambda _, x, w: routers.project(x, w), x, weight)


@pytest.mark.parametrize("kind", ["switch", "squared_mean"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_load_has_a_second_derivative(kind, adaptive):
    tokens, experts = 9, 6
    indices = torch.rand(tokens, experts, device=DEVICE).topk(2).indices
    alpha = torch.tensor(0.3, device=DEVICE)

    def load(way, probabilities):
        if way:
            given = alpha if adaptive else 0.3
            return (routers.summarise_load(probabilities, indices, kind, given, 4)[1],)
        share = balance.load_fractions(balance.count_assignments(indices, experts)).double()
        mean = probabilities.mean(dim=0)
        loss = balance.squared_mean_loss(mean)
        return (0.3 * (balance.switch_loss(mean, share) if kind == "switch" else loss),)

    given = (torch.rand(tokens, experts, device=DEVICE),)
    for got, want in zip(*(second(load, given, way) for way in (True, False)), strict=True):
        assert relative_error(got.double(), want) < 1e-5 if want.any() else not got.any()
    if kind == "squared_mean" and adaptive:
        probabilities = given[0].requires_grad_()
        (loss,) = load(True, probabilities)
        alpha.add_(0.1)
        with pytest.raises(RuntimeError, match="coefficient has moved"):
            torch.autograd.grad(loss, probabilities, create_graph=True)


@pytest.mark.parametrize("router", ["LinearRouter", "AttentionRouter"])
def test_a_whole_mixture_under_transforms_and_twice_differentiated(router, any_tokens):
    made = MixtureOfExperts(16, 8, experts=4, top_k=2, router=router, balance="squared_mean")
    made = made.to(DEVICE)
    weights = {name: weight.detach() for name, weight in made.named_parameters()}
    x = torch.randn(2, 5, 16, device=DEVICE)
    context, _ = make_context(2, 5, device=DEVICE)

    def loss(weights, x, dtype=torch.float32):
        given = {name: weight.to(dtype) for name, weight in weights.items()}
        y, aux = torch.func.functional_call(made, given, (x.to(dtype), context))
        return y.square().sum() + 10 * aux.losses["balance"]

    along = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def product(dtype):
        learn = {name: weight.to(dtype).requires_grad_() for name, weight in weights.items()}
        first = torch.autograd.grad(loss(learn, x, dtype), learn.values(), create_graph=True)
        pairs = zip(first, along.values(), strict=True)
        slope = sum((slope * way.to(dtype)).sum() for slope, way in pairs)
        return dict(zip(weights, torch.autograd.grad(slope, learn.values()), strict=True))

    want = product(torch.float64)
    by_func = torch.func.jvp(torch.func.grad(loss), (weights, x), (along, torch.zeros_like(x)))[1]
    for found in (product(torch.float32), by_func):
        for name, value in want.items():
            assert relative_error(found[name].double(), value) < 1e-3, name


# ---------------------------------------------------------------------------- under a compiler

COMPILED = {
    "attention router": {"router": "AttentionRouter", "z_coefficient": 1e-3},
    "normalised gate, dropping": {
        "router": {
            "class_path": "LinearRouter",
            "init_args": {"logit_norm": 1.0, "bias_rate": 1e-3, "score": "sigmoid"},
        },
        "balance": "squared_mean",
        "adaptive": True,
        "drop": "position",
    },
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_a_compiler_takes_the_kernels_as_operators(options, monkeypatch):
    """In one graph, to the same numbers: outputs, gradients, losses, metrics and counts."""
    monkeypatch.setattr(routers, "MIN_TOKENS", 8)
    made = MixtureOfExperts(32, 16, experts=4, **options).to(DEVICE).train()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, cotangent = torch.randn(2, 2, 12, 32, device=DEVICE)
    context, _ = make_context(2, 12, device=DEVICE)
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    def compute(x):
        with torch.autocast(DEVICE, torch.bfloat16):
            y, aux = made(x, context)
        return (y * cotangent).sum() + sum(aux.losses.values()), y, aux

    torch._dynamo.reset()
    runs = []
    for function in (compute, torch.compile(compute, backend=backend, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        loss, y, aux = function(leaf)
        made.zero_grad()
        loss.backward()
        gradients = [leaf.grad, *(parameter.grad.clone() for parameter in made.parameters())]
        counted = [value.double() for value in (*aux.metrics.values(), *aux.sums.values())]
        runs.append([loss.detach(), y.detach(), *gradients, *counted])
    for got, want in zip(*runs, strict=True):
        assert relative_error(got, want) < 1e-5
    ours = [name.removeprefix("archzoo.").removesuffix(".default") for name in names]
    for operator in ("project_router", "choose_experts", "dispatch_rows", "spread_rows"):
        assert operator in ours
    for operator in ("multiply_experts", "swiglu", "collect_rows", "summarise_load"):
        assert operator in ours


def drawn_for_operators():
    """Arguments of each operator, of 24 tokens, 2 of 4 experts, 32 channels."""
    tokens, experts, k, dim = 24, 4, 2, 32
    randn = functools.partial(torch.randn, device=DEVICE)
    logits = randn(tokens, experts)
    indices = logits.topk(k).indices
    inverse, ends = kernels._dispatch(indices.flatten(), experts, False)
    weights, probabilities = randn(tokens, k), logits.softmax(-1)
    rows, matrices = randn(tokens * k, dim).bfloat16(), randn(experts, 8, dim).bfloat16()
    options = (True, True)
    return {
        "dispatch_rows": (indices.flatten(), experts, False),
        "spread_rows": (randn(tokens, dim), inverse, ends, k, torch.bfloat16),
        "collect_rows": (rows, weights, inverse, ends, k, torch.float32),
        "collect_rows_backward": (randn(tokens, dim), rows, weights, inverse, ends),
        "multiply_experts": (rows, matrices, matrices.float(), ends),
        "multiply_experts_backward": (rows[:, :8], rows, matrices, ends, True, [True, True]),
        "project_router": (randn(tokens, dim), randn(experts, dim)),
        "project_router_back": (randn(tokens, experts), randn(2, dim, 16), None),
        "largest": (logits, k),
        "choose_experts": (logits, None, k, *options),
        "choose_experts_backward": (logits, indices, weights, probabilities, *options),
        "attend_experts": (randn(tokens, 3 * experts),),
        "attend_experts_backward": (randn(tokens, 3 * experts), logits),
        "summarise_load": (probabilities, indices, 1, None, 0.1, 15),
    }


def test_operators_say_what_they_make():
    """Their schema, and shapes, dtypes and strides to a compiler."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for name, given in drawn_for_operators().items():
        operator = getattr(torch.ops.archzoo, name).default
        torch.library.opcheck(operator, given, test_utils=checks)
