"""SwiGLU's kernels, alone and with the product behind it, against plain forms in float64.

Without a GPU they run through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels
from torch._dynamo.backends.debugging import aot_eager

from archzoo.block import make_context
from archzoo.contract import relative_error
from archzoo.feedforward.dense import GatedFeedForward
from archzoo.kernels import launching
from archzoo.kernels import swiglu as kernels
from archzoo.linear import Linear

define_kernels("archzoo.kernels.swiglu.triton")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def plainly(x, weight):
    return kernels.swiglu_plainly(x) @ weight.t()


def check(compute, plain, *inputs, allowed):
    """Result and gradients, in turn, of a form and of the plain one in float64."""
    found = []
    for function, wide in ((compute, False), (plain, True)):
        leaves = [x.detach().double() if wide else x.detach().clone() for x in inputs]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        torch.manual_seed(1)
        grad = torch.randn(y.shape, device=DEVICE)
        found.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for got, want in zip(*found, strict=True):
        assert relative_error(got.double(), want) < allowed


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 24, 1030])  # one block, a part of one, more than one
def test_alone(dtype, width):
    torch.manual_seed(width)
    x = (3 * torch.randn(5, 2 * width, device=DEVICE)).to(dtype)
    assert launching.fused(x)
    check(kernels.swiglu, kernels.swiglu_plainly, x, allowed=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 24, 1030])
def test_with_the_product_behind_it(dtype, width):
    torch.manual_seed(width)
    x = (3 * torch.randn(2, 5, 2 * width, device=DEVICE)).to(dtype)
    weight = torch.randn(8, width, device=DEVICE).to(dtype)
    check(kernels.swiglu_product, plainly, x, weight, allowed=TOLERANCE[dtype])


def test_a_kept_launch_takes_tensors_that_start_anywhere():
    """Compiled for tensors that start at 16 bytes, it must not be handed another."""
    buffer = torch.randn(5 * 32 + 1, device=DEVICE)
    for start in (0, 0, 1, 1, 0):
        x = buffer[start : start + 5 * 32].view(5, 32)
        assert relative_error(kernels.swiglu(x), kernels.swiglu_plainly(x)) < 1e-6, start


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_feed_forward_takes_it(autocast, compiled):
    """By kernels as by torch, in eager mode and in a graph without a break."""
    torch.manual_seed(0)
    layer = GatedFeedForward(16, 24).to(DEVICE)
    x = torch.randn(2, 7, 16, device=DEVICE, requires_grad=True)
    context, _ = make_context(2, 7, device=torch.device(DEVICE))
    grad, graphs = torch.randn_like(x), []

    def run(x):
        return layer(x, context)[0]

    def keep(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    by_kernels = torch.compile(run, fullgraph=True, backend=keep) if compiled else run
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=autocast):
        y = by_kernels(x)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    if compiled:
        called = {str(node.target) for node in graphs[0].graph.nodes}
    else:
        called = {node.name().lower() for node in _graph(y)}
    assert any("swiglu_product" in name for name in called)
    found = [y, *torch.autograd.grad(y, [x, *layer.parameters()], grad.to(y.dtype))]
    wide = layer.double()
    x = x.detach().double().requires_grad_()
    y, _ = wide(x, context)
    wanted = [y, *torch.autograd.grad(y, [x, *wide.parameters()], grad.double())]
    for mine, true in zip(found, wanted, strict=True):
        assert relative_error(mine.double(), true) < (2e-2 if autocast else 1e-5)


def _graph(y):
    """The nodes of autograd behind y."""
    waiting, seen = [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [after for after, _ in node.next_functions]
    return seen


def test_it_keeps_its_inputs_alone():
    x = torch.randn(4, 48, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, 24, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.swiglu_product(x, weight)
    assert sorted(tensor.numel() for tensor in kept) == [weight.numel(), x.numel()]


def test_a_frozen_weight_gets_no_gradient(monkeypatch):
    layer = GatedFeedForward(16, 24).to(DEVICE)
    x = torch.randn(1, 3, 16, device=DEVICE, requires_grad=True)
    context, _ = make_context(1, 3, device=torch.device(DEVICE))
    (true,) = torch.autograd.grad(layer(x, context)[0].square().sum(), x)
    layer.down.weight.requires_grad_(False)
    monkeypatch.setattr(kernels, "_again_operator", None)  # which would make one
    (mine,) = torch.autograd.grad(layer(x, context)[0].square().sum(), x)
    assert relative_error(mine, true) < 1e-6


def test_whoever_waits_for_a_call_gets_one():
    layer, seen = GatedFeedForward(8, 8).to(DEVICE), []
    x = torch.randn(1, 3, 8, device=DEVICE)
    context, _ = make_context(1, 3, device=torch.device(DEVICE))
    want, _ = layer(x, context)
    hook = layer.down.register_forward_hook(lambda *_: seen.append(1))
    y, _ = layer(x, context)
    assert seen == [1] and relative_error(y, want) < 1e-6
    hook.remove()
    assert layer.down.weight_of_call(x) is layer.down.weight
    with_hook = layer.down.register_full_backward_pre_hook(lambda *_: None)
    assert layer.down.weight_of_call(x) is None
    with_hook.remove()


@pytest.mark.parametrize("width", [4])
def test_other_linears_are_called(width):
    x = torch.randn(3, width, device=DEVICE)

    class Other(Linear):
        pass

    alone = Linear(width, {"down": 8}).to(DEVICE)
    assert alone.weight_of_call(x) is alone.weight
    assert Other(width, {"down": 8}).weight_of_call(x) is None
    assert Linear(width, {"down": 8}, bias=True).weight_of_call(x) is None
    assert Linear(width, {"down": 8}, stack=2).weight_of_call(x) is None
    assert alone.to(torch.bfloat16).weight_of_call(x) is None  # torch refuses the call
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        assert alone.weight_of_call(x) is alone.weight
    alone.forward = lambda x: x  # as offloading does
    assert alone.weight_of_call(x.bfloat16()) is None


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_both_have_all_derivatives():
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    loose = {"eps": 1e-2, "atol": 5e-2, "rtol": 5e-2}
    for function, inputs in ((kernels.swiglu, (x,)), (kernels.swiglu_product, (x, weight))):
        assert torch.autograd.gradcheck(function, inputs, **loose)
        assert torch.autograd.gradgradcheck(function, inputs, **loose)


def test_under_a_transform_the_plain_forms_run():
    x = torch.randn(3, 8, device=DEVICE)
    found = torch.func.grad(lambda x: kernels.swiglu(x).square().sum())(x)
    wanted = torch.func.grad(lambda x: kernels.swiglu_plainly(x).square().sum())(x)
    assert relative_error(found, wanted) < 1e-6
    inside = torch.func.vmap(lambda x: x * launching.fused(x))(x)
    assert not inside.any() and launching.fused(x)


def test_compiled_forward_derivatives_are_those_of_the_plain_form():
    """An operator has none, and its tangent would be 0."""
    layer, x = GatedFeedForward(6, 4).to(DEVICE), torch.randn(1, 3, 6, device=DEVICE)
    context, _ = make_context(1, 3, device=torch.device(DEVICE))

    def tangent(x):
        return torch.func.jvp(lambda x: layer(x, context)[0], (x,), (x,))[1]

    want = tangent(x)
    found = torch.compile(tangent, fullgraph=True, backend="aot_eager")(x)
    assert want.norm() > 0 and relative_error(found, want) < 1e-6


def test_another_module_after_it_is_called():
    class Beside(torch.nn.Module):  # as peft's own
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    layer, x = GatedFeedForward(6, 4).to(DEVICE), torch.randn(1, 3, 6, device=DEVICE)
    context, _ = make_context(1, 3, device=torch.device(DEVICE))
    want = layer(x, context)[0]
    layer.down = Beside(layer.down)
    assert relative_error(layer(x, context)[0], want) < 1e-6


def test_kernels_take_no_batch_of_gradients():
    """torch.func.vmap over a backward pass gets the plain form's; `is_grads_batched` is refused."""
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    y, batch = kernels.swiglu(x), torch.randn(2, 3, 4, device=DEVICE)

    def back(grad):
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    want = torch.stack([back(grad) for grad in batch])
    assert relative_error(torch.func.vmap(back)(batch), want) < 1e-5
    with pytest.raises(RuntimeError, match=r"[Cc]annot access"):
        torch.autograd.grad(y, x, batch, is_grads_batched=True)


def test_operators_say_what_they_make():
    """Their schema, and shapes, dtypes and strides to a compiler."""
    x, weight = torch.randn(6, 16, device=DEVICE), torch.randn(4, 8, device=DEVICE)
    given = {
        "swiglu": (x,),
        "swiglu_backward": (x, x[:, :8].contiguous()),
        "swiglu_product": (x, weight),
        "swiglu_backward_again": (x, x[:, :8].contiguous()),
    }
    for name, arguments in given.items():
        operator = getattr(torch.ops.archzoo, name).default
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)
