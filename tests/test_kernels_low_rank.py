"""A weight with its changes of low rank in one kernel, its gradients, against the plain form.

Without a GPU they run through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo import low_rank
from archzoo.contract.measure import relative_error
from archzoo.kernels import low_rank as kernels
from archzoo.linear import Linear
from archzoo.low_rank import Change

define_kernels("archzoo.kernels.low_rank.triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


# Of each change the first row, how many, its rank and scale.
WHOLE = ((0, 40, 3, 0.5), (40, 17, 8, -2.0), (57, 13, 1, 1.0))
GAPS = ((5, 33, 17, 2.0), (50, 6, 4, 0.25))
ALONE = ((0, 70, 8, 2.0),)


def drawn(places, columns=150, rows=70):
    torch.manual_seed(columns)
    changes = [
        Change(
            begin,
            torch.randn(rank, columns, device=DEVICE, requires_grad=True),
            torch.randn(count, rank, device=DEVICE, requires_grad=True),
            scale,
        )
        for begin, count, rank, scale in places
    ]
    return torch.randn(rows, columns, device=DEVICE), changes


def plainly(weight, changes):
    for begin, first, second, scale, *_ in changes:
        room = (0, 0, begin, len(weight) - begin - len(second))
        weight = weight + scale * torch.nn.functional.pad(second @ first, room)
    return weight


def wide(weight, changes):
    return weight.double(), [
        change._replace(
            first=change.first.detach().double().requires_grad_(),
            second=change.second.detach().double().requires_grad_(),
        )
        for change in changes
    ]


def factors(changes):
    return [change.first for change in changes] + [change.second for change in changes]


def taken(weight, changes):
    return kernels.available(weight, [c.first for c in changes], [c.begin for c in changes])


@pytest.mark.parametrize("places", [WHOLE, GAPS, ALONE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_and_gradients_are_those_of_the_plain_form(places, dtype):
    weight, changes = drawn(places)
    assert taken(weight, changes)
    found = low_rank.merged(weight, changes, dtype)
    true_weight, true_changes = wide(weight, changes)
    wanted = plainly(true_weight, true_changes)
    assert found.dtype == dtype
    if dtype == torch.bfloat16:  # rounded once; the interpreter cuts off instead
        exact = wanted.to(torch.bfloat16)
        assert ((found - exact).abs() <= 2.0**-7 * exact.abs()).all()
        assert not GPU or (found != exact).float().mean() < 1e-3
    else:
        assert relative_error(found, wanted) < 1e-6
    grad = torch.randn_like(wanted).to(dtype)
    mine = torch.autograd.grad(found, factors(changes), grad)
    true = torch.autograd.grad(wanted, factors(true_changes), grad.double())
    for one, other in zip(mine, true, strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_gradient_of_the_weight_is_there_where_it_is_trained():
    weight, changes = drawn(GAPS)
    weight.requires_grad_(True)
    grad = torch.randn_like(weight)
    found = low_rank.merged(weight, changes, torch.float32)
    (of_weight,) = torch.autograd.grad(found, weight, grad)
    assert torch.equal(of_weight, grad)


def test_it_has_all_derivatives():
    weight, changes = drawn(((0, 3, 2, 0.5), (4, 2, 1, 1.0)), columns=5, rows=6)

    def cubed(*given):
        pairs = zip(changes, given[:2], given[2:], strict=True)
        new = [change._replace(first=a, second=b) for change, a, b in pairs]
        return (low_rank.merged(weight, new, torch.float32) ** 3).sum()

    def plain(*given):
        pairs = zip(changes, given[:2], given[2:], strict=True)
        new = [change._replace(first=a, second=b) for change, a, b in pairs]
        return (plainly(weight.double(), new) ** 3).sum()

    given = factors(changes)
    vectors = [torch.randn_like(x) for x in given]
    found = torch.autograd.functional.vhp(cubed, tuple(given), tuple(vectors))[1]
    double = [tuple(x.double() for x in part) for part in (given, vectors)]
    wanted = torch.autograd.functional.vhp(plain, *double)[1]
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-5


def test_other_changes_take_the_plain_form():
    weight, changes = drawn(GAPS)
    assert taken(weight, changes)
    assert not taken(weight.double(), changes)
    assert not taken(weight, changes[::-1])  # not in order, as two of the same rows are not
    assert not taken(weight, [*changes, changes[-1]])
    five = drawn([(begin, 2, 1, 1.0) for begin in range(0, 10, 2)])
    assert not taken(*five)
    many = drawn(((0, 70, 65, 1.0),))
    assert not taken(*many)
    for given in (five, many, (weight, [*changes, changes[-1]])):
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):  # rounds nothing before
            found = low_rank.merged(*given, torch.float32)
        assert relative_error(found, plainly(*wide(*given))) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_trains_by_it_as_beside_its_weight(bias, monkeypatch):
    from archzoo import linear
    from archzoo.adapters import Target
    from archzoo.adapters.lora import LoRA

    torch.manual_seed(0)
    layer = Linear(24, {"query": 16, "key": 8, "value": 12}, bias=bias).to(DEVICE)
    for block in ("query", "value"):
        target = Target("linear", block, (layer.blocks[block], 24))
        layer.attach("adapter", block, LoRA(target, rank=2).to(DEVICE))
    for name, parameter in layer.named_parameters():
        if "adapter" in name:
            torch.nn.init.normal_(parameter)
    x = torch.randn(3, 5, 24, device=DEVICE, requires_grad=True)
    learn = [x, *layer.parameters()]

    def gradients(call):
        y = call(x)
        return y, torch.autograd.grad(y.square().sum(), learn)

    beside = gradients(layer)
    monkeypatch.setattr(linear, "cheaper_merged", lambda *_: True)
    inside = gradients(layer)
    assert relative_error(inside[0], beside[0]) < 1e-6
    for one, other in zip(inside[1], beside[1], strict=True):
        assert relative_error(one, other) < 1e-5
    weight = layer.weight_of_call(x)
    assert (weight is None) == bias
    if weight is not None:
        assert relative_error(torch.nn.functional.linear(x, weight), beside[0]) < 1e-6
    torch.compiler.reset()
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled[1], inside[1], strict=True):
        assert relative_error(one, other) < 1e-6


def test_operators_say_what_they_make():
    weight, changes = drawn(WHOLE)
    firsts, seconds = ([getattr(c, name) for c in changes] for name in ("first", "second"))
    rest = [change.begin for change in changes], [change.scale for change in changes]
    given = {
        "merged_weight": (weight, firsts, seconds, *rest, torch.bfloat16),
        "merged_weight_gradients": (weight, firsts, seconds, *rest),
    }
    weight, changes = drawn(THREE)
    firsts, seconds = ([getattr(c, name) for c in changes] for name in ("first", "second"))
    rest = [change.begin for change in changes], [change.scale for change in changes]
    tokens = (torch.randn(20, width, device=DEVICE) for width in weight.shape)
    given["low_rank_gradients"] = *tokens, firsts, seconds, *rest
    for name, arguments in given.items():
        operator = getattr(torch.ops.archzoo, name).default
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_many_ranks_have_smaller_tiles(monkeypatch):
    """Of 64 ranks those of 32 need 144 KiB of shared memory, where most GPUs have 99."""
    weight, changes = drawn(((0, 70, 64, 0.5),), columns=300)
    sizes = []

    def launched(*given, run=kernels.launch, **options):
        sizes.extend(options[n] for n in ("LONG_ROWS", "LONG_COLUMNS") if n in options)
        run(*given, **options)

    monkeypatch.setattr(kernels, "launch", launched)
    grad = torch.randn_like(weight)
    mine = torch.autograd.grad(
        low_rank.merged(weight, changes, torch.float32), factors(changes), grad
    )
    assert sizes == [128, 128]
    true_weight, true_changes = wide(weight, changes)
    wanted = plainly(true_weight, true_changes)
    true = torch.autograd.grad(wanted, factors(true_changes), grad.double())
    for one, other in zip(mine, true, strict=True):
        assert relative_error(one, other) < 1e-6


# Changes of one rank, and the weight's rows and columns.
THREE = ((0, 40, 3, 0.5), (40, 17, 3, -2.0), (57, 13, 3, 1.0))
JOINED = {
    "blocks": (((0, 40, 3, 0.5), (40, 17, 3, -2.0), (57, 13, 3, 1.0)), 70, 150),
    "at 16 bytes": (((0, 16, 8, 2.0), (16, 16, 8, 0.5), (32, 16, 8, 1.0)), 48, 64),
    "gaps": (((5, 33, 4, 2.0), (50, 6, 4, 0.25)), 70, 40),
    "four": (((0, 10, 2, 1.0), (10, 20, 2, 2.0), (40, 9, 2, 3.0), (60, 30, 2, 4.0)), 90, 40),
    "wider than high": (((0, 70, 8, 2.0),), 70, 150),
    "some rows of it": (((7, 40, 3, 0.5),), 60, 150),
    "higher than wide": (((0, 140, 3, 0.5),), 140, 30),
    "many ranks": (((3, 15, 32, 0.5),), 18, 14),
}


@pytest.mark.parametrize("case", JOINED)
@pytest.mark.parametrize("tokens", [7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_come_without_that_of_the_weight(case, tokens, dtype):
    places, rows, columns = JOINED[case]
    _, changes = drawn(places, columns, rows)
    firsts, seconds = ([getattr(c, name).detach() for c in changes] for name in ("first", "second"))
    begins, scales = [c.begin for c in changes], [c.scale for c in changes]
    wide_grad = torch.randn(tokens, rows + 6, device=DEVICE, dtype=dtype)
    x = torch.randn(columns, tokens, device=DEVICE, dtype=dtype).T  # column by column
    for grad in (wide_grad[:, 6:], wide_grad[:, 3:-3].contiguous()):  # rows apart, and not
        found = kernels.joined_gradients(grad, x, firsts, seconds, begins, scales)
        whole = grad.double().T @ x.double()
        parts = list(zip(begins, scales, firsts, seconds, strict=True))
        wanted = [s * b.double().T @ whole[at : at + len(b)] for at, s, _, b in parts]
        wanted += [s * whole[at : at + len(b)] @ a.double().T for at, s, a, b in parts]
        for mine, true, given in zip(found, wanted, firsts + seconds, strict=True):
            assert mine.dtype == torch.float32 and mine.shape == given.shape
            # Factors and hidden states are rounded as the weight's products are.
            assert relative_error(mine, true) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
        again = kernels.joined_gradients(grad, x, firsts, seconds, begins, scales)
        assert all(map(torch.equal, found, again))  # summed in a fixed order


def test_gradients_that_nothing_flows_into_are_zero():
    _, changes = drawn(THREE)
    firsts, seconds = ([getattr(c, name).detach() for c in changes] for name in ("first", "second"))
    rest = [c.begin for c in changes], [c.scale for c in changes]
    for tokens in (0, 20):
        grad = torch.zeros(tokens, 70, device=DEVICE)
        x = torch.randn(tokens, 150, device=DEVICE)
        found = kernels.joined_gradients(grad, x, firsts, seconds, *rest)
        assert not any(map(torch.count_nonzero, found))


def test_joined_gradients_are_cheaper_for_large_matrices_of_equal_ranks():
    assert kernels.cheaper_joined(16384, 1536, 512, [8, 8, 8])
    assert kernels.cheaper_joined(16384, 512, 1368, [8])
    assert not kernels.cheaper_joined(16384, 128, 128, [8])  # the weight's gradient is soon made
    assert not kernels.cheaper_joined(16384, 1536, 512, [8, 8, 4])
    assert not kernels.cheaper_joined(
        16384, 1536, 512, [16, 16, 16]
    )  # 1.16 times as long on an H200
    assert not kernels.cheaper_joined(16384, 512, 512, [32])  # where sums take 1.16 times, too
    # Fewer programs than a GPU runs take as long as those that fill it; so does a second turn.
    for tokens, cheaper in ((2048, False), (8192, False), (17_000, False), (32_768, True)):
        assert kernels.cheaper_joined(tokens, 1536, 512, [8, 8, 8]) is cheaper
    assert not kernels.cheaper_joined(0, 1536, 512, [8])
