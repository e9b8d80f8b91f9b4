"""One run of a comparison, in a process of its own: `archzoo fit`, then what is measured of it.

    python -m archzoo.analysis.compare.child '{"commands": [["fit", ...], ["test", ...]]}'

It ends with the process that started it, however that one ends: their pipe closes, and the run is
told to end as by SIGTERM, so that it saves its step first.

With --serve it imports what runs need, once, and forks a process for each line of JSON that it
reads: a run then starts in a moment and not in seconds. That is for the processor only, since a
forked process cannot use a GPU that its parent has looked at.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

PATIENCE = 120.0  # seconds for a step and its checkpoint, when the parent is gone
PAUSE = 0.1  # seconds between two looks at what has ended


def main(given: list[str]) -> int:
    """Run what is given, or serve; the exit status.

    Args:
        given: JSON: `commands`, each a list of words, and `facts`, where to write what they ran on;
            or --serve and the file descriptor of a pipe that closes when the parent ends.
    """
    if given[0] == "--serve":
        _serve(int(given[1]))
    _end_with_parent(0)
    return run(json.loads(given[0]))


def run(what: dict[str, Any]) -> int:
    """Run the commands in turn, up to the first that fails; the exit status."""
    for command in what["commands"]:
        status = _run(command)
        if status:
            return status
        if command[0] == "fit":
            if not os.path.isdir(os.path.dirname(what["facts"])):
                return 0  # its time was over before a step was
            _write_facts(what["facts"])
    return 0


def _run(command: list[str]) -> int:
    """`archzoo COMMAND`, as if it were this process's own."""
    sys.argv = ["archzoo", *command]
    print(f"$ archzoo {' '.join(command)}", flush=True)
    try:
        runpy.run_module("archzoo", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _write_facts(path: str) -> None:
    """What the run ran on, for its row."""
    import torch

    from archzoo.analysis.evidence import facts

    # Lightning asks a GPU that is there for its random state, wherever the run is.
    on_gpu = torch.cuda.is_initialized() and torch.cuda.max_memory_allocated()
    found = facts("cuda" if on_gpu else "cpu")
    found.pop("command")
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(found, file)
    os.replace(f"{path}.partial", path)


def _end_with_parent(pipe: int) -> None:
    """End as by SIGTERM when a pipe from the parent closes, which it does with the parent's end."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(pipe, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ---------------------------------------------------------------------------- serving


def _serve(pipe: int) -> NoReturn:
    """Fork a process for every line on standard input; say on standard output what became of it."""
    _import_all()
    going: dict[int, int] = {}  # the number that the parent knows a process by
    rest = b""
    while True:
        if select.select([0], [], [], PAUSE)[0]:
            read = os.read(0, 1 << 16)
            if not read:  # the parent is gone, and every process sees that for itself
                os._exit(0)
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                process = os.fork()
                if not process:
                    _begin(asked, pipe)
                going[process] = asked["number"]
                _say(number=asked["number"], process=process)
        while going:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            _say(number=going.pop(process), status=os.waitstatus_to_exitcode(status))


def _import_all() -> None:
    """Import what every run needs; nothing is computed, so that no thread exists when it forks."""
    from importlib import import_module

    import archzoo.training.command  # noqa: F401
    from archzoo import parts
    from archzoo.tasks.stream import import_all

    for module in parts.MODULES:
        import_module(module)
    import_all()
    gc.collect()
    gc.freeze()  # so that collecting garbage does not copy these pages


def _begin(asked: dict[str, Any], pipe: int) -> NoReturn:
    """Be the process of a run."""
    status = 1
    try:
        nowhere = os.open(os.devnull, os.O_RDONLY)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for source, target in ((nowhere, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        _end_with_parent(pipe)
        status = run(asked["what"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _say(**what: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent was killed, and says nothing more
        os.write(1, f"{json.dumps(what)}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
