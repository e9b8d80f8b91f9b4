"""One run of a comparison, in a process of its own: `archzoo fit`, then what is measured of it.

    python -m archzoo.analysis.compare.child '{"commands": [["fit", ...], ["test", ...]]}'

It ends with the process that started it, however that one ends: their pipe closes, and the run is
told to end as by SIGTERM, so that it saves its step first.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time

PATIENCE = 120.0  # seconds for a step and its checkpoint, when the parent is gone


def main(given: str) -> int:
    """Run the commands in turn, up to the first that fails; the exit status.

    Args:
        given: JSON: `commands`, each a list of words; `facts`, where to write what they ran on.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    what = json.loads(given)
    for number, command in enumerate(what["commands"]):
        status = _run(command)
        if status:
            return status
        if not number and what.get("facts"):
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

    found = facts("cuda" if torch.cuda.is_initialized() else "cpu")
    found.pop("command")
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump(found, file)
    os.replace(f"{path}.partial", path)


def _end_with_parent() -> None:
    """Wait for the end of the pipe from the parent, which comes with the parent's own end."""
    while True:
        try:
            if not os.read(0, 1):
                break
        except OSError:
            break
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
