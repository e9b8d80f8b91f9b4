"""Sums with ranked answers: what is right, what is better, and what stands where in a batch."""

import pytest
import torch

from archzoo.inputs import IGNORED
from archzoo.tasks import Addition, RankedAddition


def made(**options):
    return RankedAddition(**({"digits": 2, "held_out": 5, "batch_size": 64} | options))


def texts(task, rows, kept):
    characters = [*task.tokenizer.characters, "$"]  # the stop token
    pairs = zip(rows.tolist(), kept.tolist(), strict=True)
    return [
        "".join(
            characters[min(token, len(characters) - 1)] for token, k in zip(*pair, strict=True) if k
        )
        for pair in pairs
    ]


def parsed(task, text):
    """(right, zeros in front, where the answer begins) of a row as text."""
    assert text.endswith("$")
    problem, answer = text[:-1].split("=")
    flip = slice(None, None, -1 if task.reverse else 1)
    a, b = (int(number[flip]) for number in problem.split("+"))
    written = answer[:: -1 if task.reverse_answer else 1]
    number = str(int(written))
    return int(number) == a + b, len(written) - len(number), len(problem) + 1


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_are_what_their_ranks_say(reverse, split):
    task = made(reverse=reverse)
    loader = task.train_dataloader() if split == "train" else task.val_dataloader()
    batch = loader.batch(1)
    seen = set()
    for k in range(4):
        rows = texts(task, batch["ranked_tokens"][:, k], batch["ranked_documents"][:, k] >= 0)
        for row, text in enumerate(rows):
            right, zeros, begins = parsed(task, text)
            assert batch["ranks"][row, k] == (not right) * 5 + zeros
            assert batch["ranked_begins"][row] == begins
            seen.add((right, zeros))
    assert seen == {(right, zeros) for right in (True, False) for zeros in range(4)}


def test_what_is_imitated_has_mistakes_and_what_is_wanted_has_none():
    task = made(mistakes=0.25, batch_size=512)
    batch = task.train_dataloader().batch(0)
    labelled = batch["labels"] != IGNORED
    rights = []
    for row, tokens in enumerate(batch["tokens"]):
        answer = batch["labels"][row][labelled[row]]
        assert answer[-1] == task.stop
        wanted = batch["wanted"][row]
        wanted = wanted[wanted != IGNORED].tolist()
        question = task.tokenizer.decode(tokens[: labelled[row].int().argmax() + 1].tolist())
        a, b = (int(number[::-1]) for number in question[:-1].split("+"))
        assert task.tokenizer.decode(wanted)[::-1] == str(a + b)
        rights.append(task.is_right(wanted, answer[:-1].tolist()))
    assert 0.65 < sum(rights) / len(rights) < 0.85
    perfect = made(mistakes=0.0).train_dataloader().batch(0)
    assert perfect["ranks"].unique().numel() > 1, "ranked answers have mistakes of their own"


def test_zeros_in_front_do_not_make_an_answer_wrong():
    for reverse in (True, False):
        task = made(reverse=reverse)

        def tokens(number, task=task, reverse=reverse):
            return task.tokenizer.encode(number[::-1] if reverse else number)

        assert task.is_right(tokens("57"), tokens("0057"))
        assert task.is_right(tokens("0"), tokens("000"))
        assert not task.is_right(tokens("57"), tokens("570"))
        assert not task.is_right(tokens("57"), tokens("7"))
        assert not task.is_right(tokens("0"), [])
        assert not task.is_right(tokens("5"), task.tokenizer.encode("=5"))


@pytest.mark.parametrize(
    ("prefer", "rank"),
    [
        (["right"], lambda right, zeros: int(not right)),
        (["shorter"], lambda right, zeros: zeros),
        (["shorter", "right"], lambda right, zeros: zeros * 5 + (not right)),
    ],
)
def test_what_is_preferred_is_a_choice(prefer, rank):
    task = made(prefer=prefer)
    batch = task.train_dataloader().batch(0)
    rows = texts(task, batch["ranked_tokens"][:, 0], batch["ranked_documents"][:, 0] >= 0)
    for row, text in enumerate(rows):
        right, zeros, _ = parsed(task, text)
        assert batch["ranks"][row, 0] == rank(right, zeros)


def test_the_stream_is_a_function_of_the_numbers_and_the_split_is_additions():
    task, again = made(), made(batch_size=32)
    whole, halves = (
        task.train_dataloader().batch(3),
        [again.train_dataloader().batch(n) for n in (6, 7)],
    )
    for name, tensor in whole.items():
        parts = [half[name] for half in halves]
        assert torch.equal(torch.cat(parts), tensor), name
    plain = Addition(digits=2, held_out=5, batch_size=64)
    numbers = torch.arange(64).numpy()
    for split in ("train", "validation", "test"):
        mine, theirs = task.problems(split, numbers), plain.problems(split, numbers)
        assert (mine.operands == theirs.operands).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"answers": 1}, "answers 1 must be at least 2"),
        ({"zeros": -1}, "zeros -1 must be at least 0"),
        ({"mistakes": 1.5}, "mistakes 1.5 must lie in"),
        ({"prefer": ["longer"]}, "must hold right, shorter or both"),
        ({"prefer": []}, "must hold right, shorter or both"),
        ({"hints": True}, "omit it"),
        ({"pack": 2}, "pack 2: a row asks one question"),
    ],
)
def test_bad_arguments_are_answered(options, said):
    with pytest.raises(ValueError, match=said):
        made(**options)
