"""Addition: the stream, the split, the batches, and the order of data after a resume."""

import inspect
import itertools
import subprocess
import sys

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archzoo.tasks import Addition, Task, build, draw, exact_match
from archzoo.tasks.counter_random import random_bits
from archzoo.tasks.stream import IGNORED, Loader

torch.set_num_threads(1)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def texts(task, batch):
    """Every row's tokens up to the stop token, as text, with the last label put back."""
    for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
        line = [*tokens, labels[-1] if labels[-1] != IGNORED else task.tokenizer.pad_token]
        yield task.tokenizer.decode(line[: line.index(task.stop_token)])


# ---------------------------------------------------------------------------- one example


def test_the_docstring_shows_what_the_code_does():
    assert inspect.cleandoc(Addition.__doc__).count(
        "\n".join(f"    {line}" for line in draw(Addition(), row=3).splitlines())
    )
    assert Addition().pairs("train", 4)[3] == (2, 632)


@settings(max_examples=40, deadline=None)
@given(
    digits=st.integers(1, 40),
    shortest=st.integers(1, 40),
    reverse=st.booleans(),
    seed=st.integers(-(2**70), 2**70),
    start=st.integers(0, 2**40),
)
def test_rows_say_what_the_numbers_say(digits, shortest, reverse, seed, start):
    task = Addition(digits, min(digits, shortest), reverse, seed=seed, batch_size=8)
    batch = task.training_batch(start, np.arange(8))
    problems = task.problems("train", start * 8 + np.arange(8))
    pairs = [
        tuple(int("".join(map(str, digits[::-1]))) for digits in pair)
        for pair in problems.operands.transpose(2, 0, 1).tolist()
    ]
    for row, ((a, b), line) in enumerate(zip(pairs, texts(task, batch), strict=True)):
        assert (len(str(a)), len(str(b))) == tuple(problems.lengths[:, row])
        assert line == task.prompt(a, b) + task.answer(a, b)
        assert task.parse(line) == (a, b, a + b)
        labels = batch["labels"][row].tolist()
        answer = [*task.tokenizer.encode(task.answer(a, b)), task.stop_token]
        first = len(task.prompt(a, b)) - 1  # the logits at `=` say the answer's first digit
        assert labels[first : first + len(answer)] == answer
        assert set(labels[:first] + labels[first + len(answer) :]) <= {IGNORED}
        padding = (batch["tokens"][row] == task.tokenizer.pad_token).tolist()
        assert padding == (batch["documents"][row] == -1).tolist()
    assert batch["tokens"].shape == batch["labels"].shape == (8, task.context_length)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["examples"].tolist() == [
        [start * 8 + row] * task.context_length for row in range(8)
    ]


def test_two_hundred_digits_and_a_carry_through_all_of_them():
    task = Addition(digits=200, min_digits=200, batch_size=4)
    for (a, b), line in zip(
        task.pairs("train", 4), texts(task, task.train_dataloader().batch(0)), strict=True
    ):
        assert task.parse(line) == (a, b, a + b)
    a, b = 10**200 - 1, 1
    assert task.parse(task.prompt(a, b) + task.answer(a, b)) == (a, b, 10**200)


@pytest.mark.parametrize("line", ["", "12", "1+2", "1=2", "1+=3", "+1=1", "1+2=3x", "1-2=3"])
def test_parse_refuses_what_is_no_sum(line):
    with pytest.raises(ValueError, match="a\\+b=c"):
        Addition().parse(line)


# ---------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("digits", [3, 20])
def test_an_example_depends_on_seed_and_number_alone(digits):
    whole = Addition(digits, batch_size=128).train_dataloader().batch(0)
    for batch_size, ranks in itertools.product((4, 64), (1, 2, 4)):
        loader = Addition(digits, batch_size=batch_size).train_dataloader()
        parts = [
            loader.batch(number, rank, ranks)
            for number in range(128 // batch_size)
            for rank in range(ranks)
        ]
        joined = {key: torch.cat([part[key] for part in parts]) for key in whole}
        assert same(joined, whole)
    one_by_one = Addition(digits, batch_size=1).train_dataloader()
    for row in (0, 1, 57):
        assert same(one_by_one.batch(row), {k: v[row : row + 1] for k, v in whole.items()})
    other = Addition(digits, batch_size=128, seed=1).train_dataloader().batch(0)
    assert not torch.equal(other["tokens"], whole["tokens"])


def test_ranks_share_an_uneven_last_evaluation_batch():
    task = Addition(batch_size=64, validation_examples=129)
    loader = task.val_dataloader()
    alone = loader.batch(2)
    parts = [loader.batch(2, rank, 4) for rank in range(4)]
    assert [len(part["labels"]) for part in parts] == [1, 1, 1, 1]
    assert len(alone["labels"]) == 1
    assert same(parts[0], alone)
    assert all((part["labels"] == IGNORED).all() for part in parts[1:])


def test_a_batch_that_ranks_cannot_share_is_refused():
    task = Addition(batch_size=3)
    task.trainer = type(
        "Trainer", (), {"distributed_sampler_kwargs": {"rank": 0, "num_replicas": 2}}
    )()
    with pytest.raises(ValueError, match="batch_size 3 cannot be shared by 2 ranks"):
        next(iter(task.train_dataloader()))


def chi_square_p(counts):
    counts = torch.as_tensor(counts, dtype=torch.float64).flatten()
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(half, statistic / 2).item()


def test_lengths_and_digits_are_uniform():
    problems = Addition(digits=5).problems("train", np.arange(100_000))
    pairs = torch.zeros(5, 5)
    pairs.index_put_(tuple(torch.from_numpy(problems.lengths - 1)), torch.ones(()), accumulate=True)
    assert pairs.sum() == 100_000
    assert chi_square_p(pairs) > 1e-3
    for number, lengths in zip(problems.operands, problems.lengths, strict=True):
        long = number[:, lengths == 5]
        assert chi_square_p(np.bincount(long[4], minlength=10)[1:]) > 1e-3
        for place in range(4):
            assert chi_square_p(np.bincount(long[place], minlength=10)) > 1e-3


def test_random_bits_are_those_of_their_counter_alone():
    whole = random_bits(3, 1, np.arange(50), 8)
    assert (random_bits(3, 1, np.array([7, 49]), 3, start=2) == whole[2:5, [7, 49]]).all()
    assert len({int(bits) for bits in whole.flatten()}) == whole.size
    assert not (whole == random_bits(3, 2, np.arange(50), 8)).any()
    assert not (whole == random_bits(4, 1, np.arange(50), 8)).any()


# ---------------------------------------------------------------------------- the split


def unordered(pairs):
    return {tuple(sorted(pair)) for pair in pairs}


def test_training_and_held_out_problems_are_disjoint_up_to_three_digits():
    task = Addition(digits=3, validation_examples=10**6, test_examples=10**6, held_out=5)
    asked = {part: task.pairs(part, task.rows(part)) for part in ("validation", "test")}
    assert not unordered(asked["validation"]) & unordered(asked["test"])
    assert len(asked["test"]) == pytest.approx(len(asked["validation"]), rel=0.02)
    held_out = asked["validation"] + asked["test"]
    assert len(set(held_out)) == len(held_out)
    assert {pair[::-1] for pair in held_out} == set(held_out)  # a + b and b + a, always together
    assert pytest.approx(len(held_out), rel=0.01) == 1000 * 1000 / 5

    seen = set(task.pairs("train", 200_000))
    assert not unordered(seen) & unordered(held_out)
    # Where training has had the time to show everything, both sides together are all there is.
    small = set(itertools.product(range(100), range(10)))
    assert small <= seen | set(held_out)


@pytest.mark.parametrize("digits", [5, 30])
def test_longer_problems_are_disjoint_too_in_both_orders(digits):
    task = Addition(digits=digits, min_digits=digits)
    problems = task.problems("validation", np.arange(300))
    a, b = problems.operands
    wide = np.zeros((7, 300), np.uint8)  # leading zeros change nothing
    swapped = np.stack([np.concatenate([b, wide]), np.concatenate([a, wide])])
    assert task.is_held_out(problems._replace(operands=swapped)).all()
    train = Addition(digits=digits, min_digits=digits, seed=9).problems("train", np.arange(3000))
    assert not task.is_held_out(train._replace(operands=train.operands[::-1])).any()
    assert problems.lengths.min() == digits


def test_held_out_problems_are_spread_over_lengths_and_the_same_for_every_seed():
    task = Addition(digits=3, validation_examples=900, test_examples=900)
    counts = task.counts("validation")
    assert sum(counts.values()) == task.rows("validation") == 900
    full = max(counts.values())
    every = Addition(digits=3, validation_examples=10**6).counts("validation")
    for pair, count in counts.items():
        assert count == every[pair] or count >= full - 1
    assert task.pairs("validation", 900) == Addition(seed=5, validation_examples=900).pairs(
        "validation", 900
    )
    # Test takes other problems than validation where there are enough for both.
    roomy = {pair for pair in every if every[pair] >= 2 * full}
    for a, b in set(task.pairs("validation", 900)) & set(task.pairs("test", 900)):
        assert (len(str(a)), len(str(b))) not in roomy
    assert roomy


# ---------------------------------------------------------------------------- exact match


def test_exact_match_wants_every_label():
    labels = torch.tensor([[IGNORED, 1, 2], [IGNORED, 1, 2], [IGNORED, 0, IGNORED]])
    logits = nn.functional.one_hot(torch.tensor([[2, 1, 2], [0, 1, 1], [1, 0, 2]]), 3).float()
    assert exact_match(logits, labels).tolist() == [True, False, True]


def test_exact_match_is_what_greedy_generation_gives():
    """A model that knows addition but errs after one prefix in eleven, by a hash of the prefix."""
    task = Addition(digits=4, batch_size=200)
    batch = task.train_dataloader().batch(0)
    pairs = task.pairs("train", 200)

    def logits_after(prefix):
        weights = np.uint64(31) ** np.arange(len(prefix), dtype=np.uint64)
        errs = int((np.array(prefix, np.uint64) * weights).sum()) % 11 == 0
        text = task.tokenizer.decode(prefix)
        token = 0
        if "=" in text:
            problem, written = text.split("=")
            a, b = (int(part[::-1]) for part in problem.split("+"))
            answer = [*task.tokenizer.encode(task.answer(a, b)), task.stop_token]
            token = answer[min(len(written), len(answer) - 1)]
        return nn.functional.one_hot(
            torch.tensor((token + errs) % task.vocab_size), task.vocab_size
        )

    forced = exact_match(
        torch.stack(
            [
                torch.stack([logits_after(row[: t + 1]) for t in range(len(row))])
                for row in batch["tokens"].tolist()
            ]
        ),
        batch["labels"],
    )
    greedy = []
    for a, b in pairs:
        tokens = task.tokenizer.encode(task.prompt(a, b))
        length = len(tokens)
        while len(tokens) < task.context_length + 1 and tokens[-1] != task.stop_token:
            tokens.append(int(logits_after(tokens).argmax()))
        right = [*task.tokenizer.encode(task.answer(a, b)), task.stop_token]
        greedy.append(tokens[length:] == right)
    assert forced.tolist() == greedy
    assert 20 < sum(greedy) < 180


# ---------------------------------------------------------------------------- resuming


class Recorder(lightning.LightningModule):
    """Trains one number and writes down which examples it was shown."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = []
        self.fail_at = fail_at

    def training_step(self, batch, _):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        self.seen.append(batch["examples"][:, 0].tolist())
        return self.weight**2

    def validation_step(self, batch, _):
        self.validated.append(batch["examples"][:, 0].tolist())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["seen"] = len(self.seen)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAlways(lightning.Callback):
    """Saves after every batch, every validation and every epoch."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, moment):
        seen = len(trainer.lightning_module.seen)
        trainer.save_checkpoint(self.folder / f"{seen:03}-{moment}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")

    def on_exception(self, trainer, *_):
        self.save(trainer, "exception")


def trainer_for(settings, callbacks=()):
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


def fit(settings, model, callbacks=(), checkpoint=None, **task):
    trainer = trainer_for(settings, callbacks)
    data = Addition(batch_size=4, steps_per_epoch=5, validation_examples=8, **task)
    # weights_only: the checkpoint is plain data, nothing in it needs to be trusted
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return model


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 12},
        {"max_epochs": 3},
        {"max_steps": 5, "accumulate_grad_batches": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 2},
    ],
    ids=lambda settings: "-".join(f"{k}{v}" for k, v in settings.items()),
)
def test_a_resumed_run_is_shown_what_comes_next(tmp_path, settings):
    whole = fit(settings, Recorder(), [SaveAlways(tmp_path)]).seen
    assert whole == [[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in range(len(whole))]
    checkpoints = sorted(tmp_path.iterdir())
    moments = {path.stem.split("-")[1] for path in checkpoints}
    assert moments == {"batch", "validation", "epoch"}
    for checkpoint in checkpoints:
        seen = torch.load(checkpoint, weights_only=True)["seen"]
        resumed = fit(settings, Recorder(), checkpoint=checkpoint)
        assert resumed.seen == whole[seen:], checkpoint.name


def test_a_batch_that_failed_is_shown_again(tmp_path):
    settings = {"max_steps": 9}
    whole = fit(settings, Recorder()).seen
    with pytest.raises(RuntimeError, match="power cut"):
        fit(settings, Recorder(fail_at=7), [SaveAlways(tmp_path)])
    resumed = fit(settings, Recorder(), checkpoint=tmp_path / "007-exception.ckpt")
    assert resumed.seen == whole[7:]


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_limited_epochs_continue_through_the_stream_and_overfitting_stays():
    limited = fit({"max_epochs": 3, "limit_train_batches": 2}, Recorder())
    assert [rows[0] for rows in limited.seen] == [0, 4, 8, 12, 16, 20]
    assert limited.validated[-2:] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    overfit = fit({"max_epochs": 3, "overfit_batches": 2}, Recorder())
    assert [rows[0] for rows in overfit.seen] == [0, 4, 0, 4, 0, 4]


def test_outside_a_trainer_the_loader_keeps_its_place():
    loader = Addition(batch_size=2, steps_per_epoch=3).train_dataloader()
    first = list(loader)
    assert len(first) == len(loader) == 3
    state = loader.state_dict()
    second = next(iter(loader))
    assert second["examples"][0, 0] == 6
    again = Addition(batch_size=2, steps_per_epoch=3).train_dataloader()
    again.load_state_dict(state)
    assert same(next(iter(again)), second)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_run_resumes_with_another_batch_size_where_it_was(tmp_path):
    """Example by example, through changes of the batch size in both directions."""
    sizes, steps, path, seen = [4, 6, 3, 4], 0, None, []
    for size in sizes:
        steps += 3
        model = Recorder()
        trainer = trainer_for({"max_steps": steps})
        data = Addition(batch_size=size, steps_per_epoch=5, validation_examples=8)
        trainer.fit(model, data, ckpt_path=path, weights_only=True)
        assert [len(rows) for rows in model.seen] == [size] * 3
        seen += [number for rows in model.seen for number in rows]
        path = tmp_path / f"{steps}.ckpt"
        trainer.save_checkpoint(path)
    assert seen == list(range(3 * sum(sizes)))


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_a_run_after_a_resumed_one_begins_at_the_first_example(tmp_path):
    """In one process, with one task: what the resumed run had used is none of its own."""
    model, trainer = Recorder(), trainer_for({"max_steps": 3})
    trainer.fit(model, Addition(batch_size=6, steps_per_epoch=9, validation_examples=8))
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    data = Addition(batch_size=2, steps_per_epoch=9, validation_examples=8)
    trainer, model = trainer_for({"max_steps": 5}), Recorder()
    trainer.fit(model, data, ckpt_path=tmp_path / "3.ckpt", weights_only=True)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model, data)  # continues
    assert [number for rows in model.seen for number in rows] == list(range(18, 24))
    trainer, model = trainer_for({"max_steps": 5}), Recorder()
    trainer.fit(model, data)
    assert [number for rows in model.seen for number in rows] == list(range(10))
    assert data.state_dict()["examples"] == 10


def test_a_batch_that_begins_within_another_holds_the_same_examples():
    task = Addition(batch_size=6)
    whole = Addition(batch_size=66).train_dataloader().batch(0)
    task.load_state_dict({"batches": 7, "examples": 28, "batch_size": 4})
    loader = task.train_dataloader()
    for number in (7, 8, 9):
        rows = slice(28 + (number - 7) * 6, 34 + (number - 7) * 6)
        expected = {name: entry[rows] for name, entry in whole.items()}
        assert same(loader.batch(number), expected)
        halves = [loader.batch(number, rank, 2) for rank in range(2)]
        assert same({k: torch.cat([half[k] for half in halves]) for k in expected}, expected)
    with pytest.warns(UserWarning, match=r"other examples .* digits is 3 and was 4"):
        task.load_state_dict(Addition(digits=4).state_dict())


# ---------------------------------------------------------------------------- around


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digits": 2, "min_digits": 3}, "min_digits 3 is not between 1 and digits 2"),
        ({"digits": 0}, "min_digits 1 is not between 1 and digits 0"),
        ({"held_out": 1}, "held_out 1 leaves nothing to train on"),
        ({"batch_size": 0}, "batch_size 0 is not positive"),
        ({"steps_per_epoch": 0}, "steps_per_epoch 0 is not positive"),
        ({"test_examples": -1}, "test_examples -1 is not positive"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Addition(**arguments)
    assert "\n" not in str(caught.value)


def test_a_task_is_made_again_from_its_configuration():
    task = Addition(digits=5, reverse=False, seed=3, batch_size=8)
    assert task.config()["class_path"] == "archzoo.tasks.Addition"
    again = build(task.config())
    assert again.config() == task.config()
    assert same(task.train_dataloader().batch(2), again.train_dataloader().batch(2))
    assert again.stop_token == 94
    assert again.vocab_size == 96
    assert again.tokenizer.digit_tokens == list(range(10))
    assert set(inspect.signature(Addition).parameters) == set(task.arguments)


def test_a_stranger_s_class_is_not_imported():
    with pytest.raises(ValueError, match=r"unknown task: 'os\.system' is not a Task"):
        build({"class_path": "os.system", "init_args": {}})


def test_a_task_of_one_s_own_is_known_once_it_is_imported():
    class Ones(Task):
        def __init__(self, batch_size=2):
            super().__init__(batch_size=batch_size)

        def prepare(self):
            pass

        def rows(self, split):
            return 4

        def training_batch(self, number, rows):
            return {"tokens": torch.ones(len(rows), 3, dtype=torch.int64)}

    loader = build(Ones().config()).train_dataloader()
    assert isinstance(loader, Loader)
    assert [batch["tokens"].sum().item() for batch in loader] == [6, 6]


def test_tokenizers_do_not_wait_for_lightning():
    code = (
        "import archzoo, sys; early = [m for m in sys.modules if m.startswith('archzoo.tasks')]\n"
        "import archzoo.tasks.tokenizers\n"
        "late = {'lightning', 'tokenizers', 'sentencepiece'} & set(sys.modules)\n"
        "sys.exit(f'{early} {late}' if early or late else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class RankRecorder(Recorder):
    """Saves what every rank was shown."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save((self.seen, self.validated), self.folder / f"{self.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_share_every_batch(tmp_path):
    fit({"max_steps": 7, "devices": 2, "strategy": "ddp_fork"}, RankRecorder(tmp_path))
    alone = fit({"max_steps": 7}, Recorder())
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for together, apart in ((alone.seen, 0), (alone.validated, 1)):
        assert together == [
            left + right for left, right in zip(ranks[0][apart], ranks[1][apart], strict=True)
        ]
