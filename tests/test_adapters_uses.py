"""Every method of adaptation in every way that a model is used: compiled, copied, switched, ..."""

import copy
import functools

import pytest
import torch

import archzoo
from archzoo.adapters.attach import adapter_modules
from archzoo.contract.measure import relative_error
from archzoo.parts import list_parts
from archzoo.training.sharding import shard

METHODS = list_parts("adapter")
TOKENS = torch.randint(20, (2, 11), generator=torch.Generator().manual_seed(2))
DOCUMENTS = torch.tensor([[-1] * 2 + [0] * 4 + [1] * 5, [0] * 11])


def recipe(cls):
    """A method that is small enough for a micro model."""
    takes = list_parts("adapter")[cls.__name__].__init__.__annotations__
    small = {"rank": 2, "experts": 3, "length": 3}
    return functools.partial(cls, **{name: n for name, n in small.items() if name in takes})


def moved(net):
    """The model with its adapters off where they start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in adapter_modules(net):
            for parameter in module.parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.05 * drawn)
    return net


def made(cls, preset="retnet_micro", **options):
    torch.manual_seed(0)
    net = archzoo.create_model(preset, vocab_size=20, init_std=0.2, depth=1, **options).double()
    return moved(archzoo.adapt(net, recipe(cls)))


def gradients(net, **options):
    net.zero_grad()
    net(TOKENS, **options).logits.square().mean().backward()
    return {n: p.grad for n, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_a_compiler_follows_every_method(cls):
    net = made(cls).train()
    want = copy.deepcopy(gradients(net))
    torch._dynamo.reset()
    # What is taken apart for prompts depends on the text.
    net.compile(backend="eager", fullgraph="input" not in cls.kinds)
    for name, got in gradients(net).items():
        assert relative_error(got, want[name]) < 1e-11, name


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_recomputed_blocks_give_the_same_gradients(cls):
    """Also of weights that a functional call puts in for the forward pass alone."""
    net = made(cls, activation_checkpointing=True)
    want = copy.deepcopy(gradients(net.eval(), documents=DOCUMENTS))  # which recomputes nothing
    for name, got in gradients(net.train(), documents=DOCUMENTS).items():
        assert relative_error(got, want[name]) < 1e-12, name
    learned = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
    learned = {name: tensor.requires_grad_() for name, tensor in learned.items()}
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    output = torch.func.functional_call(net, learned, (TOKENS,), {"documents": DOCUMENTS})
    grads = torch.autograd.grad(output.logits.square().mean(), list(learned.values()))
    for name, got in zip(learned, grads, strict=True):
        assert relative_error(got, want[name]) < 1e-12, name


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_a_copy_shares_nothing_with_the_model(cls):
    """Not even what the modules of several layers share."""
    net = made(cls).eval()
    with torch.no_grad():
        want = net(TOKENS).logits
        copied = copy.deepcopy(net)
        assert torch.equal(copied(TOKENS).logits, want)
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3)
        assert torch.equal(net(TOKENS).logits, want)
        assert not torch.equal(copied(TOKENS).logits, want)


@pytest.mark.parametrize("cls", [cls for cls in METHODS.values() if "state" in cls.kinds])
def test_a_learned_state_is_not_sharded(cls):
    """It is read before its block's weights are gathered, and torch would not say so in words."""
    with pytest.raises(ValueError, match=f"{cls.__name__} at .* cannot be sharded") as refused:
        shard(made(cls), None, 2)
    assert "\n" not in str(refused.value)
