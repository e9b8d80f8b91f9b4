"""Every kernel compiles for a GPU that is not there, under the Triton that runs these tests.

`make test-triton` runs the slow ones under both ends of what is supported: the Triton that the CUDA
build of the pinned torch asks for, and the oldest one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import kernel_device
import pytest

if not kernel_device.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

import kernel_examples

ROOT = Path(__file__).parents[1]


def pinned(package: str, file: str = "constraints.txt") -> str:
    (line,) = re.findall(rf"^{package}==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    return line


def declared(requirements: list[str]) -> str | None:
    """The version of Triton in the metadata of a build of torch; None: it brings none."""
    for requirement in requirements:
        found = re.match(r"triton\s*==\s*([\w.]+)", requirement)
        if found:
            return found[1]
    return None


def compile_examples(*arguments: str, script: str = kernel_examples.__file__) -> str:
    """In a process of its own: here an interpreter may have taken the compiler's place."""
    run = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
    return run.stdout


def test_every_kernel_has_an_example():
    for module in kernel_examples.modules():
        kernel_device.define_kernels(module)
    seen = set()
    with kernel_examples.launches(lambda launch, _: seen.add(kernel_examples.name_of(launch))):
        for run in kernel_examples.EXAMPLES.values():
            run()
    missing = sorted(".".join(kernel) for kernel in kernel_examples.kernels() - seen)
    assert not missing, (
        f"never launched by an example, so never compiled before a GPU does: {', '.join(missing)}; "
        "call what launches them in tests/kernel_examples.py"
    )


def test_finds_kernels():
    """Those that others call are compiled with them."""
    names = {name for _, name in kernel_examples.kernels()}
    assert {"step_kernel", "cross_entropy_kernel", "experts_gradient_kernel"} <= names
    assert "_normaliser" not in names
    assert {"archzoo.kernels.retention.gluon", "archzoo.kernels.digits.triton"} <= set(
        kernel_examples.modules()
    )


def test_first_kernel_of_each_module_compiles():
    """Some 10 s, most of them Gluon's two."""
    printed = compile_examples("--first")
    for module in kernel_examples.modules():
        assert f"  {module.removeprefix('archzoo.kernels.')}." in printed


@pytest.mark.slow  # together some 2 minutes of one core
@pytest.mark.parametrize("name", kernel_examples.EXAMPLES)
def test_compiles(name):
    assert compile_examples(name).count(" s  ")


HOPPER = {"retention_gluon", "retention_gluon_wide", "one_bit_hopper", "one_bit_norm"}
OTHERS = [name for name in kernel_examples.EXAMPLES if name not in {*HOPPER, "decoding"}]


@pytest.mark.slow  # together some 2 minutes of one core
@pytest.mark.parametrize("name", OTHERS)  # decoding's examples begin early, as Hopper's do
def test_fits_where_there_is_little_shared_memory(name):
    assert compile_examples("--little", name).count(" s  ")


@pytest.mark.slow  # 20 s
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(kernel_device.GPU, reason="a driver is there already")
def test_shorter_launch_hands_over_the_same():
    """What Triton hands over itself, to a driver that only writes it down."""
    names = ("cross_entropy", "decoding", "retention_gluon")
    printed = compile_examples(*names, script=str(ROOT / "tests" / "kernel_driver.py"))
    assert int(re.search(r"(\d+) launches alike", printed)[1]) >= 20


def test_pins():
    """One place says which Triton: constraints.txt. The Makefile reads it there."""
    assert "TRITON := $(shell grep '^triton==' constraints.txt)" in (ROOT / "Makefile").read_text()
    oldest = pinned("triton", "constraints-triton.txt")
    (bound,) = re.findall(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert (oldest + ".").startswith(bound + ".")
    wanted = declared(metadata.requires("torch") or [])
    if wanted is not None and metadata.version("torch").startswith(pinned("torch")):
        assert pinned("triton") == wanted


@pytest.mark.slow  # 3 s, and what a package index takes to answer
def test_pin_is_what_the_cuda_build_of_torch_asks_for(tmp_path):
    """PyPI's build for Linux is that one; its metadata is read, and nothing is installed."""
    report = tmp_path / "report.json"
    run = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--dry-run", "--no-deps", "--ignore-installed", "--target", str(tmp_path / "none"),
         "--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64",
         "--python-version", "3.12", "--report", str(report),
         f"torch==={pinned('torch')}"],  # as written: no +cpu
        capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode and not os.environ.get("CI"):
        pytest.skip(f"no package index that has it: {run.stderr.strip().splitlines()[-1]}")
    assert run.returncode == 0, run.stderr
    (found,) = json.loads(report.read_text())["install"]
    assert declared(found["metadata"]["requires_dist"]) == pinned("triton")
