"""The handle of a side's process."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol


class Stopped(Exception):
    """A curve ends here.

    Args:
        kind: "memory", "time" or "error".
        why: In words.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind, self.why = kind, why


class Side(Protocol):
    """What `measuring` asks of a side."""

    def ask(self, do: str, timeout: float, **request: Any) -> dict[str, Any]:
        """What `worker.Bench`'s method `do` gives.

        Args:
            do: The method.
            timeout: Seconds.
            **request: Its arguments.

        Raises:
            Stopped: It could not, or took longer.
        """

    def close(self) -> None:
        """End it."""


@functools.cache
def _context() -> Any:
    """How processes are started: forked off one that has imported torch and done nothing else."""
    # As in training: threads that wait by spinning take the cores of the side that works.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Whether there is a GPU is asked without CUDA, which a process that is forked off cannot use
    # where it was begun before.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["archzoo.analysis.bench.preloaded"])
    return context


def get_ready() -> None:
    """Import what sides need, before time is counted."""
    nothing = _context().Process(target=_nothing, daemon=True)
    nothing.start()
    nothing.join()


def _nothing() -> None:
    """What a process runs that is there to see others started."""


class Process:
    """A side in a process of its own.

    Args:
        spec: As `worker.contender_of` takes it.
        device: Such as cpu or cuda.
        threads: Of a CPU; None: torch's choice.
        modules: The user's, to be imported first.
    """

    def __init__(
        self, spec: dict[str, Any], device: str, threads: int | None, modules: list[str]
    ) -> None:
        from archzoo.analysis.bench.worker import serve

        handle, said = tempfile.mkstemp(prefix="archzoo-bench-")
        os.close(handle)
        self._said = Path(said)  # what it prints: its last line tells why it ended
        self._answers, theirs = _context().Pipe()
        first = {"spec": spec, "device": device, "threads": threads, "modules": modules}
        self._process = _context().Process(target=serve, args=(theirs, first, said), daemon=True)
        self._process.start()
        theirs.close()
        self._began = False

    def ask(self, do: str, timeout: float, **request: Any) -> dict[str, Any]:
        """As `Side.ask`.

        Args:
            do: The same, and so are the others.
            timeout: The same.
            **request: The same.
        """
        if not self._began:
            self._began = True
            self._answer(max(timeout, 120))  # of the imports
        try:
            self._answers.send({"do": do, **request})
        except OSError:
            raise self._ended() from None
        return self._answer(timeout)

    def close(self) -> None:
        """End the process, whatever it does, and those that it started."""
        with suppress(OSError, AttributeError):  # it has no group yet, or the system has none
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._answers.close()
        with suppress(OSError):
            self._said.unlink()

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            if not self._answers.poll(max(timeout, 0.1)):
                raise Stopped("time", f"no answer in the {timeout:,.0f} s that were left")
            answer: dict[str, Any] = self._answers.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if "stopped" in answer:
            raise Stopped(answer["stopped"], answer["why"])
        return answer

    def _ended(self) -> Stopped:
        """Why the process is gone."""
        self._process.join()
        status = self._process.exitcode
        if status == -9:
            return Stopped("memory", "its process was killed, as where memory is full")
        lines = self._said.read_text(errors="replace").strip().splitlines()
        return Stopped("error", lines[-1][:300] if lines else f"its process ended with {status}")
