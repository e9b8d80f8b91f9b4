"""MoRA: the released code's numbers, no input left unread, and what its shapes promise."""

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

GOLDEN = Path(__file__).parent / "golden" / "adaptation_mora.safetensors"
MICRO = ("transformer_micro", "retnet_micro", "yuan_micro", "skywork_micro")
TYPES = {  # the released code's numbers
    1: {"kind": "sharing"},
    2: {"kind": "sharing", "inputs": "contiguous", "outputs": "contiguous"},
    3: {"kind": "sharing", "inputs": "contiguous"},
    4: {"kind": "sharing", "outputs": "contiguous"},
    6: {"kind": "rotation"},
}
CASES = [
    *[f"type{number}_{shape}" for number in (1, 6) for shape in ("sq", "wide", "tall")],
    *["type2_wide", "type2_tall", "type3_wide", "type4_wide"],
]
SHAPES = [(24, 24), (34, 20), (20, 34), (12, 12), (5, 40), (40, 5), (7, 3), (1, 9), (9, 1), (2, 2)]


def made(rows, columns, stack=(), **options):
    kind = "experts" if stack else "linear"
    target = Target(kind, "blocks.0.mixer.output.output", (*stack, rows, columns))
    mora = archzoo.MoRA(target, **options).double()
    nn.init.normal_(mora.matrix)
    return mora


def golden_of(case):
    with safe_open(GOLDEN, "pt") as file:
        facts = json.loads(file.metadata()[f"{case}.facts"])
    numbers = load_file(GOLDEN)
    start = f"{case}."
    return {k.removeprefix(start): v for k, v in numbers.items() if k.startswith(start)}, facts


def change_of(number, matrix, rows, columns):
    """D M C of the released code's types, written as matrices."""
    size = matrix.shape[0]
    count = math.ceil(columns / size)
    compress = torch.zeros(count * size if number == 6 else size, columns, dtype=torch.float64)
    if number == 6:
        for j in range(count * size):
            compress[j, j % columns] = 1
        half = size // 2
        blocks = []
        for g in range(count):
            turn = torch.zeros(size, size, dtype=torch.float64)
            for j in range(half):
                angle = g * 10_000 ** (-2 * j / size)
                turn[j, j] = turn[j + half, j + half] = math.cos(angle)
                turn[j, j + half], turn[j + half, j] = -math.sin(angle), math.sin(angle)
            blocks.append(matrix @ turn)
        change = torch.block_diag(*blocks) @ compress
        return torch.stack([change[u % (count * size)] for u in range(rows)])
    if number in (1, 4):
        for j in range(count * size):
            compress[j % size, j % columns] += 1
    else:
        for j, group in enumerate(groups(columns, size)):
            compress[group, j] = 1
    taken = [u % size for u in range(rows)] if number in (1, 3) else groups(rows, size)
    return (matrix @ compress)[taken]


def groups(count, size):
    """Which of `size` contiguous groups each of `count` is in, the longer ones first."""
    return [g for g in range(size) for _ in range(count // size + (1 if g < count % size else 0))]


@pytest.mark.parametrize("case", CASES)
def test_the_released_codes_numbers_and_gradients(case):
    golden, facts = golden_of(case)
    number = int(case[4])
    rows, columns = golden["weight"].shape
    tolerance = 1e-6 if number == 6 else 1e-12  # there the code's angles are in float32
    matrix = golden["M"]
    reference = change_of(number, matrix, rows, columns)
    assert relative_error(reference, golden["delta_from_forward"]) < tolerance
    assert int((reference.abs().sum(0) == 0).sum()) == facts["dead_inputs"]
    mora = made(rows, columns, rank=facts["r"], **TYPES[number])
    if facts["dead_inputs"]:  # the one case where this class does something else
        assert not mora.rotates
        assert mora.delta(golden["weight"]).abs().sum(0).min() > 0
        return
    linear = Linear(columns, {"output": rows}).double()
    linear.attach("default", "output", mora)
    x = golden["x"].clone().requires_grad_()
    with torch.no_grad():
        linear.weight.copy_(golden["weight"])
        mora.matrix.zero_()
        assert torch.equal(linear(x), linear.product(x))
        mora.matrix.copy_(matrix)
    y = linear(x)
    assert relative_error(y, golden["y"]) < tolerance
    grads = torch.autograd.grad(y, (x, mora.matrix), golden["gy"])
    assert relative_error(grads[0], golden["grad.x"]) < tolerance
    assert relative_error(grads[1], golden["grad.M"]) < tolerance
    change = mora.delta(linear.weight)
    assert relative_error(change, golden["delta_from_forward"]) < tolerance
    assert torch.linalg.matrix_rank(change) == facts["rank_of_delta"] > facts["r"]
    assert mora.matrix.numel() == facts["params"]


@pytest.mark.parametrize("number", TYPES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_output_is_delta_times_x_and_reads_every_input(number, rows, columns):
    """Of every shape and rank, one matrix or a stack."""
    for rank in range(1, min(rows, columns) + 1):
        for stack in ((), (3,)):
            mora = made(rows, columns, stack, rank=rank, **TYPES[number])
            x = torch.randn(6, columns, dtype=torch.float64)
            change = mora.delta(torch.zeros(*stack, rows, columns, dtype=torch.float64))
            assert change.shape == (*stack, rows, columns)
            got = mora.output(x, torch.zeros(*stack, 6, rows))
            torch.testing.assert_close(got, x @ change.mT, atol=1e-12, rtol=1e-12)
            assert change.abs().sum(-2).min() > 0, "an input is left unread"
            assert change.abs().sum(-1).min() > 0, "a row is left as it is"
            least = min(*mora.matrix.shape[-2:], rows, columns)
            assert (torch.linalg.matrix_rank(change) >= least).all()
            grads = torch.autograd.grad(got.square().sum(), mora.matrix)[0]
            assert grads.abs().min() > 0, "an entry of M learns nothing"


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_size_of_m_is_the_papers_cut_to_the_matrix(rows, columns, rank):
    if rank > min(rows, columns):
        return
    size = math.floor(math.sqrt((rows + columns) * rank) + 0.5)
    sharing = made(rows, columns, rank=rank, kind="sharing")
    assert sharing.matrix.shape == (min(size, rows), min(size, columns))
    rotation = made(rows, columns, rank=rank)
    if rotation.rotates:
        assert rotation.matrix.shape == (size // 2 * 2, size // 2 * 2)
    else:
        assert rotation.matrix.shape == sharing.matrix.shape


def test_a_matrix_of_the_full_size_is_any_change():
    """A size that reaches rows and columns: M is the change itself."""
    mora = made(4, 6, rank=4, kind="sharing")
    assert torch.equal(mora.delta(mora.matrix), mora.matrix)


def test_cyclic_and_contiguous_groups_are_one_up_to_order():
    """Where the size divides rows and columns."""
    cyclic = made(24, 24, rank=3, **TYPES[1])
    contiguous = made(24, 24, rank=3, **TYPES[2])
    with torch.no_grad():
        contiguous.matrix.copy_(cyclic.matrix)
    order = torch.arange(24).view(2, 12).T.flatten()  # of the cyclic ones, by group
    weight = torch.zeros(24, 24)
    assert torch.equal(cyclic.delta(weight)[order][:, order], contiguous.delta(weight))


def test_a_rotation_gives_full_rank_from_few_parameters():
    mora = made(64, 64, rank=1)
    assert mora.rotates
    assert mora.matrix.numel() == 100 < 128
    assert torch.linalg.matrix_rank(mora.delta(mora.matrix)) == 64
    assert torch.linalg.matrix_rank(made(64, 64, rank=1, kind="sharing").delta(mora.matrix)) == 11


@pytest.mark.parametrize("rule", CHECKS["adapter"])
def test_mora_keeps_the_rules(rule):
    finding = run_check(archzoo.MoRA, rule)
    assert finding.passed, finding.detail


@pytest.mark.parametrize("rule", ["gradients", "merged"])
def test_sharing_keeps_the_rules(rule):
    finding = run_check(archzoo.MoRA, rule, **TYPES[2])
    assert finding.passed, finding.detail


@pytest.mark.parametrize("options", [TYPES[1], TYPES[6]])
@pytest.mark.parametrize("name", MICRO)
def test_merged_it_is_what_it_was_beside_every_weight(name, options):
    """All blocks of all Linears, routers and experts too, in both forms."""
    base = archzoo.create_model(name, vocab_size=20)
    paths = [p.target.path for p in list_targets(base) if p.target.kind in ("linear", "experts")]
    adapter = functools.partial(archzoo.MoRA, targets=paths, rank=2, **options)
    net = archzoo.adapt(base.double().eval(), adapter)
    assert len(list(adapter_modules(net))) == len(paths)
    with torch.no_grad():
        for _, module in adapter_modules(net):
            module.matrix.normal_(std=0.05)
        tokens = torch.randint(20, (2, 17))
        want = {form: net(tokens, form=form).logits for form in ("recurrent", "parallel")}
        archzoo.merge_adapters(net)
        for form, logits in want.items():
            assert relative_error(net(tokens, form=form).logits, logits) < 1e-12
            assert relative_error(logits, want["recurrent"]) < 1e-12


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "MoRA: rank=0 must be at least 1 and at most 32"),
        ({"rank": 33}, r"rank=33 must be .* at most 32 for blocks\.0.*query, of 32 rows"),
        ({"kind": "rotate"}, "kind='rotate' is not valid; nearest: rotation"),
        ({"kind": "sharing", "inputs": "cyclc"}, "inputs='cyclc' is not valid; nearest: cyclic"),
        ({"outputs": "contiguous"}, "set kind='sharing' or omit them"),
    ],
)
def test_user_errors_are_answered_in_a_line(options, says):
    spec = {"class_path": "MoRA", "init_args": {"targets": ["query"]} | options}
    with pytest.raises(ValueError, match=says):
        archzoo.create_model("retnet_micro", vocab_size=20, adapter=spec)
