"""`fewtune settings`: every setting of a run with kind, default and meaning; `fewtune fit --help` ends with them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fewtune.cli.options import AsJson


def settings(
    words: Annotated[
        list[str] | None, typer.Argument(help="Show only settings whose name or meaning contains one of these words.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the settings of `fewtune fit` and of recipes, with their defaults and meanings."""
    from fewtune.cli.output import print_json
    from fewtune.errors import ConfigError
    from fewtune.recipes.settings import settings as all_settings

    wanted = {
        title: [s for s in group if not words or any(word.lower() in f"{s.key} {s.meaning}".lower() for word in words)]
        for title, group in all_settings().items()
    }
    if not any(wanted.values()):
        raise ConfigError(f"no setting has {' or '.join(words or ())} in its name or meaning")
    if as_json:
        print_json([{"group": title, **s._asdict()} for title, group in wanted.items() for s in group])
        return
    for title, group in wanted.items():
        if group:
            _print(title, group)


def _print(title: str, group: list[Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fewtune.cli.output import console

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("setting", "kind", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "setting")
    for setting in group:
        table.add_row(*map(Text, (setting.key, setting.kind, setting.default or "required", setting.meaning)))
    console(120).print(table)


class WithSettings(TyperCommand):
    """A command whose help ends with the list of all settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help, then the settings."""
        super().format_help(ctx, formatter)
        print("Settings, as key=value, in YAML files and in recipes:\n")
        settings(None, as_json=False)
