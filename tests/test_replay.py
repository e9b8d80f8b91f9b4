"""Decoding by replay, which calls the step where there are no graphs, writes the same tokens."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_generation import MODELS, PROMPTS, make
from torch import Tensor

from archzoo.block import Context, Mixer, State
from archzoo.decoder import Decoder
from archzoo.generation import decoding, generate, replay
from archzoo.generation.conversation import Conversation
from archzoo.generation.fused import Step
from archzoo.generation.prompts import pad_left
from archzoo.generation.replay import AHEAD, Replay, step_function
from archzoo.generation.rows import StateReader
from archzoo.generation.sampling import Sampler
from archzoo.states import fork, leaves

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 5, "seed": 4},
    {"temperature": 1.5, "top_p": 0.8, "seed": 5},
]


def both(model: Decoder, prompts: Any = None, **settings: Any) -> Any:
    """The tokens by replay, which must be those of calling."""
    called = generate(model, prompts, graph=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replayed = generate(model, prompts, graph=True, **settings)
    assert replayed.tokens == called.tokens
    assert replayed.stopped == called.stopped
    assert replayed.state_bytes == called.state_bytes
    assert called.capture_milliseconds == 0
    if called.conversation is not None:
        same(called.conversation, replayed.conversation)
    return replayed


def same(one: Conversation | None, other: Conversation | None) -> None:
    for (name, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
        else:
            assert a == b, name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 3, 1]]], ids=["ragged", "one"])
def test_replay_writes_what_calling_writes(name: str, prompts: list[list[int]]) -> None:
    model = make(name).double()
    for settings in SETTINGS:
        written = both(model, prompts, max_tokens=12, **settings)
        assert written.capture_milliseconds > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep_state", [False, True])
def test_rows_end_at_their_own_stop_token(name: str, keep_state: bool) -> None:
    model = make(name).double()
    settings: dict[str, Any] = {
        "max_tokens": 30,
        "temperature": 1.0,
        "seed": 0,
        "keep_state": keep_state,
    }
    tokens = generate(model, PROMPTS, **settings).tokens
    stop = tokens[1][11]  # while the others continue, unless they meet it, too
    written = both(model, PROMPTS, stop_token=stop, **settings)
    assert any(written.stopped)
    if keep_state:
        after: dict[str, Any] = {"conversation": written.conversation, "max_tokens": 12}
        both(model, [[1, 2], [4], [3]], keep_state=True, **after)


def test_a_stop_token_is_noticed_some_steps_late(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("retnet_micro")
    tokens = generate(model, [5, 3], max_tokens=60).tokens[0]
    place = next(i for i in range(10, 60) if tokens[i] not in tokens[:i])
    calls = 0

    def counting(model: Decoder, batch_size: int, plain: bool = False) -> Step:
        step = step_function(model, batch_size, plain)

        def counted(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            nonlocal calls
            calls += 1
            return step(tokens, state)

        return counted

    monkeypatch.setattr(replay, "step_function", counting)
    heard: list[int | None] = []
    written = generate(
        model,
        [5, 3],
        max_tokens=60,
        stop_token=tokens[place],
        graph=True,
        on_token=lambda row, token, text: heard.append(token),
    )
    assert written.tokens == [tokens[:place]]
    assert heard == [*tokens[:place], None]
    assert calls == place + AHEAD
    calls = 0
    generate(model, [5, 3], max_tokens=60, graph=True)
    assert calls == 59  # the first comes with the prompt, and none is computed for nothing
    calls = 0
    generate(model, [5, 3], max_tokens=60, stop_token=tokens[place], graph=True, keep_state=True)
    assert calls == place  # no step beyond the state that is kept


def test_more_tokens_than_the_device_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "RING", 7)
    both(make("retnet_micro").double(), PROMPTS, max_tokens=32, temperature=1.0, seed=2)


def test_fewer_rows_are_replayed_once_half_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "RING", 4)
    made: list[int] = []
    own = Replay.__init__

    def noting(self: Replay, *arguments: Any) -> None:
        own(self, *arguments)
        made.append(len(self.tokens))

    monkeypatch.setattr(Replay, "__init__", noting)
    model = make("hybrid").double()
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    one, _, *others = generate(model, prompts, max_tokens=40).tokens
    stop = next(token for token in one[2:] if token not in [*others[0], *others[1]])
    both(model, prompts, max_tokens=40, stop_token=stop)
    assert made == [4, 2]


# ---------------------------------------------------------------------------- falling back


class Counting(Mixer):
    """A mixer of a stranger whose state counts tokens as an int."""

    handles_documents = False

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()

    def init_state(self, batch_size: int, **options: Any) -> State:
        return {"seen": 0, "sum": torch.zeros(batch_size, 32, dtype=torch.float64)}

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        after = {"seen": state["seen"] + 1, "sum": state["sum"] + x[:, 0]}
        return (after["sum"] / after["seen"])[:, None], after


@pytest.mark.parametrize("keep_state", [False, True])
def test_a_state_that_is_not_fixed_is_stepped_as_ever(keep_state: bool) -> None:
    model = make("retnet_micro", pattern=["Retention", Counting]).double()
    settings: dict[str, Any] = {
        "max_tokens": 20,
        "temperature": 1.0,
        "seed": 0,
        "keep_state": keep_state,
    }
    called = generate(model, [[5], [6]], **settings)
    with pytest.warns(
        UserWarning, match="blocks 1 seen goes from 1 to 2, and is not a tensor"
    ) as seen:
        replayed = generate(model, [[5], [6]], graph=True, **settings)
    assert len(seen) == 1
    assert replayed.tokens == called.tokens
    assert replayed.state_bytes == called.state_bytes
    if keep_state:
        same(called.conversation, replayed.conversation)


class Fixed(Counting):
    """The same, whose ints are tensors once they are to be fixed."""

    def fixed_state(self, state: State) -> State:
        return state | {"seen": torch.as_tensor(state["seen"])}

    def copy_state(self, state: State, spare: int = 0) -> State:
        return fork(state) | {"seen": int(state["seen"])}


def test_a_mixer_of_ones_own_says_how_its_state_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "RING", 4)
    model = make("retnet_micro", pattern=["Retention", Fixed]).double()
    [tokens] = generate(model, [[5]], max_tokens=20).tokens
    both(model, [[5], [6], [7]], max_tokens=30, temperature=1.0, seed=0)
    both(model, [[5], [5], [6]], max_tokens=30, stop_token=tokens[9])


def test_after_a_first_step_that_fails_the_prompt_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make("hybrid").double()
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 0}
    called = generate(model, PROMPTS, keep_state=True, **settings)
    stop = called.tokens[1][0]  # so that the batch is smaller than the prompt's

    def failing(model: Decoder, batch_size: int, plain: bool = False) -> Step:
        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            model(tokens, state)  # which consumes the state
            raise RuntimeError("no kernel image\nand more")

        return step

    monkeypatch.setattr(replay, "step_function", failing)
    again: dict[str, Any] = {"conversation": called.conversation, "graph": True}
    for arguments in ({"prompts": PROMPTS, "graph": True, "stop_token": stop}, again):
        plain = generate(model, **arguments | {"graph": False}, **settings)
        with pytest.warns(UserWarning, match="cannot be replayed: no kernel image$"):
            replayed = generate(model, **arguments, **settings)
        assert replayed.tokens == plain.tokens

    def fused_alone(model: Decoder, batch_size: int, plain: bool = False) -> Step:
        return step_function(model, batch_size) if plain else failing(model, batch_size)

    monkeypatch.setattr(replay, "step_function", fused_alone)
    monkeypatch.setattr(decoding, "fused_step", lambda model: max)  # as if there were one
    plain = generate(model, PROMPTS, stop_token=stop, **settings)
    with pytest.warns(UserWarning, match="no kernel image$") as seen:
        replayed = generate(model, PROMPTS, stop_token=stop, graph=True, **settings)
    assert len(seen) == 1
    assert replayed.tokens == plain.tokens
    assert replayed.capture_milliseconds > 0

    def full(model: Decoder, batch_size: int, plain: bool = False) -> Step:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(replay, "step_function", full)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, [1], max_tokens=20, graph=True)


def test_other_ways_to_decode_are_called() -> None:
    model = make("retnet_micro")
    ways: list[dict[str, Any]] = [{"check": True}, {"form": "chunkwise"}, {"max_tokens": 8}]
    for settings in ways:
        written = generate(model, [1], graph=True, **{"max_tokens": 20, **settings})
        assert written.capture_milliseconds == 0
    assert generate(model, [1], max_tokens=20).capture_milliseconds == 0  # a CPU has no graphs


# ---------------------------------------------------------------------------- what it is made of


def test_a_state_whose_entries_move_is_overwritten_whole() -> None:
    last, before = torch.tensor([1.0]), torch.tensor([0.0])
    fixed = {"last": last, "before": before, "seen": [torch.tensor([True])], "count": 3}
    after = {"last": torch.tensor([2.0]), "before": last, "seen": fixed["seen"], "count": 3}
    replay._overwrite(fixed, after)
    assert (last.item(), before.item()) == (2, 1)
    window = torch.arange(4.0)
    replay._overwrite({"a": window[:3]}, {"a": window[1:]})
    assert window.tolist() == [1, 2, 3, 3]


def test_random_numbers_are_a_rows_own_however_many_are_drawn() -> None:
    one, many = (Sampler(3, 1.0, seed=7) for _ in range(2))
    singles = torch.cat([one.draw([2, 0], 1) for _ in range(40)])
    assert torch.equal(singles, many.draw([2, 0], 40))
    many.restart([17, 0, 5])
    assert torch.equal(many.draw([0, 2], 1)[0], torch.stack([singles[17, 1], singles[5, 0]]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 3, 1, 2, 4]]], ids=["ragged", "one"])
def test_a_prompt_in_segments_is_the_prompt(name: str, prompts: list[list[int]]) -> None:
    model = make(name).double()
    tokens, documents = pad_left(prompts, model.device)
    whole, parted = StateReader(model, 20), StateReader(model, 20, segment=3)
    with torch.inference_mode():
        logits = whole.read(tokens, documents), parted.read(tokens, documents)
        torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
        new = torch.tensor([[1]] * len(prompts))
        logits = whole.read(new, None), parted.read(new, None)
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-10)
    for (_, a), (_, b) in zip(leaves(whole.state), leaves(parted.state), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
