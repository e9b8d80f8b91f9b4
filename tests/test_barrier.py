"""`archzoo barrier`: the loss between models whose loss is known, and the command."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from families import micro
from torch.nn import functional as F

import archzoo
from archzoo.analysis.barrier import Between, Line, at_place, loss_of
from archzoo.checkpoint import weights_digest
from archzoo.cli import main
from archzoo.tasks import Addition, Subtraction


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    made = []
    for _ in range(count):
        tokens = torch.randint(64, (3, 9))
        labels = tokens.roll(-1, dims=1)
        labels[:, -1], labels[0, :4] = -100, -100
        made.append({"tokens": tokens, "labels": labels})
    return made


def weights_of(models: list[archzoo.Decoder]) -> list[dict[str, torch.Tensor]]:
    """Without aliases: they are overwritten otherwise."""
    return [{n: w.clone() for n, w in model.state_dict().items()} for model in models]


def test_the_loss_is_that_of_all_labelled_tokens():
    net, data = micro("transformer_micro", init_std=0.2).double().eval(), batches()
    rows = [(net(b["tokens"]).logits.flatten(0, 1), b["labels"].flatten()) for b in data]
    logits, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
    wanted = F.cross_entropy(logits, labels).item()
    assert loss_of(net, data) == pytest.approx(wanted, rel=1e-12)


def test_the_barrier_is_the_highest_rise_over_the_line_between_the_ends():
    line = Line("a", "b", [0, 0.25, 0.5, 0.75, 1], [1.0, 2, 4, 6, 5])
    assert line.rises == [0, 0, 1, 2, 0] and line.barrier == 2 and line.top == 3
    assert Line("a", "b", [0, 0.5, 1], [1.0, 0.5, 2]).barrier == 0, "a valley is no barrier"


@pytest.mark.parametrize("name", ["transformer_micro", "yuan_micro"])
def test_a_line_ends_at_its_models(name):
    models = [micro(name, init_std=0.2).double().eval() for _ in range(3)]
    data = batches()
    wanted = [loss_of(model, data) for model in models]
    between = Between(micro(name).double(), weights_of(models), data)
    line = between.line(0, 2, "abc", 3)
    assert line.losses[0] == pytest.approx(wanted[0], rel=1e-12)
    assert line.losses[2] == pytest.approx(wanted[2], rel=1e-12)
    middle = micro(name).double().eval()
    ends = [model.state_dict() for model in models]
    middle.load_state_dict({n: (w + ends[2][n]) / 2 for n, w in ends[0].items()})
    assert line.losses[1] == pytest.approx(loss_of(middle, data), rel=1e-12)
    assert line.at == [0, 0.5, 1] and (line.first, line.second) == ("a", "c")


def test_the_plane_goes_through_its_models():
    models = [micro("transformer_micro", init_std=0.2).double().eval() for _ in range(3)]
    flat = [torch.cat([w.flatten() for w in m.parameters()]) for m in models]
    data = batches(1)
    between = Between(micro("transformer_micro").double(), weights_of(models), data)
    corners = between.corners()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        distance = (flat[i] - flat[j]).norm().item()
        assert np.linalg.norm(corners[i] - corners[j]) == pytest.approx(distance)
    for number, corner in enumerate(corners):
        assert at_place(corners, tuple(corner)) == pytest.approx(np.eye(3)[number], abs=1e-12)
    plane = between.plane(3)
    place = (plane.x[0], plane.y[2])
    c = at_place(corners, place)
    assert sum(c) == pytest.approx(1) and min(c) < 0, "around the triangle, too"
    target = micro("transformer_micro").double().eval()
    torch.nn.utils.vector_to_parameters(
        sum(x * f for x, f in zip(c, flat, strict=True)), target.parameters()
    )
    assert plane.losses[2, 0] == pytest.approx(loss_of(target, data), rel=1e-9)


def test_three_models_on_a_line_have_no_plane():
    a, b = weights_of([micro("transformer_micro").double() for _ in range(2)])
    middle = {name: (w + b[name]) / 2 for name, w in a.items()}
    net = micro("transformer_micro").double()
    for three in ([a, b, middle], [a, middle, b], [a, a, b], [a, b, a]):
        with pytest.raises(ValueError, match="lie on one line"):
            Between(net, three, batches(1)).plane(3)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = [kind(digits=1, vocabulary="shared") for kind in (Addition, Subtraction, Addition)]
    for name, task in zip("abc", tasks, strict=True):
        task.prepare()
        net = micro("transformer_micro", vocab_size=task.vocab_size, init_std=0.3, tie_weights=True)
        archzoo.save_pretrained(name, net, task.tokenizer, task.config())


@pytest.mark.usefixtures("here")
def test_the_command_draws_what_it_says(capsys):
    pytest.importorskip("matplotlib")
    assert main("barrier a b --points 5 --figure out/line.png".split()) == 0  # noqa: SIM905
    assert "drew out/line.png, whose numbers are in out/line.csv" in capsys.readouterr().out
    with open("out/line.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["b"]) for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert all(float(row["a"]) + float(row["b"]) == 1 for row in rows)
    assert Path("out/line.png").stat().st_size > 5_000
    line = "barrier a b c --points 3 --grid 3 --batches 1 --figure plane.png --device cpu"
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert said.count("\n a") == 2 and said.count("\n b") == 1, "every pair"
    with open("plane.csv", newline="") as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    assert parts == ["line"] * 9 + ["plane"] * 9
    assert weights_digest(archzoo.from_pretrained("a")[0].state_dict())  # still whole
    options = "--task Addition --data.digits 1 --data.vocabulary shared --points 3"
    assert main(f"barrier a b {options}".split()) == 0


@pytest.mark.usefixtures("here")
def test_what_cannot_be_compared_is_one_line(capsys):
    net, tokenizer = archzoo.from_pretrained("a")
    other = micro("transformer_micro", vocab_size=net.vocab_size, depth=1, tie_weights=True)
    archzoo.save_pretrained("other", other, tokenizer)
    archzoo.save_pretrained("same", net, tokenizer)
    for experts in (2, 3):
        part = {"class_path": "MixtureOfExperts", "init_args": {"experts": experts}}
        mixture = micro("transformer_micro", vocab_size=net.vocab_size, feed_forward=part)
        archzoo.save_pretrained(f"of_{experts}", mixture, tokenizer)
    archzoo.save_pretrained("taskless", net.double(), tokenizer)
    for line, words in (
        ("barrier a", "1 checkpoints are given"),
        ("barrier a a", "given twice"),
        ("barrier of_2 of_3", "has feed_forward.experts=2 and of_3 has feed_forward.experts=3"),
        ("barrier a same", "a and same hold the same weights"),
        ("barrier a b --figure drawn.csv", "drawn.csv is no picture's name: end it in .png"),
        ("barrier a b --figure a", "a is a directory: name a picture's file, such as a/figure.png"),
        ("barrier a b --figure /proc/no/a.png", "figure /proc/no/a.png cannot be written"),
        ("barrier a other", "has depth=2 and other has depth=1"),
        ("barrier a nowhere", "there is no checkpoint at nowhere"),
        ("barrier a b --points 2", "points=2 must be at least 3"),
        ("barrier a b --batches 0", "batches=0 must be at least 1"),
        ("barrier a b --task Addition", "another than that of a"),
        ("barrier a b --task Adition", "Adition"),
        ("barrier a b --data.digit 2", "cannot be made with --data {'digit': 2}"),
    ):
        assert main(line.split()) == 1, line
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out
