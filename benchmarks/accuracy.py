"""Linear probe, biases, GPS and full fine-tuning on two sets of real photographs; writes docs/accuracy.md.

    python benchmarks/accuracy.py

Every run is a `fewtune fit`: 1,000 training images of which 200 choose the best epoch, 1,000 test images, read once.
Learning rates are chosen first, for each data set and method, by short runs of seed 0, judged on validation images;
no test image is read for it. Finished runs are kept and skipped, so that a killed grid
goes on. The photographs are found through FEWTUNE_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from photographs import ARCHIVES, ROOT, TITLES, one_thread, recipe, unpacked

METHODS = ("linear", "bias", "gps", "full")
NAMES = {"linear": "linear probe, converged", "bias": "biases", "gps": "GPS, K = 1", "full": "full fine-tuning"}
RATES = {"bias": (1e-3, 3e-3), "gps": (1e-3, 3e-3), "full": (3e-5, 1e-4)}


def search(name: str, method: str, cache: Path, out: Path) -> None:
    """Chooses the learning rate of a method on a data set: 300 training, 150 validation images, 75 steps of 8."""
    path = out / f"search-{name}-{method}.json"
    if path.exists():
        return
    from fewtune.training.files import write_json
    from fewtune.training.protocol import prepare
    from fewtune.training.search import search_recipe

    short = {"limit_train": 450, "val_fraction": 1 / 3, "search_epochs": 2, "batch_size": 8, "warmup_epochs": None}
    wanted = recipe(unpacked(name, cache), method, 0, search_lr=RATES[method], search_k=(1.0,), **short)
    found = search_recipe(prepare(wanted))
    write_json(path, {"lr": found.best.lr, "tried": found.rows})
    print(f"{name}, {method}: learning rate {found.best.lr}", flush=True)


def run(name: str, method: str, seed: int, epochs: int, cache: Path, out: Path) -> None:
    """One `fit`; skipped where it is done, resumed where it was killed."""
    from fewtune.training.protocol import fit

    folder = out / f"{name}-{method}-{seed}"
    if (folder / "metrics.json").exists():
        return
    lr = {} if method == "linear" else {"lr": json.loads((out / f"search-{name}-{method}.json").read_text())["lr"]}
    k = {"k": 1.0} if method == "gps" else {}
    result = fit(recipe(unpacked(name, cache), method, seed, epochs=epochs, **lr, **k), folder, resume=True)
    test = result.metrics["test"]["accuracy"]
    print(f"{name}, {method}, seed {seed}: {100 * test['value']:.1f} %", flush=True)


def grid(epochs: int, seeds: int, processes: int, cache: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    for name in ARCHIVES:
        unpacked(name, cache)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        searches = [pool.submit(search, n, m, cache, out) for m in RATES for n in ARCHIVES]
        for done in searches:
            done.result()
        jobs = itertools.product(range(seeds), METHODS, ARCHIVES)
        for done in [pool.submit(run, n, m, s, epochs, cache, out) for s, m, n in jobs]:
            done.result()


def collect(out: Path, seeds: int) -> dict[str, Any]:
    """What came out, as JSON: per data set and method accuracies by seed, cost, and paired differences from GPS."""
    import numpy as np

    from fewtune.metrics import bootstrap
    from fewtune.training.probabilities import paired_hits

    results: dict[str, Any] = {}
    for name in ARCHIVES:
        rows: dict[str, Any] = {}
        for method in METHODS:
            finished = [s for s in range(seeds) if (out / f"{name}-{method}-{s}" / "metrics.json").exists()]
            folders = [out / f"{name}-{method}-{seed}" for seed in finished]
            metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
            chosen = out / f"search-{name}-{method}.json"
            row = {
                "lr": json.loads(chosen.read_text())["lr"] if chosen.exists() else None,
                "accuracy": [m["test"]["accuracy"]["value"] for m in metrics],
                "test_images": metrics[0]["test"]["images"],
                "trained": metrics[0]["trained"],
                "percent": metrics[0]["percent_of_backbone"],
                "seconds": statistics.median(m["seconds"] for m in metrics),
                "delta_bytes": metrics[0]["delta_bytes"],
            }
            if method != "gps":
                pairs = [
                    paired_hits(folder / "test_predictions.csv", out / f"{name}-gps-{seed}" / "test_predictions.csv")
                    for seed, folder in zip(finished, folders, strict=True)
                ]
                # All seeds have the same test images: the mean over seeds of an image is one observation.
                interval = bootstrap(np.mean([second.astype(float) - first for first, second in pairs], axis=0))
                row["gps_minus_this"] = [interval.value, interval.low, interval.high]
            rows[method] = row
        results[name] = rows
    return results


def page(results: dict[str, Any], epochs: int, seeds: int) -> str:
    lines = [
        "# Accuracy on real photographs",
        "",
        "Made by `python benchmarks/accuracy.py" + f" --epochs {epochs} --seeds {seeds}`; the numbers are in",
        "[accuracy.json](accuracy.json). These are fewtune's own measurements, none of them the paper's.",
        "",
        "- Backbone: `demo:vit-small`, a ViT-S/14 of DINOv2's design, fine-tuned for saliency by its publishers",
        "  (22,056,192 parameters); 98 px, ImageNet mean and standard deviation.",
        f"- Up to {seeds} seeds, as many as stand in brackets: each draws its own 800 training and 200 validation",
        "  images; the 1,000 test images are the same. No augmentation.",
        f"- {epochs} epochs of Adam, no weight decay, warm-up of one epoch, cosine; batch 16; the best epoch by",
        "  validation accuracy is kept and the test images are read once. So few epochs are what two CPU cores allow:",
        "  the paper trains for 100.",
        "- Learning rates: of two for each method, chosen on validation images (see the JSON). The linear probe is",
        "  L-BFGS to convergence on the head's own cached features, its regularisation chosen on validation images.",
        "- Intervals: 95 %, paired bootstrap over the test images, each the mean over seeds (2,000 samples).",
        "- GPS: gradient of the supervised contrastive loss (two views, temperature 0.07) over the training images.",
        "",
    ]
    for name, rows in results.items():
        lines += [f"## {TITLES[name]}", ""]
        lines += [
            "| method | rate | trained | % of backbone | test accuracy, mean ± sd (seeds) | GPS minus it | s | file |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for method, row in rows.items():
            values = [100 * a for a in row["accuracy"]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            difference = row.get("gps_minus_this")
            between = (
                "" if difference is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * d for d in difference))
            )
            rate = "" if row["lr"] is None else f"{row['lr']:g}"
            lines.append(
                f"| {NAMES[method]} | {rate} | {row['trained']:,} | {row['percent']:.2f} | "
                f"{statistics.mean(values):.1f}{spread} ({len(values)}) | {between} | {row['seconds']:.0f} | "
                f"{row['delta_bytes'] / 1e6:.2f} MB |"
            )
        lines.append("")
    lines += [
        "Seconds are of a whole run in one of two processes side by side, one CPU thread each: selection, training,",
        "validation and test. ![accuracy](accuracy.png)",
        "",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.4), constrained_layout=True)
    for panel, (name, rows) in zip(panels, results.items(), strict=True):
        for position, (method, row) in enumerate(rows.items()):
            values = [100 * a for a in row["accuracy"]]
            panel.plot(
                [position] * len(values), values, "o", color="tab:green" if method == "gps" else "tab:gray", alpha=0.6
            )
            panel.plot(position, statistics.mean(values), "_", color="black", markersize=24)
        panel.set_xticks(range(len(rows)), ["linear", "biases", "GPS", "full"])
        panel.set_title(TITLES[name])
        panel.set_ylabel("test accuracy, %")
        panel.margins(x=0.2)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/accuracy")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/photographs")
    parser.add_argument("--report-only", action="store_true", help="write the page from runs that are finished")
    options = parser.parse_args()
    if not options.report_only:
        grid(options.epochs, options.seeds, options.processes, options.cache, options.out)
    results = collect(options.out, options.seeds)
    docs = ROOT / "docs"
    (docs / "accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    (docs / "accuracy.md").write_text(page(results, options.epochs, options.seeds))
    draw(results, docs / "accuracy.png")


if __name__ == "__main__":
    main()
