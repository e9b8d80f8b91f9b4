"""What every test runs under: one torch thread, seeded, and random inputs that can be replayed."""

import os
from collections.abc import Iterator
from pathlib import Path

# Two threads on two busy cores slow small steps several times. Set before torch is imported, and in
# the environment, so that the commands which tests start keep to it too.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import hypothesis
import kernel_device  # noqa: F401, before anything else imports Triton
import pytest
import torch
import warm

torch.set_num_threads(1)


class _TorchGenerator:
    """Torch's global generator in the shape of `random.Random`, for hypothesis to seed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_generator = _TorchGenerator()  # hypothesis keeps only a weak reference
hypothesis.register_random(_torch_generator)

# Inputs are new in every run, in CI too; a failure prints the line that replays it. For more
# examples: pytest --hypothesis-profile=thorough.
hypothesis.settings.register_profile(
    "archzoo",
    max_examples=20,
    deadline=None,  # the first call of a shape is slow, and the machine may be busy
    derandomize=False,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("archzoo"), max_examples=500
)
hypothesis.settings.load_profile("archzoo")

# A worker that runs out of tests takes half of another's rest. A long test cannot be shared, so the
# longest begin.
FIRST = ("test_readme", "test_tutorials")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A directory for PATH with `python` and `archzoo`, which start at once (see warm.py)."""
    with warm.programs() as directory:
        yield directory
