"""Autocast leaves float64 alone, as torch's does, and so does every part under it."""

import pytest
import torch

import archzoo
from archzoo.parts import list_parts

FAMILIES = ("retnet", "transformer", "yuan", "skywork")
ADAPTERS = (None, *list_parts("adapter"))


def drawn(net):
    """With adapters that do something."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return net.double().eval()


def of_both(net):
    tokens = torch.randint(net.vocab_size, (2, 8))
    wanted = net(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        return net(tokens).logits, wanted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_of_float64_is_not_rounded(family, adapter):
    net = archzoo.create_model(f"{family}_micro")
    found, wanted = of_both(drawn(net if adapter is None else archzoo.adapt(net, adapter)))
    assert found.dtype == torch.float64
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("linear", list_parts("linear"))
def test_nor_is_a_linear_of_another_class(linear):
    net = archzoo.create_model("transformer_micro", linear=linear)
    found, wanted = of_both(drawn(net))
    assert found.dtype == torch.float64
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


def test_what_is_not_of_one_dtype_is_said_by_torch():
    """No part casts away that a float64 input meets float32 weights."""
    net = archzoo.adapt(archzoo.create_model("transformer_micro", depth=1), "LoRA")
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
        net.blocks[0].mixer.query_key_value(x)
