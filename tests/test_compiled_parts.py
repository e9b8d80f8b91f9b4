"""Every part of the zoo under `Decoder.compile`: one graph, the same numbers, few compilations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import archzoo

TIME = 10
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, -1], [-1, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
DIGITS = {"digit_tokens": list(range(10)), "longest_run": 3, "rows": 32}
ABACUS = {"class_path": "AbacusEmbedding", "init_args": DIGITS | {"max_shift": 5}}
COUPLING = {"class_path": "PositionCoupling", "init_args": {"digit_tokens": list(range(10))}}
ALL_BLOCKS = {"class_path": "LoRA", "init_args": {"targets": [".*"]}}
FREQUENCIES = {"class_path": "FourierFT", "init_args": {"targets": ["query", "router_key"]}}
ROTATING = {"class_path": "MoRA", "init_args": {"targets": ["query", "router_key"], "rank": 2}}
ROUTER = {"class_path": "LinearRouter", "init_args": {"score": "sigmoid", "bias_rate": 1e-3}}
EXPERTS = {
    "class_path": "MixtureOfExperts",
    "init_args": {
        "experts": 4,
        "router": ROUTER,
        "drop": "position",
        "z_coefficient": 1e-3,
        "shared_experts": 1,
        "watch_similarity": True,
        "balance_over": "ranks",
    },
}
YARN = {
    "class_path": "RotaryEmbedding",
    "init_args": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}
LEARNABLE = {"class_path": "Retention", "init_args": {"decay": "learnable"}}
# A preset, what it is given, and the arguments of the decoder.
PARTS = {
    "abacus, packed": ("abacus", ("examples", "documents"), {"embedding": ABACUS}),
    "experts, recomputed, adapted": (
        "yuan",
        (),
        {"activation_checkpointing": True, "adapter": ALL_BLOCKS},
    ),
}
SLOW_PARTS = {
    "loops, state, packed": ("retnet", ("state", "documents"), {"loops": 2, "injection": "loop"}),
    "adapter": ("retnet", (), {"adapter": "LoRA"}),
    "adapter that rotates": ("yuan", (), {"adapter": ROTATING}),
    "adapter of frequencies": ("yuan", (), {"adapter": FREQUENCIES}),
    "attention, packed": ("transformer", ("documents",), {}),
    "experts, packed": ("yuan", ("documents",), {}),
    "attention, state": ("transformer", ("state",), {}),
    "layers' injection": ("transformer", (), {"loops": 3, "injection": "layer"}),
    "experts in loops": ("skywork", (), {"loops": 2}),
    "loops, recomputed": ("retnet", (), {"activation_checkpointing": True, "loops": 2}),
    "options of experts": ("skywork", (), {"feed_forward": EXPERTS}),
    "convolution, packed": ("retnet", ("documents",), {"convolution": 4}),
    "two mixers": ("retnet", (), {"pattern": ["Retention", "FilteredAttention"], "depth": 2}),
    "learnable decay": ("retnet", (), {"mixer": LEARNABLE}),
    "layer norm, post": ("transformer", (), {"norm": "layer", "norm_placement": "post"}),
    "tied": ("transformer", (), {"tie_weights": True}),
    "plain feed-forward": ("transformer", (), {"feed_forward": "PlainFeedForward"}),
    "linear": ("transformer", (), {"linear": "Linear"}),
    "YaRN": ("transformer", (), {"rotary": YARN}),
    "coupling": ("transformer", ("examples", "positions"), {"embedding": COUPLING}),
    **{name: ("transformer", (), {"bias": name}) for name in ("ALiBi", "FIRE", "KERPLE", "T5Bias")},
    **{
        name: ("transformer", (), {"rotary": name})
        for name in ("XPos", "NoRotation", "RetentionRotation")
    },
    **{
        name: ("transformer", ("examples",), {"embedding": name})
        for name in ("LearnedPositions", "RandomisedPositions")
    },
}
SLOW = [pytest.param(*parts, id=name) for name, parts in SLOW_PARTS.items()]
FAST = [pytest.param(*parts, id=name) for name, parts in PARTS.items()]


def given(net, names, rows):
    """A batch of that many rows, with all that is named beside its tokens."""
    inputs = {"tokens": torch.randint(16, (rows, TIME))}
    numbers = torch.arange(rows)[:, None].expand(rows, TIME)
    every = {
        "documents": DOCUMENTS[:rows],
        "examples": numbers + 1,
        "positions": torch.arange(TIME).expand(rows, TIME).clone(),
    }
    return inputs | {name: every[name] for name in names if name != "state"}


def gradients(net, inputs, cotangent, state):
    """Loss and gradients of two micro-batches that follow each other."""
    net.zero_grad(set_to_none=True)
    held = net.init_state(len(cotangent), capacity=2 * TIME) if state else None
    total = 0.0
    for _ in range(2):
        x, held, aux = net.hidden(**inputs, state=held)
        loss = (x * cotangent).sum() + sum(sum(layer.losses.values()) for layer in aux)
        loss.backward()
        held = None if held is None else archzoo.block.detach(held)
        total += float(loss.detach())
    return {"loss": torch.tensor(total)} | {
        name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None
    }


def check_compiled(family, names, options):
    torch.manual_seed(0)
    net = archzoo.create_model(f"{family}_micro", vocab_size=16, **({"depth": 1} | options))
    net.train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net.compile(backend=counter, fullgraph=True)
    compiled, counted = net.compiled_hidden, []
    for rows in (2, 1, 2, 1):  # the last batch of an epoch is short
        inputs, cotangent = given(net, names, rows), torch.randn(rows, TIME, net.dim)
        runs = []
        for net.compiled_hidden in (None, compiled):
            runs.append(gradients(net, inputs, cotangent, "state" in names))
        wanted, found = runs
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            # A gradient may be exactly 0 but for rounding.
            assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-5, name
        net.eval()
        net.hidden(**inputs)
        net.train()
        counted.append(counter.frame_count)
    first, short, *later = counted
    # A state that was carried says whether documents are packed, and a cache that was carried is
    # longer than an empty one: shapes of their own.
    each = 2 if "state" in names and ("documents" in names or family == "transformer") else 1
    assert first <= each and short <= 2 * each and set(later) == {short}


@pytest.mark.parametrize(("family", "names", "options"), FAST)
def test_a_part_compiles(family, names, options):
    check_compiled(family, names, options)


@pytest.mark.slow  # 1 to 3 s each
@pytest.mark.parametrize(("family", "names", "options"), SLOW)
def test_other_parts_compile(family, names, options):
    check_compiled(family, names, options)
