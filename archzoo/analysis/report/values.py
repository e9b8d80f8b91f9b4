"""How values are written in a report, and what columns and settings sort by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: A text that begins with a number: "1,024", "1.52 ± 0.03", "98.1 %".
NUMBER = re.compile(r"[-+−]?(\d[\d,]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?(?![\w.:/-])")
MISSING = "–"


def plain(value: Any) -> Any:
    """A value of Python's own types: numbers of numpy and torch are what their `item` gives."""
    if not isinstance(value, bool | int | float | str) and hasattr(value, "item"):
        return value.item()
    return value


def shown(value: Any) -> str:
    """A value as a table shows it."""
    value = plain(value)
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return str(value)


def number(value: float) -> str:
    """A float with four significant digits, or all of those before its point."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e12):
        return f"{value:.3e}"
    if value == int(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 4 if not value else 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, digits)}f}"


def sort_key(value: Any) -> float | None:
    """The number that a value sorts by; None where it is not one. NaN counts as missing."""
    value = plain(value)
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        found = NUMBER.match(value.strip())
        text = found[0].replace(",", "").replace("−", "-") if found else "nan"
        value = float(text)
    if isinstance(value, int | float) and not math.isnan(value):
        return float(value)
    return None


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `model.mixer` and a text, in their order."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from settings_rows(value, f"{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            yield from settings_rows({str(n): v for n, v in enumerate(value)}, f"{key}.")
        else:
            yield key, _setting(value)


def _setting(value: Any) -> str:
    """As YAML and the command line write it, but for the quotes."""
    value = plain(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_setting(part) for part in value)}]"
    if isinstance(value, Mapping):
        return "{}"
    return str(value)
