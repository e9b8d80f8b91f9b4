"""archzoo grid: what it counts, that it resumes, its files, and what it refuses."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import archzoo
from archzoo.analysis import grid
from archzoo.analysis.grid import Examiner, Journal, Key, evaluate_problems, grid_command
from archzoo.checkpoint import save_pretrained
from archzoo.cli import main
from archzoo.generation import generate
from archzoo.tasks import Addition, Mixed, Multiplication, Sorting, Subtraction, digit_arrays
from archzoo.tasks.problems import together


class Errs(nn.Module):
    """Knows every line, but says a wrong token after some: by default after `=` and an even digit.

    The tokens that it is given hold the right answer, all but the stop token.
    """

    device = torch.device("cpu")

    def __init__(self, task, errs):
        super().__init__()
        self.task, self.errs = task, errs
        self.head = nn.Linear(task.vocab_size, task.vocab_size, bias=False)
        self.head.weight.data = torch.eye(task.vocab_size)

    def hidden(self, tokens, documents=None, positions=None):
        assert documents is None  # it has no router
        following = torch.roll(tokens, -1, dims=1)
        padding = following == self.task.tokenizer.pad_token
        padding[:, -1] = True
        following[padding] = self.task.stop_token
        following = (following + self.errs(tokens)) % self.task.vocab_size
        return nn.functional.one_hot(following, self.task.vocab_size).float(), None, {}


def ask(task, errs, keys, count=40, at_once=2000):
    examiner = Examiner(Errs(task, errs), task, np.arange(task.vocab_size))
    found = {}
    for some in evaluate_problems(examiner, keys, count, at_once):
        assert not set(some) & set(found)
        found |= some
    return found


@pytest.mark.parametrize(
    "task", [Addition(), Subtraction(reverse=False), Multiplication(), Sorting()],
    ids=lambda task: type(task).__name__,
)  # fmt: skip
def test_cells_are_counted_problem_by_problem(task):
    equal = task.tokenizer.encode("=")[0]

    def errs(tokens):  # at the answer's first token, where the row's third token is even
        return (tokens == equal) & (tokens[:, 2:3] % 2 == 0)

    keys = [Key("cell", i, j) for i in (1, 2, 3, 6) for j in (1, 2, 5)]
    found = ask(task, errs, keys)
    for key in keys:
        problems = task.cell(key.first, key.second, 40)
        tokens = task.lines(problems, 60).tokens  # of a size without any, none
        right = int((tokens[:, 2] % 2 == 1).sum())
        assert found[key] == (problems.examples, right)
    assert any(0 < right < problems for problems, right in found.values())


def test_places_are_those_of_the_digits():
    """Wrong at the tens alone: everything else is right, and no answer of two digits is."""
    for reverse in (True, False):
        task = Addition(reverse=reverse)

        def errs(tokens, task=task, reverse=reverse):
            rows = []
            for row in tokens.tolist():
                text = task.tokenizer.decode(row)
                answer = text.partition("=")[2]
                # The place of the label after token t, where t is the last digit before it.
                tens = 1 if reverse else len(answer) - 2
                at = text.index("=") + tens
                rows.append([t == at and len(answer) > 1 for t in range(len(row))])
            return torch.tensor(rows)

        found = ask(task, errs, [Key("cell", n, n) for n in (1, 3)])
        for n in (1, 3):
            problems = task.cell(n, n, 40)
            lengths = digit_arrays.length(digit_arrays.add(*problems.operands))
            for place in range(n + 1):
                having = int((lengths > place).sum())
                right = 0 if place == 1 else having
                assert found.get(Key("place", n, n, place), (0, 0)) == (having, right)
            assert found[Key("place", n, n, -1)] == (problems.examples,) * 2  # the stop token
            assert found[Key("cell", n, n)] == (problems.examples, int((lengths == 1).sum()))


def test_chains_are_asked_at_every_length():
    task = Addition(digits=4)

    def errs(tokens):  # whatever has two nines in a row
        nines = (tokens[:, 1:] == 9) & (tokens[:, :-1] == 9)
        equal = tokens == task.tokenizer.encode("=")[0]
        return equal & nines.any(dim=1, keepdim=True)

    keys = [Key("chain", 4, 4, chain) for chain in range(5)]
    found = ask(task, errs, keys)
    for key in keys:
        problems = task.chained(4, key.part, 40)
        tokens = torch.from_numpy(task.lines(problems).tokens[:, :-1].astype(np.int64))
        wrong = errs(tokens).any(dim=1)
        # The answer's last column is only ever a label: two nines at its very end do not count.
        assert found[key] == (40, int((~wrong).sum()))


def test_a_pass_says_what_greedy_generation_does():
    """A real model, float64, all of its answers decoded one by one."""
    task = Addition(digits=2, reverse=False)
    keys = [Key("cell", i, j) for i in (1, 2) for j in (1, 2)]
    lines = task.lines(together([task.cell(key.first, key.second, 60) for key in keys])).tokens
    tokens = torch.from_numpy(lines.astype(np.int64))
    labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == task.tokenizer.pad_token, -100)
    torch.manual_seed(0)
    net = archzoo.create_model("transformer_micro", vocab_size=task.vocab_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(500):  # until they are half learnt by heart: some answers right, some wrong
        logits = net(tokens[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if loss < 0.7:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net = net.double().eval()
    examiner = Examiner(net, task, np.arange(task.vocab_size))
    [found] = evaluate_problems(examiner, keys, 60, 10**6)
    total = problems = 0
    for key in keys:
        lines = task.text(task.cell(key.first, key.second, 60))
        prompts = [task.tokenizer.encode(line.partition("=")[0] + "=") for line in lines]
        written = generate(net, prompts, max_tokens=6, stop_token=task.stop_token).tokens
        right = [
            task.tokenizer.decode(tokens) == line.partition("=")[2] and len(tokens) < 6
            for tokens, line in zip(written, lines, strict=True)
        ]
        assert found[key] == (len(lines), sum(right))
        total, problems = total + sum(right), problems + len(lines)
    assert 0 < total < problems


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("transformer_micro", {"bias": "FIRE"}),
        ("retnet_micro", {}),
        ("yuan_micro", {}),
        ("abacus_micro", {}),
        ("transformer_micro", {"embedding": "RandomisedPositions"}),
    ],
    ids=lambda entry: entry if isinstance(entry, str) else "-".join(entry),
)
def test_a_pass_gives_what_lines_give_alone(name, arguments):
    """Padding is marked where there are routers and left out where not; it changes nothing."""
    task = Addition(digits=3)
    torch.manual_seed(0)
    net = archzoo.create_model(name, vocab_size=task.vocab_size, init_std=0.3, **arguments)
    net.bind(task, training=True)
    net = net.double().eval()
    examiner = Examiner(net, task, np.arange(task.vocab_size))
    problems = together([task.cell(i, j, 5) for i, j in ((1, 2), (3, 3), (2, 6))])
    batch = examiner.write(problems)
    assert ("documents" in batch) == name.startswith("yuan")
    right = examiner.answer(batch)
    for row, length in enumerate(task.lines(problems).lengths.tolist()):
        tokens, labels = (batch[key][row, : length - 1] for key in ("tokens", "labels"))
        with torch.no_grad():
            alone = net(tokens[None]).logits[0].argmax(-1) == labels
        assert torch.equal(right[row, : length - 1], alone)


# ---------------------------------------------------------------------------- the table


def test_the_table_keeps_finished_rows_of_this_evaluation_alone(tmp_path):
    path = tmp_path / "grid.csv"
    journal = Journal(path, "one")
    journal.add({Key("cell", 1, 2): (10, 4), Key("place", 2, 2, -1): (7, 7)})
    assert journal.rate("cell", 1, 2) == 0.4 and math.isnan(journal.rate("cell", 9, 9))
    with path.open("a") as file:
        file.write("cell,3,3,0,10")  # cut short by a power cut
    again = Journal(path, "one")
    assert again.counts == journal.counts
    again.add({Key("cell", 3, 3): (10, 10)})
    assert Journal(path, "one").counts[Key("cell", 3, 3)] == (10, 10)
    assert not Journal(path, "other").counts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps, as `archzoo fit` leaves it."""
    place = tmp_path_factory.mktemp("runs")
    embedding = {
        "class_path": "AbacusEmbedding",
        "init_args": {"coupled": True, "max_shift": 1, "rows": 32},
    }
    config = {
        "seed_everything": 0,
        "model": {"preset": "abacus_micro", "embedding": embedding},
        "data": {"class_path": "Addition", "init_args": {"digits": 3, "batch_size": 8}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "limit_val_batches": 0},
    }
    (place / "short.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(place / "short.yaml"), "--trainer.default_root_dir", str(place)]
    assert main(["fit", *arguments]) == 0
    return place / "short"


ARGUMENTS = ["--digits", "5", "--problems", "6", "--diagonal", "7", "--device", "cpu"]


def test_the_command_writes_a_table_and_a_picture(run, capsys):
    assert main(["grid", str(run), *ARGUMENTS]) == 0
    said = capsys.readouterr().out
    assert "trained: 1 to 3 by 1 to 3" in said and "7 by 7" in said
    assert "out of distribution, up to 5" in said
    assert "training can have covered numbers of up to 5 digits" in said
    with (run / "grid_last.csv").open() as file:
        rows = list(csv.DictReader(file))
    cells = {(int(row["first"]), int(row["second"])) for row in rows if row["kind"] == "cell"}
    assert cells == {(i, j) for i in range(1, 6) for j in range(1, 6)} | {(6, 6), (7, 7)}
    assert all(int(row["right"]) <= int(row["problems"]) <= 6 for row in rows)
    chains = {(int(r["first"]), int(r["part"])) for r in rows if r["kind"] == "chain"}
    assert chains == {(n, chain) for n in (3, 4, 5) for chain in range(n + 1)}
    assert (run / "grid_last.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_is_all(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["grid", str(run), *ARGUMENTS, "--directory", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no grid_last.png: a figure needs matplotlib" in said and "drew" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["grid_last.csv"]


def test_an_interrupted_evaluation_resumes(run, tmp_path, monkeypatch):
    short = ["--digits", "3", "--problems", "6", "--device", "cpu", "--at_once", "150"]
    arguments = [str(run), *short, "--directory"]
    assert main(["grid", *arguments, str(tmp_path / "whole")]) == 0
    answer, asked = Examiner.answer, []

    def tired(self, batch):
        asked.append(len(batch["tokens"]))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(Examiner, "answer", tired)
    monkeypatch.setattr(grid, "_draw", lambda *arguments: None)
    parts = ["grid", *arguments, str(tmp_path / "parts")]
    assert main(parts) == 130
    kept = (tmp_path / "parts" / "grid_last.csv").read_text().splitlines()
    assert len(kept) > 4
    assert main(parts) == 0
    tables = [
        sorted((tmp_path / name / "grid_last.csv").read_text().splitlines())
        for name in ("whole", "parts")
    ]
    assert tables[0] == tables[1]
    before = len(asked)
    assert main(parts) == 0
    assert len(asked) == before  # nothing is left to ask
    assert main([*parts, "--problems", "3"]) == 0  # another evaluation
    assert len(asked) > before


def test_other_tokens_and_other_tasks(tmp_path, monkeypatch):
    """A mixed model asks in its own tokens, without reading any text."""
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be\n" * 200)
    task = Mixed(path=str(text), context_length=64, batch_size=2, cache_dir=str(tmp_path))
    # FIRE has parameters without any dimension.
    model = archzoo.create_model("transformer_micro", vocab_size=task.vocab_size, bias="FIRE")
    save_pretrained(tmp_path / "mixed", model, task.tokenizer, task.config())
    text.unlink()
    asked = {"digits": 3, "problems": 4, "device": "cpu"}
    with pytest.raises(ValueError, match=r"give --data\.path"):  # it lies elsewhere
        grid_command(str(tmp_path / "mixed"), **asked)
    grid_command(str(tmp_path / "mixed"), **asked, data={"path": str(text)})
    assert (tmp_path / "mixed" / "grid.png").exists()
    tokens = task.synthetic.tokens_of(task.tokenizer)
    line = task.synthetic.lines(task.synthetic.problems("train", np.arange(1)))
    written = task.tokenizer.decode(tokens[line.tokens[0]].tolist())
    assert written == task.synthetic.text(task.synthetic.problems("train", np.arange(1)))[0] + "\n"
    sorting = Sorting()
    model = archzoo.create_model("retnet_micro", vocab_size=sorting.vocab_size)
    save_pretrained(tmp_path / "sorting", model, sorting.tokenizer, sorting.config())
    grid_command(str(tmp_path / "sorting"), digits=3, problems=4, device="cpu")
    assert (tmp_path / "sorting" / "grid.png").exists()


def test_what_cannot_be_asked_is_said(run, tmp_path, capsys):
    from archzoo.tasks.tokenizers import CharacterTokenizer

    model = archzoo.create_model("retnet_micro", vocab_size=64)
    save_pretrained(tmp_path / "plain", model, CharacterTokenizer("abc"))
    assert main(["grid", str(tmp_path / "plain")]) == 1
    assert "was not trained on problems" in capsys.readouterr().err
    assert main(["grid", str(run), "--digits", "0"]) == 1
    assert "digits=0 must be at least 1" in capsys.readouterr().err
    assert main(["grid", str(tmp_path / "nothing")]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_intervals():
    assert grid._interval(0, 0) != (0, 0, 0)
    share, low, high = grid._interval(100, 50)
    assert share == 0.5 and low + high == pytest.approx(1) and 0.40 < low < 0.41
    assert grid._interval(10, 10)[2] == pytest.approx(1) and grid._interval(10, 0)[1] >= -1e-12
