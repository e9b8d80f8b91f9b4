"""What a wheel holds beside the package: the configurations and the small corpora.

An editable installation has the checkout's own (see archzoo/shipped.py).
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = ("configs/**/*.yaml", "data/*.txt", "data/README.md")


class CustomBuildHook(BuildHookInterface):
    """Adds them to what is installed, and to no editable one."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        for path in (path for pattern in FILES for path in root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            build_data["force_include"][str(path)] = f"archzoo/shipped/{name}"
