"""How kernels are launched: by the shortest way that this Triton has, or by Triton itself."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import kernel_device
import pytest
import torch

if not kernel_device.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from archzoo.kernels import launching, retention
from archzoo.kernels.launching import Launch


class Kernel:
    """A kernel in the place of Triton's, with what its handle's launcher has beside the common."""

    arg_names = ("x_ptr", "absent_ptr", "size", "BLOCK")

    def __init__(self, module: str = "", **launcher: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.error: Exception | None = None
        self.fn = SimpleNamespace(__name__="some_kernel")
        kernel = self

        class Launcher(SimpleNamespace):
            def __call__(self, *arguments: Any) -> None:
                kernel.called("Python", arguments)

        def in_c(*arguments: Any) -> None:
            kernel.called("C", arguments)

        in_c.__module__ = module
        found = Launcher(
            launch=in_c, num_ctas=1, global_scratch_size=6, profile_scratch_size=0,
            launch_cooperative_grid=False, launch_pdl=True, **launcher,
        )  # fmt: skip
        self.handle = SimpleNamespace(run=found, function="function", packed_metadata="metadata")

    def called(self, way: str, arguments: tuple[Any, ...]) -> None:
        self.calls.append((way, arguments))
        if self.error is not None and way != "Triton":
            raise self.error

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.called("Triton", (grid, *arguments, options))
            return self.handle

        return run

    @property
    def ways(self) -> list[str]:
        return [way for way, _ in self.calls]


FORMS: dict[str, dict[str, Any]] = {
    "3.6": {"module": "__triton_launcher"},
    "3.7": {"module": "cuda_utils", "arg_annotations": "annotations", "kernel_signature": b"s"},
    "unknown": {"module": "another"},
    "another memory": {"module": "cuda_utils", "kernel_signature": b"s", "gsan_enabled": True},
}


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_shortcuts", True)


def make(kernel: Any) -> Launch:
    return Launch(kernel, (2, 3, 1), (7,), {"BLOCK": 16}, num_warps=4)


@pytest.mark.parametrize("form", FORMS)
def test_what_a_launch_hands_over(form):
    """First to Triton, something else instead of what is absent; then to what it compiled."""
    kernel = Kernel(**FORMS[form])
    launch, x = make(kernel), torch.zeros(4, dtype=torch.bfloat16)
    launch(99, x, None)
    launch(99, x, None)
    (_, first), (way, second) = kernel.calls
    assert first == ((2, 3, 1), x, x, 7, {"BLOCK": 16, "num_warps": 4})
    common, hooks = (2, 3, 1, 99, "function"), ("metadata", None, None, None)
    if way == "Python":
        assert form not in ("3.6", "3.7")
        assert second == (*common, *hooks, x, x, 7, 16)
        return
    before = (False, True) if form == "3.6" else (False, True, *hooks)
    at = len(common) + len(before)
    assert second[:at] == (*common, *before) and second[at].nbytes == 2 * 3 * 6
    if form == "3.6":
        assert second[at + 1 :] == (None, *hooks, x, None, 7, 16)
    else:
        assert second[at + 1 :] == (None, "annotations", b"s", (x, None, 7, 16))


@pytest.mark.parametrize("form", FORMS)
def test_launch_falls_back_and_says_so_once(form):
    kernel, x = Kernel(**FORMS[form]), torch.zeros(1)
    launch = make(kernel)
    launch(99, x, x)
    kernel.error = TypeError("function takes exactly 18 arguments (12 given)\nand more")
    wanted = r"20 us each.*\(Triton 3\S*: TypeError function takes exactly 18 .*given\)"
    with pytest.warns(UserWarning, match=wanted):
        launch(99, x, None)
    other = Kernel(**FORMS[form])
    another = make(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(99, x, x)
        another(99, x, x)
        another(99, x, x)
    assert kernel.ways[2:] == ["Triton", "Triton"] and other.ways == ["Triton", "Triton"]


def test_what_is_not_understood_is_not_kept():
    kernel = Kernel()
    kernel.handle = SimpleNamespace()
    launch, x = make(kernel), torch.zeros(1)
    with pytest.warns(UserWarning, match="AttributeError"):
        launch(99, x, x)
    launch(99, x, x)
    assert kernel.ways == ["Triton", "Triton"]


def test_error_of_more_than_the_way_is_raised(monkeypatch):
    kernel, x = Kernel(**FORMS["3.6"]), torch.zeros(1)
    launch = make(kernel)
    launch(99, x, x)
    kernel.error = RuntimeError("an illegal memory access was encountered")
    monkeypatch.setattr(
        Kernel, "__getitem__", lambda self, grid: lambda *_, **__: self.called("", ())
    )
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launch(99, x, x)
    assert launching._shortcuts


def test_kernels_can_be_switched_off(monkeypatch):
    """An error of a kernel says how; the environment is read when the package is imported."""
    kernel, x = Kernel(), torch.zeros(1)

    def fail(self, grid):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(Kernel, "__getitem__", fail)
    with pytest.raises(RuntimeError, match="no such instruction") as caught:
        make(kernel)(99, x, x)
    (note,) = caught.value.__notes__
    assert "some_kernel (Triton 3" in note and "ARCHZOO_KERNELS=off" in note

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.zeros(1, 4, 2, 16)
    assert launching.run_beside(x) and retention.available(q, q, q)
    monkeypatch.setattr(launching, "SWITCHED_OFF", True)
    assert not launching.run_beside(x)
    assert retention.unavailable(q, q, q) == "ARCHZOO_KERNELS is off in the environment"
