"""Every preset under every kind of derivative, held against finite differences in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import MICRO
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F

import archzoo
from archzoo.mixers.attention import attend_all, attend_plainly
from archzoo.norm import rms_norm

VOCABULARY = 12
Weights = dict[str, Tensor]


def make(name: str, **arguments: Any) -> nn.Module:
    """A preset in float64, training, its weights moved off their small start."""
    torch.manual_seed(0)
    if name.startswith("abacus"):
        digits = {"digit_tokens": list(range(10)), "operator_tokens": [10, 11], "longest_run": 4}
        arguments["embedding"] = {"class_path": "AbacusEmbedding", "init_args": digits}
    net = archzoo.create_model(name, vocab_size=VOCABULARY, **arguments).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def loss_of(net: nn.Module, **arguments: Any) -> Callable[[Weights], Tensor]:
    """The loss of a small batch as a function of the weights, auxiliary losses with it."""
    tokens = torch.randint(0, VOCABULARY, (2, 7))
    examples = torch.arange(2)[:, None].expand(2, 6)

    def loss(weights: Weights) -> Tensor:
        given = {"examples": examples} | arguments
        output = functional_call(net, weights, (tokens[:, :-1],), given)
        total = F.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        for layer in output.aux:
            total = total + sum(layer.losses.values())
        return total

    return loss


def weights_of(net: nn.Module) -> Weights:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def gradient(loss: Callable[[Weights], Tensor], weights: Weights) -> Weights:
    """By one backward pass, as training makes it."""
    learn = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    found = torch.autograd.grad(loss(learn), list(learn.values()), allow_unused=True)
    pairs = zip(learn.items(), found, strict=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}


def direction_of(weights: Weights) -> Weights:
    drawn = {name: torch.randn_like(weight) for name, weight in weights.items()}
    length = torch.stack([value.square().sum() for value in drawn.values()]).sum().sqrt()
    return {name: value / length for name, value in drawn.items()}


def moved(weights: Weights, along: Weights, by: float) -> Weights:
    return {name: weight + by * along[name] for name, weight in weights.items()}


def dot(a: Weights, b: Weights) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in b]).sum()


def error(got: Weights, want: Weights) -> float:
    difference = {name: got[name] - want[name] for name in want}
    return float((dot(difference, difference) / dot(want, want)).sqrt())


def differences(
    loss: Callable[[Weights], Tensor], weights: Weights, along: Weights, step: float = 1e-5
) -> Weights:
    """The Hessian's product with a direction, by the gradients on either side."""
    ahead = gradient(loss, moved(weights, along, step))
    behind = gradient(loss, moved(weights, along, -step))
    return {name: (ahead[name] - behind[name]) / (2 * step) for name in weights}


def twice_backward(loss: Callable[[Weights], Tensor], weights: Weights, along: Weights) -> Weights:
    learn = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    names, values = list(learn), list(learn.values())
    first = torch.autograd.grad(loss(learn), values, create_graph=True, allow_unused=True)
    slope = dot({n: g for n, g in zip(names, first, strict=True) if g is not None}, {
        n: along[n] for n, g in zip(names, first, strict=True) if g is not None
    })  # fmt: skip
    second = torch.autograd.grad(slope, values, allow_unused=True)
    pairs = zip(learn.items(), second, strict=True)
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}


def by_functional(loss: Callable[[Weights], Tensor], weights: Weights, along: Weights) -> Weights:
    names = list(weights)

    def positional(*values: Tensor) -> Tensor:
        return loss(dict(zip(names, values, strict=True)))

    given = tuple(weights.values()), tuple(along[name] for name in names)
    _, found = torch.autograd.functional.hvp(positional, *given)
    return dict(zip(names, found, strict=True))


def forward_over_reverse(
    loss: Callable[[Weights], Tensor], weights: Weights, along: Weights
) -> Weights:
    return jvp(grad(loss), (weights,), (along,))[1]


def reverse_over_forward(
    loss: Callable[[Weights], Tensor], weights: Weights, along: Weights
) -> Weights:
    return grad(lambda given: jvp(loss, (given,), (along,))[1])(weights)


def reverse_over_reverse(
    loss: Callable[[Weights], Tensor], weights: Weights, along: Weights
) -> Weights:
    return grad(lambda given: dot(grad(loss)(given), along))(weights)


SECOND = [
    twice_backward,
    by_functional,
    forward_over_reverse,
    reverse_over_forward,
    reverse_over_reverse,
]


@pytest.mark.parametrize("name", MICRO)
def test_second_derivatives_are_right_by_every_way(name: str) -> None:
    """A Hessian's product with a vector was 109 % off; any second derivative must be a right one.

    So is the first by `torch.func`, by dual numbers, and by them where gradients are off.
    """
    net = make(name)
    loss, weights = loss_of(net), weights_of(net)
    along = direction_of(weights)
    first, want = gradient(loss, weights), differences(loss, weights, along)
    for way in SECOND:
        assert error(way(loss, weights, along), want) < 1e-7, way.__name__
    assert error(grad(loss)(weights), first) < 1e-12
    slope = dot(first, along)
    assert (jvp(loss, (weights,), (along,))[1] - slope).abs() < 1e-12
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(w, along[n]) for n, w in weights.items()}
            assert (forward_ad.unpack_dual(loss(dual)).tangent - slope).abs() < 1e-12


@pytest.mark.parametrize("name", MICRO)
def test_vmap_gives_each_example_its_gradient(name: str) -> None:
    """Over the tokens, and over models side by side."""
    net = make(name).eval()
    weights = weights_of(net)
    tokens = torch.randint(0, VOCABULARY, (3, 7))

    def loss(given: Weights, row: Tensor) -> Tensor:
        logits = functional_call(net, given, (row[None, :-1],)).logits
        return F.cross_entropy(logits[0], row[1:])

    each = vmap(grad(loss), in_dims=(None, 0))(weights, tokens)
    for index, row in enumerate(tokens):
        want = gradient(functools.partial(loss, row=row), weights)
        assert error({n: g[index] for n, g in each.items()}, want) < 1e-12
    models = [moved(weights, direction_of(weights), by) for by in (0.0, 0.5)]
    stacked = {n: torch.stack([model[n] for model in models]) for n in weights}
    found = vmap(loss, in_dims=(0, None))(stacked, tokens[0])
    for value, model in zip(found, models, strict=True):
        assert (value - loss(model, tokens[0])).abs() < 1e-12


@pytest.mark.parametrize("name", MICRO)
def test_hessians_of_one_weight_agree(name: str) -> None:
    """jacfwd over jacrev, jacrev over jacrev, and a Jacobian of batched gradients."""
    net = make(name)
    loss, weights = loss_of(net), weights_of(net)
    key = next(n for n in weights if n.endswith("norm.weight"))

    def of_one(some: Tensor) -> Tensor:
        return loss(weights | {key: torch.cat([some, weights[key][3:]])})

    one = weights[key][:3]
    unit = {n: torch.zeros_like(w) for n, w in weights.items()}
    unit[key][2] = 1.0
    row = differences(loss, weights, unit)[key][:3]
    for way in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        assert ((way(of_one)(one)[2] - row).norm() / row.norm()) < 1e-7

    def slopes(some: Tensor) -> Tensor:
        return torch.autograd.grad(of_one(some), some, create_graph=True)[0]

    jacobian = torch.autograd.functional.jacobian(slopes, one, vectorize=True)
    assert ((jacobian[2] - row).norm() / row.norm()) < 1e-7


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("name", MICRO)
def test_every_form_with_packed_documents(name: str, form: str) -> None:
    """Padding, where a head's output is 0 and a root has no slope, stays out of derivatives."""
    net = make(name, heads=2)
    documents = torch.tensor([[-1, -1, 0, 0, 1, 1], [3, 3, 3, 4, 4, -1]])
    loss, weights = loss_of(net, documents=documents, form=form), weights_of(net)
    along = direction_of(weights)
    want = differences(loss, weights, along)
    for way in (twice_backward, forward_over_reverse):
        assert error(way(loss, weights, along), want) < 1e-7, way.__name__


def test_blocks_computed_again_take_the_weights_they_took() -> None:
    """In the backward pass of other weights' loss they took the model's own: 100 % off."""
    net = make("skywork_micro", activation_checkpointing=True)
    loss, weights = loss_of(net), weights_of(net)
    along = direction_of(weights)
    other = moved(weights, along, 1.0)
    slope = dot(gradient(loss, other), along)
    with torch.no_grad():
        ahead, behind = (loss(moved(other, along, by)) for by in (1e-5, -1e-5))
    assert (slope - (ahead - behind) / 2e-5).abs() < 1e-7
    want = differences(loss, other, along)
    for way in SECOND:
        assert error(way(loss, other, along), want) < 1e-7, way.__name__


def test_a_state_under_transforms_is_not_written_into() -> None:
    """Where gradients are off a call writes into its state; a transform's must get a new one."""
    for name in MICRO:
        net = make(name).eval()
        weights = weights_of(net)
        tokens = torch.randint(0, VOCABULARY, (2, 5))

        def read(given: Weights, row: Tensor, net: nn.Module = net) -> Tensor:
            state = net.init_state(1)
            for token in row:
                logits, state, _ = functional_call(net, given, (token[None, None], state))
            return logits[0, 0]

        with torch.no_grad():
            found = vmap(read, in_dims=(None, 0))(weights, tokens)
            want = torch.stack([read(weights, row) for row in tokens])
            assert (found - want).abs().max() < 1e-12
            along = direction_of(weights)
            of_row = functools.partial(read, row=tokens[0])
            slope = jvp(of_row, (weights,), (along,))[1]
            ahead, behind = (of_row(moved(weights, along, by)) for by in (1e-5, -1e-5))
            assert (slope - (ahead - behind) / 2e-5).abs().max() < 1e-8


def test_norm_has_all_derivatives() -> None:
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for given in ((x, weight), (x,), (x.detach(), weight), (x.mT.contiguous().mT, weight)):
        checked = {"check_forward_ad": True, "check_batched_grad": True}
        assert torch.autograd.gradcheck(rms_norm, given, **checked)
        assert torch.autograd.gradgradcheck(rms_norm, given, check_batched_grad=True)
    zero = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: rms_norm(x, weight, 0.5), (zero,))


@pytest.mark.parametrize("mask", ["causal", "bool", "float", "learned", "none"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_has_all_derivatives(mask: str, kv_heads: int) -> None:
    """And its first ones, like its values, are those of torch's kernel to the last bit."""
    double = {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(1, heads, 3, 2, **double) for heads in (4, kv_heads, kv_heads))
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    added = torch.randn(1, 4, 3, 3, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    masks = {"causal": None, "none": None, "bool": seen, "float": added}
    learned = torch.randn(1, 4, 3, 3, **double)

    def attend(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, how: Any = attend_all) -> Tensor:
        return how(q, k, v, bias[0] if bias else masks[mask], mask == "causal")

    given = (q, k, v, learned) if mask == "learned" else (q, k, v)
    assert torch.autograd.gradcheck(attend, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, given, fast_mode=True)
    torch.testing.assert_close(attend(*given), attend(*given, how=attend_plainly))

    def by_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=True
        )

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        if dtype != torch.float64 and mask in ("float", "learned"):
            continue  # a mask has the dtype of q
        lower = [x.detach().to(dtype).requires_grad_() for x in given]
        both = [attend(*lower), attend(*lower, how=by_torch)]
        assert torch.equal(*both)
        weight = torch.randn_like(both[0])
        slopes = [torch.autograd.grad(y, lower, weight) for y in both]
        assert all(torch.equal(*pair) for pair in zip(*slopes, strict=True))
