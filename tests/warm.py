"""`python` and `archzoo` without their start-up: seconds of imports, paid once and not per command.

A server imports the libraries, none of archzoo's own modules, and forks one process per command.
The programs in its directory, put first on PATH, hand it their arguments, directory, environment
and open files and end as the command ends, so a shell line runs as it is written. archzoo itself is
imported by every command, from the place that its PYTHONPATH names. What a command starts by the
name of its own Python, such as another rank, starts at once, too. Signals and limits are not passed
on: what is killed or limited has to be a process of its own.
"""

import atexit
import contextlib
import fcntl
import itertools
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

HEADER = 4  # bytes that say how long a request is, or which status a command ended with
MOST_FILES = 64  # open ones that a program may be given
SCRIPT = Path(sys.executable).with_name("archzoo")  # that pip made
FLAGS = ("-B", "-I")  # of Python, which multiprocessing hands on
CRASHED = 139  # where it ended without a word


@contextlib.contextmanager
def programs() -> Iterator[Path]:
    """A directory that holds `python` and `archzoo`, while their server runs."""
    with tempfile.TemporaryDirectory() as place:
        address = Path(place, "socket")
        for name in ("python", "archzoo"):
            program = Path(place, name)
            line = f'exec "{sys.executable}" -IS "{__file__}" ask "{address}" {name} "$@"'
            program.write_text(f"#!/bin/sh\n{line}\n")
            program.chmod(0o755)
        command = [sys.executable, "-I", __file__, "serve", str(address)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes, start_new_session=True) as server:
            assert server.stdout is not None and server.stdin is not None
            assert server.stdout.readline() == b"ready\n"
            yield Path(place)
            server.stdin.close()  # which ends it


def ask(address: str, program: str, *arguments: str) -> int:
    """Have the server run a command with what this process has; its exit status."""
    files = _inherited()
    request = {"program": program, "arguments": arguments, "directory": os.getcwd()}
    body = json.dumps(request | {"environment": dict(os.environ), "files": files}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [len(body).to_bytes(HEADER, "big")], files)
        connection.sendall(body)
        answer = connection.recv(HEADER)
    return int.from_bytes(answer, "big") if answer else CRASHED


def _inherited() -> list[int]:
    """The files that a program was given: the first three, and those that `pass_fds` adds."""
    return [number for number in range(MOST_FILES) if _is_inherited(number)]


def _is_inherited(number: int) -> bool:
    with contextlib.suppress(OSError):
        return os.get_inheritable(number)  # Python's own are not
    return False


def serve(address: str) -> int:
    """Fork a process for every request, until stdin is closed."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA does not survive a fork
    import gc

    import einops  # noqa: F401
    import lightning.pytorch.cli  # noqa: F401
    import rich.console  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sentencepiece  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401

    assert not any(name.partition(".")[0] == "archzoo" for name in sys.modules)
    gc.freeze()  # what collecting touches would be copied in every process
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                break
            connection, _ = listener.accept()
            with contextlib.suppress(ChildProcessError):  # none is left
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
            if os.fork() == 0:
                listener.close()
                # What a command starts by this name starts at once, too.
                sys.executable = str(Path(address).with_name("python"))
                multiprocessing.set_executable(sys.executable)
                _become(connection)
            connection.close()
    os.killpg(0, signal.SIGKILL)  # with commands that someone gave up waiting for
    return 0


def _become(connection: socket.socket) -> None:
    """Run the command that is asked for, and end with this process."""
    header, files, _, _ = socket.recv_fds(connection, HEADER, MOST_FILES)
    length, body = int.from_bytes(header, "big"), b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    request = json.loads(body)
    # Out of the way first: a file may have come as the number that another is to have.
    apart = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 2 * MOST_FILES) for file in files]
    answers = fcntl.fcntl(connection, fcntl.F_DUPFD_CLOEXEC, 2 * MOST_FILES)
    os.closerange(0, 2 * MOST_FILES)
    for number, file in zip(request["files"], apart, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    status = 1
    try:
        _run(request["program"], request["arguments"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(answers, (status & 0xFF).to_bytes(HEADER, "big"))
        os._exit(status & 0xFF)


def _run(program: str, arguments: list[str]) -> None:
    """What `python` or `archzoo` does with these arguments."""
    import numpy
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", "0"))  # which Lightning read before
    numpy.random.seed()  # noqa: NPY002, which libraries share, and forks must not
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = paths
    sys.orig_argv = [program, *arguments]
    if program == "archzoo":
        sys.argv = [str(SCRIPT), *arguments]
        sys.orig_argv = [sys.executable, *sys.argv]
        from archzoo.cli import main

        sys.exit(main())
    first, *rest = itertools.dropwhile(FLAGS.__contains__, arguments)
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), module.__dict__)
    elif first == "-m":
        name, *rest = rest
        sys.argv = ["-m", *rest]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first.startswith("-"):
        raise SystemExit(f"tests/warm.py: python {first} is not known here")
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.exit({"ask": ask, "serve": serve}[sys.argv[1]](*sys.argv[2:]))
