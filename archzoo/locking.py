"""One at a time: who reads a file and writes it anew waits for whoever is about to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within it no other process or thread is within it for the same folder.

    The folder itself is locked, so nothing is left behind, and the system forgets it when the
    process ends. Where there are no locks, on Windows and some file systems, nobody waits.

    Args:
        folder: It is made where it is missing.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
