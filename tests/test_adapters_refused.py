"""What a user may get wrong with adapters: one line that names the value and the way out."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import archzoo
from archzoo.training.comparison import check_same_model
from archzoo.training.ranks import configure


def made(**options):
    return archzoo.create_model("transformer_micro", vocab_size=20, **options)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (archzoo.LoRA(rank="4"), "LoRA: rank='4' must be an integer"),
        (archzoo.LoRA(rank=4.0), "LoRA: rank=4.0 must be an integer"),
        (archzoo.MoLoRA(rank=True), "MoLoRA: rank=True must be an integer"),
        (archzoo.MoLoRA(experts="3"), "experts='3' must be an integer of at least 1"),
        (archzoo.MoV(experts=2.0), r"experts=2\.0 must be an integer"),
        (archzoo.LoRA(targets=[None]), r"LoRA: targets=\[None\] must be a list of names"),
        (archzoo.LoRA(targets=4), "LoRA: targets=4 must be a list of names"),
        (archzoo.LoRA(layers=1), r"LoRA: layers=1 must be a list, such as \[1\]"),
        (archzoo.LoRA(layers=[]), r"LoRA: layers=\[\] names no block: omit it"),
        (archzoo.LoRA(layers=[True]), "LoRA: layer True is not one of 0 to 1"),
    ],
)
def test_options_of_another_kind_are_refused(adapter, says):
    net = made()
    before = dict(net.state_dict())
    with pytest.raises(ValueError, match=says) as refused:
        archzoo.adapt(net, adapter)
    assert "\n" not in str(refused.value)
    assert net.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_arguments_in_another_order_are_refused():
    with pytest.raises(TypeError, match=r"LoRA\(4\): options go by name"):
        archzoo.LoRA(4)
    with pytest.raises(TypeError, match=r"not a Decoder: call adapt\(decoder, adapter\)"):
        archzoo.adapt(archzoo.LoRA(), made())


def test_there_must_be_an_adapter_to_remove():
    for net in (made(), archzoo.merge_adapter(made(adapter="LoRA"))):
        with pytest.raises(ValueError, match="has no adapter to remove"):
            archzoo.remove_adapters(net)


def test_several_processes_wait_for_no_adapter_that_is_off():
    class Two(DDPStrategy):
        world_size = 2

    net = made(adapters={"a": "LoRA", "b": "IA3"})
    configure(Two(), net)
    archzoo.disable_adapters(net, "b")
    configure(Two(find_unused_parameters=True), net)
    with pytest.raises(ValueError, match=r"the adapter b is switched off, and DDP .*remove_adapt"):
        configure(Two(), net)


def test_an_adapter_is_not_put_on_a_run_that_is_resumed():
    net, adapted = made(), made(adapter="LoRA")
    with pytest.raises(ValueError, match=r"by --model\.weights instead of --ckpt_path"):
        check_same_model(adapted.config, net.config)


def test_a_compiled_model_is_adapted_and_merged():
    net = torch.compile(made().eval(), backend="eager")
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        base = net(tokens).logits
        archzoo.adapt(net, archzoo.LoRA(rank=2))
        assert torch.equal(net(tokens).logits, base)
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
        adapted = net(tokens).logits
        assert not torch.allclose(adapted, base, atol=1e-3)
        archzoo.merge_adapter(net)
        torch.testing.assert_close(net(tokens).logits, adapted, rtol=1e-4, atol=1e-5)
