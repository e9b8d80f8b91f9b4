"""`archzoo extend`: perplexity of windows and tails, with RoPE scaled and without."""

import csv
import math
import sys

import pytest
import torch

import archzoo
from archzoo.analysis.extend import ALL, Scaling, compare, perplexities
from archzoo.checkpoint import save_pretrained
from archzoo.cli import main
from archzoo.conversion.rope import scale_rotary
from archzoo.tasks import Text

SIZE = 12  # tokens of the text


def model(name="transformer_micro", **arguments):
    torch.manual_seed(0)
    made = archzoo.create_model(name, vocab_size=SIZE, context_length=16, init_std=0.2, **arguments)
    return made.double().eval()


def windows(time=64, count=3):
    tokens = torch.randint(SIZE, (count, time + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def test_perplexities_are_those_of_a_loop_over_tokens():
    net, (tokens, labels) = model(), windows()
    for length, tail in ((64, 64), (40, 7), (1, 1)):
        total, ends = [], []
        for row in range(3):
            logits = net(tokens[row : row + 1, -length:]).logits[0].log_softmax(-1)
            losses = [-float(logits[t, labels[row, 64 - length + t]]) for t in range(length)]
            total += losses
            ends += losses[-tail:]
        want = [math.exp(sum(some) / len(some)) for some in (total, ends)]
        assert perplexities(net, tokens, labels, length, tail) == pytest.approx(want, rel=1e-12)


def test_every_length_is_read_with_its_own_factor_unless_one_is_given():
    net, (tokens, labels) = model(), windows()
    lengths, tail = [16, 32, 64], 8
    readings = compare(net, tokens, labels, lengths, tail)
    assert len(readings) == len(lengths) * (1 + len(ALL))
    names = list(dict.fromkeys(reading.scaling for reading in readings))
    assert names == ["none", "linear", "ntk", "ntk x2", "dynamic", "yarn", "llama3"]
    for reading in readings:
        other = model()
        if reading.scaling != "none":
            factor = reading.ratio * (2 if reading.scaling == "ntk x2" else 1)
            assert reading.factor == factor
            scale_rotary(other, rope_type=reading.scaling.partition(" ")[0], factor=factor)
        want = perplexities(other, tokens, labels, reading.length, tail)
        assert (reading.window, reading.tail) == pytest.approx(want, rel=1e-12)
    given = compare(model(), tokens, labels, lengths, tail, Scaling("yarn", 4.0))
    assert [r.factor for r in given] == [1, 1, 1, 4, 4, 4]
    assert given[-1].tail == pytest.approx(readings[names.index("yarn") * 3 + 2].tail, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("retnet_micro", {}, "rotates by RetentionRotation: only RotaryEmbedding"),
        ("transformer_micro", {"rotary": "NoRotation"}, "rotates by NoRotation"),
    ],
)
def test_models_without_a_rope_to_scale_are_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        compare(model(name, **arguments), *windows(), [16], 4)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # below which a checkpoint's text is read without asking
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n:04d} green bottles, hanging on the wall;\n" for n in range(200)))
    sizes = {"context_length": 16, "batch_size": 2, "test_fraction": 0.1}
    task = Text(str(text), cache_dir=str(tmp_path / "cache"), **sizes)
    net = archzoo.create_model(
        "transformer_micro", vocab_size=task.vocab_size, context_length=16, init_std=0.2
    )
    save_pretrained(tmp_path / "model", net, task.tokenizer, task.config())
    return tmp_path / "model"


def test_the_command_writes_a_table_and_a_figure(checkpoint, capsys, monkeypatch):
    assert main(["extend", str(checkpoint), "--windows", "4", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "4 windows; trained on 16 tokens; tail: the last 8; of the test part" in shown
    assert "128 = 8 x" in shown and "bits per byte of window (tail)" in shown
    with (checkpoint / "extend.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (1 + len(ALL)) and {row["windows"] for row in rows} == {"4"}
    assert {row["part"] for row in rows} == {"test"}
    for row in rows:  # of characters of a byte each
        for name in ("window", "tail"):
            bits = float(row[f"{name}_bits_per_byte"])
            assert bits == pytest.approx(math.log2(float(row[name])), rel=1e-12)
    assert (checkpoint / "extend.png").stat().st_size > 10_000
    assert "holds extend.csv, extend.png\n" in shown
    other = checkpoint.parent / "elsewhere"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = ["extend", str(checkpoint), "--rotary.rope_type", "yarn", "--rotary.factor", "4"]
    command += ["--lengths", "[16,32]", "--windows", "4", "--directory", str(other)]
    assert main([*command, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "no extend.png: a figure needs matplotlib" in shown
    assert shown.endswith("holds extend.csv\n")
    with (other / "extend.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [(row["scaling"], row["factor"]) for row in again] == [
        ("none", "1.0"),
        ("none", "1.0"),
        ("yarn", "4.0"),
        ("yarn", "4.0"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rotary.rope_type", "yan"], "'yan' is not one of linear, ntk, dynamic, yarn, llama3"),
        (["--rotary.factor", "0.5"], "factor=0.5 would shorten the reach"),
        (["--rotary.faktor", "4"], "nearest: --rotary.factor"),
        (["--tail", "17"], "tail=17 must lie in 1 .. 16"),
        (["--lengths", "[1000]"], "shorter than one window of 1000 tokens"),
        (["--lengths", "[0,16]"], "lengths=[0, 16] must be at least 1 token each"),
    ],
)
def test_user_errors_are_answered_in_one_line(checkpoint, capsys, arguments, words):
    assert main(["extend", str(checkpoint), "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
