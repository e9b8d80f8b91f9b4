"""Where a report goes: asked before hours of measuring, written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def plotly_script() -> str:
    """The JavaScript that draws.

    Raises:
        ValueError: The extra `report` is not installed.
    """
    try:
        import jinja2  # noqa: F401
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError(
            "a report needs plotly and jinja2: pip install 'archzoo[report]'"
        ) from None
    return str(get_plotlyjs())


def check_report_path(path: str | Path) -> Path:
    """Say now what would keep a report from being written at the end.

    Args:
        path: The HTML file to write. Its directory is made.

    Returns:
        The path.

    Raises:
        ValueError: It is a directory, or the extra `report` is not installed.
        OSError: Its directory cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir() or not path.name:
        raise ValueError(
            f"{path} is a directory: name the report's file, such as {path}/report.html"
        )
    plotly_script()
    partial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w"):
            pass
        partial.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    return path


def write_whole(path: Path, text: str) -> int:
    """Write beside the path, then move it there: readers see the old or the new file.

    Returns:
        How many bytes.

    Raises:
        OSError: It could not be written.
    """
    partial = _beside(path)
    content = text.encode("utf-8", errors="replace")  # a name may hold half of a character
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return len(content)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
