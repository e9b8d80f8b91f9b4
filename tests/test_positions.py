"""Biases against double loops; learned and randomised positions; each of them in a model."""

import math

import pytest
import torch

import archzoo
from archzoo.block import make_context
from archzoo.embeddings.learned import LearnedPositions, RandomisedPositions
from archzoo.embeddings.rows import RowEmbedding
from archzoo.positions.biases import FIRE, KERPLE, ALiBi, T5Bias, alibi_slopes

BIASES = [(ALiBi, {}), (T5Bias, {}), (KERPLE, {}), (KERPLE, {"kind": "power"}), (FIRE, {})]


# ---------------------------------------------------------------------------- biases


def alibi(part, head, i, j):
    return -(2.0 ** (-8 * (head + 1) / 4)) * (i - j)


def t5(part, head, i, j):
    distance = i - j
    if distance >= 16:
        distance = min(16 + int(math.log(distance / 16) / math.log(128 / 16) * 16), 31)
    return float(part.table[distance, head])


def kerple_log(part, head, i, j):
    scale, rate = float(part.log_scale[head].exp()), float(part.rate[head].exp())
    return -scale * math.log(1 + rate * (i - j))


def kerple_power(part, head, i, j):
    scale, rate = float(part.log_scale[head].exp()), 2 * float(part.rate[head].sigmoid())
    return -scale * (i - j) ** rate


def fire(part, head, i, j):
    slope, threshold = float(part.slope), 512 * float(part.multiplier)
    share = math.log(slope * (i - j) + 1) / math.log(slope * max(i, threshold) + 1)
    hidden = [
        max(share * float(w) + float(b), 0.0)
        for w, b in zip(part.inner.weight[:, 0], part.inner.bias, strict=True)
    ]
    weights = part.outer.weight[head]
    return sum(h * float(w) for h, w in zip(hidden, weights, strict=True))


NAIVE = [alibi, t5, kerple_log, kerple_power, fire]


@pytest.mark.parametrize("offset", [0, 37, 1000])
@pytest.mark.parametrize(
    ("part", "arguments", "naive"),
    [(part, arguments, n) for (part, arguments), n in zip(BIASES, NAIVE, strict=True)],
    ids=[n.__name__ for n in NAIVE],
)
@torch.no_grad()
def test_a_bias_is_its_formula(part, arguments, naive, offset):
    made = part(4, **arguments).double()
    keys = torch.arange(offset + 6)[None]
    queries = keys[:, offset:]
    bias = made(queries, keys)
    assert bias.shape == (1, 4, 6, offset + 6)
    shown = range(0, offset + 6, max(1, offset // 20))
    for head in range(4):
        for i in queries[0].tolist():
            for j in shown:
                if j <= i:
                    want = naive(made, head, i, j)
                    assert float(bias[0, head, i - offset, j]) == pytest.approx(want, abs=1e-6)


def test_slopes_of_alibi():
    assert alibi_slopes(8) == tuple(2.0**-n for n in range(1, 9))
    # Of the authors' code for 6 heads: those of 4, then the first and third of 8.
    assert alibi_slopes(6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    assert len(set(alibi_slopes(12))) == 12
    assert alibi_slopes(1) == (2**-8,)


@pytest.mark.parametrize(("part", "arguments"), BIASES[1:])
def test_what_is_learned_gets_a_true_and_finite_gradient(part, arguments):
    """Masked entries, where the distance is negative, included."""
    made = part(2, **arguments).double()
    positions = torch.arange(40)[None]
    weights = torch.randn(1, 2, 40, 40, dtype=torch.float64)
    parameters = list(made.parameters())

    def value():
        return (made(positions, positions) * weights).sum()

    slopes = torch.autograd.grad(value(), parameters)
    for parameter, slope in zip(parameters, slopes, strict=True):
        assert slope.isfinite().all()
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            ends.append(float(value().detach()))
        with torch.no_grad():
            parameter.add_(1e-6 * direction)
        measured = (ends[0] - ends[1]) / 2e-6
        assert float((slope * direction).sum()) == pytest.approx(measured, rel=1e-4, abs=1e-4)


def test_fire_sees_the_distance_alone_up_to_its_threshold():
    made = FIRE(2, threshold=30.0).double()
    positions = torch.arange(100)[None]
    bias = made(positions, positions)[0, 0].detach()
    assert torch.equal(bias[10, 5], bias[30, 25])
    assert not torch.isclose(bias[60, 55], bias[30, 25], rtol=1e-3)


def test_a_fire_starts_at_its_own_scale_in_a_model():
    model = archzoo.create_model("transformer_micro", bias="FIRE")
    for block in model.blocks:
        assert block.mixer.bias.outer.weight.abs().max() > 0.1
        assert block.mixer.bias.inner.bias.abs().max() > 0.1


@pytest.mark.parametrize(
    ("part", "arguments", "words"),
    [
        (T5Bias, {"buckets": 7}, "buckets=7 must be even"),
        (T5Bias, {"furthest": 16}, "furthest=16 above the 16"),
        (KERPLE, {"kind": "cubic"}, "kind='cubic' is neither log nor power"),
        (FIRE, {"threshold": 0.0}, "must be above 0"),
    ],
)
def test_a_bias_that_makes_no_sense_is_refused(part, arguments, words):
    with pytest.raises(ValueError, match=words):
        part(4, **arguments)


# ---------------------------------------------------------------------------- in a model

SLOTS = [
    {"rotary": "NoRotation"},
    {"rotary": "XPos"},
    *[
        {"rotary": "NoRotation", "bias": {"class_path": p.__name__, "init_args": a}}
        for p, a in BIASES
    ],
    {"embedding": "LearnedPositions", "rotary": "NoRotation"},
    {"embedding": "RandomisedPositions"},
    {"embedding": "RandomisedPositions", "bias": "ALiBi"},
    {
        "embedding": {
            "class_path": "RandomisedPositions",
            "init_args": {
                "embedding": {"class_path": "LearnedPositions", "init_args": {"longest": 2048}}
            },
        }
    },
]


@pytest.mark.parametrize("slots", SLOTS, ids=str)
@torch.no_grad()
def test_a_model_gives_the_same_whole_in_segments_by_step_and_packed(slots):
    model = archzoo.create_model("transformer_micro", init_std=0.2, **slots).double().eval()
    tokens = torch.randint(64, (2, 17))
    whole = model(tokens).logits

    def apart(got, want):
        return (got - want).norm() / want.norm()

    for sizes in ([1] * 17, [6, 1, 10]):
        state, found = model.init_state(2), []
        for segment in tokens.split(sizes, dim=1):
            output = model(segment, state)
            found.append(output.logits)
            state = output.state
        assert apart(torch.cat(found, 1), whole) < 1e-12
    documents = torch.tensor([[-1] * 2 + [0] * 5 + [1] * 9 + [-1]] * 2)
    packed = model(tokens, documents=documents).logits
    assert apart(packed[:, 2:7], model(tokens[:, 2:7]).logits) < 1e-12
    assert apart(packed[:, 7:16], model(tokens[:, 7:16]).logits) < 1e-12
    plain = archzoo.create_model("transformer_micro", rotary="NoRotation").double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert slots == SLOTS[0] or apart(plain(tokens).logits, whole) > 1e-3  # the method does much


def test_retention_takes_randomised_positions_in_all_forms():
    """Its rotation sees them, and in evaluation the forms agree."""
    model = archzoo.create_model("retnet_micro", embedding="RandomisedPositions", init_std=0.2)
    model = model.double().eval()
    tokens = torch.randint(64, (2, 17))
    with torch.no_grad():
        want = model(tokens, form="recurrent").logits
        for form in ("parallel", "chunkwise"):
            error = (model(tokens, form=form).logits - want).norm() / want.norm()
            assert error < 1e-12


# ---------------------------------------------------------------------------- learned


def ids(part, documents, examples):
    context, _ = make_context(*documents.shape, documents=documents, examples=examples)
    return part.assign_positions(context).positions


def test_learned_positions_count_within_the_document_and_start_at_random():
    part = LearnedPositions(29, 8, longest=40, max_start=30).double()
    with torch.no_grad():
        part.weight.zero_()
        part.table.weight.copy_(torch.arange(40.0)[:, None].expand(40, 8))
    tokens = torch.zeros(200, 9, dtype=torch.int64)
    documents = torch.tensor([0] * 5 + [1] * 4).expand(200, 9)
    examples = documents + 2 * torch.arange(200)[:, None]
    context, _ = make_context(200, 9, documents=documents, examples=examples)
    x, _ = part.eval()(tokens, None, context)
    assert x[7, :, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    starts = part.train()(tokens, None, context)[0][:, :, 0] - x[:, :, 0]
    assert (starts[:, :5] == starts[:, :1]).all() and (starts[:, 5:] == starts[:, 5:6]).all()
    assert starts.min() == 0 and starts.max() == 30
    assert (starts[:, 0] != starts[:, 5]).float().mean() > 0.9
    with pytest.raises(ValueError, match="give examples="):
        part(tokens, None, context._replace(examples=None))
    with pytest.raises(ValueError, match=r"max_start=40 must lie in 0 \.\. longest - 1 = 39"):
        LearnedPositions(29, 8, longest=40, max_start=40)


def test_a_text_beyond_the_table_is_refused():
    part = LearnedPositions(29, 8, longest=10).eval()
    tokens = torch.zeros(1, 11, dtype=torch.int64)
    part(tokens[:, :10], None, make_context(1, 10)[0])
    with pytest.raises(ValueError, match="position 10 is not one of the 10"):
        part(tokens, None, make_context(1, 11)[0])


@pytest.mark.parametrize("normalise", [False, True])
def test_rows_are_looked_up_alike_for_few_tokens_and_for_many(normalise):
    """Many tokens are gathered from all pairs of a word and a row; gradients included."""
    part = RowEmbedding(5, 8, 7, normalise=normalise).double()
    tokens, rows = torch.randint(5, (4, 30)), torch.randint(7, (4, 30))
    grad = torch.randn(4, 30, 8, dtype=torch.float64)
    whole = part.look_up(tokens, rows)
    parts = [part.look_up(*few) for few in zip(tokens.split(1, 1), rows.split(1, 1), strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    weights = list(part.parameters())
    got = torch.autograd.grad(whole, weights, grad)
    want = torch.autograd.grad(torch.cat(parts, 1), weights, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------- randomised


def test_randomised_positions_are_a_sorted_sample_of_the_whole_range():
    part = RandomisedPositions(29, 8, longest=100, text_length=20).train()
    documents = torch.tensor([-1] * 2 + [0] * 6 + [1] * 4).expand(4000, 12)
    examples = documents + 2 * torch.arange(4000)[:, None]
    drawn = ids(part, documents, examples)
    assert (drawn[:, :2] == 0).all()
    for begin, end in ((2, 8), (8, 12)):
        here = drawn[:, begin:end].double()
        assert (here.diff(dim=1) > 0).all()
        assert here.min() == 0 and here.max() == 99
        # Order statistics of n of L: the k-th (from 1) stands at k (L + 1) / (n + 1) - 1.
        count = end - begin
        expected = torch.arange(1, count + 1) * 101 / (count + 1) - 1
        torch.testing.assert_close(here.mean(0), expected.double(), rtol=0, atol=1.0)
    alone = ids(part, torch.zeros(1, 6).long(), examples[7:8, 2:8])
    assert torch.equal(alone[0], drawn[7, 2:8])


def test_a_full_sample_is_every_position():
    part = RandomisedPositions(29, 8, longest=12, text_length=12).train()
    documents = torch.zeros(3, 12).long()
    assert ids(part, documents, documents).tolist() == [list(range(12))] * 3


def test_evaluation_spreads_texts_evenly_and_draws_nothing():
    part = RandomisedPositions(29, 8, longest=100, text_length=8).eval()
    documents = torch.zeros(1, 8).long()
    assert ids(part, documents, None)[0].tolist() == [0, 12, 25, 37, 50, 62, 75, 87]
    with pytest.raises(ValueError, match="give examples="):
        ids(part.train(), documents, None)
    with pytest.raises(ValueError, match=r"text_length=101 must lie in 1 \.\. longest=100"):
        RandomisedPositions(29, 8, longest=100, text_length=101)


def test_positions_of_a_task_are_not_drawn():
    with pytest.raises(ValueError, match="PositionCoupling takes its positions from the task"):
        RandomisedPositions(29, 8, embedding="PositionCoupling")


def test_the_wrapper_is_saved_as_plain_data_and_ties_its_inner_table():
    spec = {"class_path": "RandomisedPositions", "init_args": {"embedding": "LearnedPositions"}}
    model = archzoo.create_model("transformer_micro", embedding=spec, tie_weights=True)
    assert model.head.weight is model.embedding.embedding.weight
    assert float(model.embedding.embedding.table.weight.detach().std()) == pytest.approx(
        0.02, rel=0.1
    )
    again = archzoo.Decoder(**model.config)
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
