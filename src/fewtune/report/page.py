"""`write_report`: finished runs -> one HTML file that needs nothing beside it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fewtune.errors import FewtuneError, MissingExtra
from fewtune.files import write_bytes
from fewtune.kinds import DEFAULT
from fewtune.metrics import Interval, paired_bootstrap
from fewtune.progress import duration, size
from fewtune.report import charts, features, kinds, where
from fewtune.report.findings import advice, confusions, findings
from fewtune.report.pictures import Gallery, gallery
from fewtune.report.reading import Run, read_runs
from fewtune.training.run_folder import MAY_DIFFER

TABLE_CLASSES = 20
"""Up to so many classes a confusion matrix is a table; beyond, a heat map."""


def write_report(paths: Sequence[Path], out: Path, *, pictures: bool = True) -> Path:
    """Writes the report of one run, or the comparison of several, as one self-contained HTML file.

    Args:
        paths: folders of finished runs. Of several, all are compared with the first.
        out: the file; it is written whole or not at all.
        pictures: look for the test images of a single run and show the worst mistakes, and the features before and
            after where the model is at hand too; where it is not so, the report says so.

    Raises:
        ConfigError: a folder holds no finished run.
        MissingExtra: Jinja2 is not installed.
    """
    runs = read_runs(list(paths))
    page = one_run(runs[0], gallery(runs[0]) if pictures else None) if len(runs) == 1 else several_runs(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, page.encode())
    return out


def one_run(run: Run, shown: Gallery | None) -> str:
    """The page of one run."""
    test = run.metrics.get("test", {})
    classes = "confusion" in test and not run.draws_masks
    return _rendered(
        "one.html.j2",
        title=f"Report: {run.name}",
        run=run,
        result=result(run),
        findings=findings(run),
        asked=_asked(run),
        curves=_curves([run]),
        classes=_classes(test) if classes else [],
        confusion=test if classes and len(test["class_names"]) <= TABLE_CLASSES else None,
        heat_map=charts.heat_map(test["confusion"]) if classes and len(test["class_names"]) > TABLE_CLASSES else None,
        confusions=confusions(test) if classes else [],
        reliability=charts.reliability(*run.confidences()) if classes and run.rows else None,
        histogram=_histogram(run),
        measures=_measures(test) if run.draws_masks and not run.class_masks else {},
        any_number=kinds.any_number(test) if run.multi_label else {},
        class_masks=kinds.class_masks(test) if run.class_masks else {},
        gallery=shown,
        planes=features.planes(run) if shown is not None and classes else None,
        places=_places(run),
        cost=_cost(run),
        settings=_settings([run]),
        uses=_uses(run),
    )


def _histogram(run: Run) -> str | None:
    """Of a measure that lies anywhere in 0..1 for an image."""
    if run.multi_label:
        return charts.histogram(list(run.scores().values()), "F1")
    return charts.histogram(list(run.scores().values()), "Dice") if run.draws_masks else None


def several_runs(runs: Sequence[Run]) -> str:
    """The page that compares several runs with the first of them."""
    first = runs[0]
    pairs, refused = {}, []
    for other in runs[1:]:
        try:
            pairs[f"{other.name} minus {first.name}"] = difference(first, other)
        except FewtuneError as error:
            refused.append(str(error))
    return _rendered(
        "several.html.j2",
        title=f"Report: {', '.join(run.name for run in runs)}",
        runs=[{"run": run, "result": result(run), "cost": _cost(run)} for run in runs],
        differences=pairs,
        forest=charts.differences(pairs, f"difference of {first.measure} in points") if pairs else None,
        refused=refused,
        advice=advice(runs, pairs),
        curves=_curves(runs),
        classes=_class_by_class(runs),
        overlaps=_overlaps(runs),
        settings=_settings(runs),
    )


def result(run: Run) -> str:
    """The result in one sentence."""
    test = run.metrics.get("test")
    if not test:
        return "This run had no test images, so it has no result that could be trusted."
    value = Interval(**test[run.measure])
    images = f"{test['images']:,} test images"
    span = f"95 % interval {100 * value.low:.1f} to {100 * value.high:.1f}"
    if run.multi_label:
        whole = Interval(**test["map"])
        return (
            f"Over {images} the mean average precision is {100 * whole.value:.1f} % (95 % interval "
            f"{100 * whole.low:.1f} to {100 * whole.high:.1f}); an image's classes are told with an F1 of "
            f"{100 * value.value:.1f} % on average ({span})."
        )
    if run.class_masks:
        whole = Interval(**test["miou"])
        return (
            f"Over {images} the mean IoU of the classes is {100 * whole.value:.1f} % (95 % interval "
            f"{100 * whole.low:.1f} to {100 * whole.high:.1f}); {100 * test['accuracy']:.1f} % of the pixels are right."
        )
    if run.draws_masks:
        return f"Over {images} the mean Dice is {100 * value.value:.1f} % ({span})."
    return f"{100 * value.value:.1f} % of {images} are right ({span}).{_brought(run)}"


def _brought(run: Run) -> str:
    """What tuning brought since its start, where that is a result of its own."""
    start = run.metrics.get("start", {})
    if "gain" not in start:
        return ""
    accuracy, gain = start["accuracy"]["value"], start["gain"]
    span = f"95 % interval {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}"
    return (
        f" The {start['name']} has {100 * accuracy:.1f} %: tuning brought {100 * gain['value']:+.1f} points ({span})."
    )


def difference(first: Run, second: Run) -> Interval:
    """Mean of the second's score minus the first's on the same test images, with its paired interval.

    Raises:
        ConfigError: the runs were tested on other images, or by another measure.
    """
    from fewtune.errors import ConfigError

    a, b = first.scores(), second.scores()
    if not a or a.keys() != b.keys() or first.measure != second.measure:
        raise ConfigError(f"{second.name} and {first.name} were not tested on the same images: no difference is taken")
    return paired_bootstrap(np.array([a[name] for name in a]), np.array([b[name] for name in a]))


def _asked(run: Run) -> dict[str, str]:
    metrics, recipe = run.metrics, run.recipe
    rows = {
        "task": str(recipe.get("task", DEFAULT)),
        "data": str(metrics["data"]),
        "training images": f"{metrics['train_images']:,}",
        "model": str(metrics["model"]),
        "image size": f"{recipe['image_size']} px" if recipe.get("image_size") else "the model's own",
        "method": str(metrics["method"]),
        "trained": f"{metrics['trained']:,} parameters = {metrics['percent_of_backbone']:.2f} % of the backbone",
        "learning rate": f"{recipe['lr']:g}",
        "epochs": str(recipe["epochs"]),
        "seed": str(metrics["seed"]),
    }
    if not run.history:  # a method that is fitted in one go
        del rows["learning rate"], rows["epochs"]
    return rows


def _uses(run: Run) -> dict[str, str]:
    """What can be done with the task file -> the command."""
    file = shlex.quote(str(run.path / "delta.safetensors"))
    masks = " --out masks" if run.draws_masks else ""
    return {
        "predict other images": f"fewtune predict --delta {file}{masks} FOLDER",
        "test it on other labelled images": f"fewtune evaluate --delta {file} --data FOLDER",
        "run it without fewtune": f"fewtune export {file} --to onnx --out task.onnx",
        "publish it": f"fewtune push {shlex.quote(str(run.path))} ORG/NAME",
    }


def _cost(run: Run) -> dict[str, str]:
    metrics = run.metrics
    rows = {
        "time": duration(metrics["seconds"]),
        "peak memory": size(metrics["peak_memory_bytes"]),
        "task file": size(metrics["delta_bytes"]),
        "trained parameters": f"{metrics['trained']:,}",
    }
    if "test_seconds" in metrics and "test" in metrics:
        rows["test"] = f"{metrics['test']['images'] / metrics['test_seconds']:.0f} images a second"
    return rows


def _curves(runs: Sequence[Run]) -> list[str]:
    kept = {run.name: run.metrics.get("validation", {}).get("epoch") for run in runs}
    histories = {run.name: run.history for run in runs if run.history}
    if not histories:
        return []
    return [chart for chart in (charts.losses(histories), charts.validation(histories, kept)) if chart]


def _classes(test: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recall with Wilson's interval, precision and images of every class; the worst recall first."""
    from scipy.stats import binomtest

    rows = []
    for i, name in enumerate(test["class_names"]):
        images, right = test["support"][i], test["confusion"][i][i]
        span = binomtest(right, images).proportion_ci(method="wilson") if images else None
        precision = test["precision"][i] if any(row[i] for row in test["confusion"]) else None
        recall = right / images if images else None
        rows.append({"name": name, "images": images, "recall": recall, "span": span, "precision": precision})
    return sorted(rows, key=lambda row: 2.0 if row["recall"] is None else row["recall"])


def _measures(test: Mapping[str, Any]) -> dict[str, Interval]:
    from fewtune.segmentation.metrics import TITLES

    return {TITLES[name]: Interval(**value) for name, value in test.items() if name in TITLES}


def _places(run: Run) -> dict[str, Any] | None:
    selection = run.selection
    if selection is None or not selection.connections:
        return None
    return {
        "connections": selection.connections,
        "fraction": selection.fraction,
        "tables": {
            "By block, in the order of the model": where.by_block(selection),
            "By kind of layer": where.by_kind(selection),
        },
    }


def _class_by_class(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Recall of every class, run by run, where all runs know the same classes."""
    tests = [run.metrics.get("test", {}) for run in runs]
    names = tests[0].get("class_names")
    if not names or any(test.get("class_names") != names or "recall" not in test for test in tests):
        return []
    rows = [
        {"name": name, "images": tests[0]["support"][i], "recalls": [test["recall"][i] for test in tests]}
        for i, name in enumerate(names)
        if tests[0]["support"][i]
    ]
    return sorted(rows, key=lambda row: -(max(row["recalls"]) - min(row["recalls"])))


def _overlaps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = []
    for one, other in combinations([run for run in runs if run.selection is not None], 2):
        assert one.selection is not None
        assert other.selection is not None
        try:
            overlap = one.selection.overlap(other.selection)
        except FewtuneError:
            continue  # of different backbones
        row = {"first": one.name, "second": other.name, "shared": overlap.shared, "chance": overlap.chance_shared}
        rows.append(row)
    return rows


def _settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All settings; of several runs those that have to do with the result and differ."""
    keys = list(dict.fromkeys(key for run in runs for key in run.recipe))
    rows = [{"key": key, "values": [run.recipe.get(key) for run in runs]} for key in keys]
    if len(runs) == 1:
        return rows
    return [row for row in rows if row["key"] not in MAY_DIFFER and row["values"].count(row["values"][0]) < len(runs)]


def _shell(command: str) -> str:
    """The command as one would type it: the program by its name, also where it was run as `python -m fewtune`."""
    program, space, rest = command.partition(" ")
    name = Path(program).name
    return ("fewtune" if name == "__main__.py" else name) + space + rest


def _rendered(template: str, **context: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise MissingExtra("Jinja2", "train") from None
    environment = Environment(
        loader=PackageLoader("fewtune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["chart"] = Markup  # our own SVG; everything else is escaped
    environment.filters["shell"] = _shell
    environment.filters["percent"] = lambda value, digits=1: "-" if value is None else f"{100 * value:.{digits}f}"
    return environment.get_template(template).render(**context)
