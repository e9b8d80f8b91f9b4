"""Lines to be learnt by heart: one table, the same in all parts, each line equally often."""

import pytest
import torch

from archzoo.cli import main
from archzoo.tasks import Addition, KeyValues
from archzoo.tasks.stream import IGNORED, build_task

SMALL = {"pairs": 70, "key_digits": 3, "value_digits": 2, "batch_size": 20}


def lines(task, batch):
    """Rows of a batch as text, and what is labelled of each."""
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        wanted = [label for label in labels if label != IGNORED]
        yield task.tokenizer.decode([*tokens, labels[-1]]), task.tokenizer.decode(wanted)


def test_a_value_is_asked_for_after_its_key():
    task = KeyValues(**SMALL)
    table = [task.text(number) for number in range(70)]
    keys = [line.partition("=")[0] for line in table]
    assert len(set(keys)) == 70 and all(len(key) == 3 for key in keys)
    for text, wanted in lines(task, task.train_dataloader().batch(3)):
        assert text in table and wanted == text.partition("=")[2] and len(wanted) == 2


def test_every_pass_has_every_line_once_in_another_order():
    task = KeyValues(**SMALL)
    loader = task.train_dataloader()
    seen = [text for n in range(7) for text, _ in lines(task, loader.batch(n))]  # two passes
    assert sorted(seen[:70]) == sorted(seen[70:]) == sorted(task.text(n) for n in range(70))
    assert seen[:70] != seen[70:]
    other = [
        text for text, _ in lines(task, KeyValues(**SMALL, seed=1).train_dataloader().batch(0))
    ]
    assert other != seen[:20] and set(other) <= set(seen), "another seed: the same table"
    other = KeyValues(**SMALL, table_seed=1)
    assert len({other.text(n) for n in range(70)} & set(seen)) < 5, "another table"


def test_all_parts_ask_the_lines_of_training():
    task = KeyValues(**SMALL)
    for split in ("validation", "test"):
        loader = task.evaluation_loader(split)
        found = [text for n in range(len(loader)) for text, _ in lines(task, loader.batch(n))]
        assert found == [task.text(number) for number in range(70)]


def test_it_has_the_vocabulary_of_arithmetic_and_is_made_again_from_its_configuration():
    task = KeyValues(**SMALL, seed=2)
    assert task.tokenizer.files() == Addition(digits=1).tokenizer.files()
    again = build_task(task.config())
    first, second = (t.train_dataloader().batch(1)["tokens"] for t in (task, again))
    assert torch.equal(first, second) and again.context_length == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pairs": 11, "key_digits": 1}, "there are no 11 keys of 1 digits"),
        ({"pairs": 0}, "pairs 0 is not positive"),
        ({"key_digits": 16}, "key_digits 16 is not between 1 and 15"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        KeyValues(**arguments)


def test_a_model_memorises(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    words = (
        "fit --model.preset transformer_micro --model.dim 64 --model.learning_rate 1e-2 --name x "
    )
    words += "--data KeyValues --data.pairs 20 --data.batch_size 20 --trainer.max_steps 150 "
    words += "--trainer.accelerator cpu --trainer.val_check_interval 150"
    assert main(words.split()) == 0
    assert main(["test", "--ckpt_path", "runs/x/last.ckpt", "--trainer.accelerator", "cpu"]) == 0
    assert "100" in capsys.readouterr().out.partition("test")[2]
    other = "test --ckpt_path runs/x/last.ckpt --data Addition --data.digits 1 --table other"
    assert main([*other.split(), "--trainer.accelerator", "cpu"]) == 0
    assert (tmp_path / "runs/x/other.csv").is_file()
    assert not any("other parts" in str(w.message) for w in recwarn), "parts are each task's own"
    line = KeyValues(20).text(7)
    key, _, value = line.partition("=")
    assert main(["generate", "runs/x/last.ckpt", f"{key}=", "--max_tokens", "4"]) == 0
    assert value in capsys.readouterr().out
