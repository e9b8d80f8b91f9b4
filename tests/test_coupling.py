"""Position coupling: the ids on lines written by hand, shifts, cuts, and a model's decoding."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import archzoo
from archzoo.block import make_context
from archzoo.embeddings.coupling import PositionCoupling, coupled_positions
from archzoo.generation import generate
from archzoo.tasks.arithmetic import Addition
from archzoo.tasks.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("0123456789+=", special=True)
SIGNS = TOKENIZER.encode("+=")


def task_of(longest_run, coupling=None):
    """What a task says of its numbers."""
    return SimpleNamespace(tokenizer=TOKENIZER, longest_run=longest_run, coupling=coupling)


def positions(text, prompt, documents=None):
    tokens = torch.tensor([TOKENIZER.encode(text)])
    return coupled_positions(tokens, range(10), SIGNS, prompt=prompt, documents=documents)[0]


@pytest.mark.parametrize(
    ("text", "prompt", "want"),
    [
        ("653+049=2070", "plain", [4, 3, 2, 1, 4, 3, 2, 1, 2, 3, 4, 5]),
        ("653+49=207", "plain", [4, 3, 2, 1, 3, 2, 1, 2, 3, 4]),
        ("12+345=663", "reversed", [2, 3, 1, 2, 3, 4, 1, 2, 3, 4]),
        ("7+8=", "plain", [2, 1, 2, 1]),
    ],
)
def test_positions_of_lines_written_by_hand(text, prompt, want):
    assert positions(text, prompt).tolist() == want


def line(a, b, prompt):
    """A sum as text, and the position that each of its characters must have."""

    def number(digits, reverse):
        places = range(2, len(digits) + 2)
        return (digits[::-1], [*places]) if reverse else (digits, [*places][::-1])

    reverse = prompt == "reversed"
    parts = [number(str(a), reverse), ("+", [1]), number(str(b), reverse), ("=", [1])]
    parts.append(number(str(a + b), True))
    return "".join(text for text, _ in parts), [place for _, places in parts for place in places]


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=4),
    st.sampled_from(["reversed", "plain"]),
    st.integers(0, 3),
    st.booleans(),
)
def test_packed_lines_with_padding_get_what_they_get_alone(pairs, prompt, padding, stop):
    tokens, want, documents = [TOKENIZER.pad_token] * padding, [0] * padding, [-1] * padding
    for number, pair in enumerate(pairs):
        text, places = line(*pair, prompt)
        tokens += TOKENIZER.encode(text) + [TOKENIZER.stop_token] * stop
        want += places + [0] * stop
        documents += [number] * (len(text) + stop)
    got = coupled_positions(
        torch.tensor([tokens]), range(10), SIGNS, documents=torch.tensor([documents]), prompt=prompt
    )
    assert got.tolist() == [want]


@pytest.mark.parametrize("prompt", ["reversed", "plain"])
@pytest.mark.parametrize("zero_padded", [False, True])
def test_the_task_gives_what_is_read_off_its_lines(prompt, zero_padded):
    task = Addition(
        digits=5,
        batch_size=64,
        coupled=True,
        reverse=prompt == "reversed",
        reverse_answer=True,
        zero_padded=zero_padded,
        vocabulary="own",
    )
    assert task.coupling == prompt
    batch = task.train_dataloader().batch(0)
    read = coupled_positions(
        batch["tokens"], range(10), SIGNS, documents=batch["documents"], prompt=prompt
    )
    assert torch.equal(batch["positions"], read)
    if not zero_padded:
        text = TOKENIZER.decode(batch["tokens"][0].tolist())
        order = -1 if prompt == "reversed" else 1
        a, b = (int(number[::order]) for number in text.partition("=")[0].split("+"))
        want = line(a, b, prompt)
        assert text == want[0]
        assert batch["positions"][0, : len(text)].tolist() == want[1]


# ---------------------------------------------------------------------------- the embedding


def coupling(**arguments):
    given = {"digit_tokens": list(range(10)), "operator_tokens": SIGNS, "max_position": 20}
    return PositionCoupling(14, 8, normalise=False, **given | arguments)


def rows(part, places, examples=None, documents=None):
    """Which rows of the table are read: the table holds their numbers, words hold nothing."""
    with torch.no_grad():
        part.weight.zero_()
        part.table.weight.copy_(
            torch.arange(len(part.table.weight.detach()))[:, None].expand(-1, 8)
        )
    context, _ = make_context(
        *places.shape, positions=places, examples=examples, documents=documents
    )
    return part(torch.zeros_like(places), None, context)[0][:, :, 0].long()


def test_starts_reach_from_the_first_row_to_the_last_whatever_the_length():
    for text in ("1+2=3", "123+45=8610"):
        places = positions(text, "reversed").expand(4000, -1)
        examples = torch.arange(4000)[:, None].expand_as(places)
        by = rows(coupling().train(), places, examples) - places
        assert (by == by[:, :1]).all()
        counts = torch.bincount(by[:, 0])
        most = 20 - int(places.max())
        assert len(counts) == most + 1  # the longest start brings the answer's top to row 20
        expected = 4000 / (most + 1)
        assert ((counts - expected) ** 2 / expected).sum() < 43.8  # p = 1e-3 at 19 degrees
    assert torch.equal(rows(coupling().eval(), places), places)
    with pytest.raises(ValueError, match="give examples="):
        rows(coupling().train(), places)


def test_a_start_is_the_documents_own_and_position_0_stays():
    first, second = positions("1+2=3", "reversed"), positions("99+1=001", "reversed")
    nothing = torch.zeros(1, dtype=torch.int64)
    places = torch.cat([nothing, first, nothing, second])[None]
    documents = torch.tensor([[-1] + [0] * 6 + [1] * 8])
    examples = torch.tensor([[0] + [7] * 6 + [8] * 8])
    packed = rows(coupling().train(), places, examples, documents)[0]
    alone = [
        rows(coupling().train(), part[None], torch.full((1, len(part)), number))[0]
        for part, number in ((first, 7), (second, 8))
    ]
    assert packed.tolist() == [0, *alone[0].tolist(), 0, *alone[1].tolist()]


@pytest.mark.parametrize("name", ["PositionCoupling", "RandomisedPositions"])
def test_training_on_segments_of_a_document_is_refused(name):
    """Each segment would draw another shift, or other positions, and nothing would say so."""
    arguments = {"digit_tokens": [3], "operator_tokens": [4], "prompt": "plain"}
    embedding = {"class_path": name, "init_args": arguments if name == "PositionCoupling" else {}}
    model = archzoo.create_model("transformer_micro", embedding=embedding).train()
    tokens = torch.tensor([[3, 4, 3]])
    model(tokens, examples=torch.zeros_like(tokens), positions=torch.tensor([[2, 1, 2]]))
    with pytest.raises(ValueError, match=f"{name} draws positions for whole documents in training"):
        model(tokens, model.init_state(1), examples=torch.zeros_like(tokens))
    model.eval()(tokens, model.init_state(1))


def test_numbers_beyond_the_table_warn_and_tables_too_small_are_refused():
    part = coupling().eval()
    assert part.coverage == 19
    rows(part, torch.arange(21)[None])
    with pytest.warns(UserWarning, match="20 digits is longer than the 19 .*max_position=20"):
        rows(part, torch.arange(22)[None])
    with pytest.raises(ValueError, match="max_position=20 is too small: an answer of 20"):
        coupling(longest_run=20)


def model(**arguments):
    return archzoo.create_model(
        "transformer_micro",
        vocab_size=14,
        rotary="NoRotation",
        embedding={"class_path": "PositionCoupling", "init_args": arguments},
        init_std=0.2,
    )


def test_a_task_says_how_it_writes_and_one_without_positions_is_refused():
    net = model()
    with pytest.raises(ValueError, match=r"takes its positions from the task.* coupled"):
        net.bind(task_of(4), training=True)
    net.bind(task_of(4, coupling="plain"), training=True)
    stored = net.config["embedding"]["init_args"]
    assert (stored["prompt"], stored["longest_run"]) == ("plain", 4)
    assert stored["operator_tokens"] == SIGNS
    with pytest.raises(ValueError, match="are plain, and the task writes them reversed"):
        net.bind(task_of(4, coupling="reversed"))
    with pytest.raises(ValueError, match="prompt is not set"):
        coupling().prompt_positions(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("prompt", ["reversed", "plain"])
@torch.no_grad()
def test_a_model_counts_on_from_its_prompt(prompt):
    """Whole lines in one pass give what the prompt and then token by token give."""
    net = model(digit_tokens=list(range(10)), operator_tokens=SIGNS, prompt=prompt).double().eval()
    text, places = line(653, 49, prompt)
    tokens, places = torch.tensor([TOKENIZER.encode(text)]), torch.tensor([places])
    whole = net(tokens, positions=places).logits
    begin = text.index("=") + 1
    state = net.init_state(1)
    found = net(
        tokens[:, :begin], state, positions=net.embedding.prompt_positions(tokens[:, :begin])
    )
    logits, state = [found.logits], found.state
    for t in range(begin, len(text)):
        found = net(tokens[:, t : t + 1], state)
        logits.append(found.logits)
        state = found.state
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-12, atol=1e-12)
    assert (net(tokens).logits - whole).abs().max() > 1e-3  # the positions did matter


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_generation_finds_the_positions_of_its_prompts(form):
    """Prompts of several lengths: each gets what it would get alone, in all forms."""
    net = model(digit_tokens=list(range(10)), operator_tokens=SIGNS, prompt="plain").double()
    prompts = ["653+49=", "7+8=", "12+1234="]
    arguments = {"max_tokens": 6, "form": form, "check": True, "tokenizer": TOKENIZER}
    together = generate(net, prompts, **arguments)
    assert together.largest_difference < 1e-12
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert generate(net, prompt, **arguments).tokens == [tokens]
