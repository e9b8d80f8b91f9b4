"""Signals that end a run: they are noted first, and obeyed where nothing is lost.

Light to import: it is active while torch is still being loaded.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# A terminal's, a scheduler's (SLURM, Kubernetes, docker) and a batch system's ways to say "end".
NAMES = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "XCPU", "BREAK")
ENDING = tuple(getattr(signal, f"SIG{name}") for name in NAMES if hasattr(signal, f"SIG{name}"))

# Signals so soon after the first belong to it: who ends a process group reaches a child of make
# twice, once by itself and once through make.
TOGETHER = 1.0  # seconds


class Ended(BaseException):
    """Raised where a run ends because of a signal.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number
        #: The exit status that a shell gives a process that a signal ended.
        self.status = 128 + number
        self.explained = False  # whether someone has said what was saved


class Signals:
    """A context manager that catches the signals that end a process.

    The first one raises `Ended`, or is only noted while `gentle`: then training ends itself. A
    second one ends the process at once, whatever it does. What was ignored before, such as SIGHUP
    under nohup, or had a handler of someone else's, is not touched.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the first signal
        self.gentle = False
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._watched: tuple[int, int] | None = None

    def __enter__(self) -> Signals:
        self.received, self.gentle, self._since = None, False, 0.0
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may
        for number in ENDING:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._note)
        if self._before:
            self._watch()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._watched is not None:
            signal.set_wakeup_fd(self._woken_before)
            os.close(self._watched[1])
            self._watched = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return  # `_wait` ends the process
        self.received = number
        if not self.gentle:
            raise Ended(number)
        name = signal.Signals(number).name
        # On a line of its own, for there may be a bar, and the terminal's ^C.
        say(f"\n{name}: the step is finished and saved; again ends at once")

    # Python runs a handler between two of its own instructions only, so a process that is stuck
    # elsewhere would not notice the second signal. A thread does.

    def _watch(self) -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._watched = reading, writing
        self._woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(reading,), daemon=True).start()

    def _wait(self, reading: int) -> None:
        while numbers := os.read(reading, 1):
            number = numbers[0]
            if number not in self._before:
                continue
            if self._since and time.monotonic() - self._since > TOGETHER:
                os._exit(128 + number)
            self._since = self._since or time.monotonic()
        os.close(reading)


SIGNALS = Signals()


def say(text: str) -> None:
    """A line on stderr from one process of a run; no one may be there to read it any more.

    Written by the system's call, since a handler may interrupt a write of Python's own.
    """
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if any(rank != "0" for rank in ranks):
        return
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, f"{text}\n".encode())
