"""A browser for the tests: Chromium by Playwright, every page watched for errors.

Where there is no Chromium these tests are skipped; with ARCHZOO_BROWSER=required, as in CI, they
fail. ARCHZOO_CHROMIUM names one that is not on the PATH, ARCHZOO_SCREENSHOTS a directory that keeps
what was photographed.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As in tests/conftest.py, before torch is imported.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOCAL = re.compile(r"(file|data|blob|about):|(http|ws)://(127\.0\.0\.1|localhost)[:/]")


def chromium() -> str | None:
    """The path of a Chromium."""
    named = os.environ.get("ARCHZOO_CHROMIUM")
    return named or next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    path = chromium()
    if path is None:
        why = "there is no Chromium: `make browser` installs Debian's, ARCHZOO_CHROMIUM names one"
        if os.environ.get("ARCHZOO_BROWSER") == "required":
            pytest.fail(why)
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root may not use the sandbox; the pages are our own.
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


class Visits:
    """Pages that a test opens, and what they said and loaded.

    Attributes:
        errors: Errors in the console of any page, exceptions included. Empty at the test's end.
        loaded: The addresses of all that any page loaded, none of them on another machine.
    """

    def __init__(self, browser: Any, directory: Path) -> None:
        self.browser, self.directory = browser, directory
        self.errors: list[str] = []
        self.loaded: list[str] = []
        self.contexts: list[Any] = []

    def __call__(
        self,
        address: str | Path,
        *,
        offline: bool = False,
        dark: bool = False,
        width: int = 1100,
        height: int = 800,
    ) -> Any:
        """Open a file or an address in a window of its own.

        Args:
            address: A path, or http://127.0.0.1:PORT.
            offline: Without a network.
            dark: For someone who prefers dark pages.
            width: Of the window, in pixels; below 500 it is a phone's, with touch.
            height: Of the window.

        Returns:
            Playwright's page.
        """
        phone = width < 500
        context = self.browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            offline=offline,
            has_touch=phone,
            is_mobile=phone,
        )
        context.set_default_timeout(60_000)  # a busy machine
        self.contexts.append(context)
        page = context.new_page()
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        page.on("request", lambda request: self.loaded.append(request.url))
        page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return page

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def photograph(self, page: Any, name: str) -> Path:
        """A picture of the whole page; where ARCHZOO_SCREENSHOTS names a directory, kept there."""
        path = Path(os.environ.get("ARCHZOO_SCREENSHOTS") or self.directory) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page=True)
        return path


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Visits]:
    """Opens pages; the test fails if one has an error in its console or loads from elsewhere."""
    visits = Visits(browser, tmp_path)
    yield visits
    for context in visits.contexts:
        context.close()
    assert visits.errors == []
    assert [address[:200] for address in visits.loaded if not LOCAL.match(address)] == []
