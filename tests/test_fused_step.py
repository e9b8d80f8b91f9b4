"""A decoding step by fused kernels against the decoder's own.

Without a GPU the kernels run through Triton's interpreter.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from families import micro
from kernel_device import DEVICE, GPU, define_kernels

import archzoo
from archzoo.adapters.mixture import SoftRouter
from archzoo.decoder import Decoder
from archzoo.generation import replay
from archzoo.generation.fused import Step, fused_step
from archzoo.generation.prompts import pad_left
from archzoo.kernels import decoding as kernels
from archzoo.kernels.cache_attention import make_arrivals
from archzoo.numerics import MODEL_TOLERANCES
from archzoo.states import State, fork, leaves

define_kernels("archzoo.kernels.decoding.triton")
define_kernels("archzoo.kernels.retention_layer.triton")
define_kernels("archzoo.kernels.cache_attention.triton")
for _name in ("retention", "routers", "experts"):
    define_kernels(f"archzoo.kernels.{_name}.triton")

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]


def make(**arguments: object) -> Decoder:
    """Weights large enough that contexts matter, and norms that are not all ones."""
    torch.manual_seed(0)
    name = str(arguments.pop("name", "retnet_micro"))
    model = micro(name, **{"depth": 1} | arguments)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2).add_(0.05 * torch.randn_like(weight))
    return model.to(DEVICE).eval()


def find(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> Step | None:
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "PROGRAMS", 1)  # which the interpreter runs in turn
    return fused_step(model)


def read(model: Decoder, prompts: list[list[int]]) -> State:
    tokens, documents = pad_left(prompts, model.device)
    state = model.init_state(len(prompts), capacity=16)
    read = model(tokens, state, documents).state
    assert read is not None
    return model.fixed_state(read)


PARTIAL = {"class_path": "RotaryEmbedding", "init_args": {"partial_rotary_factor": 0.5}}
OTHER = {"class_path": "Retention", "init_args": {"decay": "paper_lm", "value_factor": 1}}
LOW = torch.bfloat16 if GPU else torch.float16  # the interpreter cuts bfloat16 off
DYNAMIC = {
    "class_path": "RotaryEmbedding",
    "init_args": {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 8},
}
GROUPED = {"class_path": "Attention", "init_args": {"kv_heads": 2}}
PREFIX = {"class_path": "PTuningV2", "init_args": {"length": 3}}
PROMPT = {"class_path": "PTuning", "init_args": {"length": 3}}
CASES = [
    ({"depth": 2}, PROMPTS[:1], torch.float32),
    ({"rotary": "none"}, PROMPTS[:1], torch.float32),
    ({"rotary": PARTIAL}, PROMPTS[:2], torch.float32),
    ({"tie_weights": True, "heads": 1}, PROMPTS, LOW),
    ({"mixer": OTHER}, PROMPTS, torch.float32),
    ({"pattern": ["Retention", "Attention"], "depth": 2}, PROMPTS[:1], torch.float32),
    ({"name": "transformer_micro"}, PROMPTS[:2], LOW),
    ({"mixer": GROUPED, "heads": 4}, PROMPTS, torch.float32),
    ({"pattern": ["Retention", "Attention"], "depth": 2, "adapter": PREFIX}, PROMPTS, LOW),
    ({"pattern": ["Attention", "Retention"], "depth": 2, "adapter": PROMPT}, PROMPTS, LOW),
]


def check(
    model: Decoder, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, steps: int = 1
) -> None:
    """Some steps of a fused model, against its own."""
    allowed = MODEL_TOLERANCES[model.dtype]
    with torch.inference_mode():
        plain = read(model, prompts)
        fused = fork(plain)
        many = [torch.randint(64, (len(prompts), 1), device=DEVICE) for _ in range(steps)]
        wanted = []
        for tokens in many:
            output = model(tokens, plain, form="recurrent")
            wanted.append(output.logits[:, 0])
            plain = output.state
        step = find(model, monkeypatch)
        assert step is not None
        for held in fused["blocks"]:  # as a fixed state has them where kernels run
            if "keys" in held:
                length = int(held["length"])
                held["arrivals"] = make_arrivals(len(prompts), model.heads, length, DEVICE)
        for tokens, true in zip(many, wanted, strict=True):
            logits, fused = step(tokens, fused)
            assert logits.dtype == true.dtype
            assert (logits - true).double().norm() < allowed * true.double().norm()
    mine, true = dict(leaves(fused)), dict(leaves(plain))
    for name in true:
        if isinstance(true[name], torch.Tensor):
            error = (mine[name] - true[name]).double().norm()
            assert error <= allowed * true[name].double().norm(), name


@pytest.mark.parametrize(("arguments", "prompts", "dtype"), CASES)
def test_it_is_the_plain_step(arguments, prompts, dtype, monkeypatch):
    check(make(**arguments).to(dtype), prompts, monkeypatch, steps=2)


# One half of each block is fused, the other is called.
HALF = [
    {"feed_forward": "PlainFeedForward"},
    {"feed_forward": {"class_path": "GatedFeedForward", "init_args": {"activation": "gelu"}}},
    {"mixer": {"class_path": "Retention", "init_args": {"gate": False}}},
    {"mixer": {"class_path": "Retention", "init_args": {"head_norm": "group"}}},
    {"mixer": {"class_path": "Retention", "init_args": {"decay": "learnable"}}},
    {"name": "transformer_micro", "bias": "ALiBi"},
    {"rotary": DYNAMIC},
    {"rotary": "XPos"},
    {"convolution": 2},
    {"adapter": "LoRA"},
]
NONE = [
    {"norm": "layer"},
    {"norm_placement": "post"},
    {"injection": "layer", "depth": 2},
    {"rotary": "XPos", "feed_forward": "PlainFeedForward"},
]


@pytest.mark.parametrize("arguments", HALF)
def test_the_other_half_is_called(arguments, monkeypatch):
    check(make(**arguments), PROMPTS[:2], monkeypatch)


@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro"])
def test_adapted_weights_that_are_held_are_fused(name, monkeypatch):
    """All that can be merged is one matrix while a text is decoded."""
    blocks = ["query", "value", "output", "up", "down"]
    model = make(name=name, adapter=archzoo.LoRA(targets=blocks))
    assert model.blocks[0].feed_forward.down.one_weight() is None
    with model.weights_held(), torch.no_grad():
        monkeypatch.setattr("archzoo.generation.fused._call_mixer", None)
        monkeypatch.setattr("archzoo.generation.fused._call_feed_forward", None)
        check(model, PROMPTS[:2], monkeypatch)


EVERYWHERE = ["mixer", "feed_forward"]
MIXED = [
    ("MoLoRA", {"targets": EVERYWHERE, "rank": 3, "experts": 3}, {"depth": 2}, 1, torch.float32),
    ("MoLoRA", {"targets": ["value", "up", "output"], "rank": 2}, {}, 3, LOW),
    ("MoV", {"experts": 5}, {"depth": 2}, 1, LOW),
    ("MoV", {"experts": 4, "top_k": 3, "targets": ["value", "down"]}, {}, 3, torch.float32),
]


def adapt(cls: str, **given: object) -> Decoder:
    """What the mixture changes is as large as what it changes it of."""
    options = given.pop("options", {})
    model = make(adapter={"class_path": cls, "init_args": options}, **given)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, archzoo.MoLoRA):
                module.second.mul_(4)
            elif isinstance(module, archzoo.MoV):
                module.vectors.normal_()
            elif isinstance(module, SoftRouter):
                module.weight.normal_(
                    std=0.3
                )  # bfloat16 rounds larger logits by percents of a gate
    return model


def call_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archzoo.generation.fused._call_mixer", None)
    monkeypatch.setattr("archzoo.generation.fused._call_feed_forward", None)


@pytest.mark.parametrize("name", ["retnet_micro", "transformer_micro"])
@pytest.mark.parametrize(("cls", "options", "arguments", "rows", "dtype"), MIXED)
def test_mixtures_of_adapters_are_fused(name, cls, options, arguments, rows, dtype, monkeypatch):
    """What depends on the token is part of the kernels."""
    model = adapt(cls, options=options, name=name, **arguments).to(dtype)
    call_nothing(monkeypatch)
    with model.weights_held(), torch.no_grad():
        check(model, PROMPTS[:rows], monkeypatch)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("retnet_micro", "MoLoRA"),
        ("transformer_micro", "MoV"),
        pytest.param("retnet_micro", "MoV", marks=pytest.mark.slow),
        pytest.param("transformer_micro", "MoLoRA", marks=pytest.mark.slow),
    ],
)
def test_mixtures_of_adapters_write_the_same(name, cls, monkeypatch):
    """By `generate`, on a GPU by a captured graph."""
    model = adapt(cls, name=name)
    settings = {"max_tokens": 40 if GPU else 3}
    for prompts in (PROMPTS[:1], PROMPTS) if GPU else (PROMPTS[:2],):
        called = archzoo.generate(model, prompts, graph=False, **settings)
        monkeypatch.setattr("archzoo.generation.decoding.LEAST", 1)
        if not GPU:
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            monkeypatch.setattr(kernels, "PROGRAMS", 1)
        with warnings.catch_warnings(), monkeypatch.context() as patch:
            warnings.simplefilter("error")
            call_nothing(patch)
            assert archzoo.generate(model, prompts, graph=True, **settings).tokens == called.tokens


def test_mixtures_that_nothing_holds_are_called(monkeypatch):
    """Their weights may change between two steps."""
    model = adapt("MoLoRA", options={"targets": ["query", "down"]})
    assert find(model, monkeypatch) is None
    with model.weights_held():
        assert fused_step(model) is not None


def test_other_mixtures_are_called(monkeypatch):
    """Of different sizes on the blocks of one Linear, or beside a change of another kind."""
    sizes = {"one": archzoo.MoLoRA(targets=["query"]), "two": archzoo.MoLoRA(experts=2, rank=2)}
    kinds = {"one": archzoo.MoV(targets=["down"]), "two": archzoo.LoRA(targets=["down"])}
    for adapter, fused in ((sizes, "_call_feed_forward"), (kinds, "_call_mixer")):
        model = archzoo.adapt(make(), adapter)
        with model.weights_held(), monkeypatch.context() as patch:
            patch.setattr(f"archzoo.generation.fused.{fused}", None)
            check(model, PROMPTS[:1], patch)


@pytest.mark.parametrize("name", ["skywork_micro", "yuan_micro"])
def test_mixtures_are_called(name, monkeypatch):
    model = make(name=name)
    if find(model, monkeypatch) is not None:
        monkeypatch.undo()
        check(model, PROMPTS, monkeypatch)


@pytest.mark.parametrize("arguments", NONE)
def test_other_decoders_have_none(arguments, monkeypatch):
    assert find(make(**arguments), monkeypatch) is None


def test_nothing_else_is_fused(monkeypatch):
    model = make()
    assert find(model, monkeypatch) is not None
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fused_step(model) is None
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert fused_step(model) is None
    handle.remove()
    assert fused_step(model.double()) is None


def test_replay_takes_it(monkeypatch):
    monkeypatch.setattr(replay, "fused_step", lambda _: max)
    assert replay.step_function(make(), 1) is max


@pytest.mark.skipif(GPU, reason="of the CPU")
def test_the_cpu_has_none():
    assert fused_step(make()) is None
