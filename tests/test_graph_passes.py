"""What is changed in the compiler's graphs: on tensors that are not there, and on a GPU."""

import operator

import pytest
import torch
from kernel_device import GPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from archzoo.compiled import options
from archzoo.contract.measure import relative_error
from archzoo.graph_passes import WeightGradients

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
        values = tree_map(lambda x: x.meta["val"] if isinstance(x, Node) else x, arguments)
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
            WeightGradients()(self.graph)
        self.graph.lint()
        return [node.target for node in self.graph.nodes if node.op == "call_function"]


def gradient(made, swapped=False, rows=6, columns=3, tokens=8):
    """Of a weight (6, 3): as torch makes it of a gradient (8, 6) and an input (8, 3)."""
    grad, x = made.given(tokens, rows), made.given(tokens, columns)
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


OF_WEIGHT = torch.ops.archzoo.merged_weight_gradients.default
MANY = 16384  # tokens
OF_FACTORS = torch.ops.archzoo.low_rank_gradients.default


def of_changes(made, product, ranks=(8, 8)):
    """The gradients of changes of a weight's halves, out of its own, and nodes of the first."""
    rows, columns = product.meta["val"].shape
    firsts = [made.given(rank, columns, dtype=torch.float32) for rank in ranks]
    seconds = [made.given(rows // 2, rank, dtype=torch.float32) for rank in ranks]
    return made.call(OF_WEIGHT, product, firsts, seconds, [0, rows // 2], [2.0, 2.0])


@pytest.mark.parametrize("swapped", [False, True])
def test_changes_take_their_gradients_without_the_weight_s(swapped):
    made = Made()
    found = of_changes(made, gradient(made, swapped, 1024, 512, MANY))
    first = made.call(operator.getitem, found, 0)
    targets = made.changed(first)
    assert OF_FACTORS in targets and OF_WEIGHT not in targets and ATEN.mm.default not in targets
    (node,) = made.graph.find_nodes(op="call_function", target=OF_FACTORS)
    grad, x, firsts, seconds, begins, scales = node.args
    for given, width in ((grad, 1024), (x, 512)):
        assert given.meta["val"].shape == (MANY, width)
        while given.op != "placeholder":  # turned twice, and so as it was given
            assert given.target is ATEN.permute.default
            given = given.args[0]
        assert given.meta["val"].shape == (MANY, width)
    assert [len(firsts), len(seconds), begins, scales] == [2, 2, [0, 512], [2.0, 2.0]]
    assert [v.shape for v in node.meta["val"]] == [(8, 512), (8, 512), (512, 8), (512, 8)]


def test_other_gradients_of_changes_stay():
    made = Made()
    small = of_changes(made, gradient(made, rows=32, columns=16, tokens=MANY))
    assert OF_WEIGHT in made.changed(small)  # whose gradient is soon made
    made = Made()
    few = of_changes(made, gradient(made, rows=1024, columns=512, tokens=2048))
    assert OF_WEIGHT in made.changed(few)  # which leave most of a GPU idle
    made = Made()
    unlike = of_changes(made, gradient(made, rows=1024, columns=512, tokens=MANY), ranks=(8, 4))
    assert OF_WEIGHT in made.changed(unlike)
    made = Made()
    product = gradient(made, rows=1024, columns=512, tokens=MANY)
    assert OF_WEIGHT in made.changed(of_changes(made, product), product)  # the weight learns, too
    made = Made()
    given = made.given(1024, 512)
    assert OF_WEIGHT in made.changed(of_changes(made, given))  # of no product
    made = Made("cpu")
    assert OF_WEIGHT in made.changed(
        of_changes(made, gradient(made, rows=1024, columns=512, tokens=MANY))
    )


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_on_a_gpu_a_compiled_adapter_learns_the_same(monkeypatch):
    """Of a block whose matrices are taken apart, beside the plain form in float64."""
    from archzoo import graph_passes
    from archzoo.adapters import Target
    from archzoo.adapters.lora import LoRA
    from archzoo.linear import Linear

    torch.manual_seed(0)
    layer = Linear(512, {"query": 512, "key": 512, "value": 512}, bias=False).cuda()
    for block in ("query", "value"):
        layer.attach("adapter", block, LoRA(Target("linear", block, (512, 512)), rank=8).cuda())
    layer.weight.requires_grad_(False)
    learn = [p for n, p in layer.named_parameters() if "adapter" in n]
    for parameter in learn:
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(4, 4096, 512, device="cuda")
    seen = []
    own = graph_passes.low_rank.cheaper_joined
    monkeypatch.setattr(
        graph_passes.low_rank, "cheaper_joined", lambda *given: seen.append(own(*given)) or seen[-1]
    )
    torch.compiler.reset()

    def gradients(run, x):
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        return torch.autograd.grad(y.double().square().sum(), learn)

    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = gradients(torch.compile(layer, options=options()), x)
    assert seen == [True]
    for mine, eager in zip(compiled, gradients(layer, x), strict=True):
        assert relative_error(mine, eager) < 1e-2


def test_a_cache_of_compiled_graphs_knows_it():
    assert WeightGradients().uuid() == WeightGradients().uuid() is not None
    found = options()["post_grad_custom_pre_pass"]
    assert isinstance(found, WeightGradients)
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
