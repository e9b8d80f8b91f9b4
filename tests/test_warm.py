"""The programs that tests' commands start from do as Python does."""

import subprocess
import sys

import pytest


def ended(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import sys; print(sys.argv)", "a", "-I", "-B", ""),
        ("-B", "-I", "-c", "import sys; print(sys.argv)", "-c"),
        ("-c", "raise SystemExit(3)"),
        ("-c", "raise SystemExit('so')"),
        ("-c", "print(1); raise ValueError('so')"),
    ],
)
def test_a_program_is_python(arguments, programs):
    assert ended(programs / "python", *arguments) == ended(sys.executable, *arguments)


def test_what_it_starts_gets_its_files(programs):
    code = """
import os, subprocess, sys
assert sys.executable == sys.argv[1]
read, write = os.pipe()
child = f"import os, sys; os.write({write}, sys.argv[1].encode())"
subprocess.run([sys.executable, "-c", child, "written"], pass_fds=[write], check=True)
print(os.read(read, 99).decode())
"""
    program = str(programs / "python")
    assert ended(program, "-c", code, program) == (0, "written\n", "")
