"""What the runs of benchmarks/segmentation.py gave: docs/segmentation.md, .json and .png, from finished runs alone."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

NAMES = {
    "zero-shot": "zero-shot (untouched)", "linear": "decoder only", "bias": "biases + decoder",
    "gps": "GPS, K = 1, + decoder", "full": "full fine-tuning",
}  # fmt: skip
SHORT = ("zero-shot", "decoder", "biases", "GPS", "full")
MEASURES = {"dice": "mDice", "iou": "mIoU", "s_measure": "S", "e_measure": "E", "weighted_f": "wF", "mae": "MAE"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every test image's measures, in the order of the names."""
    with (folder / "test_predictions.csv").open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["file"])


def mean_rows(folders: list[Path]) -> list[dict[str, Any]]:
    """Every image's measures, averaged over runs (seeds)."""
    runs = [rows_of(folder) for folder in folders]
    return [
        {"file": same[0]["file"], **{key: statistics.mean(float(row[key]) for row in same) for key in MEASURES}}
        for same in zip(*runs, strict=True)
    ]


def finished(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Method -> the folders of its finished runs; only seeds that every method has finished are compared."""
    done = {
        method: {seed for seed in range(options.seeds) if (options.out / f"{method}-{seed}/metrics.json").exists()}
        for method in NAMES if method != "zero-shot"
    }  # fmt: skip
    seeds = sorted(set.intersection(*done.values()))
    if not seeds:
        raise SystemExit(f"no seed is finished by every method in {options.out}: {done}")
    runs = {method: [options.out / f"{method}-{seed}" for seed in seeds] for method in done}
    return {"zero-shot": [options.out / f"zero-shot-{options.image_size}"], **runs}


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Per method: measures by seed, cost, and paired differences of GPS minus it with 95 % intervals."""
    from fewtune.segmentation.evaluation import paired_differences

    folders, methods = finished(options), {}
    gps = mean_rows(folders["gps"])
    for method, runs in folders.items():
        metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
        row: dict[str, Any] = {key: [m["test"][key]["value"] for m in metrics] for key in MEASURES}
        row["images"] = metrics[0]["test"]["images"]
        if method != "zero-shot":
            search = json.loads((options.out / f"search-{method}.json").read_text())
            row["lr"] = search["lr"]
            row["tried"] = {f"{one['lr']:g}": one["val_dice"] for one in search["tried"]}
            row |= {key: metrics[0][key] for key in ("trained", "percent_of_backbone", "delta_bytes")}
            row["seconds"] = statistics.median(m["seconds"] for m in metrics)
            row["validation_dice"] = [m["validation"]["dice"] for m in metrics]
        if method != "gps":
            found = paired_differences(mean_rows(runs), gps)
            row["gps_minus_this"] = {key: [found[key].value, found[key].low, found[key].high] for key in MEASURES}
        methods[method] = row
    own = options.out / "zero-shot-224/metrics.json"
    at_own = json.loads(own.read_text())["test"] if own.exists() else {}
    first = json.loads((folders["gps"][0] / "metrics.json").read_text())
    return {
        "settings": {
            "image_size": options.image_size, "training_images": first["train_images"],
            "validation_images": options.images - first["train_images"], "epochs": options.epochs,
            "seeds": len(folders["gps"]),
        },
        "methods": methods,
        "zero_shot_at_224_px": {key: at_own[key]["value"] for key in MEASURES if key in at_own},
    }  # fmt: skip


def spread(values: list[float]) -> str:
    """Mean in percent, and the standard deviation over seeds where there are several."""
    text = f"{100 * statistics.mean(values):.1f}"
    return text + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| method | lr | trained | % of backbone | " + " | ".join(MEASURES.values()) + " | s | file |",
        "|" + "---|" * (6 + len(MEASURES)),
    ]
    for method, row in results["methods"].items():
        cost = ["", "0", "0"]
        tail = ["", ""]
        if method != "zero-shot":
            cost = [f"{row['lr']:g}", f"{row['trained']:,}", f"{row['percent_of_backbone']:.2f}"]
            tail = [f"{row['seconds']:.0f}", f"{row['delta_bytes'] / 1e6:.2f} MB"]
        lines.append(f"| {' | '.join([NAMES[method], *cost, *(spread(row[key]) for key in MEASURES), *tail])} |")
    return lines


def gaps(results: dict[str, Any]) -> list[str]:
    lines = ["| GPS minus | mDice, points | mIoU, points |", "|---|---|---|"]
    for method, row in results["methods"].items():
        if method != "gps":
            cells = [
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in row["gps_minus_this"][key]))
                for key in ("dice", "iou")
            ]
            lines.append(f"| {NAMES[method]} | {' | '.join(cells)} |")
    return lines


TEMPLATE = Path(__file__).with_suffix(".md")


def verdict(results: dict[str, Any]) -> str:
    """Which gaps in Dice the intervals tell from zero."""
    clear = {"above": [], "below": [], "not told apart from": []}  # type: dict[str, list[str]]
    for method, row in results["methods"].items():
        if method != "gps":
            _, low, high = row["gps_minus_this"]["dice"]
            clear["above" if low > 0 else "below" if high < 0 else "not told apart from"].append(NAMES[method])
    return "By mDice, GPS is " + "; ".join(f"{how} {', '.join(who)}" for how, who in clear.items() if who) + "."


def edges(results: dict[str, Any]) -> str:
    """Where the chosen learning rate is the smallest or largest that was tried, so that a wider grid may do better."""
    said = []
    for end, words in ((min, "smallest"), (max, "largest")):
        at = [
            SHORT[place]
            for place, row in enumerate(results["methods"].values())
            if row.get("tried") and row["lr"] == end(map(float, row["tried"]))
        ]
        if at:
            said.append(f"the chosen rate is the {words} of those tried for {', '.join(at)}")
    return "; ".join(said) + ": a wider grid may do better."


def page(results: dict[str, Any]) -> str:
    own = results["zero_shot_at_224_px"]
    return TEMPLATE.read_text(encoding="utf-8").format(
        **results["settings"], images=results["methods"]["gps"]["images"], table="\n".join(table(results)),
        gaps="\n".join(gaps(results)), verdict=verdict(results), edges=edges(results),
        own_dice=f"{100 * own['dice']:.1f}" if own else "not measured",
        own_iou=f"{100 * own['iou']:.1f}" if own else "not measured",
    )  # fmt: skip


def draw(options: argparse.Namespace, path: Path) -> None:
    """Numbers in place of pictures, which the data's licence keeps out: the Dice of every test image, sorted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(9.6, 3.5), constrained_layout=True)
    for position, (method, runs) in enumerate(finished(options).items()):
        values = [json.loads((run / "metrics.json").read_text())["test"]["dice"] for run in runs]
        colour = "tab:green" if method == "gps" else f"C{position + 4}"
        bars.plot([position] * len(values), [100 * v["value"] for v in values], "o", color=colour, alpha=0.6)
        bars.plot(position, 100 * statistics.mean(v["value"] for v in values), "_", color="black", markersize=24)
        ordered = sorted(row["dice"] for row in mean_rows(runs))
        curves.plot(range(1, len(ordered) + 1), ordered, color=colour, label=SHORT[position])
    bars.set_xticks(range(len(SHORT)), SHORT)
    bars.set(ylabel="test mDice, % (a point a seed)")
    bars.margins(x=0.2)
    curves.set(xlabel="test images, each method's own order", ylabel="Dice, mean over seeds")
    curves.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def drawn_sheet(path: Path) -> None:
    """A sheet of errors on scenes that are drawn here, by the untouched demo segmenter."""
    import tempfile

    import numpy as np
    from PIL import Image

    from fewtune.data.masks import save_mask, save_png
    from fewtune.segmentation import evaluate
    from fewtune.segmentation.evaluation import worst_first

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("images", "masks"):
            (root / part).mkdir()
        for number in range(4):
            rng = np.random.default_rng(number)
            rows, columns = np.mgrid[:180, :240]
            centre, radii = rng.uniform(0.35, 0.65, 2) * (180, 240), rng.uniform(0.12, 0.3, 2) * (180, 240)
            distance = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2
            colours = rng.uniform(60, 200, (2, 3))
            shade = np.clip(1.2 - distance / 2, 0.4, 1.2)[..., None]
            picture = np.where((distance <= 1)[..., None], colours[0] * shade, colours[1])
            picture = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
            save_png(Image.fromarray(picture), root / f"images/scene{number}.png")
            save_mask(distance <= 1, root / f"masks/scene{number}.png")
        found = evaluate(str(root), model="demo:vit-small-saliency", image_size=126, accelerator="cpu")
        worst_first(found, 4, path, "cpu")


def write(options: argparse.Namespace, docs: Path) -> None:
    """The page, its numbers, its plot and its sheet."""
    results = collect(options)
    (docs / "segmentation.json").write_text(json.dumps(results, indent=1) + "\n")
    (docs / "segmentation.md").write_text(page(results))
    draw(options, docs / "segmentation.png")
    if not (docs / "segmentation-sheet.png").exists():
        drawn_sheet(docs / "segmentation-sheet.png")
