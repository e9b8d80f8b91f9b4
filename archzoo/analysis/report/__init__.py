"""A report: one HTML file with tables, interactive plots and every setting of what was measured.

It is opened from the disk, without a network, and can be sent to someone as it is: the scripts are
in it, and its own security policy lets it load nothing.

    from archzoo.analysis.report import Chart, Series, Table, write_report

    write_report(
        "report.html",
        "Retention and attention",
        command="archzoo compare ...",
        settings={"seeds": [0, 1, 2]},
        sections=[
            "What was asked, in a sentence or two.",
            Table("Results", ["mixer", "loss"], [["Retention", 2.1], ["Attention", 2.2]]),
            Chart("Loss", "step", "loss", [Series("Retention", [1, 10], [4.1, 2.1])], log_x=True),
        ],
    )
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from archzoo.analysis.report.files import check_report_path, write_whole
from archzoo.analysis.report.model import Cell, Chart, Series, Table
from archzoo.analysis.report.page import context, render

__all__ = ["Cell", "Chart", "Series", "Table", "check_report_path", "write_report"]


def write_report(
    path: str | Path,
    title: str,
    *,
    command: str,
    settings: Mapping[str, Any],
    sections: Sequence[Table | Chart | str],
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a report, whole or not at all, and print where it is and how large.

    Args:
        path: The HTML file; one that is there is replaced. Directories are made.
        title: Of the page.
        command: That made what is shown, as it is typed.
        settings: All that the results depend on. May be nested.
        sections: In the order in which they are read. A text is a paragraph.
        facts: What computed: the machine, the versions, the commit. None: this process's.

    Returns:
        The file.

    Raises:
        ValueError: A chart or a table does not fit together, or the extra `report` is missing.
        OSError: The file could not be written; the one there was is as before.
    """
    path = check_report_path(path)
    text = render(
        context(title, command=command, settings=settings, sections=sections, facts=facts)
    )
    size = write_whole(path, text)
    print(f"wrote {path} ({size / 1e6:.1f} MB; it opens without a network)")
    return path
