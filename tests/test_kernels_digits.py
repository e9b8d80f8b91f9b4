"""The kernel of digits' rows against its plain form, exactly.

Without a GPU it runs through Triton's interpreter.
"""

import pytest
import torch
from kernel_device import DEVICE, GPU, define_kernels

from archzoo.block import make_context
from archzoo.embeddings.abacus import AbacusEmbedding
from archzoo.kernels import digits as kernels

define_kernels("archzoo.kernels.digits.triton")


def rows(part, tokens, context, monkeypatch, *, by_kernel):
    with monkeypatch.context() as patch:
        if by_kernel and not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        if not by_kernel:
            patch.setattr(kernels, "available", lambda tokens: False)
        assert kernels.available(tokens) == by_kernel
        return part.positions(tokens, None, context)[0]


@pytest.mark.filterwarnings("ignore:a number of")
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("max_shift", [0, 1, 50])
@pytest.mark.parametrize("time", [1, 7, 63, 1500])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_those_of_the_plain_form(coupled, max_shift, time, packed, monkeypatch):
    part = AbacusEmbedding(
        14, 8, digit_tokens=list(range(10)), operator_tokens=[10, 11], coupled=coupled,
        max_shift=max_shift, rows=80, seed=2**70 + 3,
    ).train().to(DEVICE)  # fmt: skip
    torch.manual_seed(time)
    # Runs as long as the table and longer, and short ones.
    often = torch.rand(5, 1) ** 4
    tokens = torch.where(torch.rand(5, time) < often, 10 + torch.randint(4, (5, time)), 3)
    examples = torch.randint(2**62, (5, time))
    documents = None
    if packed:
        documents = torch.sort(torch.randint(3, (5, time)), dim=1).values
        index = torch.arange(time)
        documents[
            (index < torch.randint(4, (5, 1))) | (index > time - torch.randint(4, (5, 1)))
        ] = -1
        documents[4] = -1  # a row of nothing
        documents = documents.to(DEVICE)
    tokens, examples = tokens.to(DEVICE), examples.to(DEVICE)
    context, _ = make_context(5, time, documents=documents, examples=examples, device=tokens.device)
    want = rows(part, tokens, context, monkeypatch, by_kernel=False)
    got = rows(part, tokens, context, monkeypatch, by_kernel=True)
    assert got.dtype == torch.int64 and torch.equal(got, want)
    # Tensors that are not laid out row by row, such as one row of examples for all.
    turned = tokens.t().contiguous().t()
    alike = context._replace(examples=context.examples[:1].expand(5, time))
    want = rows(part, tokens, alike, monkeypatch, by_kernel=False)
    assert torch.equal(rows(part, turned, alike, monkeypatch, by_kernel=True), want)
    part.eval()
    want = rows(part, tokens, context, monkeypatch, by_kernel=False)
    assert torch.equal(rows(part, tokens, context, monkeypatch, by_kernel=True), want)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_no_number_is_asked_of_the_device():
    part = AbacusEmbedding(14, 8, digit_tokens=list(range(10)), max_shift=5).train().to(DEVICE)
    tokens = torch.zeros(3, 9, dtype=torch.int64, device=DEVICE)
    context, _ = make_context(3, 9, documents=tokens, examples=tokens, device=tokens.device)
    part(tokens, None, context)
    torch.cuda.set_sync_debug_mode("error")
    try:
        part(tokens, None, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")
