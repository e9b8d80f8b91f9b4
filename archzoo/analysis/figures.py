"""Pictures: matplotlib where there is one, for files and not for a screen."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install 'archzoo[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def drawn(draw: Callable[[Path], None], path: Path) -> bool:
    """Draw a picture that belongs to a table; without matplotlib say so, and omit it.

    The table is what was measured: a command that has written it has done its work.

    Args:
        draw: What draws it there.
        path: Where it goes.
    """
    try:
        pyplot()
    except ValueError as error:
        print(f"no {path.name}: {error}")
        return False
    draw(path)
    return True


def check_figure(path: str) -> Path:
    """Where a picture is written, once it is sure that it can be; nothing is written yet.

    Args:
        path: As it is given; without an ending it is a PNG.

    Raises:
        ValueError: matplotlib is not installed, it is a directory, or no picture has its ending.
        OSError: It cannot be written there.
    """
    pyplot()  # which says now where there is none
    from matplotlib.backend_bases import FigureCanvasBase

    found = Path(path)
    if found.is_dir():
        raise ValueError(f"{path} is a directory: name a picture's file, such as {path}/figure.png")
    found = found if found.suffix else found.with_suffix(".png")
    known = FigureCanvasBase.get_supported_filetypes()
    if found.suffix[1:].lower() not in known:
        raise ValueError(f"{path} is no picture's name: end it in .png, .svg or .pdf")
    there = next(folder for folder in found.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"the figure {path} cannot be written: {error.strerror}") from None
    return found


def legend(panel: Any, beside: bool = False) -> None:
    """A legend outside of a panel, where it covers nothing; none for lines without names.

    Args:
        panel: Of a figure with a constrained layout, which reserves space for it.
        beside: At its right, for many or long names. Else below it.
    """
    names = panel.get_legend_handles_labels()[1]
    if not names:
        return
    if beside:
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
        return
    columns = next((n for n in (4, 3, 2) if n <= len(names) and n * max(map(len, names)) < 40), 1)
    panel.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, frameon=False
    )


def save(figure: Any, path: Path) -> None:
    """Write a figure into a file, whose directories are made, and let it go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
