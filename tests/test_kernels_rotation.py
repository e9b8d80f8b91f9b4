"""Cutting apart and rotating in one kernel against the plain form, gradients included.

Without a GPU it runs through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo.block import make_context
from archzoo.kernels import rotation as kernels
from archzoo.mixers.attention import Attention
from archzoo.positions.rotary import RotaryEmbedding

define_kernels("archzoo.kernels.rotation.triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def context_of(rows, time, packed):
    documents = None
    if packed:
        documents = torch.sort(torch.randint(3, (rows, time)), dim=1).values.to(DEVICE)
    return make_context(rows, time, documents=documents, device=torch.device(DEVICE))[0]


def plainly(projected, rotary, heads, key_heads, context):
    width = projected.shape[-1] // (heads + 2 * key_heads)
    parts = projected.unflatten(-1, (-1, width)).split((heads + key_heads, key_heads), dim=2)
    return *rotary.both(parts[0], heads, context.positions), parts[1]


# Widths that fill their blocks and one that does not; grouped queries; tokens that leave a rest.
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(3, 3, 16), (4, 2, 12), (2, 1, 64)])
@pytest.mark.parametrize("packed", [False, True])
def test_parts_and_gradients_are_those_of_the_plain_form(heads, key_heads, width, packed):
    torch.manual_seed(width)
    rows, time, rotary = 2, 37, RotaryEmbedding(width)
    context = context_of(rows, time, packed)
    shape = (rows, time, (heads + 2 * key_heads) * width)
    projected = torch.randn(shape, device=DEVICE, requires_grad=True)
    assert kernels.available(projected)
    table = rotary.table(context.positions, torch.float32)
    found = kernels.split_rotated(projected, table, heads, key_heads)
    wide = projected.detach().double().requires_grad_()
    wanted = plainly(wide, rotary, heads, key_heads, context)
    # As attention gives them: heads before time.
    grads = [torch.randn_like(part.transpose(1, 2)).transpose(1, 2) for part in found]
    for mine, true in zip(found, wanted, strict=True):
        assert mine.is_contiguous() and (mine - true).abs().max() < 1e-5
    (mine,) = torch.autograd.grad(found, projected, grads, create_graph=True)
    (true,) = torch.autograd.grad(wanted, wide, [grad.double() for grad in grads])
    assert (mine - true).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_it_has_all_derivatives():
    projected = torch.randn(1, 3, 12, device=DEVICE, requires_grad=True)
    table = RotaryEmbedding(4).table(torch.arange(3, device=DEVICE)[None], torch.float32)
    weights = [torch.randn(1, 3, 1, 4, device=DEVICE) for _ in range(3)]

    def loss(x):
        parts = kernels.split_rotated(x, table, 1, 1)
        return sum((w * part**3).sum() for w, part in zip(weights, parts, strict=True))

    assert torch.autograd.gradcheck(loss, projected, eps=1e-2, atol=5e-2, rtol=5e-2)
    assert torch.autograd.gradgradcheck(loss, projected, eps=1e-2, atol=0.2, rtol=5e-2)


def test_attention_takes_it_and_compiles_without_a_break(monkeypatch):
    torch.manual_seed(0)
    layer = Attention(24, 3).to(DEVICE)
    x = torch.randn(2, 9, 24, device=DEVICE, requires_grad=True)
    context = context_of(2, 9, False)
    calls = []
    split = kernels.split_rotated
    monkeypatch.setattr(kernels, "split_rotated", lambda *given: calls.append(1) or split(*given))

    def loss(x):
        return layer.parallel(x, None, context)[0].square().sum()

    (found,) = torch.autograd.grad(loss(x), x)
    assert calls
    monkeypatch.setattr(kernels, "split_rotated", split)
    (compiled,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x
    )
    monkeypatch.setattr(kernels, "available", lambda projected: False)
    (plain,) = torch.autograd.grad(loss(x), x)
    for mine in (found, compiled):
        assert (mine - plain).norm() < 1e-5 * plain.norm()


def test_what_one_table_does_not_describe_takes_the_plain_form(monkeypatch):
    layer = Attention(24, 3).to(DEVICE)
    projected = torch.randn(1, 4, 72, device=DEVICE)
    assert layer.splits_in_one(projected)
    layer.rotary = RotaryEmbedding(8, partial_rotary_factor=0.5)
    assert not layer.splits_in_one(projected)
    assert not kernels.available(projected.double())
    assert not kernels.available(projected.mT)
    assert kernels.available(projected)
    monkeypatch.setattr(kernels, "exporting", lambda: True)  # of torch's own operations
    assert not kernels.available(projected)
