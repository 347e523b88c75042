"""The demo: a really pretrained backbone, labelled images, three ways to tune it, and the task file at work.

Backbone: EfficientNet-Lite0, trained on ImageNet, at 64 px. Images: the 1,797 real handwritten digits of scikit-learn,
which ImageNet has nothing of: 320 to train, 80 to validate, 898 to test. Every step is a command of its own process, so
that its memory is measured and the task file is applied by a process that knows nothing else.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewtune.errors import FewtuneError
from fewtune.metrics import proportion

log = logging.getLogger("fewtune")

MODEL, DATA = "demo:efficientnet-lite0", "demo:digits"
SETTINGS = (
    "image_size=64", "limit_train=400", "epochs=8", "batch_size=16", "warmup_epochs=1", "cache=true", "report=false"
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """A way to tune, with its settings."""

    title: str
    settings: tuple[str, ...]


# Learning rates: those that validation images of EuroSAT chose for this backbone (benchmarks/studies).
ARMS = {
    "linear": Arm("linear probe", ("method=linear",)),
    "random": Arm("random connections, K = 1", ("method=gps", "importance=random", "lr=3e-3")),
    "gps": Arm("GPS, K = 1", ("method=gps", "lr=3e-3")),
}
FULL = {"full": Arm("full fine-tuning", ("method=full", "lr=1e-3"))}


def fit_all(out: Path, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """Train every arm in a process of its own; arm -> what stands in its metrics.json.

    Raises FewtuneError where one of them fails.
    """
    metrics = {}
    for name, arm in arms.items():
        log.info("\n%s", arm.title)
        where = ["--model", MODEL, "--data", DATA, "--out", str(out / name), "--overwrite", "--json"]
        metrics[name] = json.loads(command(["fit", *where, *SETTINGS, *arm.settings]))
    return metrics


def difference(out: Path, first: str, second: str) -> dict[str, Any]:
    """Paired bootstrap of two arms' accuracies on the same test images, second minus first."""
    files = [str(out / arm / "test_predictions.csv") for arm in (first, second)]
    return json.loads(command(["evaluate", "--compare", *files, "--json"]))["difference"]


def recalls(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Class -> its test images, and by arm the share of them that is found, with Wilson's interval."""
    tests = {arm: measured["test"] for arm, measured in metrics.items()}
    first = next(iter(tests.values()))
    table = {}
    for i, (name, images) in enumerate(zip(first["class_names"], first["support"], strict=True)):
        shares = {arm: asdict(proportion(test["confusion"][i][i], images)) for arm, test in tests.items()}
        table[name] = {"images": images, **shares}
    return table


def predict_some(out: Path, count: int = 6) -> list[dict[str, Any]]:
    """Write test images of many classes as files and apply the GPS task file to them in a fresh process."""
    from fewtune.data import load_data

    data = load_data(DATA)
    assert data.test is not None
    firsts = [data.test.labels.index(label) for label in sorted(set(data.test.labels))]
    chosen, folder = firsts[:count], out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    names = [Path(data.test.names[i]).with_suffix(".png").as_posix().replace("/", "-") for i in chosen]
    files = {str(folder / name): i for name, i in zip(names, chosen, strict=True)}
    for file, i in files.items():
        data.test.image(i).save(file)
    rows = json.loads(command(["predict", "--delta", str(out / "gps/delta.safetensors"), "--json", *files]))
    return [
        {
            "image": Path(row["file"]).name,
            "class": data.class_names[data.test.labels[i]],
            "prediction": row["prediction"],
            "probability": row["probability"],
        }
        for i, row in zip(chosen, rows, strict=True)
    ]


def command(arguments: list[str]) -> str:
    """What `fewtune ARGUMENTS` prints on stdout in a process of its own; its stderr is shown as it comes."""
    done = subprocess.run([sys.executable, "-m", "fewtune", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise FewtuneError(
            f"`fewtune {' '.join(arguments[:1])}` ended with status {done.returncode}; see the line above"
        )
    return done.stdout


def run(out: Path, *, full: bool) -> dict[str, Any]:
    """The whole demo; gives everything that was measured and predicted."""
    started = time.perf_counter()
    arms = ARMS | (FULL if full else {})
    metrics = fit_all(out, arms)
    gains = {f"gps minus {name}": difference(out, name, "gps") for name in arms if name != "gps"}
    log.info("\nthe task file, applied in a fresh process")
    predictions = predict_some(out)
    return {
        "arms": {name: arm.title for name, arm in arms.items()},
        "methods": metrics,
        **gains,
        "recall": recalls(metrics),
        "predictions": predictions,
        "seconds": time.perf_counter() - started,
    }
