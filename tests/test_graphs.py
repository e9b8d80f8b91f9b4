"""Models in one graph: `torch.compile(fullgraph=True)` and `torch.export` of every preset."""

import pytest
import torch
from torch.export import Dim, export

import archzoo

HYBRID = {"pattern": ["Retention", "Attention"], "depth": 2}
ABACUS = {
    "class_path": "AbacusEmbedding",
    "init_args": {"digit_tokens": list(range(10)), "max_shift": 0},
}


def whole(family):
    """A small model of a preset's parts."""
    torch.manual_seed(0)
    options = {"hybrid": HYBRID, "abacus": {"embedding": ABACUS}}.get(family, {})
    name = "retnet" if family == "hybrid" else family
    return archzoo.create_model(f"{name}_micro", vocab_size=16, **({"depth": 1} | options))


def families(*fast):
    every = ("retnet", "transformer", "yuan", "skywork", "abacus", "hybrid")
    slow = pytest.mark.slow  # 2 to 5 s each, and the others go through the same lines
    return [name if name in fast else pytest.param(name, marks=slow) for name in every]


def drawn(rows, time):
    return torch.randint(16, (rows, time))


@pytest.mark.parametrize("family", families("yuan", "abacus"))
def test_a_model_is_one_graph_of_any_length(family):
    net = whole(family).eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for time in (12, 19):
            tokens = drawn(2, time)
            assert torch.allclose(compiled(tokens).logits, net(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("family", families("retnet", "yuan"))
def test_a_model_is_exported_with_a_dynamic_length(family):
    net = whole(family).eval()
    sizes = {0: Dim("batch", max=64), 1: Dim("time", max=100_000)}
    exported = export(net, (drawn(2, 12),), dynamic_shapes=(sizes,)).module()
    with torch.no_grad():
        for rows, time in ((2, 2), (3, 12), (1, 200)):
            tokens = drawn(rows, time)
            assert torch.allclose(exported(tokens).logits, net(tokens).logits, atol=1e-5)
