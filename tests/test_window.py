"""How far back heads read: against numbers by hand, and against what models do."""

import math

import pytest
import torch

import archzoo
from archzoo import cli
from archzoo.analysis.window import outgrown, windows
from archzoo.block import init_cursor, make_context, nbytes

# By hand, of 8 heads: log 2 and log 100 over -log(1 - 2^-5), ..., -log(1 - 2^-12); and over
# 1 - gamma from 1/32 to 1/512, evenly in the logarithm.
HALF = {
    "default": [22, 44, 88, 177, 355, 709, 1419, 2839],
    "paper_lm": [22, 33, 49, 72, 108, 160, 238, 355],
}
HUNDREDTH = {"default": (145, 18_860), "paper_lm": (145, 2_356)}


def retnet(decay="default", **arguments):
    mixer = {"class_path": "Retention", "init_args": {"decay": decay}}
    return archzoo.create_model("retnet_micro", **{"mixer": mixer} | arguments)


@pytest.mark.parametrize("decay", HALF)
def test_both_schedules_by_hand(decay):
    found = windows(retnet(decay, heads=8))
    assert [(window.layer, window.head) for window in found] == [
        (layer, head) for layer in range(2) for head in range(8)
    ]
    assert [round(window.half_life) for window in found] == 2 * HALF[decay]
    assert (round(found[0].one_percent), round(found[7].one_percent)) == HUNDREDTH[decay]


@pytest.mark.parametrize("decay", ["default", "paper_lm", "learnable", 0.9])
def test_a_token_really_weighs_gamma_to_the_n(decay):
    """In the recurrent form, whatever tokens follow: S_n holds gamma^n of what the first put in."""
    mixer = archzoo.Retention(16, 2, decay=decay).double()
    model = retnet(decay)
    if decay == "learnable":
        with torch.no_grad():
            mixer.decay_rate += torch.tensor([0.5, -0.25])
            model.blocks[1].mixer.decay_rate.copy_(mixer.decay_rate)
    predicted = windows(model)[2:]
    n = round(predicted[0].one_percent)
    x = torch.randn(1, n + 1, 16, dtype=torch.float64, requires_grad=True)
    some = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    state, cursor, gradients = mixer.init_state(1, dtype=torch.float64), init_cursor(1), []
    for t in range(n + 1):
        context, cursor = make_context(1, 1, cursor=cursor)
        _, state = mixer.step(x[:, t : t + 1], state, context)
        if t in (0, n):
            weighed = (state["memory"] * some).sum((0, 2, 3))  # of each head
            gradients.append(
                torch.stack(
                    [torch.autograd.grad(w, x, retain_graph=True)[0][0, 0] for w in weighed]
                )
            )
    new, old = gradients
    for head, window in enumerate(predicted):
        torch.testing.assert_close(old[head], new[head] * window.gamma**n, rtol=1e-5, atol=0)
    assert predicted[0].gamma ** n == pytest.approx(0.01, rel=0.06)  # n is a whole number
    half = predicted[1]
    assert half.gamma**half.half_life == pytest.approx(0.5)
    assert half.gamma**half.one_percent == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "dtype", "length"),
    [
        ({}, torch.float32, 17),  # 2 heads of 16 x 32 floats against 2 x 32 a token
        ({}, torch.bfloat16, 33),  # the state stays float32
        ({"heads": 1}, torch.float32, 33),
        ({"loops": 2}, torch.float32, 17),
        ({"convolution": 4}, torch.float32, 17),  # both have one
        ({"pattern": ["Retention", "Attention"]}, torch.float32, 17),
        ({"pattern": ["ShortConvolution"]}, torch.float32, 2),  # 3 x 32 against 2 x 32 a token
    ],
)
def test_the_cache_outgrows_the_state_where_predicted(arguments, dtype, length):
    own = archzoo.create_model("retnet_micro", **arguments).to(dtype)
    swap = {"mixer": "Attention", "pattern": None}
    cached = archzoo.Decoder(**own.config | swap).to(dtype)
    assert outgrown(own) == length

    def measured(model, time):
        with torch.no_grad():
            state = model.init_state(1, capacity=time)
            return nbytes(model(torch.zeros(1, time, dtype=torch.int64), state).state)

    assert measured(cached, length) > measured(own, length)
    assert measured(cached, length - 1) <= measured(own, length - 1)


def test_attention_has_no_window(capsys):
    model = archzoo.create_model("transformer_micro")
    assert {window.half_life for window in windows(model)} == {None}
    assert outgrown(model) is None
    assert cli.main(["show", "transformer_micro", "--window"]) == 0
    assert capsys.readouterr().out == "no window: Attention has no decay\n"


def test_show_takes_presets_and_checkpoints(tmp_path, capsys):
    assert cli.main(["show", "retnet_tiny", "--window"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()[1:5]]
    assert rows[0] == ["0-3", "0", "0.96875", "22", "145"]
    assert rows[3] == ["0-3", "3", "0.996094", "177", "1,177"]
    assert "outgrows the state at 33 tokens" in printed
    model = retnet("learnable", pattern=None)
    with torch.no_grad():
        model.blocks[1].mixer.decay_rate.copy_(torch.tensor([math.log(1.0), math.log(0.001)]))
    archzoo.save_pretrained(tmp_path / "model", model)
    assert cli.main(["show", str(tmp_path / "model"), "--window"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert lines[0] == ["0", "0", "0.96875", "22", "145"]
    assert lines[2] == ["1", "0", "0.367879", "0.7", "4.6"]
    assert lines[3] == ["1", "1", "0.999", "693", "4,605"]


def test_learnable_decays_without_values_are_as_they_start():
    with torch.device("meta"):
        model = retnet("learnable")
    assert windows(model) == windows(retnet("default"))


def test_gamma_of_one_never_forgets(tmp_path, capsys):
    found = windows(retnet(1.0))
    assert {(window.half_life, window.one_percent) for window in found} == {(math.inf, math.inf)}
    archzoo.save_pretrained(tmp_path / "model", retnet(1.0))
    cli.main(["show", str(tmp_path / "model"), "--window"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["0-1", "0", "1", "never", "never"]
