"""What README links to is there, and the page of settings says what the settings say; test_pages runs the commands."""

from __future__ import annotations

import re
import subprocess
import sys

from documents import ROOT


def test_links() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_page_of_settings_is_of_today() -> None:
    made = subprocess.run(
        [sys.executable, "-c", "import runpy; print(runpy.run_path('docs/make_recipe_page.py')['page'](), end='')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
