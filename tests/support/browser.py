"""A headless Chromium for the tests of pages; they are skipped where it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SERIOUS = ("serious", "critical")


@dataclass
class Seen:
    """A page as a browser shows it: what it complained of, what it asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def broken_pictures(self) -> int:
        """Pictures that are not shown."""
        script = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        return int(self.page.evaluate(script))

    def overflows(self) -> bool:
        """Whether the page as a whole must be scrolled sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))

    def faults(self) -> list[str]:
        """What axe-core calls a serious or critical fault of accessibility."""
        from axe_playwright_python.sync_playwright import Axe

        got = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in got if one["impact"] in SERIOUS]


@contextmanager
def opened(address: str | Path, width: int, scheme: str = "light") -> Iterator[Seen]:
    """An address (or an HTML file) in Chromium, `width` pixels wide."""
    from playwright.sync_api import sync_playwright

    url = address.resolve().as_uri() if isinstance(address, Path) else address
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        seen = Seen(page)
        page.on("console", lambda message: message.type == "error" and seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(url)
        yield seen
        browser.close()
