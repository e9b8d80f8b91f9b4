"""Random models on random texts: whatever the way a text is read, it gets the same logits.

A case draws a decoder (a preset with parts swapped, or parts at random), and rows of documents. The
reference reads each document alone, token by token. Against it, in float64: every form; rows in one
batch, padded on either side, packed, and numbered as one likes; texts cut into segments of any
length and form, each row cut where it likes, and the state forked, saved, moved and reordered in
between; training mode; gradients; and greedy generation.
"""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import archzoo
from archzoo.block import FORMS, State, fork, reorder, to
from archzoo.decoder import Decoder
from archzoo.generation import generate

SLICE = 40
TOLERANCE = 1e-9  # relative RMS

VOCABULARY = 24
DIGITS, OPERATORS = list(range(3, 13)), [13, 14]
LONGEST = 40  # positions that any text of a case may reach


def case(draw: random.Random, prepared: Path | None = None, place: Path | None = None) -> str:
    """One model and one batch of texts, read in every way."""
    arguments = decoder_arguments(draw)
    try:
        return _case(draw, arguments)
    except Exception as error:  # the model is what one wants to know first
        error.add_note(f"with {arguments}")
        raise type(error)(f"{error}; with {arguments}") from error


def _case(draw: random.Random, arguments: dict[str, Any]) -> str:
    name = arguments.pop("preset", None)
    model = archzoo.create_model(name, **arguments) if name else Decoder(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may hide behind a zero or a one
            parameter.add_(0.05 * torch.randn_like(parameter))
    model = model.double().eval()
    rows = [_draw_row(draw, model) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.3:
        _chosen_positions(draw, rows)
    with torch.no_grad():
        alone = _alone(model, rows)
        for form in (*FORMS, None):
            _expect(_in_a_batch(model, rows, form, draw), alone, f"batch, {form}")
        for turn in range(2):
            _expect(_in_segments(model, rows, draw), alone, f"segments {turn}")
    if draw.random() < 0.5:
        _expect(_without_documents(model, rows, draw), alone, "no documents given")
    if draw.random() < 0.3:
        _same_gradients(model, rows, draw)
    if draw.random() < 0.3 and model.dropout == 0:
        _in_training(model, rows, draw)
    if draw.random() < 0.3:
        _generated(model, rows, draw)
    packed = max(len(row) for row in rows) > 1
    return "packed" if packed else "padded" if len({len(row[0].tokens) for row in rows}) > 1 else (
        "plain"
    )  # fmt: skip


# ---------------------------------------------------------------------------- models


def decoder_arguments(draw: random.Random) -> dict[str, Any]:
    """Arguments of a decoder, or of `create_model` with the name of a preset."""
    heads = draw.choice([1, 2, 3, 4])
    head_dim = draw.choice([2, 4, 6, 8])
    dim = heads * head_dim
    attends = draw.random() < 0.5
    kinds = ["Attention", "FilteredAttention"] + ["Retention"] * 3 * (not attends)
    arguments: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "dim": dim,
        "depth": draw.choice([1, 1, 2, 3]),
        "heads": heads,
        "width": draw.choice([4, 12, 24]),
        "context_length": 8,
        "feed_forward": _feed_forward(draw),
        "embedding": _embedding(draw),
        "rotary": _rotary(draw, head_dim),
        "bias": _bias(draw) if attends else None,
        "norm": draw.choice(["rms", "layer"]),
        "norm_placement": draw.choice(["pre", "post"]),
        "norm_eps": draw.choice([1e-6, 1e-3]),
        "tie_weights": draw.random() < 0.3,
        "init_std": draw.choice([0.1, 0.3, 0.6]),
        "loops": draw.choice([1, 1, 1, 2, 3]),
        "injection": draw.choice(["none", "layer", "loop"]),
    }
    if draw.random() < 0.3:
        arguments["pattern"] = [
            _mixer(draw, draw.choice(kinds), heads, head_dim) for _ in range(draw.randint(1, 3))
        ]
    else:
        arguments["mixer"] = _mixer(draw, draw.choice(kinds), heads, head_dim)
    if draw.random() < 0.25:  # a preset, of which some things are changed
        family = draw.choice(archzoo.list_models("*_micro"))
        kept = {"vocab_size": VOCABULARY, "init_std": 0.3, "preset": family}
        swapped = ["feed_forward", "norm", "norm_placement", "loops", "injection", "tie_weights"]
        kept |= {key: arguments[key] for key in draw.sample(swapped, k=draw.randint(0, 3))}
        kept["embedding"] = arguments["embedding"]
        return kept
    return arguments


def _spec(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def _mixer(draw: random.Random, kind: str, heads: int, head_dim: int) -> dict[str, Any]:
    if kind != "Retention":
        return _spec(kind, kv_heads=draw.choice([n for n in (1, 2, 3, 4) if heads % n == 0]))
    return _spec(
        kind,
        value_factor=draw.choice([1.0, 2.0, 1 / head_dim]),
        decay=draw.choice(["default", "paper_lm", "learnable", 1.0, 0.9]),
        gate=draw.random() < 0.7,
        head_norm=draw.choice(["rms", "group", "none"]),
        norm_eps=draw.choice([1e-6, 1e-3]),
        chunk_size=draw.choice([1, 2, 3, 5, 8, 64]),
    )


def _feed_forward(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice(["GatedFeedForward", "PlainFeedForward", "MixtureOfExperts"])
    if kind != "MixtureOfExperts":
        return _spec(kind, activation=draw.choice(["silu", "gelu", "relu"]))
    experts = draw.choice([3, 4, 6])
    router = _spec(
        draw.choice(["LinearRouter", "AttentionRouter"]),
        score=draw.choice(["softmax", "sigmoid"]),
        logit_norm=draw.choice([None, 1.0]),
    )
    return _spec(kind, experts=experts, top_k=draw.randint(1, 2), router=router)


def _embedding(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice(
        ["TokenEmbedding"] * 3 + ["Learned", "Abacus", "PositionCoupling", "Randomised"]
    )
    if kind == "Learned":
        return _spec("LearnedPositions", longest=2 * LONGEST, max_start=draw.choice([0, 9]))
    if kind == "Abacus":
        return _spec(
            "AbacusEmbedding",
            digit_tokens=DIGITS,
            operator_tokens=OPERATORS,
            coupled=draw.random() < 0.5,
            max_shift=draw.choice([0, 5]),
            longest_run=LONGEST,
            normalise=draw.random() < 0.5,
            rows=64,
        )
    if kind == "PositionCoupling":
        return _spec(
            kind,
            digit_tokens=DIGITS,
            operator_tokens=OPERATORS,
            max_position=2 * LONGEST,
            longest_run=LONGEST,
            prompt=draw.choice(["reversed", "plain"]),
        )
    if kind == "Randomised":
        inner = draw.choice(["TokenEmbedding", "AbacusEmbedding"])
        inner = _spec(inner, **({"digit_tokens": DIGITS} if inner != "TokenEmbedding" else {}))
        return _spec(
            "RandomisedPositions", embedding=inner, longest=100, text_length=draw.choice([40, 60])
        )
    return _spec(kind)


def _rotary(draw: random.Random, head_dim: int) -> dict[str, Any] | None:
    kind = draw.choice([None, "NoRotation", "RetentionRotation", "XPos"] + ["RotaryEmbedding"] * 4)
    if kind is None:
        return None
    if kind != "RotaryEmbedding":
        return _spec(kind)
    types = ["default", "linear", "yarn", "llama3"] + ["ntk", "dynamic"] * (head_dim > 3)
    arguments = {"rope_type": draw.choice(types), "base": draw.choice([100.0, 10_000.0])}
    if arguments["rope_type"] != "default":
        arguments["factor"] = draw.choice([1.0, 2.0, 4.0])
    arguments["original_max_position_embeddings"] = draw.choice([2, 5, 16])
    if head_dim == 8:
        arguments["partial_rotary_factor"] = draw.choice([0.5, 1.0])
    return _spec(kind, **arguments)


def _bias(draw: random.Random) -> dict[str, Any] | None:
    return draw.choice(
        [
            None,
            _spec("ALiBi"),
            _spec("T5Bias", buckets=4, furthest=9),
            _spec("KERPLE", kind=draw.choice(["log", "power"])),
            _spec("FIRE", threshold=6.0),
        ]
    )


# ---------------------------------------------------------------------------- texts


class Document(NamedTuple):
    """One document: its tokens, the task's number of it, and its positions where they are given."""

    tokens: list[int]
    example: int
    positions: list[int] | None


Row = list[Document]
Logits = list[Tensor]  # of each row, of its documents one after the other


def _draw_row(draw: random.Random, model: Decoder) -> Row:
    row = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        length = draw.choice([1, 2, draw.randint(3, 9), draw.randint(3, 20)])
        some = DIGITS * 2 + OPERATORS if draw.random() < 0.5 else range(model.vocab_size)
        tokens = [draw.choice(some) for _ in range(length)]
        places = model.embedding.prompt_positions(torch.tensor([tokens]))
        found = None if places is None else places[0].tolist()
        row.append(Document(tokens, draw.randrange(1 << 40), found))
    return row


def _chosen_positions(draw: random.Random, rows: list[Row]) -> None:
    """Positions as a caller may choose them, where the method does not read them off the text."""
    for row in rows:
        for number, document in enumerate(row):
            if document.positions is None:
                size, start = len(document.tokens), draw.randint(0, 15)
                places = [start + t for t in range(size)]
                row[number] = document._replace(positions=places)


class Batch(NamedTuple):
    """Rows of tokens beside each other; (batch, time) all."""

    tokens: Tensor
    documents: Tensor
    examples: Tensor
    positions: Tensor | None

    def read(self, model: Decoder, state: State, form: str | None) -> Any:
        return model(
            self.tokens, state, self.documents, self.examples, form, positions=self.positions
        )


class Token(NamedTuple):
    """A token and all that is said of it."""

    token: int
    document: int
    example: int
    position: int


def _spelled(row: Row, draw: random.Random) -> list[Token]:
    """The tokens of a row; its documents are numbered anyhow, so that neighbours differ."""
    found, last = [], -1
    for document in row:
        last = draw.choice([n for n in (0, 1, 5) if n != last])
        places = document.positions or [0] * len(document.tokens)
        found += [
            Token(token, last, document.example, at)
            for token, at in zip(document.tokens, places, strict=True)
        ]
    return found


def _batch(
    parts: list[list[Token]], left: list[int], right: list[int], placed: bool, draw: random.Random
) -> Batch:
    """Rows with padding of any tokens on their left and right."""
    filled = []
    for part, before, after in zip(parts, left, right, strict=True):
        padding = [
            Token(draw.randrange(VOCABULARY), -1, draw.randrange(9), 0)
            for _ in range(before + after)
        ]
        filled.append(padding[:before] + part + padding[before:])
    fields = [torch.tensor([[t[n] for t in row] for row in filled]) for n in range(4)]
    return Batch(*fields[:3], fields[3] if placed else None)


def _pick(logits: Tensor, batch: Batch) -> Logits:
    return [row[numbers >= 0] for row, numbers in zip(logits, batch.documents, strict=True)]


def _placed(rows: list[Row]) -> bool:
    return rows[0][0].positions is not None


# ---------------------------------------------------------------------------- ways to read them


def _alone(model: Decoder, rows: list[Row], form: str | None = "recurrent") -> Logits:
    """Each document alone; by default token by token."""
    found = []
    for row in rows:
        logits = []
        for document in row:
            tokens = torch.tensor([document.tokens])
            places = None if document.positions is None else torch.tensor([document.positions])
            numbers = torch.full_like(tokens, document.example)
            output = model(tokens, None, None, numbers, form, positions=places)
            logits.append(output.logits[0])
        found.append(torch.cat(logits))
    return found


def _in_a_batch(model: Decoder, rows: list[Row], form: str | None, draw: random.Random) -> Logits:
    """All rows at once, padded on either side."""
    parts = [_spelled(row, draw) for row in rows]
    width = max(map(len, parts)) + draw.choice([0, 0, 3])
    missing = [width - len(part) for part in parts]
    left = [draw.choice([0, n, draw.randint(0, n)]) for n in missing]
    right = [n - m for n, m in zip(missing, left, strict=True)]
    batch = _batch(parts, left, right, _placed(rows), draw)
    state = model.init_state(len(rows), capacity=width) if draw.random() < 0.5 else None
    return _pick(batch.read(model, state, form).logits, batch)


def _in_segments(model: Decoder, rows: list[Row], draw: random.Random) -> Logits:
    """In segments of any length and form, each row cut where it likes."""
    parts = [_spelled(row, draw) for row in rows]
    order = list(range(len(rows)))  # which text a row of the state is
    done = [0] * len(rows)
    found: list[list[Tensor]] = [[] for _ in rows]
    state = model.init_state(len(rows), capacity=draw.choice([None, 1, 9, 60]))
    steps = draw.choice([1, 3, 9])
    while any(len(part) > end for part, end in zip(parts, done, strict=True)):
        takes = [min(draw.randint(0, steps), len(parts[n]) - done[n]) for n in order]
        width = max(*takes, 1) + draw.choice([0, 0, 0, 2])
        left = [draw.choice([0, width - take]) for take in takes]
        right = [width - take - before for take, before in zip(takes, left, strict=True)]
        segments = [
            parts[n][done[n] : done[n] + take] for n, take in zip(order, takes, strict=True)
        ]
        batch = _batch(segments, left, right, _placed(rows), draw)
        output = batch.read(model, state, draw.choice((*FORMS, None)))
        for n, take, logits in zip(order, takes, _pick(output.logits, batch), strict=True):
            found[n].append(logits)
            done[n] += take
        state = output.state
        if draw.random() < 0.4:
            state, kept = _handled(state, draw), state
            batch.read(model, kept, None)  # the copy must not notice what is done to the original
        if draw.random() < 0.3:
            chosen = draw.sample(range(len(order)), k=len(order))
            state = reorder(state, torch.tensor(chosen))
            order = [order[n] for n in chosen]
    return [torch.cat(logits) for logits in found]


def _handled(state: State, draw: random.Random) -> State:
    how = draw.choice(["forked", "moved", "saved"])
    if how == "saved":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    return fork(state) if how == "forked" else to(fork(state), "cpu")


@torch.no_grad()
def _without_documents(model: Decoder, rows: list[Row], draw: random.Random) -> Logits:
    """As one that knows of no documents reads: the first of each row alone, in plain segments."""
    found = []
    for row in rows:
        logits = []
        for document in row:
            tokens = torch.tensor([document.tokens])
            places = None if document.positions is None else torch.tensor([document.positions])
            state, begin = model.init_state(1, capacity=draw.choice([None, 30])), 0
            while begin < tokens.shape[1]:
                end = min(begin + draw.choice([1, 2, 7]), tokens.shape[1])
                here = None if places is None else places[:, begin:end]
                form = draw.choice((*FORMS, None))
                keep = draw.choice([None, end - begin])
                output = model(tokens[:, begin:end], state, None, None, form, keep, positions=here)
                logits.append(output.logits[0])
                state, begin = output.state, end
        found.append(torch.cat(logits))
    return found


def _same_gradients(model: Decoder, rows: list[Row], draw: random.Random) -> None:
    """Every form has the gradients of the recurrent one."""
    parts = [_spelled(row, draw) for row in rows]
    width = max(map(len, parts))
    zeros = [0] * len(parts)
    batch = _batch(parts, zeros, [width - len(p) for p in parts], _placed(rows), draw)
    weights = torch.randn(len(parts), width, model.vocab_size, dtype=torch.float64)
    weights = weights * (batch.documents >= 0)[..., None]
    named = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(form: str | None) -> Tensor:
        loss = (batch.read(model, None, form).logits * weights).sum()
        found = torch.autograd.grad(loss, named, allow_unused=True)
        return torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])

    want = gradients("recurrent")
    for form in ("parallel", "chunkwise", None):
        _expect([gradients(form)], [want], f"gradients, {form}", 1e-7)
    model.train()
    want = gradients(None)
    model.activation_checkpointing = True
    _expect([gradients(None)], [want], "gradients, recomputed", 1e-7)
    model.activation_checkpointing = False
    model.eval()


@torch.no_grad()
def _in_training(model: Decoder, rows: list[Row], draw: random.Random) -> None:
    """Training draws by example numbers, so that batch, packing and form change nothing."""
    model.train()
    alone = _alone(model, rows)
    for form in (*FORMS, None):
        parts = [_spelled(row, draw) for row in rows]
        missing = [max(map(len, parts)) - len(part) for part in parts]
        batch = _batch(parts, missing, [0] * len(parts), _placed(rows), draw)
        logits = batch.read(model, None, form).logits
        _expect(_pick(logits, batch), alone, f"training, {form}")
    if not model.embedding.trains_on_whole_documents:
        _expect(_in_segments(model, rows, draw), alone, "training, in segments")
    model.eval()


def _generated(model: Decoder, rows: list[Row], draw: random.Random) -> None:
    """Prompts in a batch are continued as alone, in every form, whatever max_tokens is."""
    prompts = [row[0].tokens[:12] for row in rows]
    many = draw.randint(2, 6)
    want = [generate(model, prompt, max_tokens=many).tokens[0] for prompt in prompts]
    for form in FORMS:
        got = generate(model, prompts, max_tokens=many, form=form).tokens
        assert got == want, f"generated in a batch, {form}: {got} instead of {want}"
    fewer = generate(model, prompts, max_tokens=many - 1).tokens
    assert fewer == [row[: many - 1] for row in want], f"fewer tokens: {fewer}, more: {want}"


def _expect(got: Logits, want: Logits, what: str, tolerance: float = TOLERANCE) -> None:
    for row, (some, other) in enumerate(zip(got, want, strict=True)):
        assert some.shape == other.shape, f"{what}, row {row}: {some.shape} not {other.shape}"
        assert some.isfinite().all(), f"{what}, row {row}: not finite"
        error = float((some - other).norm() / other.norm().clamp(min=1e-12))
        assert error <= tolerance, f"{what}, row {row}: relative error {error:.1e}"
