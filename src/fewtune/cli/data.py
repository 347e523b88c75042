"""`fewtune data list | info | check | prepare`: the published data sets that recipes use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewtune.cli.options import AsJson

if TYPE_CHECKING:
    from fewtune.data.catalog import Declaration
    from fewtune.data.listing import Counts

app = typer.Typer(help="List, download and check data sets, and your own images.")

Key = Annotated[str, typer.Argument(help="The data set's key, as `fewtune data list` shows it.")]
Root = Annotated[Path, typer.Option("--data", help="The folder of the data set, or the folder that holds it.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List all data sets with their numbers of classes and images."""
    from fewtune.cli.output import print_json, print_table
    from fewtune.data.catalog import DECLARATIONS

    if as_json:
        print_json([_described(data_set) for data_set in DECLARATIONS.values()])
        return
    print_table(
        [
            {"key": d.key, "title": d.title, "group": d.group, "classes": f"{d.classes:,}"}
            | {split: "" if n is None else f"{n:,}" for split, n in d.counts._asdict().items()}
            for d in DECLARATIONS.values()
        ]
    )


@app.command("info")
def info(key: Key, as_json: AsJson = False) -> None:
    """Show what a data set is, its licence, and how to get it."""
    from fewtune.cli.output import print_json
    from fewtune.data.catalog import declaration

    described = _described(declaration(key))
    if as_json:
        print_json(described)
        return
    for name, value in described.items():
        print(f"{name:<14}{value}")


@app.command("shard")
def shard(
    data: Annotated[str, typer.Argument(help="Class folders, a CSV file or a data set's name.")],
    out: Annotated[Path, typer.Option(help="The folder for the shards.")],
    images: Annotated[int, typer.Option(min=1, help="How many images each shard holds.")] = 1000,
) -> None:
    """Write a data set as WebDataset shards. Training on them (`data=wds:FOLDER`) gives the same numbers."""
    from fewtune.data import load_data
    from fewtune.data.shards import write_shards

    if out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; choose another --out")
    written = write_shards(load_data(data, val_fraction=0), out, images)
    print(f"{out}: {len(written)} shards, {sum(path.stat().st_size for path in written):,} bytes")


@app.command("check")
def check(
    key: Annotated[str, typer.Argument(help="A data set's key, or a folder or CSV file of your own.")],
    root: Annotated[
        Path | None, typer.Option("--data", help="For a data set's key: the folder that holds its folder.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Open only this many images of each split.")] = None,
    duplicates: Annotated[bool, typer.Option(help="Look for test images that are also training images.")] = True,
    counts: Annotated[
        str | None, typer.Option(help="How many images to expect, if you have only a part: train=80,val=20,test=50.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="How many classes to expect, if you have only a part.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a folder of images, or a published data set against its description. The exit status is 2 on faults."""
    from fewtune.cli.output import print_json
    from fewtune.data.catalog import declaration
    from fewtune.data.check import check as check_published
    from fewtune.data.check import check_path

    title = key
    if root is None and Path(key).expanduser().exists():
        result = check_path(key, sample=sample, duplicates=duplicates)
    else:
        data_set = declaration(key)
        data_set = data_set.part(classes, _counts(counts, data_set.counts) if counts else None)
        if root is None:
            raise typer.BadParameter(f"--data ROOT says in which folder {data_set.folders[0]}/ lies")
        title = data_set.title
        result = check_published(data_set, root, sample=sample, duplicates=duplicates)
    if as_json:
        print_json(
            {"key": key, "folder": str(result.folder), "counts": result.counts, "classes": result.classes,
             "opened": result.opened, "faults": list(result.faults)}
        )  # fmt: skip
    else:
        for fault in result.faults:
            print(fault)
        sizes = ", ".join(f"{number:,} {split}" for split, number in result.counts.items())
        faults = f"{len(result.faults):,} fault{'s' if len(result.faults) > 1 else ''}"
        verdict = f"has {faults}" if result.faults else "is whole"
        print(f"{title} {verdict}: {sizes}; {result.classes:,} classes; {result.opened:,} images opened")
    if result.faults:
        raise typer.Exit(2)


@app.command("prepare")
def prepare(key: Key, root: Root) -> None:
    """Download or unpack a data set. If that is not possible, say what to fetch by hand and exit with status 2."""
    import logging

    from fewtune.data.catalog import declaration
    from fewtune.data.prepare import prepare as run
    from fewtune.data.prepare import what_to_fetch

    data_set = declaration(key)
    folder = run(data_set, root, logging.getLogger("fewtune").info)
    if folder is None:
        print(what_to_fetch(data_set, root))
        raise typer.Exit(2)
    print(f"{data_set.title} is in {folder}; `fewtune data check {key} --data {root}` says whether it is whole")


def _described(data_set: Declaration) -> dict[str, object]:
    numbers = ", ".join(f"{n:,} {split}" for split, n in data_set.counts._asdict().items() if n is not None)
    return {
        "key": data_set.key, "title": data_set.title, "group": data_set.group, "classes": data_set.classes,
        "images": numbers, "metric": data_set.metric, "normalisation": data_set.normalisation,
        "licence": data_set.licence, "source": data_set.source, "folder": " or ".join(data_set.folders),
        "layout": data_set.layout, "fetch": data_set.fetch, "prepare": data_set.download or "by hand",
        **({"drawn": getattr(data_set.draw, "status", data_set.draw)} if data_set.draw else {}),
    }  # fmt: skip


def _counts(text: str, published: Counts) -> Counts:
    """ "train=80,test=50" -> the published counts with these in their place."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return published._replace(**{name.strip(): int(number) for name, number in pairs})
    except (ValueError, TypeError):
        raise typer.BadParameter(f"--counts must read train=80,val=20,test=50, got {text}") from None
