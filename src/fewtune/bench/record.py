"""Finished runs, small enough for version control: one JSON line each, from which every table can be made again."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fewtune.bench.plan import Kind, Run
from fewtune.config import Recipe
from fewtune.errors import DataError
from fewtune.files import write_text
from fewtune.tasks import TASKS, Task
from fewtune.training.run_folder import LIBRARIES, MAY_DIFFER, RunFolder

SMALLEST = 5e-7
"""Probabilities are written with six digits; a smaller one counts as this in the test loss."""

KEPT = (
    "trained", "percent_of_backbone", "train_images", "delta_bytes", "peak_memory_bytes", "test_seconds", "ood",
)  # fmt: skip
"""What is kept of a run's metrics beside those of the test images."""


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        recipe: `digest` of its resolved recipe.
        seconds: of the whole run.
        candidates: of a choosing run: what was judged on validation images, {"setting", "accuracy", "loss"} each.
        metrics: of a reported run: part of its metrics.json, with the mean test loss (nats), the median seconds of a
            training step and the seconds of the pass that scores connections, where there are such.
        images: digest of the names of the test images in their sorted order.
        by_image: whether each is right, as bits in hexadecimal digits, or each one's Dice; None where the measure is no
            mean over images.
    """

    name: str
    kind: Kind
    recipe: str
    seconds: float
    versions: dict[str, str]
    processor: str
    candidates: list[dict[str, Any]] | None = None
    metrics: dict[str, Any] | None = None
    images: str | None = None
    by_image: str | list[float] | None = None

    def values(self) -> np.ndarray:
        """1 or 0 for right or wrong, or Dice, of every test image [N], in the sorted order of their names."""
        if not isinstance(self.by_image, str):
            return np.asarray(self.by_image or [])
        assert self.metrics is not None
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.by_image), dtype=np.uint8))
        return bits[: self.metrics["test"]["images"]].astype(np.float64)


def digest(recipe: Recipe) -> str:
    """Sixteen hexadecimal digits that tell recipes of a grid apart.

    Only what was said counts, and only where it is not the default, so that settings which come to be later change
    nothing; of the data's place the last part counts, since the same images lie elsewhere on another machine.
    """
    said = {
        key: value
        for key, value in recipe.model_dump(mode="json", include=recipe.model_fields_set - MAY_DIFFER).items()
        if getattr(recipe, key) != Recipe.model_fields[key].default
    }
    said["data"] = Path(recipe.data.partition("?")[0]).name
    return _sha(json.dumps(said, sort_keys=True))


def record_of(run: Run, recipe: Recipe, out: Path) -> Record:
    """The record of a run of `recipe` that is finished below `out`."""
    folder = RunFolder(out / run.name)
    versions, result = _read(folder.versions), _read(run.result(out))
    candidates = metrics = images = by_image = None
    if run.kind == "choose":
        candidates = result["candidates"]
    else:
        metrics = _metrics(folder, recipe, result)
    if metrics is not None and "test" in result:
        test = {key: _plain(value) for key, value in result["test"].items() if not isinstance(value, list | tuple)}
        images, values, loss = _by_image(folder.predictions, TASKS[recipe.task])
        metrics["test"] = test if loss is None else {**test, "loss": loss}
        if values is not None:
            by_image = [round(value, 6) for value in values.tolist()] if loss is None else _hex(values)
    return Record(
        name=run.name, kind=run.kind, recipe=digest(recipe), seconds=round(result["seconds"], 1),
        versions={key: versions[key] for key in ("python", *LIBRARIES) if key in versions}, processor=processor(),
        candidates=candidates, metrics=metrics, images=images, by_image=by_image,
    )  # fmt: skip


def _metrics(folder: RunFolder, recipe: Recipe, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's metrics beside those of the test images, and its times."""
    steps, importance = _step_seconds(folder, result, recipe), folder.path / "importance.json"
    metrics = {key: result[key] for key in KEPT if key in result}
    metrics |= {} if steps is None else {"step_seconds": steps}
    return metrics | ({"selection_seconds": _read(importance)["seconds"]} if importance.exists() else {})


def _hex(hits: np.ndarray) -> str:
    return np.packbits(hits.astype(np.uint8)).tobytes().hex()


def read_records(file: Path) -> dict[str, Record]:
    """Name -> record; empty where there is no file yet.

    Raises:
        DataError: a line is none of ours.
    """
    records = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), 1):
        try:
            record = Record(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(f"{file}, line {number}: expected the record of a run, one JSON object; {error}") from None
        records[record.name] = record
    return records


def write_records(file: Path, records: Iterable[Record]) -> None:
    """One line a record, keys that say nothing left out."""
    lines = [{key: value for key, value in asdict(record).items() if value is not None} for record in records]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def processor() -> str:
    """Name of this machine's processor, with what tells generations apart that go by one name (AMD EPYC for one)."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    numbers = ", ".join(f"{key} {told[key]}" for key in ("cpu family", "model") if key in told)
    return f"{told['model name']} ({numbers})" if numbers else told["model name"]


def _by_image(file: Path, task: Task) -> tuple[str, np.ndarray | None, float | None]:
    """Digest of the images' names, each one's value in sorted order where the metric is a mean of such, and the mean
    loss (of one class an image alone)."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = sorted(csv.DictReader(opened), key=lambda row: row["file"])
    names = _sha("\n".join(row["file"] for row in rows))
    values = None if task.by_image is None else np.array([task.by_image(row) for row in rows])
    if values is None or not {"label", "prediction"} <= rows[0].keys():
        return names, values, None
    losses = [-math.log(max(SMALLEST, float(row[f"p({row['label']})"]))) for row in rows]
    return names, values, statistics.fmean(losses)


def _step_seconds(folder: RunFolder, metrics: Mapping[str, Any], recipe: Recipe) -> float | None:
    """Median over epochs; the training has no validation in it."""
    history = folder.history.with_suffix(".json")
    if not history.exists():
        return None
    steps = math.ceil(metrics["train_images"] / recipe.batch_size)
    return statistics.median(entry["seconds"] / steps for entry in _read(history))


def _plain(value: Any) -> Any:
    """An interval's value alone: its ends are taken from `by_image` again."""
    return {"value": value["value"]} if isinstance(value, dict) and "value" in value else value


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
