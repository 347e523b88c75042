"""`fewtune evaluate`: a task file on labelled images or images with masks, or two files of predictions compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    delta: Annotated[Path | None, typer.Option(help="The task file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="In place of a task file: a pretrained segmenter as it is (zero-shot).")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Of --model, in pixels; left out, its own.")] = None,
    arch: Annotated[str | None, typer.Option(help="Of a --model that is a file, as in `fewtune fit`.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled images, as in `fewtune fit`.")] = None,
    split: Annotated[str, typer.Option(help="test, val, train or all")] = "test",
    predictions: Annotated[
        Path | None, typer.Option(help="Write every image's probabilities (or measures) to this CSV file.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Of masks: write image, truth, prediction and errors, worst first (PNG).")
    ] = None,
    sheet_images: Annotated[int, typer.Option(min=1, help="Rows of that sheet.")] = 12,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files of predictions on the same images.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits, where the data is split here.")] = 0,
    test_fraction: Annotated[float | None, typer.Option(help="As when the task was trained.")] = None,
    limit_test: Annotated[int | None, typer.Option(help="At most so many test images.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Left out: 32, and 1 for masks.")] = None,
    workers: int = 0,
    accelerator: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
) -> None:
    """Accuracy with a bootstrap interval, per-class figures, confusion matrix and calibration; of a segmentation task,
    six measures of masks with intervals."""
    import logging

    from fewtune.cli import masks

    if compare is not None:
        _compare(compare, as_json)
        return
    if (delta is None and model is None) or data is None:
        raise typer.BadParameter("give --delta and --data, or --compare and two files of predictions")
    common: dict[str, Any] = {
        "split": split, "batch_size": batch_size or 32, "workers": workers, "accelerator": accelerator,
        "progress": logging.getLogger("fewtune").info, "seed": seed, "test_fraction": test_fraction,
        "limit_test": limit_test,
    }  # fmt: skip
    if delta is None or model is not None or masks.of_masks(delta):
        written: dict[str, Any] = {
            "predictions": predictions,
            "sheet": sheet,
            "sheet_images": sheet_images,
            "as_json": as_json,
        }
        source: dict[str, Any] = {"delta": delta, "model": model, "image_size": image_size, "architecture": arch}
        masks.evaluate(data, **written, **source, **{**common, "batch_size": batch_size or 1})
        return
    if sheet is not None:
        raise typer.BadParameter("--sheet draws masks, and this task file is of a classification run")
    from fewtune.cli.output import percent, print_json, print_table
    from fewtune.training import evaluate as run
    from fewtune.training.probabilities import write_predictions

    found = run(delta, data, **common)
    if predictions is not None:
        write_predictions(predictions, found.rows)
    report = found.report.to_json()
    if as_json:
        print_json(report)
        return
    print(f"images                        {report['images']}")
    print(f"accuracy, 95 % interval       {percent(report['accuracy'])} %")
    print(f"balanced accuracy             {100 * report['balanced_accuracy']:.1f} %")
    print(f"expected calibration error    {100 * report['calibration_error']:.1f} %")
    columns = zip(
        report["class_names"],
        report["support"],
        report["precision"],
        report["recall"],
        report["confusion"],
        strict=True,
    )
    print_table(
        [
            {"class": name, "images": str(n), "precision": f"{p:.3f}", "recall": f"{r:.3f}",
             "predicted as each class": " ".join(map(str, row))}
            for name, n, p, r, row in columns
        ]
    )  # fmt: skip


def _compare(files: tuple[Path, Path], as_json: bool) -> None:
    from dataclasses import asdict

    from fewtune.cli import masks
    from fewtune.cli.output import percent, print_json
    from fewtune.metrics import paired_bootstrap
    from fewtune.segmentation.evaluation import is_measures
    from fewtune.training.probabilities import paired_hits

    if is_measures(files[0]):
        masks.compare(files, as_json)
        return
    first, second = paired_hits(*files)
    difference = asdict(paired_bootstrap(first, second))
    if as_json:
        print_json({"images": len(first), "first": first.mean(), "second": second.mean(), "difference": difference})
        return
    print(f"{files[0]}    {100 * first.mean():.1f} %")
    print(f"{files[1]}    {100 * second.mean():.1f} %")
    print(f"second minus first, 95 % interval (paired bootstrap)    {percent(difference)} points")
