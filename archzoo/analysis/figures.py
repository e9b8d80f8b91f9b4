"""Pictures: matplotlib where there is one, for files and not for a screen."""

from __future__ import annotations

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
