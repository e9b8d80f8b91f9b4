"""Two that are at the same thing at once, for tests of what they share."""

from __future__ import annotations

import threading
from collections.abc import Callable


def overlapping(work: Callable[[Callable[[], object]], object]) -> None:
    """Call work here and in another thread, which begins within the first call and ends behind it.

    Args:
        work: It calls what it is given in its midst, where it waits.
    """
    begun, followed, ended = (threading.Event() for _ in range(3))

    def between(mine: threading.Event, wait: threading.Event) -> None:
        mine.set()
        wait.wait(60)

    def follow() -> None:
        begun.wait(60)
        work(lambda: between(followed, ended))

    thread = threading.Thread(target=follow)
    thread.start()
    work(lambda: between(begun, followed))
    ended.set()
    thread.join()
