"""Run the tests that a GPU alone runs in full, and record what came of them.

    python benchmarks/gpu_tests.py                     # some 5 minutes with 8 processes
    python benchmarks/gpu_tests.py --jobs 4 tests/test_one_bit.py

Without a GPU kernels go through Triton's interpreter at small sizes, and what is written in Gluon,
kernels on several streams and replayed graphs do not run at all. A row says which tests, how many
passed, failed and were skipped, and on what.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import torch
from harness import ROOT, write_rows

TESTS = ("tests/test_kernels_*.py", "tests/test_one_bit.py", "tests/test_compiling.py")


def outcome(last_line: str) -> dict[str, float]:
    """Of pytest's last line: how many passed, failed and were skipped, and the seconds.

    Raises:
        ValueError: pytest did not come to its end.
    """
    seconds = re.search(r" in ([\d.]+)s", last_line)
    if seconds is None:
        raise ValueError(f"pytest ended with {last_line!r}, which counts no tests")
    found: dict[str, float] = {"passed": 0, "failed": 0, "skipped": 0}
    for count, word in re.findall(r"(\d+) (\w+)", last_line):
        if word in found:
            found[word] = int(count)
    return found | {"seconds": float(seconds[1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", nargs="*", default=TESTS, help="files [%(default)s]")
    parser.add_argument("--jobs", type=int, default=8, help="processes [8]")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU was found: make test runs what needs none")
    files = [str(path) for pattern in given.tests for path in sorted(ROOT.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-n", str(given.jobs)]
    lines = []
    with subprocess.Popen([*command, *files], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    row = {"tests": " ".join(given.tests)} | outcome(lines[-1] if lines else "")
    # A row for each Triton: the kernels are compiled by it.
    from triton import __version__ as triton

    row["triton"] = triton
    write_rows("tests", [row], on_gpu=True, replacing=("tests", "triton"))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
