"""Cutting apart and rotating in one kernel against the plain form, gradients included.

Without a GPU it runs through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo.block import make_context
from archzoo.compiled import keep_traced_functions
from archzoo.kernels import rotation as kernels
from archzoo.linear import Linear
from archzoo.mixers import attention
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


# Gradients of x and W, which are cast as autocast does; of the weight alone where x needs none.
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(3, 3, 16), (4, 2, 12)])
@pytest.mark.parametrize("packed", [False, True])
def test_product_and_rotation_in_one_are_the_plain_forms(heads, key_heads, width, packed):
    torch.manual_seed(width)
    rotary, context = RotaryEmbedding(width), context_of(2, 37, packed)
    layer = Linear(20, {"rows": (heads + 2 * key_heads) * width}).to(DEVICE)
    x = torch.randn(2, 37, 20, device=DEVICE, requires_grad=True)
    assert layer.weight_of_call(x) is layer.weight
    table = rotary.table(context.positions, torch.float32)
    found = kernels.split_product(x, layer.weight, table, heads, key_heads)
    wide, weight = (one.detach().double().requires_grad_() for one in (x, layer.weight))
    wanted = plainly(wide @ weight.T, rotary, heads, key_heads, context)
    grads = [torch.randn_like(part.transpose(1, 2)).transpose(1, 2) for part in found]
    for mine, true in zip(found, wanted, strict=True):
        assert (mine - true).abs().max() < 1e-5
    mine = torch.autograd.grad(found, (x, layer.weight), grads, retain_graph=True)
    true = torch.autograd.grad(wanted, (wide, weight), [grad.double() for grad in grads])
    for one, other in zip(mine, true, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    (alone,) = torch.autograd.grad(found, layer.weight, grads)
    assert torch.equal(alone, mine[1])
    with torch.no_grad():
        again = kernels.split_product(x, layer.weight, table, heads, key_heads)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_product_has_all_derivatives():
    x, weight = (torch.randn(shape, device=DEVICE) for shape in ((1, 3, 5), (12, 5)))
    table = RotaryEmbedding(4).table(torch.arange(3, device=DEVICE)[None], torch.float32)

    def loss(x, weight):
        return sum((part**3).sum() for part in kernels.split_product(x, weight, table, 1, 1))

    given = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(loss, given, eps=1e-2, atol=5e-2, rtol=5e-2)
    assert torch.autograd.gradgradcheck(loss, given, eps=1e-2, atol=0.5, rtol=5e-2)


@pytest.mark.parametrize("form", ["split_product", "split_rotated"])
def test_attention_takes_it_and_compiles_without_a_break(form, monkeypatch):
    torch.manual_seed(0)
    layer = Attention(24, 3).to(DEVICE)
    if form == "split_rotated":  # something waits for the matrix's call
        layer.query_key_value.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 9, 24, device=DEVICE, requires_grad=True)
    context = context_of(2, 9, False)
    calls = []
    split = getattr(kernels, form)
    monkeypatch.setattr(kernels, form, lambda *given: calls.append(1) or split(*given))

    def loss(x):
        return layer.parallel(x, None, context)[0].square().sum()

    def gradients(loss):
        return torch.autograd.grad(loss(x), (x, layer.query_key_value.weight))

    found = gradients(loss)
    assert calls
    monkeypatch.setattr(kernels, form, split)
    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    monkeypatch.setattr(kernels, "available", lambda *_: False)
    monkeypatch.setattr(attention, "fused", lambda *_: False)
    plain = gradients(loss)
    for mine in (found, compiled):
        for one, other in zip(mine, plain, strict=True):
            assert (one - other).norm() < 1e-5 * other.norm()


def test_what_one_table_does_not_describe_takes_the_plain_form(monkeypatch):
    layer = Attention(24, 3).to(DEVICE)
    projected = torch.randn(1, 4, 72, device=DEVICE)
    assert layer.one_table()
    layer.rotary = RotaryEmbedding(8, partial_rotary_factor=0.5)
    assert not layer.one_table()
    assert not kernels.available(projected.double())
    assert not kernels.available(projected.mT)
    assert kernels.available(projected)
    monkeypatch.setattr(kernels, "exporting", lambda: True)  # of torch's own operations
    assert not kernels.available(projected)


class Beside(torch.nn.Module):
    """What stands for a Linear, as peft's own do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_another_module_in_the_linear_s_place_is_called():
    layer, x = Attention(24, 3).to(DEVICE), torch.randn(2, 9, 24, device=DEVICE)
    context = context_of(2, 9, False)
    want = layer.parallel(x, None, context)[0]
    layer.query_key_value = Beside(layer.query_key_value)
    assert (layer.parallel(x, None, context)[0] - want).abs().max() < 1e-5


def test_transforms_that_are_compiled_take_the_plain_form():
    """The product's function has no rule for vmap, and operators have no derivative forward."""
    layer, x = Attention(24, 3).to(DEVICE), torch.randn(3, 1, 5, 24, device=DEVICE)
    context = context_of(1, 5, False)

    def one(x):
        return layer.parallel(x, None, context)[0]

    def forward(x):
        return torch.func.jvp(torch.func.vmap(one), (x,), (x,))[1]

    for run in (torch.func.vmap(one), forward):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        want = run(x)
        assert want.norm() > 0 and (compiled(x) - want).norm() < 1e-5 * want.norm()


def test_a_cache_on_disk_finds_the_graph_again_and_no_other(monkeypatch):
    """Its key is the traced backward pass, too."""
    from torch._dynamo.utils import counters
    from torch._functorch import config
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr(config, "autograd_cache_allow_custom_autograd_functions", False)
    keep_traced_functions()
    torch.manual_seed(0)
    layer, x = Attention(24, 3).to(DEVICE), torch.randn(2, 9, 24, device=DEVICE)
    context, seen = context_of(2, 9, False), []

    def found():
        torch.compiler.reset()
        counters.clear()
        y = torch.compile(lambda x: layer.parallel(x, None, context)[0])(x)
        (grad,) = torch.autograd.grad(y.square().sum(), layer.query_key_value.weight)
        seen.append({n for n in counters["aot_autograd"] if n.startswith("autograd_cache_")})
        return grad

    with fresh_cache():
        first, again = found(), found()
        assert torch.equal(first, again)
        assert seen == [{"autograd_cache_miss", "autograd_cache_saved"}, {"autograd_cache_hit"}]
        real = kernels._SplitProduct.backward

        def doubled(ctx, *grads):
            return tuple(None if grad is None else 2 * grad for grad in real(ctx, *grads))

        monkeypatch.setattr(kernels._SplitProduct, "backward", staticmethod(doubled))
        assert torch.allclose(found(), 2 * first)
        assert "autograd_cache_hit" not in seen[-1]
