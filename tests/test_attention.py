"""Attention's cache: fixed states, and the one query that no kernel of ours takes.

Forms, hand-offs, documents and fixed states of every mixer are held by tests/test_contract.py.
"""

import pytest
import torch
from families import MICRO, micro
from torch import nn

import archzoo
from archzoo.block import fork, make_context
from archzoo.contract.measure import leaves_of
from archzoo.mixers.attention import Attention, attend_plainly, attend_without_plans

DOUBLE = torch.float64


class Prefix(archzoo.Adapter):
    """A learned state that every document starts from."""

    kinds = ("state",)
    default_targets = ("state",)
    identity_at_start = False

    def __init__(self, target, *, targets=None, layers=None):
        super().__init__(target, targets=targets, layers=layers)
        self.names = list(target.state)
        for name, shape in target.state.items():
            start = torch.empty([size or 3 for size in shape])
            self.register_parameter(f"of_{name}", nn.Parameter(start))
        self.reset_parameters()

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def prefix(self):
        return {name: getattr(self, f"of_{name}") for name in self.names}


# Every family, a hybrid, and the ways that attention's cache is not keys and values alone.
DECODERS = [
    *[(name, {}) for name in MICRO],
    ("retnet_micro", {"pattern": ["Retention", "Attention"]}),
    ("transformer_micro", {"bias": "ALiBi"}),
    ("transformer_micro", {"convolution": 3}),
    ("yuan_micro", {"adapter": Prefix}),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "options"), DECODERS)
def test_a_decoder_steps_from_a_fixed_state_as_from_an_ordinary_one(name, options, padded):
    torch.manual_seed(0)
    options = dict(options)
    adapter = options.pop("adapter", None)
    model = micro(name, **options).to(DOUBLE).eval()
    if adapter is not None:
        model = archzoo.adapt(model, adapter).to(DOUBLE)
    tokens = torch.randint(64, (2, 12))
    documents = torch.tensor([[-1] * 2 + [0] * 5, [0] * 7]) if padded else None
    with torch.inference_mode():
        ordinary = model(tokens[:, :7], model.init_state(2, capacity=12), documents).state
        state = model.fixed_state(fork(ordinary))
        for t in range(7, 12):
            wanted = model(tokens[:, t : t + 1], ordinary, form="recurrent")
            found = model(tokens[:, t : t + 1], state, form="recurrent")
            difference = (found.logits - wanted.logits).norm() / wanted.logits.norm()
            assert difference < 1e-12
            ordinary, state = wanted.state, found.state
            numbers = [x for x in leaves_of(state) if isinstance(x, int) and x is not padded]
            assert not numbers  # but whether there are documents


def test_a_fixed_state_stays_where_it_is():
    mixer = Attention(16, 2).to(DOUBLE)
    mixer.bias = archzoo.ALiBi(2)
    x = torch.randn(1, 3, 16, dtype=DOUBLE)
    with torch.no_grad():
        state = mixer.fixed_state(mixer.init_state(1, capacity=3, dtype=DOUBLE))
        held = dict(state)
        cursor = None
        for t in range(3):
            context, cursor = make_context(1, 1, cursor=cursor)
            _, after = mixer(x[:, t : t + 1], state, context)
            assert after.keys() == held.keys()
            assert all(after[name] is leaf for name, leaf in held.items())
    assert state["length"] == 3 and state["positions"].tolist() == [[0, 1, 2]]
    assert mixer.fixed_state(state) is state


def test_a_copy_of_a_fixed_state_is_an_ordinary_one():
    mixer = Attention(16, 2)
    state = mixer.fixed_state(mixer.init_state(1, capacity=5))
    context, _ = make_context(1, 1)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 1, 16), state, context)
    copied = mixer.copy_state(state, spare=2)
    assert copied["length"] == 1 and isinstance(copied["length"], int)
    assert copied["keys"].shape == (1, 2, 3, 8)
    assert torch.equal(copied["keys"][:, :, :1], state["keys"][:, :, :1])


def test_documents_that_begin_in_a_fixed_state_are_refused():
    mixer = Attention(16, 2)
    state = mixer.fixed_state(mixer.init_state(1, capacity=5))
    context, _ = make_context(1, 1, documents=torch.tensor([[-1]]))
    with torch.no_grad(), pytest.raises(ValueError, match="copy_state first"):
        mixer(torch.randn(1, 1, 16), state, context)


@pytest.mark.parametrize("kind", [None, torch.bool, DOUBLE])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_one_query_without_a_plan_is_attention(kind, heads, kv_heads):
    torch.manual_seed(0)
    q = torch.randn(3, heads, 1, 8, dtype=DOUBLE)
    k, v = torch.randn(2, 3, kv_heads, 11, 8, dtype=DOUBLE)
    mask = None
    if kind is torch.bool:
        mask = torch.rand(3, 1, 1, 11) < 0.7
        mask[..., -1] = True
    elif kind is not None:
        mask = torch.randn(1, heads, 1, 11, dtype=kind)
    wanted = attend_plainly(q, k, v, mask, False)
    found = attend_without_plans(q, k, v, mask)
    assert (found - wanted).norm() < 1e-12 * wanted.norm()
