"""Abacus: the published ids, cuts, documents, shifts, coverage, and what a task tells it."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import archzoo
from archzoo.block import init_cursor, make_context
from archzoo.checkpoint import from_pretrained, save_pretrained
from archzoo.embeddings.abacus import AbacusEmbedding
from archzoo.embeddings.counter_random import SHIFTS, integers, random_bits, uniform
from archzoo.embeddings.token import TokenEmbedding
from archzoo.generation import generate
from archzoo.tasks import counter_random
from archzoo.tasks.arithmetic import Addition, exact_match
from archzoo.tasks.stream import Task
from archzoo.tasks.tokenizers import CharacterTokenizer
from archzoo.training.module import LanguageModel

GOLDEN = load_file(Path(__file__).parent / "golden" / "abacus_positions.safetensors")
DIGITS = GOLDEN["digit_tokens"].tolist()
TOKENIZER = CharacterTokenizer("0123456789+=", special=True)


def abacus(**arguments) -> AbacusEmbedding:
    """Over the tokenizer of sums, in evaluation mode."""
    given = {"digit_tokens": list(range(10)), "operator_tokens": [10, 11]} | arguments
    return AbacusEmbedding(14, 8, **given).eval()


def task_of(longest_run, tokenizer=TOKENIZER):
    """What a task says of its numbers."""
    return SimpleNamespace(tokenizer=tokenizer, longest_run=longest_run)


def rows(part, tokens, examples=None, documents=None):
    context, _ = make_context(*tokens.shape, documents=documents, examples=examples)
    return part.positions(tokens, None, context)[0]


def written(part, text):
    return rows(part, torch.tensor([TOKENIZER.encode(text)]))[0].tolist()


def naive(tokens, digits, documents=None):
    """The rule, one token at a time; padding is ignored."""
    found = []
    for row in range(len(tokens)):
        count, last, ids = 0, None, []
        for t, token in enumerate(tokens[row].tolist()):
            document = 0 if documents is None else int(documents[row, t])
            if document < 0:
                ids.append(0)
                continue
            if last is not None and document != last:
                count = 0
            last = document
            count = count + 1 if token in digits else 0
            ids.append(count)
        found.append(ids)
    return torch.tensor(found)


# ---------------------------------------------------------------------------- ids


def test_evaluation_gives_the_published_ids_and_embeddings():
    part = AbacusEmbedding(21, 8, digit_tokens=DIGITS, normalise=False).eval()
    tokens = GOLDEN["input_ids"]
    assert torch.equal(rows(part, tokens), GOLDEN["position_ids_eval"])
    with torch.no_grad():
        part.weight.zero_()
        part.table.weight.copy_(GOLDEN["embedding.weight"])
    context, _ = make_context(*tokens.shape)
    x, _ = part(tokens, None, context)
    torch.testing.assert_close(x, GOLDEN["embedding_out_eval"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [0, 1, 5, 99])
def test_training_gives_the_published_ids_for_a_shift(shift):
    part = AbacusEmbedding(21, 8, digit_tokens=DIGITS, max_shift=99).train()
    numbers = torch.arange(5000)
    drawn = integers(random_bits(0, SHIFTS, numbers), 100)
    tokens = GOLDEN["input_ids"]
    examples = numbers[drawn == shift][: len(tokens), None].expand(-1, tokens.shape[1])
    assert len(examples) == len(tokens)
    assert torch.equal(rows(part, tokens, examples), GOLDEN[f"position_ids_train_k{shift}"])


def test_coupled_ids_on_lines_written_by_hand():
    part = abacus(coupled=True)
    assert written(part, "12+345=663") == [2, 3, 1, 2, 3, 4, 1, 2, 3, 4]
    assert written(part, "9+=0") == [2, 1, 1, 2]
    assert written(abacus(), "12+345=663") == [1, 2, 0, 1, 2, 3, 0, 1, 2, 3]
    stop, pad = TOKENIZER.stop_token, TOKENIZER.pad_token
    assert rows(part, torch.tensor([[5, stop, pad, pad]]))[0].tolist() == [2, 0, 0, 0]


@given(st.data())
def test_any_text_cut_anywhere_gives_the_ids_of_the_rule(data):
    time = data.draw(st.integers(1, 24))
    token = st.sampled_from([0, 1, 2, 3, 10, 11])
    tokens = torch.tensor([data.draw(st.lists(token, min_size=time, max_size=time))])
    documents = None
    if data.draw(st.booleans()):  # padding at both ends and up to three documents
        left = data.draw(st.integers(0, time - 1))
        right = data.draw(st.integers(left + 1, time))
        borders = [data.draw(st.integers(left, right)) for _ in range(2)]
        documents = torch.tensor(
            [
                [sum(t >= b for b in borders) if left <= t < right else -1 for t in range(time)],
            ]
        )
    want = naive(tokens, range(10), documents)
    part = abacus()
    assert torch.equal(rows(part, tokens, documents=documents), want)
    for cut in range(1, time):
        state, cursor, found = part.init_state(1), init_cursor(1), []
        for segment in (slice(0, cut), slice(cut, time)):
            context, cursor = make_context(
                1,
                tokens[:, segment].shape[1],
                documents=None if documents is None else documents[:, segment],
                cursor=cursor,
            )
            ids, state = part.positions(tokens[:, segment], state, context)
            found.append(ids)
        assert torch.equal(torch.cat(found, 1), want)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_model_gives_the_same_whole_in_segments_and_by_step(coupled, dtype, tolerance):
    arguments = {"digit_tokens": DIGITS, "coupled": coupled, "operator_tokens": [13, 14]}
    model = archzoo.create_model(
        "transformer_micro",
        vocab_size=21,
        embedding={"class_path": "AbacusEmbedding", "init_args": arguments},
    )
    model = model.to(dtype).eval()
    tokens = GOLDEN["input_ids"]
    with torch.no_grad():
        whole = model(tokens).logits
        for sizes in ([1] * 21, [20, 1], [4, 9, 8]):
            state, found = model.init_state(len(tokens)), []
            for segment in tokens.split(sizes, dim=1):
                output = model(segment, state)
                found.append(output.logits)
                state = output.state
            error = (torch.cat(found, 1) - whole).norm() / whole.norm()
            assert error < tolerance
        # The count in the state did matter.
        lost = model.init_state(len(tokens))
        first = model(tokens[:, :10], lost)
        first.state["embedding"]["run"].zero_()
        rest = model(tokens[:, 10:], first.state).logits
        assert (rest - whole[:, 10:]).abs().max() > 1e-3


def test_the_count_survives_half_precision():
    part = abacus(rows=700, max_shift=100).bfloat16()
    tokens = torch.full((1, 600), 7)
    assert rows(part, tokens)[0].tolist() == list(range(1, 601))
    state = part.init_state(2, dtype=torch.bfloat16)
    assert state["run"].dtype == torch.int64


# ---------------------------------------------------------------------------- shifts


def test_draws_are_those_of_the_data():
    numbers = torch.tensor([0, 1, 2, 77, 2**40, 2**62 + 1])
    for seed in (0, 3, -5, 2**70):
        for stream_number in (0, SHIFTS):
            want = counter_random.random_bits(seed, stream_number, numbers.numpy(), 4)
            for draw in range(4):
                got = random_bits(seed, stream_number, numbers, draw)
                assert np.array_equal(got.numpy().view(np.uint64), want[draw])
            tensor = random_bits(seed, stream_number, numbers[:, None], torch.arange(4))
            assert np.array_equal(tensor.numpy().view(np.uint64), want.T)


def test_draws_are_uniform():
    bits = random_bits(1, SHIFTS, torch.arange(100_000))
    counts = torch.bincount(integers(bits, 21), minlength=21)
    assert len(counts) == 21  # 0 and 20 among them: the largest shift is included
    chi_square = ((counts - 1e5 / 21) ** 2 / (1e5 / 21)).sum()
    assert chi_square < 45.3  # p = 1e-3 at 20 degrees of freedom
    numbers = uniform(bits)
    assert numbers.min() > 0 and numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=5e-3)
    assert numbers.var() == pytest.approx(1 / 12, abs=5e-3)


def test_one_shift_for_all_numbers_of_an_example_and_another_for_the_next():
    part = abacus(max_shift=50, coupled=True).train()
    line = torch.tensor([TOKENIZER.encode("12+345=663")]).expand(64, -1)
    plain = rows(part.eval(), line)
    examples = torch.arange(64)[:, None].expand_as(line)
    shifted = rows(part.train(), line, examples)
    by = shifted - plain
    assert (by == by[:, :1]).all()
    assert by.min() >= 0 and by.max() <= 50 and len(by[:, 0].unique()) > 20
    other = AbacusEmbedding(
        14, 8, digit_tokens=list(range(10)), operator_tokens=[10, 11], coupled=True, max_shift=50,
        seed=1,
    )  # fmt: skip
    assert not torch.equal(rows(other.train(), line, examples), shifted)
    assert torch.equal(rows(part.eval(), line, examples), plain)


def test_a_shift_depends_on_the_example_alone():
    """Not on the batch, the row, the packing or what was drawn before."""
    part = abacus(max_shift=50).train()
    lines = [torch.tensor(TOKENIZER.encode(text)) for text in ("1+2=3", "55+5=06", "987+1=887")]
    alone = [
        rows(part, line[None], torch.full((1, len(line)), number))[0]
        for number, line in enumerate(lines)
    ]
    torch.rand(3)  # another state of torch's own generator
    packed = torch.cat(lines)[None]
    documents = torch.cat([torch.full((len(line),), n) for n, line in enumerate(lines)])[None]
    assert torch.equal(rows(part, packed, documents, documents)[0], torch.cat(alone))
    assert torch.equal(rows(part, lines[1][None], torch.ones(1, 7).long())[0], alone[1])


def test_training_without_example_numbers_is_refused():
    part = abacus().train()
    with pytest.raises(ValueError, match="give examples="):
        rows(part, torch.zeros(1, 3, dtype=torch.int64))
    rows(abacus(max_shift=0).train(), torch.zeros(1, 3, dtype=torch.int64))


def test_gradients_reach_the_rows_of_the_law_and_no_others():
    """Rows 1 .. max_shift + longest run, and row 0; each of them, and no others."""
    part = abacus(max_shift=6, longest_run=4, rows=20).train()
    line = torch.tensor([TOKENIZER.encode("123+45=8610")]).expand(400, -1)
    examples = torch.arange(400)[:, None].expand_as(line)
    context, _ = make_context(*line.shape, examples=examples)
    part(line, None, context)[0].square().mul(torch.randn(8)).sum().backward()
    trained = part.table.weight.grad.abs().sum(1) > 0
    assert trained.nonzero()[:, 0].tolist() == list(range(11))
    assert part.coverage == 10


# ---------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("coupled", [False, True])
def test_coverage_warns_beyond_shift_and_run_and_not_before(coupled):
    part = abacus(max_shift=6, longest_run=4, rows=40, coupled=coupled)
    for run in range(1, 14):
        tokens = torch.zeros(1, run, dtype=torch.int64)
        part._warned = False
        if run > 10:
            with pytest.warns(UserWarning, match=rf"{run} digits is longer than the 10 .*=6 .*=4"):
                rows(part, tokens)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                rows(part, tokens)


def test_a_run_too_long_for_the_table_reads_its_last_row_and_warns_once():
    part = abacus(max_shift=2, longest_run=3, rows=6)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.warns(UserWarning, match="9 digits is longer than the 5"):
        assert rows(part, tokens)[0].tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(part, tokens)


def test_generation_warns_by_the_length_of_its_prompts(monkeypatch):
    """Whatever device the model is on: its numbers are not read."""
    net = model(max_shift=2, longest_run=3, digit_tokens=list(range(10)))
    net.task = {"class_path": "archzoo.tasks.Addition", "init_args": {"reverse": False}}
    monkeypatch.setattr(AbacusEmbedding, "watch", lambda self, runs: None)
    texts = ["1+2=", "12345+12345="]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(net, texts, max_tokens=1, tokenizer=TOKENIZER)
    with pytest.warns(UserWarning, match="6 digits is longer than the 5"):
        generate(net, [*texts, "123456+1="], max_tokens=1, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_shift": 100, "longest_run": 28}, "rows=128 is too small.* take rows=129"),
        ({"max_shift": 100, "longest_run": 27, "coupled": True}, "take rows=129"),
        ({"max_shift": 127}, "take rows=129"),
        ({"max_shift": -1}, "max_shift=-1 must be at least 0"),
        ({"digit_tokens": [3, 14]}, "token 14 is not one of 14"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words):
    abacus(max_shift=100, longest_run=27)
    with pytest.raises(ValueError, match=words):
        abacus(**arguments)


# ---------------------------------------------------------------------------- a task's knowledge


def model(**arguments):
    return archzoo.create_model(
        "transformer_micro",
        vocab_size=14,
        embedding={"class_path": "AbacusEmbedding", "init_args": arguments},
    )


def test_a_task_fills_what_was_left_open(tmp_path):
    net = model(coupled=True, max_shift=50)
    tokens = torch.tensor([TOKENIZER.encode("12+345=663")])
    with pytest.raises(ValueError, match="digit_tokens is not set"):
        net(tokens)
    net.bind(task_of(8), training=True)
    assert net.embedding.coverage == 58
    assert net.config["embedding"]["init_args"] == {
        "coupled": True,
        "max_shift": 50,
        "digit_tokens": list(range(10)),
        "operator_tokens": [10, 11],
        "longest_run": 8,
    }
    json.dumps(net.config)
    save_pretrained(tmp_path / "model", net.eval(), TOKENIZER)
    again, _ = from_pretrained(tmp_path / "model")
    assert torch.equal(again(tokens).logits, net(tokens).logits)
    with pytest.warns(UserWarning, match="59 digits is longer than the 58"):
        again.bind(task_of(59))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.bind(task_of(58))
    with pytest.raises(ValueError, match="rows=128 is too small"):
        again.bind(task_of(90), training=True)


def test_a_wrapped_abacus_is_told_too():
    inner = {"class_path": "AbacusEmbedding", "init_args": {"max_shift": 5}}
    net = archzoo.create_model(
        "transformer_micro",
        vocab_size=14,
        embedding={"class_path": "RandomisedPositions", "init_args": {"embedding": inner}},
    )
    net.bind(task_of(4), training=True)
    assert net.embedding.embedding.digit_tokens == tuple(range(10))
    assert net.config["embedding"]["init_args"]["embedding"]["init_args"]["longest_run"] == 4
    assert archzoo.Decoder(**net.config).embedding.coverage == 9


def test_training_widens_and_what_is_only_asked_is_held_against_it():
    """In one call: the longest number of training, and the longest that validation asks."""
    net = model(max_shift=5)
    task = SimpleNamespace(tokenizer=TOKENIZER, longest_run=4, longest_tested=10, operators="+=")
    with pytest.warns(UserWarning, match="10 digits is longer than the 9"):
        net.bind(task, training=True)
    assert net.embedding.coverage == 9
    assert net.config["embedding"]["init_args"]["longest_run"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.bind(task)  # what is only tested asks by its own numbers


def test_a_task_that_says_nothing_of_numbers_can_be_trained_on():
    """`Task` itself knows no numbers; its tokenizer says which tokens are digits."""
    net = model(max_shift=5)
    net.bind(SimpleNamespace(tokenizer=TOKENIZER), training=True)
    assert net.config["embedding"]["init_args"]["digit_tokens"] == list(range(10))
    assert not {"longest_run", "operators", "coupling"} & vars(Task).keys()


class Counted(TokenEmbedding):
    """An embedding of one's own that asks the task for its vocabulary."""

    def __init__(self, vocab_size, dim, *, known=None):
        super().__init__(vocab_size, dim)
        self.known = known

    def bind(self, task, *, training=False):
        self.known = task.tokenizer.vocab_size
        return {"known": self.known}


def test_an_embedding_of_ones_own_is_bound_by_the_trainer():
    net = LanguageModel("transformer_micro", embedding=Counted)
    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(net, Addition(digits=1, batch_size=2))
    assert net.net.config["embedding"]["init_args"] == {"known": net.net.vocab_size}


def test_a_wrapper_around_plain_words_needs_nothing():
    net = archzoo.create_model("transformer_micro", vocab_size=14, embedding="RandomisedPositions")
    before = json.dumps(net.config)
    net.bind(task_of(4), training=True)
    assert json.dumps(net.config) == before


def test_words_and_rows_start_large_unless_the_head_is_tied_to_them():
    for std, tied, want in ((1.0, False, 1.0), (0.5, False, 0.5), (None, True, 0.02)):
        net = archzoo.create_model(
            "transformer_micro",
            embedding={"class_path": "AbacusEmbedding", "init_args": {"std": std}},
            tie_weights=tied,
        )
        for table in (net.embedding.weight, net.embedding.table.weight):
            assert float(table.detach().std()) == pytest.approx(want, rel=0.1)


def test_other_embeddings_are_left_alone_and_merged_digits_refused():
    net = archzoo.create_model("transformer_micro", vocab_size=14)
    before = json.dumps(net.config)
    net.bind(task_of(4), training=True)
    assert json.dumps(net.config) == before

    class Merges(CharacterTokenizer):
        digit_tokens = None

    with pytest.raises(ValueError, match="each digit to be one token"):
        model().bind(task_of(4, Merges("0123456789+=")))


def test_a_batch_of_sums_is_read_as_it_is_written():
    """Tokens, documents and example numbers as the task gives them."""
    task = Addition(digits=4, batch_size=8, vocabulary="own")
    batch = task.train_dataloader().batch(0)
    part = abacus(max_shift=9).train()
    context, _ = make_context(
        *batch["tokens"].shape, documents=batch["documents"], examples=batch["examples"]
    )
    ids, _ = part.positions(batch["tokens"], None, context)
    want = naive(batch["tokens"], range(10), batch["documents"])
    shifts = integers(random_bits(0, SHIFTS, batch["examples"]), 10)
    assert torch.equal(ids, torch.where(want > 0, want + shifts, 0))


# ---------------------------------------------------------------------------- training


def trained(directory, steps, digits=2, **fit):
    torch.manual_seed(0)
    module = LanguageModel(preset="abacus_micro", warmup_steps=1, schedule="constant")
    task = Addition(digits=digits, batch_size=16, steps_per_epoch=4, validation_examples=8)
    trainer = lightning.Trainer(
        default_root_dir=str(directory),
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, task, **fit)
    trainer.save_checkpoint(directory / f"{steps}.ckpt")
    return module, trainer


def test_a_run_learns_from_its_task_resumes_to_the_bit_and_warns_beyond_its_reach(tmp_path):
    module, trainer = trained(tmp_path, 6)
    assert module.net.config["embedding"]["init_args"] == {
        "coupled": True,
        "max_shift": 5,
        "rows": 32,
        "digit_tokens": list(range(10)),
        "operator_tokens": [20, 28],
        "longest_run": 3,
    }
    again, _ = from_pretrained(tmp_path / "6.ckpt")
    assert again.embedding.coverage == 8

    trained(tmp_path, 3)
    resumed, _ = trained(tmp_path, 6, ckpt_path=tmp_path / "3.ckpt")
    for name, weight in module.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], weight)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer.test(module, Addition(digits=7, test_examples=4, batch_size=4), verbose=False)
    with pytest.warns(UserWarning, match="9 digits is longer than the 8"):
        trainer.test(module, Addition(digits=8, test_examples=4, batch_size=4), verbose=False)


def test_a_compiled_model_has_no_break_and_draws_the_same_shifts():
    """Where k comes from Python's generator, a compiler breaks off or bakes one k in."""
    part = abacus(max_shift=50, coupled=True).train()
    line = torch.tensor([TOKENIZER.encode("12+345=663")]).expand(4, -1)
    compiled = torch.compile(rows, backend="eager", fullgraph=True)
    for first in (0, 4):
        examples = torch.arange(first, first + 4)[:, None].expand_as(line)
        assert torch.equal(compiled(part, line, examples), rows(part, line, examples))


def learn_to_add(steps):
    """Sums of up to 3 digits, 64 a step; the losses, and the model."""
    torch.manual_seed(0)
    net = archzoo.create_model("abacus_tiny").train()
    task = Addition(digits=3, batch_size=64)
    net.bind(task, training=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    loader, losses = task.train_dataloader(), []
    for step in range(steps):
        batch = loader.batch(step)
        logits = net(
            batch["tokens"], documents=batch["documents"], examples=batch["examples"]
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, net


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
    assert learn_to_add(4)[0] == learn_to_add(4)[0]


@pytest.mark.slow
def test_a_small_model_learns_to_add_and_goes_beyond_its_training():
    losses, net = learn_to_add(1000)
    assert sum(losses[-10:]) / 10 < 0.5
    net.eval()
    right = {}
    for digits in (3, 4):
        task = Addition(digits=digits, min_digits=digits, batch_size=200, test_examples=200)
        batch = task.test_dataloader().batch(0)
        with torch.no_grad():
            logits = net(batch["tokens"], documents=batch["documents"]).logits
        right[digits] = float(exact_match(logits, batch["labels"]).float().mean())
    assert right[3] > 0.5, right
    assert right[4] > 0.1, right  # nobody guesses five digits
