"""The methods side by side on photographs of refuse; writes docs/peers.md, docs/peers.json and docs/peers.png.

    python benchmarks/peers.py

Runs the grid of benchmarks/peers.yaml (`fewtune bench run`), of which finished runs are skipped, then makes the page
from all runs that are finished: a run that is missing shows as not yet measured. The photographs are found through
FEWTUNE_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fewtune.bench.grid import Grid, read_grid
from photographs import ROOT, unpacked

GRID = ROOT / "benchmarks" / "peers.yaml"
LACKING = {
    "Adapter, VPT-shallow, SPT-Adapter, SPT-LoRA": "built and tested, not in this grid for want of time",
    "GPS at K = 2 to 20, by layer and by network, by magnitude, by Head+CE": "see docs/ablations.md",
    "flowers, textiles, and the paper's 24 tasks, CIFAR-100 and ImageNet-1k": "no other images in this grid",
    "ViT-B/16, Swin-B, ConvNeXt-B": "no weights of theirs were at hand",
    "100 epochs at 224 px": "two CPU cores do not do it; the paper's figures are not comparable with these",
    "times and memory on a GPU": "no GPU was at hand",
}
"""What the page says is missing, and why."""


def page(table: str, grid: Grid, rows: list[dict[str, Any]]) -> str:
    """The page's text."""
    measured = [row for row in rows if row["mean"] is not None]
    seeds = sorted({seed for row in measured for seed in row["seeds"]})
    lines = [
        "# The methods side by side",
        "",
        "Made by `python benchmarks/peers.py` from the grid [peers.yaml](../benchmarks/peers.yaml); the numbers are in",
        "[peers.json](peers.json). These are fewtune's own measurements, none of them the paper's.",
        "",
        "- Backbone: `demo:vit-small`, a ViT-S/14 of DINOv2's design, fine-tuned for saliency by its publishers;",
        f"  {grid.settings['image_size']} px, ImageNet mean and standard deviation.",
        "- Images: TrashNet. Each seed draws its own 200 training images; the 500 test images are the same. No",
        "  augmentation. 5 epochs of Adam, batch 16, warm-up of one epoch, cosine: the paper trains for 100.",
        "- Three learning rates for each method, the best by the accuracy on 40 validation images of seed 0 (runs of 3",
        "  epochs on the other 160); then trained on all 200 images, the last epoch is taken and the test images are",
        "  read once. The linear probe's regularisation is chosen in the same way. With 40 images a choice is coarse.",
        f"- Seeds: {', '.join(map(str, seeds))}; as many as stand in brackets.",
        "- Times: one CPU thread, two runs side by side on a machine that did other work too: compare them roughly.",
        "",
        table.replace("## ", "## Accuracy: ", 1).rstrip(),
        "",
        "![accuracy of every seed](peers.png)",
        "",
        *reading(measured, titles(grid)),
    ]
    lines += ["What the methods cost in time and memory, the paper's cost figure: [benchmarks](benchmarks.md).", ""]
    lines += ["## Not yet measured", ""]
    lines += [f"- {what}: {why}." for what, why in LACKING.items()]
    return "\n".join(lines) + "\n"


def titles(grid: Grid) -> dict[str, str]:
    """What tables and plots call the methods."""
    return {name: method.title or name for name, method in grid.methods.items()}


def reading(rows: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """What the intervals allow to say, in words that are made from them."""
    lines = ["## What this says", ""]
    for row in rows:
        between = row.get("minus_gps")
        if between is None:
            continue
        value, low, high = (100 * one for one in between)
        told = "no difference can be told" if low <= 0 <= high else f"{'better' if low > 0 else 'worse'} than GPS"
        points = f"{value:+.1f} points against GPS, 95 % interval {low:+.1f} to {high:+.1f}"
        lines.append(f"- {names[row['method']]}: {points}: {told}.")
    lines += [
        "",
        "The intervals are of the test images alone; how far other training images lead elsewhere is told by the",
        "standard deviations over seeds. One task with few images is no ranking of methods.",
        "",
    ]
    return lines


def draw(rows: list[dict[str, Any]], names: dict[str, str], path: Path) -> None:
    """Test accuracy, method by method, best mean at the top: every seed a dot, their mean a bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), constrained_layout=True)
    ordered = sorted(rows, key=lambda row: row["mean"])
    for place, row in enumerate(ordered):
        values = [100 * value for value in row["values"]]
        axes.plot(values, [place] * len(values), "o", color="tab:green" if row["method"] == "gps" else "tab:gray")
        axes.plot(100 * row["mean"], place, "|", color="black", markersize=20)
    axes.set_yticks(
        range(len(ordered)), [f"{names[row['method']]} ({row['percent_of_backbone']:.2f} %)" for row in ordered]
    )
    axes.set(xlabel="test accuracy, %", title="in brackets: trained parameters in % of the backbone")
    axes.title.set_fontsize(9)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.08, y=0.08)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/peers")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/photographs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report-only", action="store_true", help="write the page from runs that are finished")
    options = parser.parse_args()
    from fewtune.bench.foreman import run_grid
    from fewtune.bench.report import grid_tables
    from fewtune.bench.results import to_json
    from fewtune.bench.tables import markdown

    data = unpacked("trashnet", options.cache)
    grid = read_grid(GRID, [f"tasks.refuse.data={data}", f"workers={options.workers}"])
    if not options.report_only:
        run_grid(grid, options.out)
    rows = to_json(grid, options.out)
    docs = ROOT / "docs"
    (docs / "peers.json").write_text(json.dumps({"grid": "benchmarks/peers.yaml", "results": rows}, indent=1) + "\n")
    table = markdown(grid_tables(grid, options.out))
    (docs / "peers.md").write_text(page(table, grid, rows))
    draw(rows, titles(grid), docs / "peers.png")


if __name__ == "__main__":
    main()
