"""The Typer application with all commands."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Annotated

import typer

from fewtune.allocator import keep_freed_memory
from fewtune.cli import (
    bench,
    data,
    delta,
    demo,
    evaluate,
    export,
    fit,
    fit_many,
    ood,
    predict,
    push,
    recipes,
    report,
    select,
    serve,
    settings,
)
from fewtune.progress import quiet_libraries

app = typer.Typer(
    name="fewtune",
    help="Fine-tune pretrained vision models by changing only a few of their weights.",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fine-tune pretrained vision models by changing only a few of their weights."""
    if version:
        print(f"fewtune {installed('fewtune')}")
        raise typer.Exit
    keep_freed_memory()
    quiet_libraries()
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("fit", cls=settings.WithSettings)(fit.fit)
app.command("fit-many")(fit_many.fit_many)
app.command("settings")(settings.settings)
app.command("select")(select.select)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("serve")(serve.serve)
app.command("ood")(ood.ood)
app.command("report")(report.report)
app.add_typer(delta.app, name="delta")
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.add_typer(bench.app, name="bench")
app.command("demo")(demo.demo)
