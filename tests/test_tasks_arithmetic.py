"""Every task of problems: what its lines say, its stream, its split, and greedy generation."""

import inspect
import itertools
import random
import re
import textwrap

import numpy as np
import pytest
import torch
from families import MICRO, micro
from hypothesis import given, settings
from hypothesis import strategies as st

import archzoo
from archzoo.generation import generate
from archzoo.tasks import (
    Addition,
    Arithmetic,
    BitwiseOr,
    Mixed,
    Multiplication,
    Sorting,
    Subtraction,
    arithmetic,
    build,
    digit_arrays,
    draw,
    exact_match,
    stream,
)
from archzoo.tasks.stream import IGNORED
from archzoo.training.losses import total_loss

OPERATIONS = {"+": Addition, "-": Subtraction, "x": Multiplication, "|": BitwiseOr}
ANSWERS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
}


def make(name, batch_size=32, **arguments):
    """A task by its name, small, with enough problems that are held out."""
    if name is BitwiseOr:
        arguments = {"digits": 5, "held_out": 3} | arguments
    if name is Mixed:
        arguments = {"context_length": 64} | arguments
    return name(batch_size=batch_size, **arguments)


EVERY = [Addition, Subtraction, Multiplication, BitwiseOr, Sorting]
tasks = pytest.mark.parametrize("name", EVERY, ids=lambda name: name.__name__)
also_mixed = pytest.mark.parametrize("name", [*EVERY, Mixed], ids=lambda name: name.__name__)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(inspect.getfile(archzoo).rpartition("/archzoo/")[0])
        yield


# ---------------------------------------------------------------------------- numbers


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 130), other=st.integers(1, 130), seed=st.integers(0, 2**32))
def test_digit_arrays_calculate_as_python_does(size, other, seed):
    draws = random.Random(seed)
    a = [draws.randrange(10 ** draws.randint(0, size)) for _ in range(8)]
    b = [draws.randrange(10 ** draws.randint(0, other)) for _ in range(8)]
    wide = max(size, other)
    first, second = digit_arrays.from_integers(a, wide), digit_arrays.from_integers(b, wide)
    pairs = list(zip(a, b, strict=True))
    assert digit_arrays.to_integers(first) == a
    assert digit_arrays.length(first).tolist() == [len(str(number)) for number in a]
    assert digit_arrays.to_integers(digit_arrays.add(first, second)) == [a + b for a, b in pairs]
    difference, negative = digit_arrays.subtract(first, second)
    assert digit_arrays.to_integers(difference) == [abs(a - b) for a, b in pairs]
    assert negative.tolist() == [a < b for a, b in pairs]
    narrow = digit_arrays.from_integers(b, other)  # factors may differ in size
    assert digit_arrays.to_integers(digit_arrays.multiply(first, narrow)) == [
        a * b for a, b in pairs
    ]


def longest_carry(a, b):
    """The longest chain of carries in a + b, (examples,): 0 where no column exceeds 9.

    A chain is a column whose digits sum to 10 or more and the columns after it that sum to 9, each
    of which passes the carry on.
    """
    chain, longest = np.zeros((2, a.shape[1]), np.int64)
    for column in a + b:
        chain = np.where(column > 9, 1, np.where(column == 9, chain + (chain > 0), 0))
        longest = np.maximum(longest, chain)
    return longest


def test_the_longest_carry_of_sums_done_by_hand():
    pairs = [(12, 34), (15, 5), (95, 5), (999, 1), (5995, 15), (1999, 8001), (50505, 50505)]
    a, b = (digit_arrays.from_integers(numbers, 6) for numbers in zip(*pairs, strict=True))
    assert longest_carry(a, b).tolist() == [0, 1, 2, 3, 2, 4, 1]


# ---------------------------------------------------------------------------- lines


@settings(max_examples=60, deadline=None)
@given(
    sign=st.sampled_from("+-x"),
    longest=st.integers(1, 40),
    reverse=st.booleans(),
    reverse_answer=st.none() | st.booleans(),
    zero_padded=st.booleans(),
    hints=st.booleans(),
    start=st.integers(0, 2**40),
)
def test_lines_say_what_python_says(
    sign, longest, reverse, reverse_answer, zero_padded, hints, start
):
    task = OPERATIONS[sign](
        longest,
        reverse=reverse,
        reverse_answer=reverse_answer,
        zero_padded=zero_padded,
        hints=hints,
    )
    problems = task.problems("train", start + np.arange(6))
    operands = [digit_arrays.to_integers(number) for number in problems.operands]
    for a, b, line in zip(*operands, task.text(problems), strict=True):
        assert task.parse(line) == (a, b, ANSWERS[sign](a, b))
        if hints:  # the same letter for the same place
            letters = [number[::2] for number in re.split("[-+x=]", line) if number]
            orders = [reverse, reverse, task.reverse_answer]
            ordered = [t if order else t[::-1] for t, order in zip(letters, orders, strict=True)]
            longest_one = max(ordered, key=len)
            assert all(longest_one.startswith(text) for text in ordered)
            assert longest_one in arithmetic.LETTERS * 4
            line = re.sub(f"[{arithmetic.LETTERS}]", "", line)
        left, right = line.split("=")
        numbers = [len(number) for number in left.split(sign)]
        assert len(numbers) == 2 and (not zero_padded or numbers[0] == numbers[1])
        if zero_padded:
            assert len(right.strip("-")) == task.answer_size(*numbers)
        if not hints and not zero_padded:
            assert line == task.prompt(a, b) + task.answer(a, b)


@pytest.mark.parametrize("sign", "+-x")
def test_a_hundred_digits_are_exact(sign):
    task = OPERATIONS[sign](digits=100, min_digits=100)
    pairs = task.pairs("train", 20)
    lines = task.text(task.problems("train", np.arange(20)))
    assert [task.parse(line) for line in lines] == [(a, b, ANSWERS[sign](a, b)) for a, b in pairs]
    nines = 10**100 - 1
    for a, b in ((nines, nines), (nines, 1), (1, nines), (10**99, 10**99)):
        assert task.parse(task.prompt(a, b) + task.answer(a, b)) == (a, b, ANSWERS[sign](a, b))


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("longest", [1, 18])
def test_sorting_names_the_keys_in_order(reverse, longest):
    task = Sorting(numbers=7, digits=longest, reverse=reverse)
    for line in task.text(task.problems("train", np.arange(300))):
        problem, answer = line.split("=")
        listed = [entry.split(":") for entry in problem.split(",")]
        values = {key: int(text[::-1] if reverse else text) for key, text in listed}
        assert len(values) == len(listed)  # every key once
        # Ties in the order of the list: Python's sort is stable, too.
        assert answer.split(",") == sorted(values, key=values.__getitem__)
        keys = "".join(key for key, _ in listed)
        assert keys in arithmetic.LETTERS * 2


def test_one_vector_of_a_bitwise_or_has_a_single_one():
    task = make(BitwiseOr, digits=6)
    lines = task.text(task.problems("train", np.arange(2000)))
    for line in lines:
        a, b, c = re.fullmatch(r"([01]+)\|([01]+)=([01]+)", line).groups()
        assert (a + b).count("1") == 1
        assert "1" in min(a, b, key=len) or len(a) == len(b)
        size = max(len(a), len(b))  # aligned at the first place
        assert c == "".join(map(max, a.ljust(size, "0"), b.ljust(size, "0")))
    held_out = [
        line
        for split in ("validation", "test")
        for line in task.text(task.problems(split, np.arange(task.rows(split))))
    ]
    pairs = [(i, j) for i in range(1, 7) for j in range(1, 7)]
    # Both sides together are all there is: min(i, j) problems, of equal lengths twice as many.
    assert len(set(lines) | set(held_out)) == sum(min(i, j) * (1 + (i == j)) for i, j in pairs)
    assert {tuple(map(len, re.split(r"\||=", line)[:2])) for line in lines} == set(pairs)


@tasks
def test_a_row_holds_a_line_and_asks_for_the_answer(name):
    task = make(name)
    batch = task.train_dataloader().batch(3)
    texts = task.text(task.problems("train", 3 * 32 + np.arange(32)))
    assert batch["tokens"].shape == (32, task.context_length)
    longest = 0
    for row, line in enumerate(texts):
        tokens = [*task.tokenizer.encode(line), task.stop_token]
        longest = max(longest, len(tokens))
        begin = line.index("=") + 1
        assert batch["tokens"][row, : len(tokens) - 1].tolist() == tokens[:-1]
        labels = [IGNORED] * (begin - 1) + tokens[begin:]
        labels += [IGNORED] * (task.context_length - len(labels))
        assert batch["labels"][row].tolist() == labels
        used = (batch["documents"][row] >= 0).sum().item()
        assert used == min(len(tokens), task.context_length)
    # As short as its longest line: the last token is only ever a label.
    many = task.lines(task.problems("train", np.arange(5000)))
    assert many.lengths.max() == task.context_length + 1
    runs = [len(run) for line in task.text(task.problems("train", np.arange(5000)))
            for run in re.findall("[0-9]+", line)]  # fmt: skip
    assert max(runs) == task.longest_run


@pytest.mark.parametrize("problems", [2, 3, 40])
def test_packed_rows_hold_the_same_problems_and_train_the_same(problems):
    """The loss and its gradient are those of a problem a row; so is all that parts are given."""
    arguments = {"batch_size": 32, "coupled": True, "seed": random.randrange(2**32)}
    plain = Addition(**arguments).training_batch(3, np.arange(32))
    packed = Addition(**arguments, pack=problems).training_batch(3, np.arange(32))
    assert plain.keys() == packed.keys()
    assert len(packed["tokens"]) == -(-32 // problems)

    def of_example(batch, number):
        """What the tokens of one example hold, up to the last with a label."""
        mine = (batch["examples"] == number) & (batch["documents"] >= 0)
        assert len(batch["documents"][mine].unique()) == 1
        entries = {name: batch[name][mine] for name in ("tokens", "labels", "positions")}
        end = (entries["labels"] != IGNORED).nonzero().max() + 1
        return {name: entry[:end].tolist() for name, entry in entries.items()}

    for number in range(3 * 32, 4 * 32):
        assert of_example(plain, number) == of_example(packed, number)
    kept = (packed["documents"] >= 0).sum()
    assert kept == sum(len(of_example(plain, n)["tokens"]) for n in range(3 * 32, 4 * 32))
    assert (packed["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()
    padding = packed["documents"] < 0
    assert (packed["tokens"][padding] == Addition().pad).all() and padding.float().mean() < 0.15
    for preset in ("retnet_micro", "transformer_micro"):
        model = archzoo.create_model(preset, vocab_size=Addition().vocab_size).double()
        gradients = []
        for batch in (plain, packed):
            x, _, _ = model.hidden(batch["tokens"], documents=batch["documents"])
            loss = total_loss(x, model.head, batch["labels"])
            gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("problems", [2, 4])
def test_several_tasks_pack_as_one_does(problems):
    arguments = {"tasks": {"Addition": {}, "Subtraction": {}}, "batch_size": 24}
    plain = Arithmetic(**arguments).training_batch(0, np.arange(24))
    packed = Arithmetic(**arguments, pack=problems).training_batch(0, np.arange(24))
    assert len(packed["tokens"]) == 24 // problems

    def labels(batch):
        seen = batch["labels"] != IGNORED
        return sorted(torch.stack([batch["examples"][seen], batch["labels"][seen]], 1).tolist())

    assert labels(plain) == labels(packed)
    validation = Arithmetic(**arguments, pack=problems).val_dataloader()
    validation = validation[0] if isinstance(validation, list) else validation
    assert len(next(iter(validation))["tokens"]) == 24  # a row each, which exact match counts


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (Addition(), 16),
        (Subtraction(), 16),
        (Multiplication(), 16),
        (BitwiseOr(held_out=2), 16),
        (Sorting(2, 2), 16),
        (Mixed(), 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_docstring_draws_an_example(task, columns):
    text = inspect.cleandoc(type(task).__doc__)
    drawn = (draw(task, row, columns) for row in range(min(task.batch_size, 16)))
    assert any("\n".join(f"    {line}" for line in t.splitlines()) in text for t in drawn)


def test_the_operation_of_the_module_s_docstring_works():
    text = inspect.cleandoc(arithmetic.__doc__).partition("::\n\n")[2]
    scope = {"np": np, "less": digit_arrays.less, "TwoNumbers": arithmetic.TwoNumbers}
    exec(textwrap.dedent(text), scope)
    task = scope["Maximum"](digits=30, reverse=False)
    for (a, b), line in zip(
        task.pairs("train", 50), task.text(task.problems("train", np.arange(50))), strict=True
    ):
        assert line == f"{a}^{b}={max(a, b)}"


# ---------------------------------------------------------------------------- positions


@pytest.mark.parametrize("reverse", [True, False])
def test_digits_of_one_place_share_a_position(reverse):
    task = Addition(
        digits=6,
        reverse=reverse,
        reverse_answer=True,
        zero_padded=True,
        coupled=True,
        batch_size=64,
    )
    assert task.coupling == ("reversed" if reverse else "plain")
    batch = task.train_dataloader().batch(0)
    for tokens, positions in zip(batch["tokens"], batch["positions"], strict=True):
        text = task.tokenizer.decode(tokens.tolist())
        places, at = [], 0
        for number, sign in re.findall("([0-9]+)([+=]?)", text):
            up = list(range(2, len(number) + 2))
            is_answer = "=" in text[:at]
            places += up if reverse or is_answer else up[::-1]
            places += [1] * len(sign)
            at += len(number + sign)
        assert positions[:at].tolist() == places
        assert (positions[at:] == 0).all()
    with pytest.raises(ValueError, match="coupled counts an answer from its units"):
        Addition(reverse=False, coupled=True)


# ---------------------------------------------------------------------------- the stream


@also_mixed
def test_an_example_depends_on_seed_and_number_alone(name):
    whole = make(name, 64).train_dataloader().batch(0)
    for batch_size, ranks in itertools.product((4, 32), (1, 2)):
        loader = make(name, batch_size).train_dataloader()
        parts = [
            loader.batch(number, rank, ranks)
            for number in range(64 // batch_size)
            for rank in range(ranks)
        ]
        assert same({key: torch.cat([part[key] for part in parts]) for key in whole}, whole)
    other = make(name, 64, seed=1).train_dataloader().batch(0)
    assert not torch.equal(other["tokens"], whole["tokens"])


@also_mixed
def test_a_resumed_stream_continues(name):
    arguments = {} if name is Mixed else {"steps_per_epoch": 3}
    loader = make(name, 2, **arguments).train_dataloader()
    whole = [batch for batch, _ in zip(loader, range(3), strict=False)]
    again = make(name, 2, **arguments).train_dataloader()
    again.load_state_dict({"batches": 2})
    assert same(next(iter(again)), whole[2])
    built = build(make(name, 2).config())
    assert same(built.train_dataloader().batch(2), whole[2])


@also_mixed
def test_batches_made_ahead_are_the_same_batches(name, monkeypatch):
    arguments = {} if name is Mixed else {"steps_per_epoch": 7}
    whole = [
        b for b, _ in zip(make(name, 4, **arguments).train_dataloader(), range(7), strict=False)
    ]
    monkeypatch.setattr(stream, "_on_gpu", lambda trainer: True)
    monkeypatch.setattr(stream, "_pinned", lambda batch: batch)
    loader = make(name, 4, **arguments).train_dataloader()
    for number, (batch, expected) in enumerate(zip(loader, whole, strict=False)):
        assert same(batch, expected)
        assert loader.state_dict() == {"batches": number + 1}  # those used, not those made
    if name is not Mixed:
        assert number == 6


@tasks
def test_every_size_comes_equally_often(name):
    task = make(name)
    lines = task.text(task.problems("train", np.arange(40_000)))
    if name is Sorting:
        counts = np.bincount([line.count(":") for line in lines])[1:]
    else:
        sign = re.escape(task.operators[0])
        sizes = [tuple(map(len, re.split(f"{sign}|=", line)[:2])) for line in lines]
        counts = np.unique(sizes, axis=0, return_counts=True)[1]
        assert len(counts) == task.digits**2
    expected = counts.mean()
    statistic = torch.tensor(((counts - expected) ** 2 / expected).sum(), dtype=torch.float64)
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-3


# ---------------------------------------------------------------------------- the split


def identity(task, line):
    """What makes a problem that one: its numbers, whatever their order where it means nothing."""
    problem = line.split("=")[0]
    if isinstance(task, Sorting):
        return tuple(sorted(re.findall("[0-9]+", problem)))
    a, _, b = problem.partition(task.operators[0])
    return (a, b) if isinstance(task, Subtraction) else tuple(sorted((a, b)))


@tasks
def test_train_and_held_out_are_disjoint_where_all_is_shown(name):
    small = {"held_out": 5} | ({"digits": 8} if name is BitwiseOr else {"digits": 2})
    small |= {"numbers": 2} if name is Sorting else {}
    task = make(name, validation_examples=10**6, test_examples=10**6, **small)
    shown = {identity(task, t) for t in task.text(task.problems("train", np.arange(60_000)))}
    asked = {}
    for split in ("validation", "test"):
        lines = task.text(task.problems(split, np.arange(task.rows(split))))
        asked[split] = {identity(task, line) for line in lines}
        assert asked[split] and not asked[split] & shown
        size = 4 if name is BitwiseOr else 2
        cell = task.text(task.cell(size, size, 10**6, split))
        assert {identity(task, line) for line in cell} <= asked[split]
    assert not asked["validation"] & asked["test"]
    held_out = asked["validation"] | asked["test"]
    share = len(asked["test"]) / len(held_out)
    assert share == pytest.approx(1 / 2, abs=0.06 if name is not BitwiseOr else 0.3)
    share = len(held_out) / len(held_out | shown)
    assert share == pytest.approx(1 / 5, abs=0.06 if name is not BitwiseOr else 0.2)


@tasks
def test_the_split_is_the_same_at_every_length_and_seed(name):
    sizes = {"numbers": 9, "digits": 9} if name is Sorting else {"digits": 25}
    task = make(name, seed=3, **sizes)
    small = make(name)
    train = task.problems("train", np.arange(2000))
    assert not task.is_held_out(train).any()
    assert not small.is_held_out(train).any()  # whatever lengths a task was made for
    for problems in (
        task.cell(9, 9, 40),
        task.problems("validation", np.arange(task.rows("validation"))),
    ):
        assert problems.examples and small.is_held_out(problems).all()
    shorter = task.cell(9, 9, 20)
    same_ones = task.cell(9, 9, 40).take(np.arange(shorter.examples))
    assert (shorter.operands == same_ones.operands).all()


@pytest.mark.parametrize("size", [3, 12])
def test_chains_are_as_long_as_asked(size):
    task = Addition()
    for chain in range(size + 1):
        problems = task.chained(size, chain, 30)
        assert (longest_carry(*problems.operands) == chain).all()
        assert (problems.lengths == size).all() and (problems.operands[:, size - 1] > 0).all()
        assert task.is_held_out(problems).all()
    with pytest.raises(ValueError, match="carry through 13 columns"):
        task.chained(12, 13, 1)


# ---------------------------------------------------------------------------- greedy generation


@tasks
@pytest.mark.parametrize("model", MICRO)
def test_exact_match_is_what_greedy_generation_gives(name, model):
    """One teacher-forced pass over lines of many lengths, against decoding each problem."""
    task = make(name, 24, **({"numbers": 3} if name is Sorting else {"digits": 5}))
    torch.manual_seed(1)
    net = micro(model, vocab_size=task.vocab_size).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter *= 8  # so that contexts matter to what it writes
    batch = task.train_dataloader().batch(0)
    tokens, labels = batch["tokens"], batch["labels"]
    asked = [row.nonzero()[:, 0].tolist() for row in labels != IGNORED]
    prompts = [tokens[row, : places[0] + 1].tolist() for row, places in enumerate(asked)]
    found = generate(net, prompts, max_tokens=max(map(len, asked))).tokens
    # What the model answers becomes the right answer, but for one token in two rows of three.
    expected = []
    for row, places in enumerate(asked):
        answer = found[row][: len(places)]
        if row % 3:
            answer[-1 if row % 3 == 1 else 0] ^= 1
        labels[row, places] = torch.tensor(answer)
        tokens[row, places[1:]] = torch.tensor(answer[:-1], dtype=torch.int64)
        expected.append(answer == found[row][: len(places)])
    with torch.no_grad():
        logits = net(tokens, documents=batch["documents"]).logits
    assert exact_match(logits, labels).tolist() == expected
    assert any(expected) and not all(expected)


# ---------------------------------------------------------------------------- inside text


def mixed(**arguments):
    return Mixed(context_length=128, lines=2, batch_size=32, **arguments)


def test_a_window_is_the_text_with_problems_between_its_lines():
    task, plain = mixed(), Mixed.__mro__[1](context_length=128, batch_size=32)
    batch, text = task.train_dataloader().batch(5), plain.train_dataloader().batch(5)
    numbers = (5 * 32 + np.arange(32))[:, None] * 2 + np.arange(2)
    for row in range(32):
        written = task.tokenizer.decode([*batch["tokens"][row], batch["labels"][row, -1]])
        expected = task.synthetic.text(task.synthetic.problems("train", numbers[row]))
        for line in expected:
            assert re.search(rf"(^|\n){re.escape(line)}\n", written)
            written = re.sub(rf"(^|\n){re.escape(line)}\n", r"\1", written, count=1)
        whole = plain.tokenizer.decode([*text["tokens"][row], text["labels"][row, -1]])
        assert whole.startswith(written)
        # All is asked but the problems themselves.
        unasked = batch["tokens"][row, 1:][batch["labels"][row, :-1] == IGNORED]
        left = "".join(line.partition("=")[0] + "=" for line in expected)
        assert sorted(task.tokenizer.decode(unasked.tolist())) in (
            sorted(left),
            sorted(left.replace(expected[0][0], "", 1)),  # the window's first token never is
            sorted(left.replace(expected[1][0], "", 1)),
        )


def test_held_out_problems_are_asked_within_text_that_is_not_trained_on():
    task = mixed(problem_arguments={"digits": 4, "ood_digits": [7], "validation_examples": 70})
    text, problems, longer = task.val_dataloader()
    assert task.extra_validation == ("problems", 7)
    assert (text.batch(0)["labels"] != IGNORED).all()
    for loader, size in ((problems, 4), (longer, 7)):
        seen = 0
        for batch in loader:
            for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
                answer = task.tokenizer.decode(labels[labels != IGNORED].tolist())
                assert answer.endswith("\n")
                written = task.tokenizer.decode([*tokens, labels[-1].clamp(min=0)])
                [found] = re.findall(r"(?:^|\n)([0-9]+\+[0-9]+=[0-9]+\n)", written)
                a, b, c = task.synthetic.parse(found.strip())
                assert a + b == c and answer == str(c)[::-1] + "\n"
                assert max(len(str(a)), len(str(b))) <= size
                problem = digit_arrays.from_integers([a], 9), digit_arrays.from_integers([b], 9)
                lengths = np.array([[len(str(a))], [len(str(b))]])
                both = arithmetic.Problems(np.stack(problem), lengths, np.zeros(1, np.int64))
                assert task.synthetic.is_held_out(both).all()
                seen += 1
        assert seen == (70 if size == 4 else 200)


@pytest.mark.parametrize("tokenizer", ["bpe", "unigram"])
def test_any_tokenizer_that_splits_digits_holds_both(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Fourscore and seven years ago, in 1863.\n" * 400)
    task = Mixed(
        path=str(path), tokenizer=tokenizer, vocab_size=400, context_length=64, batch_size=4
    )
    batch = task.train_dataloader().batch(0)
    for row, tokens in enumerate(batch["tokens"].tolist()):
        written = task.tokenizer.decode([*tokens, batch["labels"][row, -1].item()])
        for line in task.synthetic.text(task.synthetic.problems("train", row * 2 + np.arange(2))):
            assert f"{line}\n" in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problems": "Text"}, "Text cannot stand in a text"),
        ({"lines": 0}, "lines 0 is not positive"),
        ({"context_length": 20}, "too short for 2 problems of up to 13 tokens: take 26"),
        ({"problem_arguments": {"digits": 0}}, "min_digits 1 is not between 1 and digits 0"),
    ],
)
def test_what_cannot_be_mixed_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixed(**arguments)


def test_what_cannot_be_made_is_said():
    with pytest.raises(ValueError, match="none of the few problems is held out"):
        BitwiseOr(held_out=20).prepare()
    BitwiseOr().prepare()
    with pytest.raises(ValueError, match="keys for 51 numbers, not for 52"):
        Sorting(numbers=52)
    with pytest.raises(ValueError, match="numbers 0 is not positive"):
        Sorting(numbers=0)
    with pytest.raises(ValueError, match="pack 0 is not positive: 1 gives each problem a row"):
        Addition(pack=0)
