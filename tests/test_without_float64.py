"""Models on a device that has no float64, as Apple's GPUs: nothing asks it for one.

There is no such device in CI. A stand-in is a tensor that says it lies on "meta", holds numbers on
the CPU, and refuses to be float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import archzoo
from archzoo import numerics
from archzoo.contract import relative_error
from archzoo.documents import make_context
from archzoo.positions.rotary import NoRotation, RetentionRotation, RotaryEmbedding, XPos

DEVICE = "meta"
WIDE = (torch.float64, torch.complex128)


class There(Tensor):
    """On the device, as far as anyone can see; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        layout = inner.size(), inner.stride(), inner.storage_offset()
        kind = {"dtype": inner.dtype, "device": DEVICE}
        with torch.inference_mode(False):  # a view in that mode would be none of what it views
            made: There = Tensor._make_wrapper_subclass(cls, *layout, **kind)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the numbers; what it makes lies where its inputs do, or where it is told."""
    met = []

    def bring(value: Any) -> Any:
        if isinstance(value, There):
            met.append(value)
            return value.inner
        return value

    args, kwargs = tree_map(bring, (args, dict(kwargs)))
    device = kwargs.get("device")
    there = bool(met) if device is None else torch.device(device).type == DEVICE
    if device is not None:
        kwargs["device"] = "cpu"
    made = function(*args, **kwargs)

    def put(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = [tensor for tensor in met if tensor.inner is value]  # written in place
        return same[0] if same else send(value)

    return tree_map(put, made) if there else made


def send(tensor: Tensor) -> There:
    if tensor.dtype in WIDE:
        raise TypeError(f"this device has no {tensor.dtype}")
    return There(tensor)


class Device(TorchDispatchMode):
    """What makes tensors from nothing goes through here, too."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(numerics, "WITHOUT_FLOAT64", frozenset({DEVICE}))
    from_numbers = torch.tensor

    def tensor(*numbers: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Torch's own makes tensors without numbers of whatever it puts on "meta"."""
        made = from_numbers(*numbers, **kwargs)
        there = device is not None and torch.device(device).type == DEVICE
        return send(made) if there else made

    monkeypatch.setattr(torch, "tensor", tensor)
    with Device():
        yield


def make(name: str, **arguments: Any) -> tuple[Any, Any]:
    """A model on the CPU, and the same there."""
    if name.startswith("abacus"):
        digits = {"digit_tokens": list(range(10)), "operator_tokens": [10, 11], "longest_run": 4}
        arguments["embedding"] = {"class_path": "AbacusEmbedding", "init_args": digits}
    here = archzoo.create_model(name, **arguments)
    there = archzoo.create_model(name, **arguments)
    for module in there.modules():
        for kind in (module._parameters, module._buffers):
            for key, value in kind.items():
                if value is not None:
                    kind[key] = move(value.detach())
    there.load_state_dict({key: move(value) for key, value in here.state_dict().items()})
    return here.eval(), there.eval()


def move(tensor: Tensor) -> Tensor:
    return There(tensor.detach().clone())


@pytest.mark.parametrize("name", [n for n in archzoo.list_models() if n.endswith("_micro")])
@torch.no_grad()
def test_a_model_reads_and_writes_there(name: str, device: None) -> None:
    here, there = make(name)
    tokens = torch.randint(0, 12, (2, 6))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [-1, -1, 3, 3, 3, 3]])
    for given in ({}, {"documents": documents}, {"positions": torch.arange(6).repeat(2, 1) * 2}):
        found = there(move(tokens), **{key: move(value) for key, value in given.items()}).logits
        assert isinstance(found, There) and found.device.type == DEVICE
        assert relative_error(found.inner, here(tokens, **given).logits) < 1e-5
    for settings in ({}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 3}):
        written = [
            archzoo.generate(model, [[1, 2, 3], [4, 5]], max_tokens=4, check=True, **settings)
            for model in (here, there)
        ]
        assert written[0].tokens == written[1].tokens


@pytest.mark.parametrize(
    "rotation",
    [
        RotaryEmbedding(8),
        RotaryEmbedding(8, rope_type="yarn", factor=4, original_max_position_embeddings=4),
        RotaryEmbedding(8, rope_type="dynamic", factor=2, original_max_position_embeddings=4),
        RetentionRotation(8),
        XPos(8),
        NoRotation(8),
    ],
)
def test_tables_are_made_on_the_cpu(rotation: Any, device: None) -> None:
    q, positions = torch.randn(2, 6, 2, 8), torch.arange(6).repeat(2, 1) * 5
    want = rotation(q, q, positions, positions)
    found = rotation(*map(move, (q, q, positions, positions)))
    for got, wanted in zip(found, want, strict=True):
        assert isinstance(got, There)
        assert torch.equal(got.inner, wanted)


def test_positions_are_drawn_on_the_cpu(device: None) -> None:
    embedding = archzoo.RandomisedPositions(12, 8, longest=40, text_length=20)
    examples = torch.arange(2)[:, None].repeat(1, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [-1, -1, 3, 3, 3, 3]])
    want, _ = make_context(2, 6, documents=documents, examples=examples)
    found, _ = make_context(2, 6, documents=move(documents), examples=move(examples), device=DEVICE)
    drawn = embedding.assign_positions(found).positions
    assert isinstance(drawn, There)
    assert torch.equal(drawn.inner, embedding.assign_positions(want).positions)


def test_the_stand_in_refuses_float64(device: None) -> None:
    with pytest.raises(TypeError, match=r"no torch.float64"):
        move(torch.ones(2)).double()
    with pytest.raises(TypeError, match=r"no torch.float64"):
        torch.zeros(2, device=DEVICE, dtype=torch.float64)
