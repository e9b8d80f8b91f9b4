"""What is changed in the compiler's graphs: on tensors that are not there, and on a GPU."""

import pytest
import torch
from kernel_device import GPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

from archzoo.compiled import options
from archzoo.graph_passes import GradientsInFloat32

ATEN, CONVERT = torch.ops.aten, torch.ops.prims.convert_element_type.default


class Made:
    """A graph of nodes that know their results, as the compiler's do."""

    def __init__(self, device="cuda"):
        self.graph, self.mode, self.device = Graph(), FakeTensorMode(), device

    def given(self, *shape, dtype=torch.bfloat16):
        node = self.graph.placeholder("x")
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self.device)
        return node

    def call(self, target, *arguments):
        node = self.graph.call_function(target, arguments)
        values = [x.meta["val"] if hasattr(x, "meta") else x for x in arguments]
        with self.mode:
            if target is ATEN.mm.default:
                shape = values[0].shape[0], values[1].shape[1]
                node.meta["val"] = torch.empty(shape, dtype=values[0].dtype, device=self.device)
            else:
                node.meta["val"] = target(*values)
        return node

    def changed(self, *results):
        self.graph.output(results)
        with self.mode:
            GradientsInFloat32()(self.graph)
        self.graph.lint()
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


def gradient(made, swapped=False):
    """Of a weight (6, 3): as torch makes it of a gradient (8, 6) and an input (8, 3)."""
    grad, x = made.given(8, 6), made.given(8, 3)
    if not swapped:
        return made.call(ATEN.mm.default, made.call(ATEN.permute.default, grad, [1, 0]), x)
    product = made.call(ATEN.mm.default, made.call(ATEN.permute.default, x, [1, 0]), grad)
    return made.call(ATEN.permute.default, product, [1, 0])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_product_returns_a_weight_s_gradient_in_float32(swapped):
    made = Made()
    wide = made.call(CONVERT, gradient(made, swapped), torch.float32)
    targets = made.changed(wide)
    assert ATEN.mm.dtype in targets
    assert CONVERT not in targets and ATEN.mm.default not in targets
    (output,) = made.graph.find_nodes(op="output")
    ((result,),) = output.args
    value = result.meta["val"]
    assert value.dtype == torch.float32 and value.shape == (6, 3) and value.is_contiguous()

    # The numbers are those of the product, in whatever order it is written.
    torch.manual_seed(0)
    grad, x = torch.randn(8, 6), torch.randn(8, 3)
    first, second, _ = result.args

    def computed(node):
        if node.op == "placeholder":
            return grad if node.meta["val"].shape[1] == 6 else x
        assert node.target is ATEN.permute.default
        return computed(node.args[0]).permute(*node.args[1])

    assert torch.equal(computed(first), grad.T) and torch.equal(computed(second), x)


def test_what_else_is_cast_stays():
    made = Made()
    read = made.call(CONVERT, gradient(made), torch.float32)
    again = made.call(ATEN.neg.default, read)  # read again: it is not what is returned
    assert CONVERT in made.changed(again)
    made = Made()
    product = gradient(made)
    wide = made.call(CONVERT, product, torch.float32)
    assert CONVERT in made.changed(wide, product)  # another reads it in bf16
    made = Made()
    assert CONVERT in made.changed(made.call(CONVERT, made.given(6, 3), torch.float32))
    made = Made()
    wide = made.call(CONVERT, gradient(made), torch.float64)
    assert CONVERT in made.changed(wide)
    made = Made("cpu")  # which has no such product
    assert CONVERT in made.changed(made.call(CONVERT, gradient(made), torch.float32))


def test_a_cache_of_compiled_graphs_knows_it():
    assert GradientsInFloat32().uuid() == GradientsInFloat32().uuid() is not None
    found = options()["post_grad_custom_pre_pass"]
    assert isinstance(found, GradientsInFloat32)
    assert options() == options()  # else Dynamo compiles anew for each


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_on_a_gpu_a_gradient_is_not_rounded():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32, bias=False, device="cuda")
    x = torch.randn(128, 64, device="cuda")

    def grad(run):
        layer.weight.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        return layer.weight.grad

    eager = grad(layer)
    compiled = grad(torch.compile(layer, options=options()))
    assert torch.equal(eager, eager.bfloat16().float())
    assert not torch.equal(compiled, compiled.bfloat16().float())
    assert (compiled - eager).abs().max() <= 2.0**-7 * eager.abs().max()
