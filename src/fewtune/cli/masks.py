"""What `fewtune evaluate` and `fewtune predict` do for a task of segmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str], None]


def of_masks(delta: Path) -> bool:
    """Whether a task file is of a segmentation run."""
    from fewtune.methods import load_task_file

    return load_task_file(delta).metadata.get("task") == "segmentation"


def evaluate(
    data: str, *, predictions: Path | None, sheet: Path | None, sheet_images: int, as_json: bool, **options: Any
) -> None:
    """Print the measures with their intervals; write every image's measures and the sheet of pictures, where asked."""
    from fewtune.cli.output import print_json
    from fewtune.segmentation.evaluation import evaluate as run
    from fewtune.segmentation.evaluation import worst_first
    from fewtune.training.probabilities import write_predictions

    found = run(data, **options)
    if predictions is not None:
        write_predictions(predictions, found.rows)
    if sheet is not None:
        worst_first(found, sheet_images, sheet, options["accelerator"])
    report = found.report.to_json()
    if as_json:
        print_json(report)
        return
    _print_intervals({key: value for key, value in report.items() if key != "images"}, f"{report['images']} images")


def compare(files: tuple[Path, Path], as_json: bool) -> None:
    """Second minus first of two files of measures of the same images."""
    from dataclasses import asdict

    from fewtune.cli.output import print_json
    from fewtune.segmentation.evaluation import compare as run

    found = {name: asdict(interval) for name, interval in run(*files).items()}
    if as_json:
        print_json(found)
        return
    _print_intervals(found, f"{files[1]} minus {files[0]}")


def _print_intervals(found: dict[str, dict[str, float]], title: str) -> None:
    from fewtune.cli.output import percent, print_table
    from fewtune.segmentation.metrics import TITLES

    print_table([{title: TITLES[name], "in %, 95 % interval": percent(value)} for name, value in found.items()])


def predict(delta: Path, images: list[Path], out: Path | None, *, as_json: bool, **options: Any) -> None:
    """Write masks and overlays into the folder `out`, and say on stdout what was written."""
    import json

    import typer

    from fewtune.segmentation.prediction import predict as run
    from fewtune.training.files import csv_text

    if out is None or out.suffix.lower() in (".csv", ".json"):
        raise typer.BadParameter(f"a task of segmentation draws masks: --out must be a folder for them, got {out}")
    rows = run(delta, images, out, **options)
    print(json.dumps(rows, indent=2, ensure_ascii=False) if as_json else csv_text(rows).rstrip())


def export(delta: Path, out: Path, progress: Progress, as_json: bool) -> None:
    """Write the tuned segmenter's plain state, which the model of `fewtune.segmentation.models` loads strictly."""
    from fewtune.cli.output import print_json
    from fewtune.segmentation.task import load_mask_task
    from fewtune.training.checkpoints import save_state

    task = load_mask_task(delta, progress)
    save_state(task.plain_state_dict(), out)
    described = task.segmenter.describe()
    if as_json:
        print_json({"file": str(out), "backbone": described})
    else:
        print(f"{out}: {described['source']}, a mask an image, {task.segmenter.image_size} px")
