"""A run's directory: held by one run at a time, and never written over another run."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning
from lightning.fabric.utilities import rank_zero_only

from archzoo.training.files import bring_back

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
LEFT_OVER = ("last.ckpt.*.partial", "best.ckpt.*.partial", "metrics.csv.partial")
OF_A_RUN = ("last.ckpt", "best.ckpt", "metrics.csv")


def in_use(directory: Path) -> str | None:
    """Which process holds a directory; None: no one does. Nothing is changed."""
    try:
        with open(directory / LOCK, encoding="utf-8") as file:
            if fcntl is None:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass
    return None


class Lock:
    """Says that a process trains into a directory; the system forgets it when the process ends.

    Args:
        directory: It is made where it is missing.
        option: Of the command that takes another directory, for messages.

    Raises:
        ValueError: Another process holds it; the message says which.
    """

    def __init__(self, directory: Path, option: str = "--name") -> None:
        self.directory = directory
        self.path = directory / LOCK
        missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        self._made = missing  # the innermost first
        self._file: IO[str] | None = None
        while self._file is None:
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115, held while it runs
            if not _hold(file):
                file.seek(0)
                who = file.read().strip() or "another process"
                file.close()
                raise ValueError(
                    f"{directory} is in use by {who}: wait for it, end it, or choose another "
                    f"{option}"
                )
            # Whoever held it may have removed the file between opening and holding it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    self._file = file
                    continue
            file.close()
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self._file.flush()

    def release(self) -> None:
        """Give the directory back; one that was made for nothing goes."""
        if self._file is None:
            return
        with suppress(OSError):
            self.path.unlink()
        self._file.close()
        self._file = None
        with suppress(OSError):  # where something lies in it, it stays
            for folder in self._made:
                folder.rmdir()


def _hold(file: IO[str]) -> bool:
    """Whether this process holds an open file from now on; without locks everyone may."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True


class RunDirectory(lightning.Callback):
    """Prepares a run's directory when its first step has been computed, and not before.

    Until then an error may show, in data, sizes, optimizer or memory, and the run that lies in the
    directory stays as it is. It must be the first callback, since others write.

    Args:
        path: The directory.
        resumes: Whether the run in it is the one that is resumed.
    """

    def __init__(self, path: Path, resumes: bool) -> None:
        self.path = path
        self.lock = Lock(path)
        back = [name for name in OF_A_RUN if bring_back(path / name)]
        if back:  # too late for this run, which has looked for its checkpoint
            self.lock.release()
            raise ValueError(
                f"{path}: the run in it was killed while it replaced {back[0]}; what was there is "
                "back in its place: repeat the command"
            )
        found = [] if resumes else _files(path)
        #: What another run left here.
        self.others = found if {path / name for name in OF_A_RUN} & set(found) else []

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        for pattern in LEFT_OVER:  # of a run that was killed while it wrote
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        self.make_room()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.make_room()

    @rank_zero_only
    def make_room(self) -> None:
        """Move another run's files, and nothing that this run has written, beside the directory."""
        if not self.others:
            return
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        aside.mkdir()
        others, self.others = set(self.others), []
        for entry in sorted(self.path.iterdir()):
            files = _files(entry) if entry.is_dir() else [entry]
            if others.issuperset(files):  # as a whole
                entry.rename(aside / entry.name)
                continue
            for file in others.intersection(files):
                target = aside / file.relative_to(self.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)
        print(f"{self.path} held another run, which is now {aside}")


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and path.name != LOCK]
