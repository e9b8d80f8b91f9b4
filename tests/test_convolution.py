"""The short convolution before a mixer: torch's numbers, documents, its place in a decoder.

Forms, hand-offs, documents and gradients are held by the contract, tests/test_contract.py, alone
and in a decoder before attention.
"""

import json

import pytest
import torch
from torch.nn import functional as F

import archzoo
from archzoo import cli
from archzoo.block import detach, fork, make_context, nbytes, reorder
from archzoo.contract import relative_error
from archzoo.convolution import ShortConvolution, last_valid, previous

DOUBLE = torch.float64


@pytest.mark.parametrize("taps", [2, 4, 7])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_it_is_torchs_depthwise_convolution(taps, activation):
    part = ShortConvolution(12, taps=taps, activation=activation).double()
    x = torch.randn(3, 9, 12, dtype=DOUBLE, requires_grad=True)
    y, state = part(x, None, make_context(3, 9)[0])
    assert state is None
    theirs = F.conv1d(F.pad(x.mT, (taps - 1, 0)), part.weight.T[:, None], groups=12).mT
    want = theirs if activation == "none" else F.silu(theirs)
    assert relative_error(y, want) < 1e-12
    inputs = [x, part.weight]
    got, wanted = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, want))
    for ours, other in zip(got, wanted, strict=True):
        assert relative_error(ours, other) < 1e-12


@pytest.mark.parametrize("padding", [False, True])
def test_previous_is_the_token_before_in_its_document(padding):
    """Over padding inside a row as well, as positions are counted there."""
    rows = torch.tensor([[-1, 4, 4, -1, 4, 7], [4, 7, 7, 7, -1, -1]])
    context, _ = make_context(2, 6, documents=rows if padding else None)
    x = torch.randn(2, 6, 3, dtype=DOUBLE)
    got = previous(x, None, context)
    zero = torch.zeros(3, dtype=DOUBLE)
    for row in range(2):
        for t in range(6):
            if not context.valid[row, t]:
                continue
            before = [s for s in range(t) if context.documents[row, s] == context.documents[row, t]]
            assert torch.equal(got[row, t], x[row, before[-1]] if before else zero)
    last = last_valid(x, torch.zeros(2, 3, dtype=DOUBLE), context)
    assert torch.equal(last[0], x[0, 5]) and torch.equal(last[1], x[1, 3 if padding else 5])


def test_a_segment_of_padding_leaves_the_state():
    part = ShortConvolution(4).double()
    x = torch.randn(2, 5, 4, dtype=DOUBLE)
    _, state = part(x, part.init_state(2, dtype=DOUBLE), make_context(2, 5)[0])
    assert torch.equal(state["inputs"], x[:, 2:])
    padding, _ = make_context(2, 3, documents=torch.full((2, 3), -1))
    _, after = part(torch.randn(2, 3, 4, dtype=DOUBLE), state, padding)
    assert torch.equal(after["inputs"], state["inputs"])


@pytest.fixture(params=["retention", "pattern", "post", "looped"])
def net(request):
    arguments = {
        "retention": {},
        "pattern": {"pattern": ["Retention", "ShortConvolution", "Attention"], "depth": 3},
        "post": {"norm_placement": "post"},
        "looped": {"loops": 2, "injection": "layer"},
    }[request.param]
    net = archzoo.create_model("retnet_micro", convolution=4, init_std=0.3, **arguments)
    return net.double().eval()


def test_cut_anywhere_it_gives_the_same(net):
    """Packed and padded too: each document as alone, whatever the lengths of the calls."""
    tokens = torch.randint(64, (2, 23))
    rows = torch.tensor([[-1] * 3 + [0] * 14 + [1] * 6, [0] * 2 + [1] * 1 + [2] * 16 + [-1] * 4])
    with torch.no_grad():
        for form in ("parallel", "chunkwise", "recurrent"):
            got, state, begin = [], net.init_state(2), 0
            for time in (2, 1, 1, 5, 14):
                part = slice(begin, begin + time)
                out = net(tokens[:, part], state, rows[:, part], form=form)
                got.append(out.logits)
                state, begin = out.state, begin + time
            got = torch.cat(got, dim=1)
            for row, numbers in enumerate(rows):
                for number in numbers.unique().tolist():
                    here = numbers == number
                    if number >= 0:
                        alone = net(tokens[row, here][None]).logits[0]
                        assert relative_error(got[row, here], alone) < 1e-12


def test_a_state_is_forked_reordered_and_detached(net):
    tokens = torch.randint(64, (2, 9))
    state = net(tokens[:, :6], net.init_state(2)).state
    with torch.no_grad():
        want = net(tokens).logits[:, 6:]
        swapped = reorder(detach(fork(state)), torch.tensor([1, 0]))
        got = net(tokens[:, 6:].flip(0), swapped).logits.flip(0)
    assert relative_error(got, want) < 1e-12
    assert not any(leaf.requires_grad for leaf in swapped["blocks"][0]["convolution"].values())
    assert relative_error(net(tokens[:, 6:], state).logits, want) < 1e-12


def test_checkpointing_activations_changes_nothing(net):
    tokens = torch.randint(64, (2, 9))
    gradients = []
    for recompute in (False, True):
        net.activation_checkpointing = recompute
        net.train().zero_grad()
        net(tokens).logits.square().mean().backward()
        gradients.append(net.blocks[0].convolution.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_a_number_a_class_and_none_fill_the_slot():
    plain = archzoo.create_model("retnet_micro")
    assert plain.config["convolution"] is None
    full = {"class_path": "ShortConvolution", "init_args": {"taps": 4}}
    for given in (4, full, archzoo.ShortConvolution, "ShortConvolution"):
        net = archzoo.create_model("retnet_micro", convolution=given)
        assert net.parameter_count() == plain.parameter_count() + 2 * 4 * 32
        grown = nbytes(net.init_state(1)) - nbytes(plain.init_state(1))
        assert grown == 2 * 3 * 32 * 4, "three vectors a layer, in float32"
    archzoo.register_model(
        "retnet_test_near",
        archzoo.registry.get_preset("retnet_micro").arguments | {"convolution": 3},
    )
    try:
        net = archzoo.create_model("retnet_test_near")
        assert net.config["convolution"]["init_args"] == {"taps": 3}
        assert archzoo.create_model("retnet_test_near", convolution="none").config == plain.config
    finally:
        del archzoo.registry._presets["retnet_test_near"]


def test_parameters_are_matched_with_it():
    want = archzoo.create_model("retnet_tiny").parameter_count()
    net = archzoo.create_model("retnet_tiny", match="parameters", convolution=16)
    assert abs(net.parameter_count() / want - 1) < 0.01
    assert net.width < 176


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (1, "taps=1 must be an integer of at least 2"),
        (True, "taps=True must be"),
        ("Attention", "there is no convolution 'Attention'; nearest: ShortConv"),
        ("ShortConvolutio", "there is no convolution 'ShortConvolutio'; nearest: ShortConv"),
        ({"class_path": "ShortConvolution", "init_args": {"tap": 4}}, "no argument 'tap'"),
    ],
)
def test_what_does_not_fit_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        archzoo.create_model("retnet_micro", convolution=given)


def test_it_is_saved_shown_and_older_models_load_without(tmp_path, capsys):
    net = archzoo.create_model("retnet_micro", convolution=3).eval()
    archzoo.save_pretrained(tmp_path / "near", net)
    again, _ = archzoo.from_pretrained(tmp_path / "near")
    assert again.config == net.config
    tokens = torch.randint(64, (1, 8))
    assert torch.equal(again(tokens).logits, net(tokens).logits)
    cli.main(["show", str(tmp_path / "near")])
    printed = capsys.readouterr().out
    assert "ShortConvolution (taps: 3)" in printed
    assert "2 x convolution" in printed and "192" in printed
    plain = archzoo.create_model("retnet_micro").eval()
    archzoo.save_pretrained(tmp_path / "plain", plain)
    path = tmp_path / "plain" / "config.json"
    written = json.loads(path.read_text())
    assert written["decoder"].pop("convolution", "absent") is None
    path.write_text(json.dumps(written))
    again, _ = archzoo.from_pretrained(tmp_path / "plain")
    assert torch.equal(again(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(
    ("options", "taps"),
    [("--model.convolution 3", 3), ("--model.convolution ShortConvolution", 4)],
)
def test_it_is_set_from_the_command_line_and_a_file(options, taps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = "--data Addition --data.batch_size 2 --trainer.max_steps 1 --trainer.accelerator cpu"
    common += " --trainer.limit_val_batches 0 --trainer.default_root_dir ."
    arguments = f"fit --model.preset retnet_micro {common} --name first {options}".split()
    assert cli.main(arguments) == 0
    assert cli.main(["fit", "--config", "first/config.yaml", "--name", "second"]) == 0
    for run in ("first", "second"):
        model = archzoo.checkpoint.load(f"{run}/last.ckpt", "cpu").model
        assert model.blocks[1].convolution.taps == taps
