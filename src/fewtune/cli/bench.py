"""`fewtune bench run | status | table | cost`: many methods under one protocol, and tables beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewtune.cli.options import Accelerator, AsJson

app = typer.Typer(
    help="Compare methods: train a grid of methods, tasks and seeds under one protocol and print tables of the results."
)

GridFile = Annotated[Path, typer.Argument(help="The grid, a YAML file.")]
Settings = Annotated[list[str] | None, typer.Argument(help="key=value, such as workers=2 or tasks.NAME.data=FOLDER")]
Out = Annotated[
    Path | None,
    typer.Option(help="The grid's folder, also s3://… or gs://… Default: runs/ and the name of the file."),
]


def _here(folder: Path, *more: str) -> Path:
    """A grid's folder as a local one: of an object store a copy of what tells of its runs, and of files `more`."""
    from fewtune.stores import is_address
    from fewtune.training.mirror import SMALL, Mirror

    if not is_address(folder):
        return folder
    mirror = Mirror.of(folder)
    mirror.pull((*SMALL, *more))
    return mirror.local


@app.command("run")
def run(
    grid: GridFile,
    settings: Settings = None,
    out: Out = None,
    on: Annotated[
        str, typer.Option(help="Where to run: local, ray, or the address of a Ray cluster, ray://HOST:PORT")
    ] = "local",
    as_json: AsJson = False,
) -> None:
    """Do all runs of a grid that are not done yet. The exit status is 1 if some failed."""
    from fewtune.bench.foreman import run_grid
    from fewtune.bench.grid import read_grid

    folder = out or Path("runs") / grid.stem
    progress = run_grid(read_grid(grid, settings or []), folder, on)
    _show(progress, folder, as_json)
    if progress.failed:
        raise typer.Exit(1)


@app.command("status")
def status(grid: GridFile, settings: Settings = None, out: Out = None, as_json: AsJson = False) -> None:
    """Show which runs are done, which failed and which are left. Nothing is run."""
    from fewtune.bench.foreman import status as look
    from fewtune.bench.grid import read_grid

    folder = out or Path("runs") / grid.stem
    _show(look(read_grid(grid, settings or []), _here(folder)), folder, as_json)


@app.command("record")
def record(
    grid: GridFile,
    settings: Settings = None,
    out: Out = None,
    to: Annotated[
        Path | None, typer.Option(help="The file to write. Default: the one that the grid names (its key `record`).")
    ] = None,
) -> None:
    """Write all finished runs into one small file. Tables can be made from it without the runs' folders."""
    from fewtune.bench.grid import read_grid
    from fewtune.bench.record import write_records
    from fewtune.bench.results import record_all

    read, folder = read_grid(grid, settings or []), _here(out or Path("runs") / grid.stem)
    file = to or (None if read.record is None else Path(read.record))
    if file is None:
        raise typer.BadParameter("the grid names no record; give --to FILE")
    records = record_all(read, folder)
    write_records(file, records)
    print(f"{file}: {len(records)} runs")


@app.command("table")
def table(
    grid: Annotated[
        Path | None, typer.Argument(help="The grid, a YAML file. Without it only the paper's tables are printed.")
    ] = None,
    settings: Settings = None,
    out: Out = None,
    paper: Annotated[list[int] | None, typer.Option(help="Print this table of the paper too, by its number.")] = None,
    form: Annotated[str, typer.Option("--format", help="Format of what is printed: md, csv or html")] = "md",
    to: Annotated[Path | None, typer.Option(help="Write to this file (.md, .csv or .html) and print nothing.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print tables of a grid's results, and the paper's tables with our results beside the printed values."""
    from fewtune.bench.grid import read_grid
    from fewtune.bench.paper_tables import numbers
    from fewtune.bench.report import grid_tables, paper_tables, printed
    from fewtune.bench.results import to_json
    from fewtune.bench.tables import csv_text, html_page, markdown
    from fewtune.cli.output import print_json

    writers = {"md": markdown, "csv": csv_text, "html": html_page}
    kind = form if to is None else to.suffix.removeprefix(".")
    if kind not in writers:
        raise typer.BadParameter(f"a table is written as md, csv or html, got '{kind}'")
    if grid is None:
        tables = [printed(number) for number in (paper or numbers())]
    else:
        read, folder = read_grid(grid, settings or []), _here(out or Path("runs") / grid.stem)
        if as_json:
            print_json(to_json(read, folder))
            return
        tables = [*grid_tables(read, folder), *paper_tables(read, folder), *(printed(n) for n in paper or [])]
    text = writers[kind](tables)
    if to is None:
        print(text, end="")
    else:
        to.write_text(text, encoding="utf-8")


@app.command("selections")
def selections(
    grid: GridFile,
    settings: Settings = None,
    out: Out = None,
    ranks: Annotated[
        bool, typer.Option(help="Also compare the ranks of scores with full fine-tuning (takes minutes).")
    ] = False,
    to: Annotated[Path | None, typer.Option(help="Write to this Markdown file and print nothing.")] = None,
) -> None:
    """Show how far the selections of a grid's runs overlap."""
    from fewtune.bench.grid import read_grid
    from fewtune.bench.selections import agreement, overlaps
    from fewtune.bench.tables import markdown

    more = ("selection.safetensors", *["delta.safetensors"] * ranks)
    read, folder = read_grid(grid, settings or []), _here(out or Path("runs") / grid.stem, *more)
    text = markdown([overlaps(read, folder), *([agreement(read, folder)] if ranks else [])])
    if to is None:
        print(text, end="")
    else:
        to.write_text(text, encoding="utf-8")


@app.command("cost")
def cost(
    methods: Annotated[
        list[str] | None, typer.Argument(help="The methods to measure. Default: all of the paper's cost figure.")
    ] = None,
    model: Annotated[str, typer.Option(help="The backbone, as in `fewtune fit`.")] = "timm:vit_base_patch16_224",
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 32,
    image_size: Annotated[int | None, typer.Option(help="Image size in pixels. Default: the model's own.")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Load real weights. Times do not need them.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="How often each method is measured; times are medians.")] = 10,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
    accelerator: Accelerator = "auto",
    library: Annotated[str, typer.Option(help="What multiplies float32 matrices on a CPU: torch or onednn.")] = "torch",
    as_json: AsJson = False,
) -> None:
    """Measure time and memory of training and inference, all methods side by side (the paper's cost figure)."""
    from fewtune.bench.cost import PAPER, Setting, measure
    from fewtune.cli.output import print_json, print_table
    from fewtune.progress import size

    machine: dict[str, Any] = {"accelerator": accelerator, "threads": threads, "library": library}
    setting = Setting(model, batch, image_size, pretrained=pretrained, **machine)
    figures = measure(setting, methods or list(PAPER), rounds)
    if as_json:
        print_json({"model": model, "batch": batch, "rounds": rounds, **machine, "figures": figures})
        return
    rows = [
        {
            "method": name,
            "trained": f"{row['trained']:,}",
            "%": f"{row['percent_of_backbone']:.2f}",
            "train, ms": f"{row['train_ms']:.0f}",
            "train, memory": size(row["train_peak_bytes"]),
            "inference, ms": f"{row['inference_ms']:.0f}",
            "inference, memory": size(row["inference_peak_bytes"]),
            "selection, s": f"{row['selection_seconds']:.2f}",
        }
        for name, row in figures.items()
    ]
    print_table(rows, f"{model}, batch {batch}; memory is what a step needs beyond the model and what it holds already")


def _show(progress: Any, folder: Path, as_json: bool) -> None:
    from fewtune.cli.output import print_json
    from fewtune.stores import address, is_address

    where = address(folder) if is_address(folder) else str(folder)
    if as_json:
        print_json({"folder": where, "done": progress.done, "waiting": progress.waiting, "failed": progress.failed})
        return
    counts = f"{len(progress.done)} done, {len(progress.failed)} failed, {len(progress.waiting)} left"
    print(f"{where}: {len(progress.runs)} runs, {counts}")
    for name, reason in progress.failed.items():
        print(f"failed: {name}: {reason}")
