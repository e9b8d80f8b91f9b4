"""Processes of runs: started one by one, or forked from one that has imported all they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

CHILD = (sys.executable, "-m", "archzoo.analysis.compare.child")
UNKNOWN = -9  # the status of a process whose server is gone: what it did shows in its files


class Process(Protocol):
    """What is known of a process."""

    def poll(self) -> int | None:
        """Its exit status; None: it runs."""
        ...

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is there."""
        ...


class Started(subprocess.Popen[bytes]):
    """A process of a run, whose pipe is closed with it."""

    def poll(self) -> int | None:
        status = super().poll()
        if status is not None and self.stdin is not None:
            self.stdin.close()
        return status


class Starter:
    """Starts a process for every run."""

    def start(self, what: dict[str, Any], log: Path, environment: dict[str, str]) -> Process:
        """A process that runs commands; its end of a pipe closes when this process ends.

        Args:
            what: As `archzoo.analysis.compare.child` takes it.
            log: What it prints is added there.
            environment: Variables beside this process's.
        """
        with log.open("ab") as file:
            return Started(
                [*CHILD, json.dumps(what)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,  # a terminal's Ctrl-C is for this process to hand on
            )

    def close(self) -> None:
        """Nothing more is started."""


class Forked:
    """A process that a server has forked.

    Args:
        server: That knows it.
        number: By which the server knows it.
    """

    def __init__(self, server: ForkingStarter, number: int) -> None:
        self.server, self.number = server, number

    def poll(self) -> int | None:
        return self.server.status(self.number)

    def send_signal(self, number: int) -> None:
        process = self.server.process(self.number)
        if process is not None and self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(process, number)


class ForkingStarter(Starter):
    """Has one process import torch and Lightning, and fork the processes of all runs."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._writing = -1  # of the pipe that closes when this process ends
        self._rest = b""
        self._statuses: dict[int, int] = {}
        self._processes: dict[int, int] = {}
        self._count = 0

    def start(self, what: dict[str, Any], log: Path, environment: dict[str, str]) -> Process:
        self._pump()
        if self._server is None or self._server.poll() is not None:
            self._begin(environment)
        self._count += 1
        asked = {"number": self._count, "what": what, "log": str(log)}
        assert self._server is not None and self._server.stdin is not None
        with suppress(BrokenPipeError):  # the server has just been killed: as its processes
            self._server.stdin.write(f"{json.dumps(asked)}\n".encode())
            self._server.stdin.flush()
        return Forked(self, self._count)

    def _begin(self, environment: dict[str, str]) -> None:
        reading, writing = os.pipe()
        os.set_inheritable(reading, True)
        self._server = subprocess.Popen(
            [*CHILD, "--serve", str(reading)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            start_new_session=True,
            pass_fds=(reading,),
        )
        os.close(reading)
        if self._writing < 0:
            self._writing = writing
        self._rest = b""
        assert self._server.stdout is not None
        os.set_blocking(self._server.stdout.fileno(), False)

    def _pump(self) -> None:
        """Read what the server has said."""
        if self._server is None or self._server.stdout is None:
            return
        while True:
            try:
                read = os.read(self._server.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return
            if not read:
                return
            *lines, self._rest = (self._rest + read).split(b"\n")
            for line in lines:
                said = json.loads(line)
                kind = self._statuses if "status" in said else self._processes
                kind[said["number"]] = said.get("status", said.get("process"))

    def process(self, number: int) -> int | None:
        """The process id; None: it is not forked yet."""
        self._pump()
        return self._processes.get(number)

    def status(self, number: int) -> int | None:
        """The exit status; None: it runs."""
        self._pump()
        if number not in self._statuses and self._server is not None:
            if self._server.poll() is None:
                return None
            self._pump()
            process = self._processes.get(number)
            if number not in self._statuses and not (process and _is_there(process)):
                self._statuses[number] = UNKNOWN
        return self._statuses.get(number)

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            with suppress(BrokenPipeError):
                self._server.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(10)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # One that has ended and that nobody has waited for is there by name only.
    with suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return True


def starter(on_gpu: bool) -> Starter:
    """What starts the processes of runs on this machine."""
    forks = sys.platform == "linux" and not on_gpu
    return ForkingStarter() if forks else Starter()


def wait(processes: list[Process], seconds: float) -> list[Process]:
    """Wait for processes to end, at most so long; those that have not."""
    until = time.monotonic() + seconds
    while processes and time.monotonic() < until:
        processes = [process for process in processes if process.poll() is None]
        time.sleep(0.05)
    return processes
