"""The configurations and the small corpora that come with the package, found from any directory.

In a wheel they lie in `archzoo/shipped/`; in a checkout beside the package, where they are edited.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from archzoo.names import nearest

PACKAGE = Path(__file__).parent


def root() -> Path:
    """The directory that holds `configs/` and `data/`."""
    inside = PACKAGE / "shipped"
    return inside if inside.is_dir() else PACKAGE.parent


def configurations() -> dict[str, Path]:
    """Those that come with the package, by the names that `archzoo fit NAME` takes."""
    found = sorted((root() / "configs").glob("*.yaml"))
    for room in ("claims", "preferences"):
        found += sorted((root() / "configs" / room).rglob("*.yaml"))
    place = root() / "configs"
    return {path.relative_to(place).with_suffix("").as_posix(): path for path in found}


def about(path: Path) -> str:
    """What a configuration is for: the first sentence of the comment that it begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("# "), lines)
    text = " ".join(line.removeprefix("# ").strip() for line in comment)
    sentence = re.split(r"(?<=[.?]) ", text)[0].removesuffix(":")
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."


def configuration(name: str) -> Path:
    """A configuration: the file of that name where there is one, else one that is shipped.

    Args:
        name: A path, or a shipped one's name with or without `configs/` and `.yaml`.

    Raises:
        FileNotFoundError: There is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = configurations()
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in known:
        return known[short]
    if Path(name).suffix:
        return Path(name)  # whoever reads it says that it is not there
    plain = [entry for entry in known if "/" not in entry]
    raise FileNotFoundError(
        f"there is no file {name}, and archzoo has no configuration of that name; "
        f"{nearest(short, plain)}; archzoo list --configurations shows all"
    )


def text(path: str) -> str:
    """A text's path, or where the same path lies in the package if it is not there.

    Args:
        path: A file, a folder or a pattern. Only `data/...` may be the package's.
    """
    given = Path(path)
    if given.is_absolute() or given.parts[:1] != ("data",) or ".." in given.parts:
        return path
    if given.exists() or any(Path().glob(path)):
        return path
    place = root()
    return str(place / given) if any(place.glob(path)) else path
