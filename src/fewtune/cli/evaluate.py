"""`fewtune evaluate`: a task file on labelled images, or two files of predictions against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    delta: Annotated[Path | None, typer.Option(help="The task file.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled images, as in `fewtune fit`.")] = None,
    split: Annotated[str, typer.Option(help="test, val, train or all")] = "test",
    predictions: Annotated[
        Path | None, typer.Option(help="Write every image's probabilities to this CSV file.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files of predictions on the same images.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits, where the data is split here.")] = 0,
    test_fraction: Annotated[float | None, typer.Option(help="As when the task was trained.")] = None,
    limit_test: Annotated[int | None, typer.Option(help="At most so many test images.")] = None,
    batch_size: int = 32,
    workers: int = 0,
    accelerator: str = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
) -> None:
    """Accuracy with a bootstrap interval, per-class figures, confusion matrix and calibration."""
    if compare is not None:
        _compare(compare, as_json)
        return
    if delta is None or data is None:
        raise typer.BadParameter("give --delta and --data, or --compare and two files of predictions")
    import logging

    from fewtune.cli.output import percent, print_json, print_table
    from fewtune.training import evaluate as run
    from fewtune.training.probabilities import write_predictions

    found = run(
        delta,
        data,
        split=split,  # type: ignore[arg-type]
        batch_size=batch_size,
        workers=workers,
        accelerator=accelerator,
        progress=logging.getLogger("fewtune").info,
        seed=seed,
        test_fraction=test_fraction,
        limit_test=limit_test,
    )
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

    from fewtune.cli.output import percent, print_json
    from fewtune.metrics import paired_bootstrap
    from fewtune.training.probabilities import paired_hits

    first, second = paired_hits(*files)
    difference = asdict(paired_bootstrap(first, second))
    if as_json:
        print_json({"images": len(first), "first": first.mean(), "second": second.mean(), "difference": difference})
        return
    print(f"{files[0]}    {100 * first.mean():.1f} %")
    print(f"{files[1]}    {100 * second.mean():.1f} %")
    print(f"second minus first, 95 % interval (paired bootstrap)    {percent(difference)} points")
