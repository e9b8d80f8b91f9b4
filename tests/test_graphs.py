"""Models in one graph: `torch.compile(fullgraph=True)` and `torch.export` of every preset."""

import pytest
import torch
from safetensors.torch import save_file
from torch.export import Dim, export

import archzoo
from archzoo.training.comparison import check_weights_fit
from archzoo.training.module import LanguageModel

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


def test_a_compiled_model_is_the_model_elsewhere(tmp_path):
    """Saved by its own names, adapted, and asked to write."""
    net = whole("transformer").eval()
    compiled = torch.compile(net, backend="eager")
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    archzoo.save_pretrained(tmp_path / "model", compiled)
    loaded, _ = archzoo.from_pretrained(tmp_path / "model")
    net.blocks[0] = net.blocks[0]._orig_mod
    assert list(loaded.state_dict()) == list(net.state_dict())
    tokens = drawn(1, 5)
    assert torch.equal(loaded(tokens).logits, net(tokens).logits)
    wanted = archzoo.generate(net, tokens.tolist(), max_tokens=3, temperature=0).tokens
    assert archzoo.generate(compiled, tokens.tolist(), max_tokens=3, temperature=0).tokens == wanted
    state = net(tokens, net.init_state(1)).state
    archzoo.save_state(tmp_path / "state.safetensors", state, compiled)
    archzoo.load_state(tmp_path / "state.safetensors", net)
    assert archzoo.remove_adapters(archzoo.adapt(compiled, "LoRA")) is net


def test_the_names_of_a_compiled_model_are_read(tmp_path):
    net, other = whole("transformer"), whole("retnet")
    archzoo.save_pretrained(tmp_path, net)
    theirs = {f"_orig_mod.{name}": tensor + 1 for name, tensor in net.state_dict().items()}
    save_file(theirs, tmp_path / "model.safetensors")
    loaded, _ = archzoo.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name] + 1)
    net.load_state_dict(theirs)
    assert torch.equal(net.head.weight, loaded.head.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(theirs)


def test_a_checkpoint_with_the_names_of_a_compiled_model_is_read(tmp_path):
    module = LanguageModel(preset="transformer_micro", vocab_size=16, depth=1)
    content = {
        "hyper_parameters": module.hyper_parameters(),
        "state_dict": {
            name.replace("decoder.", "decoder._orig_mod."): tensor
            for name, tensor in module.state_dict().items()
        },
    }
    torch.save(content, tmp_path / "run.ckpt")
    loaded, _ = archzoo.from_pretrained(tmp_path / "run.ckpt")
    assert torch.equal(loaded.head.weight, module.net.head.weight)
    check_weights_fit(module.net, content["state_dict"])
    module.load_state_dict(content["state_dict"])
