"""Encoded texts on disk: made once, checked whenever they are used, rebuilt where damaged.

An entry is a folder, named by a digest of the text and of all that decides how it is encoded. Its
`meta.json` holds a digest of each of its files and of itself, so that nothing is read that was not
written here, whatever happened to it since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

META = "meta.json"
PREFIX = "text-"  # of an entry's name
UNPACKED = "unpacked-"  # the same of what is known of files that had to be unpacked
_PARTIAL = ".partial"  # ends the name of one that is being made
_ABANDONED = 86_400.0  # seconds after which such a folder is of a process that was killed


def home(directory: str | None = None) -> Path:
    """Where entries are kept: the directory that is named, or the user's."""
    if directory is not None:
        return Path(directory)
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "archzoo"
    except RuntimeError:  # a user without a home
        raise OSError("there is no home directory for encoded texts: set cache_dir") from None


def entry(directory: str | None, recipe: list[Any], prefix: str = PREFIX) -> Path:
    """The folder of what a recipe gives.

    Args:
        directory: As for `home`.
        recipe: Plain data.
        prefix: Of the folder's name, the kind of entry.
    """
    return home(directory) / f"{prefix}{_digest_of(recipe)[:16]}"


def scratch(root: Path) -> Path:
    """A folder for what is needed while an entry is made, which is swept if it stays.

    Raises:
        OSError: it cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    return Path(tempfile.mkdtemp(_PARTIAL, f"{PREFIX}unpacked.", root))


def cannot_write(root: Path, error: OSError) -> OSError:
    """Says that a directory is full, or cannot be written."""
    return OSError(
        error.errno,
        f"cannot write the encoded text to {root} ({error.strerror}): free some disk "
        "space or set cache_dir to another directory",
    )


def read(folder: Path, recipe: list[Any]) -> dict[str, Any] | None:
    """What `fill` was told of an entry; None where it is not there or not as it was written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        seal = meta.pop("seal")
        whole = (
            seal == _digest_of(meta)
            and meta["recipe"] == json.loads(json.dumps(recipe))
            and all(_digest(folder / name) == known for name, known in meta["digests"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta["content"] if whole else None


def fill(folder: Path, recipe: list[Any], write: Callable[[Path], dict[str, Any]]) -> None:
    """Makes an entry whole or not at all: written beside it, then moved in.

    A process that reads the entry meanwhile sees old files or new ones, which hold the same.

    Args:
        folder: Of the entry.
        recipe: What it is made from.
        write: Writes the files into a folder, and says what `read` shall give, plain data.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        partial = Path(tempfile.mkdtemp(_PARTIAL, f"{folder.name}.", folder.parent))
        content = write(partial)
        digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        meta = {"recipe": recipe, "content": content, "digests": digests}
        meta["seal"] = _digest_of(meta)
        (partial / META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        partial.chmod(0o777 & ~_umask())  # made for its owner alone
        try:
            partial.rename(folder)
        except OSError:  # it is there: damaged, or another process was faster
            if read(folder, recipe) is None:
                folder.mkdir(exist_ok=True)
                for name in (*digests, META):
                    (partial / name).replace(folder / name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise cannot_write(folder.parent, error) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Removes what processes that were killed had begun."""
    for folder in parent.glob(f"*-*{_PARTIAL}"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _ABANDONED:
                shutil.rmtree(folder)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------- what a person sees


def say(text: str, end: str = "\n") -> None:
    """A line on stderr, from one process of a run."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if all(rank == "0" for rank in ranks):
        with contextlib.suppress(OSError, ValueError):  # no one reads it any more
            print(text, end=end, file=sys.stderr, flush=True)


class Progress:
    """How far something long is: one line written over in a terminal, else one every 10 s.

    What takes less than two seconds says nothing.

    Args:
        label: What is done.
        total: Bytes of it.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._began + 2
        self._width = 0

    def __call__(self, done: int) -> None:
        """Report that this many bytes are done."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.2 if self._terminal else 10)
        left = (now - self._began) * (self.total - done) / max(done, 1)
        line = f"{self.label}: {megabytes(done)} of {megabytes(self.total)}, {left:.0f} s left"
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            say(f"\r{line:{self._width}}", end="")
            self._width = len(line)
        else:
            say(line)

    def end(self) -> None:
        """Leaves the terminal's line empty."""
        if self._width:
            say(f"\r{'':{self._width}}\r", end="")
            self._width = 0


def megabytes(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 1e6:.1f} MB"


def cache_command(clear: bool = False, directory: str | None = None) -> None:
    """Show the encoded texts that are kept, or remove them.

    A text is encoded once for each tokenizer and kept, so that the next run begins at once. What
    is removed is rebuilt when it is needed.

    Args:
        clear: Remove all of them.
        directory: Where they are. None: ~/.cache/archzoo, as without data.cache_dir.
    """
    root = home(directory)
    folders = sorted(root.glob(f"{PREFIX}*")) if root.is_dir() else []
    folders = [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]
    total = 0
    for folder in folders:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        total += size
        print(f"{folder.name}  {megabytes(size):>10}  {_source(folder)}")
        if clear:
            shutil.rmtree(folder)
    if clear:
        for note in root.glob(f"{UNPACKED}*"):
            shutil.rmtree(note, ignore_errors=True)
    texts = "1 encoded text" if len(folders) == 1 else f"{len(folders)} encoded texts"
    print(f"{root}: {texts}, {megabytes(total)}" + (" removed" if clear and folders else ""))


def _source(folder: Path) -> str:
    """Which text an entry was made from, as far as it says so."""
    try:
        content = json.loads((folder / META).read_text(encoding="utf-8"))["content"]
        return f"{content['path']}, {content['tokenizer']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished" if folder.name.endswith(_PARTIAL) else "of an older version, or damaged"
