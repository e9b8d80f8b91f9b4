"""Recall, copying and state tracking: labels that anyone can work out from the text alone."""

import functools
import inspect
import json
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archzoo.cli import main
from archzoo.tasks import (
    Copying,
    FuzzyRecall,
    Induction,
    Memorisation,
    NoisyRecall,
    Recall,
    SelectiveCopying,
    StateTracking,
    draw,
)
from archzoo.tasks.sequences import PARTS, permuted
from archzoo.tasks.stream import IGNORED, build
from archzoo.tasks.tokenizers import StreamDecoder, Tokenizer, WordTokenizer, from_files

SMALL = {"batch_size": 8, "alike": 8, "validation_examples": 12, "test_examples": 10}


def words_of(task, batch):
    """Rows of a batch as words, and their labels; "" where there is none. Without padding."""
    there = batch.get("documents", torch.zeros_like(batch["tokens"])) == 0
    for row, labels, keep in zip(*(batch[n] for n in ("tokens", "labels")), there, strict=True):
        wanted = ["" if label == IGNORED else label for label in labels[keep].tolist()]
        yield (
            [task.tokenizer.words[token] for token in row[keep].tolist()],
            [w if w == "" else task.tokenizer.words[w] for w in wanted],
        )


# ---------------------------------------------------------------------------- from the text alone


def recall(task, words):
    """A dictionary of what is read, pair by pair; a key of it that comes again is asked for."""
    labels, values, index = [""] * len(words), {}, 0
    while index < len(words):
        word = words[index]
        if word in values:
            labels[index] = values[word]
        elif word[0] == "k" and words[index + 1 : index + 2] and words[index + 1][0] == "v":
            values[word], index = words[index + 1], index + 1
        index += 1
    return labels


def copying(task, words):
    """What stood before `copy`, but for blanks, each in its turn."""
    end = words.index("copy")
    symbols = [word for word in words[:end] if word != "_"]
    assert words[end + 1 :] == ["_"] * len(symbols)
    return [""] * (end + 1) + symbols


def induction(task, words):
    """What stood after the last word when it came before."""
    assert words.count(words[-1]) == 2
    return [""] * (len(words) - 1) + [words[words.index(words[-1]) + 1]]


def noisy_recall(task, words):
    """A dictionary of pairs; noise is two words that are no pair."""
    labels, values = [""] * len(words), {}
    for index in range(0, len(words), 2):
        key, value = [*words[index : index + 2], None][:2]
        if key in values:
            labels[index] = values[key]
            assert value in (values[key], None), "a key has one value"
        elif key[0] == "k":
            values[key] = value
    return labels


def fuzzy_recall(task, words):
    """A dictionary from several words to several: keys are of k, values of v."""
    labels, values, index = [""] * len(words), {}, 0
    while index < len(words) and words[index] == "_":
        index += 1
    while index < len(words):
        key, index = tuple(words[index : index + task.key_length]), index + task.key_length
        begin = index
        while index < len(words) and words[index][0] == "v":
            index += 1
        if key in values:
            value = values[key]
            assert value[: index - begin] == words[begin:index], "a key has one value"
            labels[begin - 1 : begin - 1 + len(value)] = value
        values.setdefault(key, words[begin:index])
    return labels[: len(words)]


@functools.cache
def seen_in_training(task, follows):
    """What training shows, by what `follows` finds in a row of it: a table learnt by heart."""
    batches = [task.train_dataloader().batch(number) for number in range(40)]
    rows = [row for batch in batches for row in words_of(task, batch)]
    return {key: value for row in rows for key, value in follows(*row)}


def asked_and_answered(words, labels):
    return zip(words[::2], labels[1::2], strict=True)


def memorisation(task, words):
    table = seen_in_training(task, asked_and_answered)
    return [label for key in words[::2] for label in ("", table[key])]


def modulo(task, words):
    numbers = [0 if word == "_" else int(word) for word in words]
    return [str(total % (len(task.tokenizer.words) - 1)) for total in np.cumsum(numbers)]


def group(task, words):
    """Where everything ends up that is moved again and again."""
    state, labels = list(range(1, 1 + int(task.of[1]))), []
    for word in words:
        state = state if word == "_" else [int(word[place - 1]) for place in state]
        labels.append("".join(map(str, state)))
    return labels


def dyck(task, words):
    """A stack."""
    stack, labels = [], []
    for word in words:
        if word in "([{<":
            stack.append(")]}>"["([{<".index(word)])
        elif word != "_":
            assert stack.pop() == word
        labels.append(stack[-1] if stack else "_")
        assert len(stack) <= task.depth
    return labels


def states_and_symbols(words, labels):
    return zip(zip(["q0", *labels], words, strict=False), labels, strict=False)


def automaton(task, words):
    table, state, labels = seen_in_training(task, states_and_symbols), "q0", []
    for word in words:
        state = state if word == "_" else table[state, word]
        labels.append(state)
    return labels


TASKS = [
    (Recall(vocabulary=64, sizes=[[4, 32]], **SMALL), recall),
    (Recall(vocabulary=40, sizes=[[2, 12], [4, 16, 3]], random_filler=False, **SMALL), recall),
    (Recall(held_out=4, **SMALL), recall),
    (NoisyRecall(**SMALL), noisy_recall),
    (NoisyRecall(32, 4, 0.7, sizes=[[3, 8], [9, 40]], **SMALL), noisy_recall),
    (NoisyRecall(noise=0.0, noise_vocabulary=0, **SMALL), noisy_recall),
    (FuzzyRecall(**SMALL), fuzzy_recall),
    (FuzzyRecall(9, 2, 4, sizes=[[3, 12], [7, 61]], **SMALL), fuzzy_recall),
    (Memorisation(32, sizes=[[15, 8], [4, 10]], **SMALL), memorisation),
    (Copying(**SMALL), copying),
    (Copying(5, [[6, 13], [4, 20]], **SMALL), copying),
    (SelectiveCopying(**SMALL), copying),
    (SelectiveCopying(5, [[6, 13], [5, 20]], **SMALL), copying),
    (Induction(**SMALL), induction),
    (Induction(8, [[3, 7], [2, 12]], **SMALL), induction),
    (StateTracking(**SMALL), modulo),
    (StateTracking("modular_addition", [[9, 9], [5, 12]], modulus=7, **SMALL), modulo),
    (StateTracking("S3", [[6, 9]], **SMALL), group),
    (StateTracking("S5", **SMALL), group),
    (StateTracking("dyck", [[40, 40], [20, 30]], brackets=4, depth=3, **SMALL), dyck),
    (StateTracking("automaton", [[20, 20], [9, 12]], **SMALL), automaton),
]
ALL = pytest.mark.parametrize(
    ("task", "solve"), TASKS, ids=lambda value: type(value).__name__ if value in dict(TASKS) else ""
)
EACH = pytest.mark.parametrize("task", [task for task, _ in TASKS], ids=lambda t: type(t).__name__)


@ALL
def test_labels_can_be_worked_out_from_the_text(task, solve):
    loaders = [
        task.train_dataloader(),
        task.val_dataloader(),
        *np.atleast_1d(task.test_dataloader()),
    ]
    for loader in loaders:
        for number in range(min(len(loader), 4)):
            batch = loader.batch(number)
            rows = list(words_of(task, batch))
            assert len(rows) == len(batch["tokens"])
            for words, labels in rows:
                assert solve(task, words) == labels
                assert any(labels)


@EACH
def test_no_problem_is_in_two_parts(task):
    """As they are written: what decides the labels is the same where the text is."""
    seen = {}
    for part in PARTS:
        for first, second in task.sizes:
            found = task.sequences(part, np.arange(60), first, second)
            for text, labels in zip(task.text(found), found.labels.tolist(), strict=True):
                assert seen.setdefault((text, *labels), part) == part


@EACH
def test_examples_are_a_function_of_seed_and_number(task):
    config = task.config()
    config["init_args"] |= {"batch_size": 4}
    other = build(config)
    for number in range(3):
        whole = task.train_dataloader().batch(number)
        halves = [other.train_dataloader().batch(2 * number + half) for half in (0, 1)]
        for name in ("tokens", "labels"):
            assert torch.equal(whole[name], torch.cat([half[name] for half in halves]))
        ranks = [task.train_dataloader().batch(number, rank, 2) for rank in (0, 1)]
        assert torch.equal(whole["tokens"], torch.cat([half["tokens"] for half in ranks]))
    config["init_args"] |= {"seed": 1}
    seeded = build(config)
    assert not torch.equal(
        seeded.train_dataloader().batch(0)["tokens"], other.train_dataloader().batch(0)["tokens"]
    )
    for mine, theirs in zip(other.val_dataloader(), seeded.val_dataloader(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@EACH
def test_every_split_has_its_rows(task):
    loaders = task.test_dataloader()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    assert [sum(len(b["tokens"]) for b in loader) for loader in loaders] == [10] * len(loaders)
    assert len(loaders) == 1 + len(task.extra_evaluations("test"))
    assert sum(len(b["tokens"]) for b in task.val_dataloader()) == 12
    assert task.train_dataloader().batch(0)["tokens"].max() < task.vocab_size
    assert task.context_length == max(task.length(*s) for s in task.sizes + task.test_sizes)


@pytest.mark.parametrize(
    "task",
    [
        Recall(16, [[2, 12]], random_filler=False, held_out=4, **SMALL),
        NoisyRecall(8, 4, 0.3, sizes=[[3, 14]], held_out=4, **SMALL),
        FuzzyRecall(9, 2, 2, sizes=[[2, 20]], held_out=4, **SMALL),
        Memorisation(15, sizes=[[7, 8]], held_out=4, **SMALL),
        Copying(8, [[3, 12]], held_out=4, **SMALL),
        SelectiveCopying(8, [[3, 12]], held_out=4, **SMALL),
        Induction(8, [[1, 12]], held_out=4, **SMALL),
        StateTracking("modular_addition", [[6, 8]], held_out=4, **SMALL),
    ],
    ids=lambda task: type(task).__name__,
)
def test_an_example_is_drawn_in_the_docstring(task):
    said = inspect.cleandoc(type(task).__doc__)
    drawn = draw(task, columns=20)
    assert "\n".join(f"    {line}" for line in drawn.splitlines()) in said, drawn


# ---------------------------------------------------------------------------- recall


def test_recall_has_zoology_s_recipe():
    task = Recall()
    assert task.vocab_size == 8192 and task.context_length == 1024
    assert task.extra_evaluations("test") == (
        *("4x64", "8x64", "16x64", "32x128", "64x256", "128x512", "256x1024"),
    )
    one = np.arange(1)
    lengths = [task.training_batch(number, one)["tokens"].shape[1] for number in range(400)]
    shares = [lengths.count(length) / len(lengths) for length in (64, 128, 256)]
    assert np.allclose(shares, [5 / 9, 1 / 9, 3 / 9], atol=0.06)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 3), st.floats(0.01, 2), st.booleans(), st.integers(0, 99))
def test_a_row_of_recall_asks_for_each_key_once(pairs, more, power, random_filler, number):
    vocabulary = 2 * (pairs + random_filler) + 1 + 4 * (pairs < 3)
    task = Recall(vocabulary, [[pairs, 4 * pairs + 2 * more]], None, power, random_filler, **SMALL)
    (row,) = task.sequences("train", np.array([number]), *task.sizes[0]).tokens.tolist()
    words = [task.tokenizer.words[token] for token in row]
    keys, values = words[0 : 2 * pairs : 2], words[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert all(words.count(key) == 2 for key in keys)
    assert not any(word[0] == "v" for word in words[2 * pairs :])
    assert random_filler == ("_" not in words) or len(row) == 3 * pairs
    assert [label for label in recall(task, words) if label] != []


def test_recall_s_gaps_follow_their_power_law():
    task = Recall(vocabulary=64, sizes=[[2, 16]], power=0.5)
    labels = task.sequences("train", np.arange(20_000), 2, 16).labels
    tokens = task.sequences("train", np.arange(20_000), 2, 16).tokens
    first = (tokens[:, 4:] == tokens[:, :1]).argmax(axis=1) // 2  # where the first key is asked for
    weights = np.arange(1, 7) ** -0.5
    assert np.allclose(np.bincount(first) / 20_000, weights / weights.sum(), atol=0.015)
    assert ((labels != IGNORED).sum(axis=1) == 2).all() and (labels[:, 1::2] == IGNORED).all()


def test_a_recalled_assignment_is_one_problem_in_whatever_order():
    """All of them, of a vocabulary so small that training has seen each."""
    task = Recall(vocabulary=9, sizes=[[2, 8]], held_out=3, random_filler=False, **SMALL)
    parts = {part: set() for part in PARTS}
    for part in PARTS:
        for row in task.sequences(part, np.arange(1500), 2, 8).tokens.tolist():
            parts[part].add(frozenset(zip(row[0:4:2], row[1:4:2], strict=True)))
    assert not parts["train"] & (parts["validation"] | parts["test"])
    assert not parts["validation"] & parts["test"]
    assert sum(map(len, parts.values())) == 6 * 12  # two of four keys, with two of four values
    assert all(len(found) > 3 for found in parts.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [[5, 18]]}, "5 pairs do not fit in a length of 18: each takes four tokens"),
        ({"vocabulary": 10, "sizes": [[4, 32]]}, "4 keys, which are too few for 4 pairs"),
        ({"sizes": [[4]]}, r"size \[4\] is not two integers, \[pairs, length\]"),
        ({"sizes": [[4, 32, 0]]}, "a weight that is not positive"),
        ({"sizes": [[0, 32]]}, "holds a number that is not positive"),
        ({"sizes": []}, r"sizes is empty: give one at least, \[pairs, length\]"),
        ({"held_out": 1}, "leaves nothing to train on"),
        ({"vocabulary": 4}, "take 5 or more"),
        ({"power": 0.0}, "power 0.0 must be above 0"),
        ({"alike": 0}, "alike 0 is not positive"),
    ],
)
def test_recall_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recall(**arguments)


def test_a_part_without_problems_is_said():
    task = Recall(vocabulary=9, sizes=[[1, 4]], random_filler=False, held_out=60)
    with pytest.raises(ValueError, match="pairs 1, length 4: none of the few problems of that"):
        task.sequences("test", np.arange(2), 1, 4)


# ---------------------------------------------------------------------------- what they share


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(count, key):
    keys = np.array([key, key ^ 1], np.uint64)
    found = permuted(keys, np.tile(np.arange(count), (2, 1)), count)
    assert (np.sort(found, axis=1) == np.arange(count)).all()
    some = permuted(keys[:1], np.arange(count)[None, count // 2 :], count)
    assert (some == found[:1, count // 2 :]).all()


def test_all_permutations_are_equally_likely():
    keys = np.random.default_rng(0).integers(0, 2**63, 24_000).astype(np.uint64)
    found = permuted(keys, np.tile(np.arange(4), (len(keys), 1)), 4)
    counts = [int((found == order).all(axis=1).sum()) for order in permutations(range(4))]
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 50  # 23 degrees of freedom


def test_words_are_tokens(tmp_path):
    tokenizer = WordTokenizer(["_", "k0", "k1", "v10"])
    assert tokenizer.encode("k1 v10  _\nk0") == [2, 3, 0, 1] and tokenizer.vocab_size == 4
    assert tokenizer.decode([2, 3, 0]) == "k1 v10 _" and tokenizer.show(3) == "v10"
    tokenizer.save(tmp_path)
    for again in (Tokenizer.load(tmp_path), from_files(tokenizer.files())):
        assert type(again) is WordTokenizer and again.words == tokenizer.words
        assert again.fingerprint() == tokenizer.fingerprint()
    stream = StreamDecoder(tokenizer)
    assert "".join([*map(stream.push, [2, 3, 0]), stream.finish()]) == "k1 v10 _"
    with pytest.raises(ValueError, match=r"'v1' is not one of the 4 words .* \(_ \.\. v10\)"):
        tokenizer.encode("k1 v1")


def test_a_model_is_trained_tested_and_read(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = (
        f"--model.preset transformer_micro --trainer.default_root_dir {tmp_path} --name run "
        "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.accelerator cpu "
        "--data.class_path Recall --data.vocabulary 16 --data.sizes [[1,4],[2,8]] --data.alike 8 "
        "--data.batch_size 8 --data.validation_examples 8 --data.test_examples 8"
    )
    assert main(["fit", *arguments.split()]) == 0
    assert main(["test", "--ckpt_path", str(run)]) == 0
    header, row = (run / "test.csv").read_text().splitlines()
    found = dict(zip(header.split(","), row.split(","), strict=True))
    for name in ("1x4", "2x8"):
        assert 0 <= float(found[f"test/exact_match/{name}"]) <= 1
        assert 0 <= float(found[f"test/token_accuracy/{name}"]) <= 1
    assert "test/token_accuracy" in found
    capsys.readouterr()
    assert main(["predict", "--ckpt_path", str(run)]) == 0
    said = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    assert said["text"].split()[0][0] == "k" and said["asked"][0] == "v"
    capsys.readouterr()
    assert main(["generate", str(run), "k1 v2 k1", "--max_tokens", "2"]) == 0
    print(capsys.readouterr().out)
