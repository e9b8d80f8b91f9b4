"""The decoder: what it owns, how it is described, and what it refuses."""

import copy
import itertools
import json
import math
from pathlib import Path

import hypothesis
import pytest
import torch
from families import MICRO, micro
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import archzoo
from archzoo.block import FORMS, Aux, Bias, FeedForward, Mixer, fork, make_context, to
from archzoo.contract import relative_error
from archzoo.decoder import Decoder
from archzoo.mixers.attention import attend_once


@pytest.fixture(params=MICRO)
def family(request):
    return request.param


class Slope(Bias):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, query_positions, key_positions):
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        return -0.1 * distance[:, None].float().expand(-1, self.heads, -1, -1)


class Nothing(Mixer):
    """Takes neither rotary nor bias."""

    def __init__(self, dim, heads):
        super().__init__()

    def init_state(self, batch_size, **options):
        return {}

    def step(self, x, state, context):
        return torch.zeros_like(x), state


class Counting(FeedForward):
    """Hands out one of each kind of aux, and keeps what it is told after the step."""

    def __init__(self, dim, width):
        super().__init__()
        self.told = None

    def forward(self, x, context):
        seen = context.valid.sum()
        return torch.zeros_like(x), Aux({"size": x.square().mean()}, sums={"tokens": seen})

    def after_step(self, sums):
        self.told = sums


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_weights": True, "dropout": 0.1},
        {"pattern": ["Retention", "Retention", "Attention"], "depth": 4},
        {"mixer": "Attention", "bias": Slope, "rotary": "NoRotation"},
        {"norm": "layer", "norm_placement": "post", "norm_eps": 1e-3, "init_std": 0.1},
        {"mixer": {"class_path": "Retention", "init_args": {"decay": 1.0, "gate": False}}},
        {"feed_forward": "PlainFeedForward", "width": 20, "activation_checkpointing": True},
    ],
)
def test_config_builds_the_same_model_again(family, overrides):
    model = micro(family, **overrides)
    stored = json.loads(json.dumps(model.config))  # config.json holds no more than JSON does
    again = Decoder(**stored)
    assert again.config == model.config == stored
    assert [(n, p.shape) for n, p in again.named_parameters()] == [
        (n, p.shape) for n, p in model.named_parameters()
    ]
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_the_signature_is_the_config():
    """Every key is an argument and every argument a key: nothing is defined twice or dropped."""
    arguments = set(Decoder.__init__.__annotations__) - {"return"}
    assert set(micro("retnet_micro").config) == arguments
    assert all(default is None for default in Decoder.__init__.__defaults__)


def test_dead_keys_raise():
    with pytest.raises(TypeError, match="xpos_rel_pos"):
        Decoder(**micro("retnet_micro").config | {"xpos_rel_pos": True})


def test_pattern_is_tiled_over_depth():
    model = micro("retnet_micro", pattern=["Retention", "Retention", "Attention"], depth=5)
    names = [type(block.mixer).__name__ for block in model.blocks]
    assert names == ["Retention", "Retention", "Attention", "Retention", "Retention"]
    assert model.config["mixer"] is None


def test_each_layer_has_parts_of_its_own():
    model = micro("retnet_micro", rotary="RotaryEmbedding")
    for part in ("mixer", "feed_forward", "mixer_norm"):
        assert getattr(model.blocks[0], part) is not getattr(model.blocks[1], part)
    assert model.blocks[0].mixer.rotary is not model.blocks[1].mixer.rotary


def test_rotary_is_each_mixers_own_unless_given():
    model = micro("retnet_micro", pattern=["Retention", "Attention"])
    assert [type(block.mixer.rotary).__name__ for block in model.blocks] == [
        "RetentionRotation",
        "RotaryEmbedding",
    ]
    spec = {"class_path": "RotaryEmbedding", "init_args": {"base": 500.0}}
    model = micro("retnet_micro", pattern=["Retention", "Attention"], rotary=spec)
    tables = {block.mixer.rotary.frequencies for block in model.blocks}
    assert len(tables) == 1 and min(tables.pop()) > 1 / 500


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mixer": "Retention", "bias": Slope}, "Retention takes no bias: set bias to none, or"),
        ({"pattern": ["Attention", "Retention"], "bias": Slope}, "Retention takes no bias"),
        ({"mixer": Nothing, "rotary": "RotaryEmbedding"}, "Nothing takes no rotary"),
        ({"mixer": Nothing, "bias": Slope}, "Nothing takes no bias"),
    ],
)
def test_a_slot_that_a_mixer_lacks_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        micro("transformer_micro", **overrides)


def test_none_is_a_word_for_an_empty_slot():
    """Under a preset None is the preset's value, so that nothing else could say it."""
    size = {"dim": 32, "heads": 4, "depth": 2, "width": 8, "vocab_size": 64}
    for mixer in ("Retention", Nothing):  # neither takes the bias that the preset brings
        model = archzoo.create_model("abacus_small", mixer=mixer, bias="none", **size)
        assert model.config["bias"] is None
        again = Decoder(**json.loads(json.dumps(model.config)))
        assert again.config == model.config
    model = micro("transformer_micro", rotary="none")
    assert [type(block.mixer.rotary) for block in model.blocks] == [archzoo.NoRotation] * 2
    assert model.config["rotary"] == {"class_path": "NoRotation", "init_args": {}}
    # A mixer that rotates nothing is what is wanted, whether it has a slot or not.
    hybrid = micro("transformer_micro", pattern=["Attention", Nothing], rotary="none")
    assert not hasattr(hybrid.blocks[1].mixer, "rotary")
    with pytest.raises(ValueError, match="there is no mixer 'none'"):
        micro("transformer_micro", mixer="none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tie_weights": "yes"}, "tie_weights='yes' must be true or false"),
        ({"activation_checkpointing": "no"}, "activation_checkpointing='no' must be true or false"),
        ({"dropout": "0.1"}, "dropout='0.1' must be a number"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"init_std": math.nan}, "init_std=nan must be at least 0, and finite"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 must be at least 0"),
        ({"context_length": 0}, "context_length=0 must be an integer of at least 1"),
        ({"context_length": "long"}, "context_length='long' must be an integer"),
        ({"vocab_size": True}, "vocab_size=True: a decoder needs an integer"),
        ({"loops": True}, "loops=True must be an integer"),
        ({"width": 1.5}, "width=1.5 must be an integer"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        micro("transformer_micro", **arguments)


def test_sizes_are_needed():
    with pytest.raises(ValueError, match="vocab_size=None: a decoder needs an integer"):
        Decoder(dim=8, depth=1, heads=1)


# ---------------------------------------------------------------------------- weights


def test_tied_weights_are_one(family):
    tied, untied = micro(family, tie_weights=True), micro(family)
    assert tied.head.weight is tied.embedding.weight
    assert untied.parameter_count() - tied.parameter_count() == 64 * 32
    tokens = torch.randint(64, (2, 9))
    tied(tokens).logits.square().sum().backward()
    assert tied.embedding.weight.grad.abs().min() > 0  # words that were not read, by the head
    assert len([n for n, _ in tied.named_parameters() if "head" in n]) == 0
    same = copy.deepcopy(tied)
    assert same.head.weight is same.embedding.weight


def test_parameter_count_is_the_formula():
    """Retention 2 d^2 + 3 f d^2 with values f d wide, attention 4 d^2, SwiGLU 3 d w."""
    d, depth, vocab_size, width = 32, 2, 64, 48
    rest = depth * (3 * d * width + 2 * d) + d + 2 * vocab_size * d
    assert micro("retnet_micro").parameter_count() == depth * 8 * d * d + rest
    attention = micro("retnet_micro", mixer="Attention").parameter_count()
    assert attention == depth * 4 * d * d + rest
    narrow = {"class_path": "Retention", "init_args": {"value_factor": 5 / 4}}
    assert micro("retnet_micro", mixer=narrow).parameter_count() == depth * 5.75 * d * d + rest


@pytest.mark.parametrize("mixer", ["Attention", "Retention"])
def test_initialisation(mixer):
    model = archzoo.create_model("transformer_tiny", mixer=mixer, init_std=0.03)
    gated, mixer, fed = mixer == "Retention", model.blocks[0].mixer, model.blocks[0].feed_forward
    inner = mixer.query_key_value_gate if gated else mixer.query_key_value
    closing = 0.03 / (2 * model.depth) ** 0.5
    for weight, std in (
        (inner.weight, 0.03),
        (model.embedding.weight, 0.03),
        (model.head.weight, 0.03),
        (fed.gate_up.weight, 0.03),
        (mixer.output.weight, closing),
        (fed.down.weight, closing),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5


def test_a_module_may_keep_its_own_initialisation():
    class Zeroed(archzoo.Attention):
        def __init__(self, dim, heads):
            super().__init__(dim, heads)
            nn.init.zeros_(self.output.weight)
            self.output.keeps_init = True

    model = micro("transformer_micro", mixer=archzoo.Attention)
    model.blocks[0].mixer = Zeroed(32, 2)
    model.reset_parameters()
    assert not model.blocks[0].mixer.output.weight.any()
    assert model.blocks[1].mixer.output.weight.any()


def test_the_same_seed_gives_the_same_weights(family):
    def build(seed):
        torch.manual_seed(seed)
        return [p.clone() for p in micro(family).parameters()]

    first, second, other = build(1), build(1), build(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


# ---------------------------------------------------------------------------- calls


@pytest.mark.parametrize("form", [*FORMS, None])
def test_logits_to_keep_are_the_last_ones(family, form):
    model = micro(family).double()
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        want = model(tokens, form=form).logits
        for keep in (0, 1, 4, 9, 100):
            got = model(tokens, form=form, logits_to_keep=keep).logits
            assert got.shape == (2, min(keep, 9), 64)
            if keep:
                assert relative_error(got, want[:, -keep:]) < 1e-12


def test_hidden_is_the_model_up_to_the_head(family):
    model = micro(family)
    tokens = torch.randint(64, (2, 9))
    x, state, aux = model.hidden(tokens)
    assert x.shape == (2, 9, 32) and state is None and len(aux) == 2
    dense = isinstance(model.blocks[0].feed_forward, archzoo.GatedFeedForward)
    assert aux == [Aux()] * 2 or not dense
    assert torch.equal(model.head(x), model(tokens).logits)


def test_dropout_is_drawn_from_the_seed(family):
    model = micro(family, dropout=0.3)
    tokens = torch.randint(64, (2, 9))

    def run(seed):
        torch.manual_seed(seed)
        return model(tokens).logits

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    model.eval()
    assert torch.equal(run(1), run(2))
    without = micro(family)
    without.load_state_dict(model.state_dict())
    assert torch.equal(without(tokens).logits, run(1)), "scaled so that eval needs no correction"


def test_dropout_and_recomputation_draw_the_same(family):
    """Activation checkpointing replays the random state, or gradients would be of another loss."""
    model = micro(family, dropout=0.3).double().train()
    tokens = torch.randint(64, (2, 9))
    found = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        torch.manual_seed(5)
        loss = model(tokens).logits.square().mean()
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for kept, recomputed in zip(*found, strict=True):
        assert relative_error(recomputed, kept) < 1e-12


def test_activation_checkpointing_keeps_less(family):
    """It does what it is for: fewer tensors are saved for the backward pass."""
    tokens = torch.randint(64, (2, 64))
    saved = []
    for recompute in (False, True):
        model = micro(family, depth=4, activation_checkpointing=recompute).train()
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens).logits.sum()
        saved.append(sum(sizes))
    assert saved[1] < 0.5 * saved[0]


def test_state_none_gives_none_and_a_state_a_state(family):
    model = micro(family)
    tokens = torch.randint(64, (2, 9))
    for form in (*FORMS, None):
        assert model(tokens, form=form).state is None
        state = model(tokens, model.init_state(2), form=form).state
        assert set(state) == {"place", "embedding", "blocks"} and len(state["blocks"]) == 2


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=10)
def test_hand_offs_of_a_hybrid(data):
    """Retention and attention in one model: packed rows, any cuts, any forms."""
    model = micro("retnet_micro", pattern=["Retention", "Attention"], bias=None).double()
    tokens = torch.randint(64, (2, 60))
    documents = torch.tensor([[-1] * 4 + [2] * 30 + [3] * 26, [0] * 11 + [1] * 40 + [-1] * 9])
    ends = sorted({0, 60, *data.draw(st.lists(st.integers(1, 59), max_size=4))})
    with torch.no_grad():
        want = model(tokens, documents=documents, form="recurrent").logits
        state, segments = model.init_state(2), []
        for begin, end in itertools.pairwise(ends):
            form = data.draw(st.sampled_from([*FORMS, None]))
            here = documents[:, begin:end]
            output = model(tokens[:, begin:end], state, here, form=form)
            state = output.state
            segments.append(output.logits)
    valid = documents >= 0
    assert relative_error(torch.cat(segments, dim=1)[valid], want[valid]) < 1e-12


def test_prompts_of_different_lengths_are_decoded_as_alone(family):
    """Left-padded together, then step by step with no documents named."""
    model = micro(family).double()
    prompts = [torch.randint(64, (length,)) for length in (3, 8, 5)]
    more = torch.randint(64, (3, 4))
    tokens = torch.stack([F.pad(prompt, (8 - len(prompt), 0)) for prompt in prompts])
    documents = torch.stack([F.pad(0 * p, (8 - len(p), 0), value=-1) for p in prompts])
    with torch.no_grad():
        output = model(tokens, model.init_state(3, capacity=12), documents)
        steps = [output.logits[:, -1:]]
        for t in range(4):
            output = model(more[:, t : t + 1], output.state)
            steps.append(output.logits)
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat([prompt, more[row]])[None]).logits[:, len(prompt) - 1 :]
            got = torch.cat(steps, dim=1)[row : row + 1]
            assert relative_error(got, alone) < 1e-12


def test_a_consumed_state_and_its_fork(family):
    model = micro(family)
    tokens = torch.randint(64, (1, 12))
    with torch.no_grad():
        state = model(tokens[:, :6], model.init_state(1, capacity=32)).state
        kept = fork(state)
        first = model(tokens[:, 6:], state).logits
        model(torch.randint(64, (1, 5)), fork(kept))
        assert torch.equal(model(tokens[:, 6:], kept).logits, first)


def test_capacity_is_room_and_no_limit():
    model = micro("transformer_micro").double()
    tokens = torch.randint(64, (1, 30))
    with torch.no_grad():
        want = model(tokens).logits
        for capacity in (None, 0, 1, 29, 30, 100):
            state, segments = model.init_state(1, capacity=capacity), []
            for t in range(30):
                output = model(tokens[:, t : t + 1], state)
                state = output.state
                segments.append(output.logits)
            assert relative_error(torch.cat(segments, dim=1), want) < 1e-12


def test_a_cache_within_its_capacity_is_written_in_place():
    model = micro("transformer_micro")
    with torch.no_grad():
        state = model.init_state(1, capacity=16)
        buffer = state["blocks"][0]["keys"].data_ptr()
        for _ in range(16):
            state = model(torch.tensor([[1]]), state).state
            assert state["blocks"][0]["keys"].data_ptr() == buffer
        state = model(torch.tensor([[1]]), state).state
        assert state["blocks"][0]["keys"].shape[2] == 32, "doubled, not grown by one"


BESIDE = {"class_path": "AbacusEmbedding", "init_args": {"digit_tokens": list(range(10, 40))}}


@pytest.mark.parametrize(
    "parts",
    [
        {"mixer": "Attention"},
        {"mixer": "Attention", "bias": "ALiBi"},
        {"mixer": "FilteredAttention"},
        {"mixer": "Retention"},
        {"pattern": ["Retention", "FilteredAttention"], "embedding": BESIDE},
    ],
)
@pytest.mark.parametrize("form", [*FORMS, None])
@torch.no_grad()
def test_a_document_is_a_run_whatever_its_number(parts, form):
    """Numbered from 0 again in each segment, or twice in a row by the same number."""
    torch.manual_seed(0)
    model = archzoo.create_model("transformer_micro", init_std=0.3, **parts).double().eval()
    tokens = torch.randint(64, (2, 14))
    documents = torch.tensor(
        [[0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0], [2, 2, 0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 0, -1]]
    )
    ends = [[0, 3, 5, 7, 9, 12, 13, 14], [0, 2, 5, 8, 13]]  # of the runs
    for cuts in ([14], [7, 7], [1, 6, 2, 5], [1] * 14):
        state, segments = model.init_state(2), []
        for segment, numbers in zip(tokens.split(cuts, 1), documents.split(cuts, 1), strict=True):
            output = model(segment, state, numbers, form=form)
            state = output.state
            segments.append(output.logits)
        got = torch.cat(segments, 1)
        for row, edges in enumerate(ends):
            for begin, end in itertools.pairwise(edges):
                alone = model(tokens[row : row + 1, begin:end], form=form).logits[0]
                torch.testing.assert_close(got[row, begin:end], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (0, 2), (1, 2, 3)])
def test_tokens_of_another_shape_are_refused(family, shape):
    with pytest.raises(ValueError, match="a decoder takes"):
        micro(family)(torch.zeros(shape, dtype=torch.int64))


WRONG = {
    "list": (lambda: {"tokens": [[1, 2]]}, r"tokens are a list: .* torch\.tensor"),
    "float": (lambda: {"tokens": torch.ones(1, 2)}, "tokens are float32: they are integers"),
    "bool": (lambda: {"tokens": torch.ones(1, 2) > 0}, "tokens are bool"),
    "too large": (
        lambda: {"tokens": torch.tensor([[1, 163]])},
        "token 163 is not one of .* 0 to 63",
    ),
    "negative": (lambda: {"tokens": torch.tensor([[1, -2]])}, "token -2 is not one of"),
    "elsewhere": (
        lambda: {"tokens": torch.ones((1, 2), dtype=torch.int64, device="meta")},
        "tokens are on meta, the model on cpu",
    ),
    "documents' mask": (
        lambda: {"documents": torch.tensor([[False, True]])},
        r"documents are bool: .* torch\.where\(mask, 0, -1\)",
    ),
    "documents' dtype": (lambda: {"documents": torch.zeros(1, 2)}, "documents are float32"),
    "documents' type": (lambda: {"documents": [[0, 0]]}, "documents are a list"),
    "documents' device": (
        lambda: {"documents": torch.zeros(1, 2, dtype=torch.int64, device="meta")},
        "documents are on meta, the tokens on cpu",
    ),
    "positions' dtype": (lambda: {"positions": torch.zeros(1, 2)}, "positions are float32"),
    "examples' dtype": (lambda: {"examples": torch.zeros(1, 2)}, "examples are float32"),
    "logits_to_keep": (lambda: {"logits_to_keep": -1}, "logits_to_keep=-1 must be at least 0"),
    "state": (lambda: {"state": [1, 2]}, "the state is a list that no decoder made"),
}


@pytest.mark.parametrize("embedding", ["TokenEmbedding", "AbacusEmbedding"])
@pytest.mark.parametrize("kind", WRONG)
def test_an_input_of_the_wrong_kind_is_named(kind, embedding):
    if embedding == "AbacusEmbedding":
        embedding = {"class_path": embedding, "init_args": {"digit_tokens": [3, 4]}}
    model = archzoo.create_model("transformer_micro", embedding=embedding).eval()
    make, words = WRONG[kind]
    given = {"tokens": torch.tensor([[1, 2]])} | make()
    with pytest.raises(ValueError, match=words):
        model(**given)


def test_whole_numbers_of_any_width_are_tokens(family):
    model, tokens = micro(family).eval(), torch.randint(64, (2, 5))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model(tokens.to(dtype)).logits, model(tokens).logits)


def test_a_state_that_is_not_this_models_is_refused(family):
    model, tokens = micro(family).eval(), torch.randint(64, (2, 5))
    attends = isinstance(model.blocks[0].mixer, archzoo.Attention)
    other = micro(family, mixer="Retention" if attends else "Attention").eval()
    output = model(tokens, model.init_state(2))
    with pytest.raises(ValueError, match=r"give its \.state"):
        model(tokens, output)
    with pytest.raises(ValueError, match=r"the state's blocks 0 holds .* where this model has"):
        model(tokens, other(tokens, other.init_state(2)).state)
    with pytest.raises(ValueError, match="the state holds 3 blocks, and this model runs 2"):
        model(tokens, micro(family, depth=3).init_state(2))
    with pytest.raises(ValueError, match=r"the state's blocks 0 .* has shape .*, here"):
        model(tokens, micro(family, heads=8).init_state(2))
    moved = to(model.init_state(2), "meta")
    with pytest.raises(ValueError, match=r"the state's .* is meta, here cpu"):
        model(tokens, moved)
    if attends:  # whose cache has the model's dtype
        with pytest.raises(
            ValueError, match=r"is torch\.float32, here torch\.float64: .* was cast"
        ):
            micro(family).double()(tokens, model.init_state(2))
    abacus = {"class_path": "AbacusEmbedding", "init_args": {"digit_tokens": [3, 4]}}
    counting = micro(family, embedding=abacus).eval()
    with pytest.raises(ValueError, match="embedding holds nothing where this model has run"):
        counting(tokens, model.init_state(2))


def test_an_error_that_no_input_explains_comes_as_it_is(family, monkeypatch):
    model = micro(family)

    def fail(*arguments):
        raise RuntimeError("something else")

    monkeypatch.setattr(model.blocks[0], "forward", fail)
    with pytest.raises(RuntimeError, match="something else"):
        model(torch.zeros(1, 2, dtype=torch.int64), model.init_state(1))


def test_a_state_of_another_batch_is_refused(family):
    model = micro(family)
    with pytest.raises(ValueError, match="the state holds 2 rows, the tokens 1"):
        model(torch.zeros((1, 3), dtype=torch.int64), model.init_state(2))


def test_unknown_form_is_refused(family):
    with pytest.raises(ValueError, match="form 'sideways' is not one of parallel, chunkwise"):
        micro(family)(torch.zeros((1, 3), dtype=torch.int64), form="sideways")


# ---------------------------------------------------------------------------- aux


@pytest.mark.parametrize("recompute", [False, True])
def test_aux_is_a_record_a_layer_and_carries_gradients(recompute):
    model = micro("transformer_micro", feed_forward=Counting, activation_checkpointing=recompute)
    tokens = torch.randint(64, (2, 5))
    aux = model.train()(tokens).aux
    assert [(set(layer.losses), set(layer.sums)) for layer in aux] == [({"size"}, {"tokens"})] * 2
    assert aux[0].sums["tokens"] == 10
    aux[1].losses["size"].backward()
    # The norm before the feed-forward fixes the size of x, so the weight of that norm learns.
    assert model.blocks[1].feed_forward_norm.weight.grad.abs().min() > 0
    assert model.blocks[0].feed_forward_norm.weight.grad is None


def test_padding_reaches_the_feed_forward_as_invalid():
    model = micro("transformer_micro", feed_forward=Counting)
    documents = torch.tensor([[-1, -1, 0, 0], [0, 1, 1, -1]])
    aux = model(torch.zeros((2, 4), dtype=torch.int64), documents=documents).aux
    assert aux[0].sums["tokens"] == 5


def test_after_step_hands_each_layer_its_own():
    model = micro("transformer_micro", feed_forward=Counting, depth=12)
    model.after_step([{"tokens": torch.tensor(layer)} for layer in range(12)])
    for layer, block in enumerate(model.blocks):
        assert block.feed_forward.told == {"tokens": torch.tensor(layer)}


@pytest.mark.parametrize("recompute", [False, True])
def test_aux_goes_through_compilers_and_transforms(recompute):
    model = micro(
        "transformer_micro", feed_forward=Counting, activation_checkpointing=recompute
    ).train()
    tokens = torch.randint(64, (3, 5))
    want = model(tokens).aux
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).aux
    rows = torch.func.vmap(lambda row: model(row[None]).aux)(tokens)
    for layer in range(2):
        loss = want[layer].losses["size"]
        assert torch.allclose(got[layer].losses["size"], loss)
        assert torch.allclose(rows[layer].losses["size"].mean(), loss)
        assert got[layer].sums["tokens"] == rows[layer].sums["tokens"].sum() == 15


def test_a_model_asks_for_the_sums_of_each_of_its_layers():
    model = micro("transformer_micro", feed_forward=Counting)
    for given in ({"tokens": torch.tensor(1)}, [{}]):
        with pytest.raises(ValueError, match=r"2 layers: .*\[layer.sums for layer in aux\]"):
            model.after_step(given)


def test_examples_reach_the_embedding():
    class Numbered(archzoo.TokenEmbedding):
        def forward(self, tokens, state, context):
            self.seen = context.examples
            return super().forward(tokens, state, context)

    model = micro("retnet_micro")
    model.embedding = Numbered(64, 32)
    examples = torch.arange(6).view(2, 3)
    model(torch.zeros((2, 3), dtype=torch.int64), examples=examples)
    assert torch.equal(model.embedding.seen, examples)
    context, _ = make_context(2, 3, examples=examples)
    assert torch.equal(context.segment(1, 3).examples, examples[:, 1:])


# ---------------------------------------------------------------------------- training


def test_truncated_back_propagation_carries_the_state(family):
    """Window by window with a detached state: the values of the whole, the gradient of a window."""
    model = micro(family).double()
    tokens = torch.randint(64, (2, 24))
    whole = model(tokens).logits
    state, segments = model.init_state(2), []
    for begin in range(0, 24, 8):
        output = model(tokens[:, begin : begin + 8], archzoo.block.detach(state))
        state = output.state
        output.logits.square().mean().backward()
        segments.append(output.logits.detach())
    assert relative_error(torch.cat(segments, dim=1), whole) < 1e-12
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_few_steps_learn(family):
    """Loss falls below what letters alone tell, so the past is used; from the seed, bit for bit."""

    def train():
        torch.manual_seed(0)
        model = micro(family, init_std=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tokens = torch.randint(8, (4, 24))
        losses = []
        for _ in range(40):
            logits = model(tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train()
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)
    assert losses[-1] < math.log(8) - 0.3
    assert train() == losses


@pytest.mark.parametrize("name", MICRO)
def test_weights_go_through_what_takes_them_as_one_vector(name: str, tmp_path: Path) -> None:
    """They lay by input channel, and views as one vector were refused, weights and gradients."""
    net = archzoo.create_model(name, vocab_size=16)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    vector = parameters_to_vector(net.parameters())
    vector_to_parameters(vector * 2, net.parameters())
    for key, parameter in net.named_parameters():
        assert torch.equal(parameter, weights[key] * 2)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())


def test_lbfgs_trains(family: str) -> None:
    model = micro(family, vocab_size=8)
    tokens = torch.randint(0, 8, (4, 9))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).logits
        value = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        value.backward()
        return value

    before = loss().item()
    optimizer.step(loss)
    assert loss().item() < before - 0.1


def test_one_query_reads_a_long_cache_as_attention_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past LONG_CACHE tokens two products replace the fused attention."""
    grouped = {"class_path": "Attention", "init_args": {"kv_heads": 2}}
    net = archzoo.create_model("transformer_micro", vocab_size=16, heads=4, mixer=grouped)
    net, tokens = net.double().eval(), torch.randint(0, 16, (3, 40))
    whole = net(tokens).logits
    monkeypatch.setattr("archzoo.mixers.attention.LONG_CACHE", 8)
    seen = []
    monkeypatch.setattr(
        "archzoo.mixers.attention.attend_once",
        lambda *qkv: seen.append(qkv[1].shape[2]) or attend_once(*qkv),
    )
    with torch.inference_mode():
        state, steps = net.init_state(3, capacity=40), []
        for t in range(40):
            logits, state, _ = net(tokens[:, t : t + 1], state)
            steps.append(logits)
    assert min(seen) == 8
    assert relative_error(torch.cat(steps, dim=1), whole) < 1e-12


# ---------------------------------------------------------------------------- how it is born

COUPLED = {"digit_tokens": [3, 4, 5], "operator_tokens": [1, 2]}
BORN = [
    {"mixer": {"class_path": "Retention", "init_args": {"decay": "learnable"}}},
    {"mixer": "Retention", "rotary": "XPos", "norm": "layer"},
    {"mixer": "FilteredAttention", "bias": {"class_path": "T5Bias", "init_args": {"furthest": 30}}},
    {"bias": "KERPLE"},
    {"bias": {"class_path": "KERPLE", "init_args": {"kind": "power"}}},
    {"bias": "FIRE", "tie_weights": True},
    {"bias": "ALiBi", "embedding": "LearnedPositions"},
    {"embedding": {"class_path": "AbacusEmbedding", "init_args": COUPLED | {"coupled": True}}},
    {"embedding": {"class_path": "PositionCoupling", "init_args": COUPLED | {"prompt": "plain"}}},
    {"embedding": "RandomisedPositions", "rotary": "RotaryEmbedding"},
    {
        "feed_forward": {
            "class_path": "MixtureOfExperts",
            "init_args": {"adaptive": True, "router": "AttentionRouter"},
        }
    },
]


def owned(model):
    """Everything that modules own, by name, the non-persistent buffers too."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("parts", BORN)
def test_after_to_empty_and_reset_parameters_all_is_defined(parts, monkeypatch):
    """Room is not empty but holds whatever was there before: here what no model starts with."""
    like = torch.empty_like

    def left_over(tensor, **options):
        return like(tensor, **options).fill_(99)

    torch.manual_seed(0)
    want = micro("transformer_micro", **parts)
    with torch.device("meta"):
        model = micro("transformer_micro", **parts)
    monkeypatch.setattr(torch, "empty_like", left_over)
    model.to_empty(device="cpu")
    monkeypatch.undo()
    assert any(99 in parameter for parameter in model.parameters())
    model.reset_parameters()
    assert owned(model).keys() == owned(want).keys()  # a tied head is tied again
    for name, tensor in owned(model).items():
        assert tensor.device.type == "cpu" and not (tensor == 99).any(), name
        other = owned(want)[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        size, expected = (t.detach().double().abs().mean().item() for t in (tensor, other))
        apart = 20 if tensor.numel() < 500 else 1.1  # a few draws may be of any size below 99
        assert expected / apart <= size <= expected * apart, name
    # What is in no file is defined by loading alone.
    with torch.device("meta"):
        loaded = micro("transformer_micro", **parts)
    monkeypatch.setattr(torch, "empty_like", left_over)
    loaded.to_empty(device="cpu").load_state_dict(want.state_dict())
    tokens = torch.randint(64, (2, 40))
    assert torch.equal(loaded.eval()(tokens).logits, want.eval()(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parts", BORN)
@torch.no_grad()
def test_under_another_default_dtype_a_model_is_as_if_it_were_cast(parts, dtype):
    """What a cast leaves at float32 is born float32, and nothing is computed by the default."""
    tokens = torch.randint(64, (2, 40))
    try:
        torch.set_default_dtype(dtype)
        born = micro("transformer_micro", **parts).eval()
        got = born(tokens, documents=torch.tensor([[-1] * 3 + [0] * 37, [0] * 9 + [1] * 31])).logits
        stepped = born(tokens[:, 30:], born(tokens[:, :30], born.init_state(2)).state).logits
    finally:
        torch.set_default_dtype(torch.float32)
    cast = micro("transformer_micro", **parts).to(dtype).eval()
    dtypes = {name: tensor.dtype for name, tensor in owned(cast).items()}
    assert {name: tensor.dtype for name, tensor in owned(born).items()} == dtypes
    cast.load_state_dict(born.state_dict())
    want = cast(tokens, documents=torch.tensor([[-1] * 3 + [0] * 37, [0] * 9 + [1] * 31])).logits
    assert torch.equal(got, want)
    want = cast(tokens[:, 30:], cast(tokens[:, :30], cast.init_state(2)).state).logits
    assert torch.equal(stepped, want)
