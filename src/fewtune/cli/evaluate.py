"""`fewtune evaluate`: a task file on labelled images or images with masks, or two files of predictions compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewtune.cli.options import Accelerator, AsJson, BatchSize, TaskFileOption, Workers


def evaluate(
    delta: TaskFileOption = None,
    model: Annotated[
        str | None, typer.Option(help="A pretrained segmenter to score untuned (zero-shot), in place of a task file.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Image size for --model in pixels. Default: the model's own.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Architecture of a --model that is a file, as in `fewtune fit`.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Labelled images, as in `fewtune fit`.")] = None,
    split: Annotated[str, typer.Option(help="Which images to score: test, val, train or all")] = "test",
    predictions: Annotated[
        Path | None, typer.Option(help="Write every image's probabilities (or measures) to this CSV file.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="For masks: write image, truth, prediction and errors to this PNG, worst first.")
    ] = None,
    sheet_images: Annotated[int, typer.Option(min=1, help="How many images the sheet shows.")] = 12,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two files of predictions on the same images.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the splits. Default: as the task file records.")] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Part that is set aside for the test. Default: as the task file records.")
    ] = None,
    include_training: Annotated[
        bool, typer.Option("--include-training", help="Score images that were trained on too, and report them apart.")
    ] = False,
    limit_test: Annotated[int | None, typer.Option(help="Score at most this many test images.")] = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    accelerator: Accelerator = "auto",
    as_json: AsJson = False,
) -> None:
    """Score a task on labelled images: accuracy with its interval, figures of each class, and calibration.

    For a segmentation task it computes six measures of masks, with their intervals.
    """
    import logging

    from fewtune import tasks
    from fewtune.cli.output import print_json, print_table
    from fewtune.files import write_csv
    from fewtune.hub import resolve
    from fewtune.training.task import Drawn

    if compare is not None:
        comparison = tasks.compare(*compare)
        print_json(comparison.values) if as_json else print_table(comparison.rows)
        return
    if (delta is None and model is None) or data is None:
        raise typer.BadParameter("give --delta and --data, or --compare and two files of predictions")
    options: dict[str, Any] = {
        "split": split, "batch_size": batch_size, "accelerator": accelerator,
        "progress": logging.getLogger("fewtune").info, "seed": seed, "test_fraction": test_fraction,
        "limit_test": limit_test, "include_training": include_training,
    }  # fmt: skip
    if workers is not None:
        options["workers"] = workers
    origin = None
    if delta is not None:
        found_file = resolve(delta)
        delta, origin = found_file.path, found_file.origin
    if model is None and delta is not None:
        task = tasks.task_of(delta)
    else:
        task = next(task for task in tasks.TASKS.values() if task.untouched)
        options |= {"model": model, "image_size": image_size, "architecture": arch}
    if sheet is not None and not task.draws:
        raise typer.BadParameter(f"--sheet draws masks, and this task file is of a {task.name} run")
    evaluation = task.evaluate(data, delta=delta, **options)
    if predictions is not None:
        write_csv(predictions, evaluation.rows)
    if sheet is not None:
        assert isinstance(evaluation, Drawn)
        evaluation.draw(sheet_images, sheet, accelerator)
    if as_json:
        print_json(evaluation.to_json() | ({} if origin is None else {"task_file": str(origin)}))
        return
    if origin is not None:
        print(f"task file: {origin}")
    for table in evaluation.tables():
        print_table(table)
