"""What is checked of a part inside a decoder, beside parts of the usual kind."""

from __future__ import annotations

import torch

from archzoo import block as interface
from archzoo.contract.measure import by_dtype, expect_same, gradients_of
from archzoo.contract.subject import SIZES, Subject
from archzoo.decoder import Decoder
from archzoo.numerics import MODEL_TOLERANCES, TOLERANCES
from archzoo.states import State


def decoder_with(subject: Subject, dtype: torch.dtype = torch.float64) -> Decoder:
    """A small decoder with the subject in its slot, in every layer.

    The part is put into a finished decoder, since a class made in a function has no import path.
    """
    sizes = SIZES["mixer"] | SIZES["feed_forward"] | SIZES["embedding"] | subject.sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        decoder = Decoder(depth=2, init_std=0.2, **sizes)
        if subject.slot == "embedding":
            decoder.embedding = subject.make()
        else:
            for block in decoder.blocks:
                setattr(block, subject.slot, subject.make())
        decoder.draw_weights()
    return decoder.to(dtype)


def checkpointing(subject: Subject) -> str:
    """Recomputing blocks in the backward pass changes neither loss nor gradients."""
    decoder = decoder_with(subject).train()
    tokens = subject.tokens(2, 24, decoder.vocab_size)
    examples = torch.tensor([[5], [6]]).expand(2, 24)
    starts: list[tuple[int, State | None]] = [(0, None)]
    if not decoder.embedding.trains_on_whole_documents:
        with torch.no_grad():
            first = decoder(tokens[:, :8], decoder.init_state(2), examples=examples[:, :8])
        starts.append((8, first.state))
    rule = "activation checkpointing must change nothing: no hidden state, no in-place update"
    worst = 0.0
    for begin, incoming in starts:
        runs = []
        for recompute in (False, True):
            decoder.activation_checkpointing = recompute
            incoming_too = interface.fork(incoming)
            output = decoder(tokens[:, begin:], incoming_too, examples=examples[:, begin:])
            extra = [value for layer in output.aux for value in layer.losses.values()]
            loss = output.logits.square().mean() + sum(extra, torch.zeros(()))
            weights = [p for p in decoder.parameters() if p.requires_grad]
            runs.append([loss, *gradients_of(loss, weights)])
        for kept, recomputed in zip(*runs, strict=True):
            worst = max(worst, expect_same(recomputed, kept, TOLERANCES[torch.float64], rule))
    too = ", from an incoming state too" if len(starts) > 1 else ""
    return f"loss and gradients differ by at most {worst:.0e}{too}"


def mixer_model(subject: Subject) -> str:
    """In a decoder: forms and hand-offs agree on logits, padding and packing included."""
    found: dict[torch.dtype, float] = {}
    for dtype in (torch.float64, torch.float32):
        decoder = decoder_with(subject, dtype)
        tokens = subject.tokens(2, 40, decoder.vocab_size)
        documents = torch.tensor([[-1] * 6 + [0] * 34, [0] * 11 + [5] * 25 + [-1] * 4])
        valid = documents >= 0
        with torch.no_grad():
            for given in (None, documents):
                want = decoder(tokens, documents=given, form="recurrent").logits
                for form in ("parallel", "chunkwise", None):
                    state = decoder.init_state(2, capacity=40)
                    segments = []
                    for begin, end in ((0, 13), (13, 14), (14, 40)):
                        here = None if given is None else given[:, begin:end]
                        output = decoder(tokens[:, begin:end], state, here, form=form)
                        state = output.state
                        segments.append(output.logits)
                    whole = decoder(tokens, documents=given, form=form).logits
                    for how, got in (("whole", whole), ("in segments", torch.cat(segments, 1))):
                        what = f"logits {form} {how} against recurrent, {dtype}"
                        error = expect_same(got[valid], want[valid], MODEL_TOLERANCES[dtype], what)
                        found[dtype] = max(found.get(dtype, 0.0), error)
    return by_dtype(found)
