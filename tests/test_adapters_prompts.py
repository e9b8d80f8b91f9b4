"""Prompt tuning, P-tuning and prefixes: golden numbers, counts, and documents that begin there."""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import archzoo
from archzoo.adapters import Target
from archzoo.adapters.attach import adapter_modules
from archzoo.contract import CHECKS, run_check
from archzoo.contract.measure import relative_error

GOLDEN = Path(__file__).parent / "golden" / "adaptation_prompts.safetensors"


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def trained(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@functools.cache
def golden(case):
    tensors = load_file(GOLDEN)
    return {n.removeprefix(f"{case}."): t for n, t in tensors.items() if n.startswith(f"{case}.")}


# ---------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("cls", [archzoo.PromptTuning, archzoo.PTuning])
@pytest.mark.parametrize("rule", CHECKS["adapter"])
def test_prompts_keep_the_rules(cls, rule):
    finding = run_check(cls, rule)
    assert finding.passed, finding.detail


# ---------------------------------------------------------------------------- prompts


def test_p_tuning_gives_the_golden_numbers_and_gradients():
    """The authors' encoder, all of its weights."""
    want = golden("v1")
    length, dim = want["prompt"].shape
    adapter = archzoo.PTuning(Target("input", "embedding", (dim,)), length=length).double()
    assert count(adapter) == 3968
    assert count(adapter) == length * dim + 2 * dim**2 + 2 * dim + 12 * dim**2 + 16 * dim
    ours = {"embedding.weight": "vectors"}
    ours |= {n: n.replace("lstm_head", "lstm").replace("mlp_head", "head") for n in want}
    ours["embedding.weight"] = "vectors"
    parameters = dict(adapter.named_parameters())
    theirs = {n: ours[n] for n in want if ours[n] in parameters}
    assert set(theirs.values()) == set(parameters)
    with torch.no_grad():
        for name, own in theirs.items():
            parameters[own].copy_(want[name])
    prompt = adapter.prompt()
    assert relative_error(prompt, want["prompt"]) < 1e-12
    prompt.backward(want["gy"])
    for name, own in theirs.items():
        assert relative_error(parameters[own].grad, want[f"grad.{name}"]) < 1e-12, name
    assert adapter.collapse() == {"encoder": "none"}
    assert count(adapter) == length * dim
    assert relative_error(adapter.prompt(), prompt) < 1e-12


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_a_collapsed_prompt_computes_the_same_and_is_saved_without_its_network(encoder, tmp_path):
    adapter = functools.partial(archzoo.PTuning, length=5, encoder=encoder)
    net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=adapter).eval()
    dim = net.dim
    network = 2 * dim**2 + 2 * dim + (12 * dim**2 + 16 * dim if encoder == "lstm" else 0)
    assert trained(net) == 5 * dim + network
    tokens = torch.randint(20, (2, 9))
    with torch.no_grad():
        want = net(tokens).logits
        archzoo.collapse_adapters(net)
        assert trained(net) == 5 * dim
        assert torch.equal(net(tokens).logits, want)
        archzoo.save_pretrained(tmp_path / "model", net)
        again, _ = archzoo.from_pretrained(tmp_path / "model")
        assert torch.equal(again.eval()(tokens).logits, want)
    assert again.config["adapter"]["init_args"]["encoder"] == "none"
    archzoo.remove_adapters(again)
    assert again.config["adapter"] is None


def test_prompts_start_from_vectors_of_words():
    net = archzoo.create_model("transformer_micro", vocab_size=20)
    table = net.embedding.weight.clone()

    def vectors(**arguments):
        adapted = archzoo.adapt(net, functools.partial(archzoo.PromptTuning, **arguments))
        found = adapted.prompt["default"].vectors.detach().clone()
        archzoo.remove_adapters(net)
        return found

    assert torch.equal(vectors(tokens=[7, 0, 7]), table[[7, 0, 7]])
    drawn = vectors(length=20, seed=1)
    assert torch.equal(drawn, vectors(length=20, seed=1))
    assert not torch.equal(drawn, vectors(length=20, seed=2))
    rows = torch.cdist(drawn, table).argmin(1)
    assert torch.equal(drawn, table[rows])
    assert len(set(rows.tolist())) == 20
    assert vectors(length=30).shape == (30, net.dim)
    normal = vectors(length=2000, start="normal")
    assert abs(normal.std() / table.std() - 1) < 0.02
    assert abs(vectors(length=2000, start="normal", std=0.5).std() / 0.5 - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("PromptTuning", {"length": 0}, "length=0 must be an integer of at least 1"),
        ("PromptTuning", {"tokens": []}, "at least one token"),
        ("PromptTuning", {"tokens": [3, 20]}, "token 20 is not one of the model's 0 to 19"),
        ("PromptTuning", {"start": "word"}, "neither vocabulary nor normal"),
        ("PromptTuning", {"std": -1.0}, "std=-1.0 must be at least 0"),
        ("PTuning", {"length": True}, "length=True must be"),
        ("PTuning", {"encoder": "gru"}, "none of lstm, mlp, none"),
    ],
)
def test_user_errors_are_answered_in_a_line(name, arguments, says):
    spec = {"class_path": name, "init_args": arguments}
    with pytest.raises(ValueError, match=says):
        archzoo.create_model("retnet_micro", vocab_size=20, adapter=spec)


def test_prompts_are_never_decayed_nor_merged():
    from archzoo.training.optim import decay_groups

    for name in ("PromptTuning", "PTuning"):
        net = archzoo.create_model("retnet_micro", vocab_size=20, adapter=name)
        assert [group["weight_decay"] for group in decay_groups(net, 0.1)] == [0.0]
        with pytest.raises(ValueError, match=f"{name} at prompt.default cannot be merged"):
            archzoo.merge_adapters(net)
    assert not [p for p, m in adapter_modules(net) if isinstance(m, nn.Linear)]
