"""Zero-shot, decoder, biases, GPS and full fine-tuning of a segmenter on Kvasir-SEG; writes docs/segmentation.md.

    python benchmarks/segmentation.py

Every run is a `fewtune fit`; the 120 test images of the split by rule are scored once a run, at their own size, by
all six measures. Learning rates are chosen first, for each method, by short runs of seed 0 judged on validation images.
Finished runs are kept and skipped, and a killed run goes on after its last epoch. Two processes may share the work:
`--methods full` in one, `--methods linear bias gps` in the other, then `--report-only`. The images are found through
FEWTUNE_TEST_DATA (default ../shared/data); their licence lets numbers into docs/, and no pixels.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE, SOURCE, OWN_SIZE = "kvasir_seg_256.zip", "demo:vit-small-saliency", 224
RATES = {"linear": (1e-3, 3e-3), "bias": (1e-3, 3e-3), "gps": (1e-3, 3e-3), "full": (3e-5, 1e-4)}


def unpacked(cache: Path) -> Path:
    """The folder that holds Kvasir-SEG, unpacked once into the cache."""
    target = cache / "kvasir"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"kvasir.partial-{os.getpid()}"
        with zipfile.ZipFile(Path(os.environ.get("FEWTUNE_TEST_DATA", ROOT / "../shared/data")) / ARCHIVE) as archive:
            archive.extractall(partial)
        partial.rename(target)
    return target


def recipe(options: argparse.Namespace, method: str, seed: int, **changed: Any) -> Any:
    from fewtune.config import Recipe

    values = {
        "task": "segmentation", "model": SOURCE, "image_size": options.image_size, "method": method, "seed": seed,
        "data": f"task:kvasir-seg?root={unpacked(options.cache)}", "limit_train": options.images, "val_fraction": 0.2,
        "augment": "flip", "batch_size": 4, "epochs": options.epochs, "warmup_epochs": 0, "min_lr": 1e-7,
        "accelerator": "cpu", "devices": 1,
    }  # fmt: skip
    return Recipe(**({"k": 1.0} if method == "gps" else {}), **(values | changed))


def searched(options: argparse.Namespace, method: str) -> float:
    """The learning rate of a method: the better of two in runs of two epochs of 80 images, on 40 validation images."""
    path = options.out / f"search-{method}.json"
    if not path.exists():
        from fewtune.segmentation.protocol import prepare
        from fewtune.training.files import write_json
        from fewtune.training.search import search_recipe

        short = recipe(options, method, 0, limit_train=120, val_fraction=1 / 3, search_epochs=2,
                       search_lr=RATES[method], search_k=(1.0,))  # fmt: skip
        found = search_recipe(prepare(short))
        write_json(path, {"lr": found.best.lr, "tried": found.rows})
        print(f"{method}: learning rate {found.best.lr:g} of {RATES[method]}", flush=True)
    return float(json.loads(path.read_text())["lr"])


def run(options: argparse.Namespace, method: str, seed: int) -> None:
    """One `fit`; skipped where it is done, resumed where it was killed."""
    from fewtune.segmentation import fit

    folder = options.out / f"{method}-{seed}"
    if (folder / "metrics.json").exists():
        return
    result = fit(recipe(options, method, seed, lr=searched(options, method)), folder, resume=True)
    test = result.metrics["test"]
    values = ", ".join(f"{name} {100 * test[name]['value']:.1f} %" for name in ("dice", "iou"))
    print(f"{method}, seed {seed}: {values}; {result.metrics['seconds']:.0f} s", flush=True)


def zero_shot(options: argparse.Namespace, size: int) -> None:
    """The untouched segmenter on the test images."""
    from fewtune.segmentation import evaluate
    from fewtune.training.files import write_json
    from fewtune.training.probabilities import write_predictions

    target = options.out / f"zero-shot-{size}"
    if (target / "metrics.json").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    data = f"task:kvasir-seg?root={unpacked(options.cache)}"
    found = evaluate(data, model=SOURCE, image_size=size, batch_size=8, accelerator="cpu")
    write_predictions(target / "test_predictions.csv", found.rows)
    write_json(target / "metrics.json", {"test": found.report.to_json()})
    print(f"zero-shot at {size} px: Dice {100 * found.report.dice.value:.1f} %", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=98, help="pixels; a multiple of 14")
    parser.add_argument("--images", type=int, default=200, help="training images, of which a fifth validate")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/segmentation")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/photographs")
    parser.add_argument("--report-only", action="store_true", help="write the page from runs that are finished")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        import torch

        torch.set_num_threads(options.threads)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        for size in (options.image_size, OWN_SIZE):
            zero_shot(options, size)
        for seed in range(options.seeds):
            for method in options.methods:
                run(options, method, seed)
    from segmentation_page import write

    write(options, ROOT / "docs")


if __name__ == "__main__":
    main()
