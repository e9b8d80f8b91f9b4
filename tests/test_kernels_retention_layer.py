"""A retention layer's kernels against its plain form, gradients included.

Without a GPU they run through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo.block import init_cursor, make_context
from archzoo.kernels import retention_layer as kernels
from archzoo.mixers import retention as mixers
from archzoo.mixers.retention import Retention
from archzoo.positions.rotary import RotaryEmbedding

define_kernels("archzoo.kernels.retention_layer.triton")
define_kernels("archzoo.kernels.retention.triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def documents_of(rows, time, packed):
    if not packed:
        return None
    torch.manual_seed(1)
    documents = torch.sort(torch.randint(3, (rows, time)), dim=1).values
    index = torch.arange(time)
    first, last = torch.randint(4, (2, rows, 1))
    documents[(index < first) | (index >= time - last)] = -1
    return documents.to(DEVICE)


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def run(layer, x, context, grad, *, by_kernel, monkeypatch):
    """y and the gradients of x and of both matrices."""
    with monkeypatch.context() as patch:
        if not by_kernel:
            patch.setattr(kernels, "available", lambda *_: False)
            patch.setattr(mixers.kernels, "available", lambda *_: False)
        y, state = layer.chunkwise(x, None, context)
    assert state is None
    weights = (layer.query_key_value_gate.weight, layer.output.weight)
    return y, *torch.autograd.grad(y, (x, *weights), grad)


# Widths that fill their blocks and widths that do not; 3 heads, as the base model has.
@pytest.mark.parametrize(
    ("dim", "heads", "factor", "time"),
    [(32, 2, 2.0, 37), (24, 3, 2.0, 20), (12, 2, 4.0, 9), (64, 1, 1.0, 70)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_layer_is_that_of_the_plain_form(dim, heads, factor, time, packed, monkeypatch):
    torch.manual_seed(dim)
    layer = Retention(dim, heads, value_factor=factor).to(DEVICE)
    x = torch.randn(3, time, dim, device=DEVICE, requires_grad=True)
    context, _ = make_context(
        3, time, documents=documents_of(3, time, packed), device=torch.device(DEVICE)
    )
    projected = layer.query_key_value_gate(x)
    assert layer.fits_one_kernel(projected, layer.log_decay(x))
    grad = torch.randn_like(x) * context.valid[..., None]  # nobody looks at padding
    found = run(layer, x, context, grad, by_kernel=True, monkeypatch=monkeypatch)
    wide = x.detach().double().requires_grad_()
    wanted = run(
        layer.double(), wide, context, grad.double(), by_kernel=False, monkeypatch=monkeypatch
    )
    names = ("y", "x", "first matrix", "last matrix")
    for name, mine, true in zip(names, found, wanted, strict=True):
        if name == "y":
            mine, true = mine[context.valid], true[context.valid]
        assert distance(mine, true) < (1e-5 if name == "y" else 1e-4), name


def test_keys_are_scaled_and_channels_turned_by_the_amplitude(monkeypatch):
    """YaRN's amplitude goes both ways: it is in the table, which the gradient takes too."""
    layer = Retention(16, 2).to(DEVICE)
    layer.rotary = RotaryEmbedding(
        8, rope_type="yarn", factor=4.0, original_max_position_embeddings=16
    )
    x = torch.randn(1, 11, 16, device=DEVICE, requires_grad=True)
    context, _ = make_context(1, 11, device=torch.device(DEVICE))
    grad = torch.randn_like(x)
    found = run(layer, x, context, grad, by_kernel=True, monkeypatch=monkeypatch)
    wanted = run(layer, x, context, grad, by_kernel=False, monkeypatch=monkeypatch)
    assert all(distance(mine, true) < 1e-4 for mine, true in zip(found, wanted, strict=True))


def test_bfloat16_rounds_no_more_than_the_parts_do(monkeypatch):
    torch.manual_seed(0)
    layer = Retention(64, 2).to(DEVICE)
    x = torch.randn(2, 80, 64, device=DEVICE, requires_grad=True)
    context, _ = make_context(2, 80, device=torch.device(DEVICE))
    grad = torch.randn_like(x)
    wide = x.detach().double().requires_grad_()
    double = Retention(64, 2).to(DEVICE, torch.float64)
    double.load_state_dict(layer.state_dict())
    wanted = run(double, wide, context, grad.double(), by_kernel=False, monkeypatch=monkeypatch)
    layer, grad = layer.bfloat16(), grad.bfloat16()
    x = x.detach().bfloat16().requires_grad_()
    found = run(layer, x, context, grad, by_kernel=True, monkeypatch=monkeypatch)
    plain = run(layer, x, context, grad, by_kernel=False, monkeypatch=monkeypatch)
    for mine, theirs, true in zip(found, plain, wanted, strict=True):
        assert distance(mine, true) < max(1.5 * distance(theirs, true), 5e-3)


@pytest.mark.parametrize(
    "options",
    [{"gate": False}, {"head_norm": "group"}, {"head_norm": "none"}, {"decay": "learnable"}],
)
def test_other_layers_run_as_before(options):
    layer = Retention(16, 2, **options).to(DEVICE)
    x = torch.randn(1, 5, 16, device=DEVICE)
    assert not layer.fits_one_kernel(layer.query_key_value_gate(x), layer.log_decay(x))


def test_partial_rotation_and_a_state_run_as_before():
    layer = Retention(16, 2).to(DEVICE)
    x = torch.randn(1, 5, 16, device=DEVICE)
    context, _ = make_context(1, 5, device=torch.device(DEVICE))
    y, state = layer.chunkwise(x, layer.init_state(1, device=DEVICE), context)
    assert state is not None
    assert distance(layer.chunkwise(x, None, context)[0], y) < 1e-5
    layer.rotary = RotaryEmbedding(8, partial_rotary_factor=0.5)
    assert not layer.fits_one_kernel(layer.query_key_value_gate(x), layer.log_decay(x))


@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_a_text_are_read_from_state_to_state(packed, monkeypatch):
    torch.manual_seed(3)
    layer = Retention(24, 3).to(DEVICE)
    x = torch.randn(2, 30, 24, device=DEVICE)
    documents = documents_of(2, 30, packed)
    calls = []
    real = kernels.gated_retention_from
    monkeypatch.setattr(
        kernels,
        "gated_retention_from",
        lambda *given, **how: calls.append(1) or real(*given, **how),
    )

    def read(layer, x):
        state, cursor = layer.init_state(2, device=DEVICE), init_cursor(2, DEVICE)
        ys, seen = [], []
        with torch.no_grad():
            for segment in (slice(0, 17), slice(17, 30)):
                some = None if documents is None else documents[:, segment]
                time = segment.stop - segment.start
                context, cursor = make_context(
                    2, time, documents=some, cursor=cursor, device=torch.device(DEVICE)
                )
                y, state = layer.chunkwise(x[:, segment], state, context)
                ys.append(y)
                seen.append(context.valid.expand(2, time))
        return torch.cat(ys, 1), state["memory"], torch.cat(seen, 1)

    y, memory, valid = read(layer, x)
    assert len(calls) == 2
    monkeypatch.setattr(kernels, "available", lambda *_: False)
    monkeypatch.setattr(mixers.kernels, "available", lambda *_: False)
    wanted, wanted_memory, _ = read(layer.double(), x.double())
    assert len(calls) == 2
    assert distance(y[valid], wanted[valid]) < 1e-5 and distance(memory, wanted_memory) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_documents_start_from_a_memory(packed, monkeypatch):
    """By kernels with gradients, without any, token by token, and by none of them."""
    torch.manual_seed(0)
    layer = Retention(32, 2).to(DEVICE)
    x = torch.randn(2, 11, 32, device=DEVICE)
    begun = torch.randn(1, 2, 16, 32, device=DEVICE, requires_grad=True)
    documents = documents_of(2, 11, packed)
    context, _ = make_context(2, 11, documents=documents, device=torch.device(DEVICE), first=4)
    grad = torch.randn_like(x) * context.valid[..., None]

    def compute(layer, begun, x, grad):
        here = context._replace(start={"memory": begun})
        y, _ = layer(x, None, here, "chunkwise")
        slopes = torch.autograd.grad(y, (begun, layer.output.weight), grad)
        with torch.no_grad():
            state = layer.start_state(2, here.start, device=DEVICE, dtype=x.dtype)
            read, _ = layer(x, state, here, "chunkwise")
            steps, _ = layer(x, None, here, "recurrent")
        seen = context.valid.expand(2, 11)
        return y[seen].detach(), *slopes, read[seen], steps[seen]

    found = compute(layer, begun, x, grad)
    monkeypatch.setattr(kernels, "available", lambda *_: False)
    monkeypatch.setattr(mixers.kernels, "available", lambda *_: False)
    wide = begun.detach().double().requires_grad_()
    wanted = compute(layer.double(), wide, x.double(), grad.double())
    for mine, true in zip(found, wanted, strict=True):
        assert distance(mine, true) < 1e-4
    assert distance(wanted[3], wanted[0]) < 1e-12 and distance(wanted[4], wanted[0]) < 1e-12


def test_compiles_without_a_break_and_refuses_a_second_derivative():
    layer = Retention(16, 2).to(DEVICE)
    x = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    context, _ = make_context(2, 9, device=torch.device(DEVICE))

    def loss(x):
        return layer.chunkwise(x, None, context)[0].square().sum()

    (wanted,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    assert distance(found, wanted) < 1e-6
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(loss(x), x, create_graph=True)
