"""docs/ablations.md from the figures: tables, and the reading that stands at its end."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from ablations_analysis import COMPARED, SELECTION_BATCH
from ablations_figures import figures
from ablations_grid import BLOCKS, CRITERIA, FEW, FIRST, IMAGES, MANY, SEARCH_EPOCHS, SEEDS, TASK, TRIALS
from photographs import TITLES

READING = "## What of the paper's claims holds here"
"""From this heading on the page is written by hand, and kept when it is made again."""

LABELS = {
    "gps": "GPS: gradient of SCL, by neuron",
    "layer": "by layer",
    "network": "by network",
    "neuron-random": "Neuron Random",
    "net-random": "Net Random",
    "magnitude": "magnitude",
    "head-ce": "Head+CE",
    "oracle": "oracle: full fine-tuning's largest moves",
    "full": "full fine-tuning",
    "linear": "linear probe, converged",
}


def percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} ({len(values)})"


def interval(values: list[float] | None, scale: float, digits: int) -> str:
    if values is None:
        return ""
    value, low, high = (scale * v for v in values)
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def table(rows: dict[str, Any], names: dict[str, str]) -> list[str]:
    """The runs called `names`, with their labels."""
    lines = [
        "| | trained | % | rate | accuracy %, mean ± sd (seeds) | minus GPS, points | test loss | minus GPS, nats |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, label in names.items():
        if name not in rows:
            continue
        row = rows[name]
        rate = "" if row["lr"] is None else f"{row['lr']:g}"
        lines.append(
            f"| {label} | {row['trained']:,} | {row['percent']:.2f} | {rate} | {percent(row['accuracy'])} | "
            f"{interval(row.get('accuracy_difference'), 100, 1)} | {statistics.mean(row['loss']):.3f} | "
            f"{interval(row.get('loss_difference'), 1, 3)} |"
        )
    return [*lines, ""]


INTRODUCTION = """
Backbone: `demo:vit-small`, a ViT-S/14 of DINOv2's design, fine-tuned for saliency by its publishers, at {image_size}
px. The paper's ablations are of ViT-B/16 at 224 px on the five whole FGVC sets for 100 epochs.

Images: {title}; each seed draws its own {limit_train} (320 to train, 80 to validate); the {limit_test} test images are
the same for all seeds and are read once a run. No augmentation.

{epochs} epochs of Adam in batches of {batch_size}, no weight decay, warm-up of one epoch, cosine; the best epoch by
validation accuracy (80 images: a coarse choice) is kept.

Learning rates: one for K = 1 and 2, one for larger K, one for full fine-tuning, each of three, by runs of
{search_epochs} epochs with seed 0, judged on validation images. All criteria, granularities and locations share the one
that was chosen for GPS at K = 1, which can only favour GPS.

Selection: one pass over the training images in two augmented views, batches of {selection_batch}. Biases and layer
scales are trained in every selection; a block that is left out is frozen with its biases and scales.

Intervals: 95 %, paired bootstrap over the test images of the mean over the common seeds (2,000 samples). They hold the
uncertainty of the test images, not that of the draw of training images: for that read the standard deviation over
seeds. A single run, (1), has none.

Test loss (cross-entropy, nats) is the finer measure: it sees changes that cross no decision boundary.
"""


def introduction() -> list[str]:
    """What the figures are, and of what."""
    settings = {"selection_batch": SELECTION_BATCH, "search_epochs": SEARCH_EPOCHS, **IMAGES}
    points = INTRODUCTION.format(title=TITLES[TASK], **settings).strip().split("\n\n")
    return [
        "# Ablations on real photographs",
        "",
        "Made by `python benchmarks/ablations.py`; the figures are in [ablations.json](ablations.json). They are",
        "fewtune's own measurements, none of them the paper's.",
        "",
        *(wrapped(point, "- ") for point in points),
        "",
    ]


def wrapped(text: str, mark: str = "") -> str:
    """A paragraph, or an item of a list, in lines of at most 120 characters."""
    return textwrap.fill(
        " ".join(text.split()), 120, initial_indent=mark, subsequent_indent=" " * len(mark), break_on_hyphens=False
    )


def sections(found: dict[str, Any]) -> list[str]:
    rows = found["trials"]
    first = {f"without-first-{n}": f"without the first {n} blocks" for n in FIRST}
    blocks = {f"without-block-{b}": f"without block {b + 1}" for b in range(BLOCKS)}
    lines = ["## Granularity and criterion", "", "As many connections in each (K = 1 a neuron).", ""]
    lines += table(rows, {name: LABELS[name] for name in (*CRITERIA, "linear", "full")})
    lines += ["![differences from GPS](ablations-differences.png)", ""]
    lines += ["## Where the connections lie", "", *location_table(found["location"])]
    lines += ["## Number of connections", ""]
    lines += table(rows, {"gps": "K = 1", **{f"k{k}": f"K = {k}" for k in MANY}})
    lines += ["## Location", "", "Blocks count from 1, as in the paper.", ""]
    lines += table(rows, {"gps": "all blocks", **first, **blocks})
    lines += ["![K and location](ablations-amount.png)", ""]
    lines += ["## Few images of each class", "", *few_table(found["few_shot"])]
    lines += ["## Does the gradient know where full fine-tuning goes?", "", *agreement_table(found["agreement"])]
    lines += ["## Overlap of selections", "", *overlap_tables(found["overlap"])]
    if found["not_run"]:
        told = "; ".join(f"{draw}: {', '.join(names)}" for draw, names in found["not_run"].items())
        count = sum(map(len, found["not_run"].values()))
        lines += [
            "## Not run",
            "",
            wrapped(f"For want of time, {count} of {len(TRIALS)} runs of the grid. {told}."),
            "",
        ]
    return lines


def location_table(found: dict[str, dict[str, float]]) -> list[str]:
    if not found:
        return []
    parts = list(next(iter(found.values())))
    lines = ["Share of the selected connections in each block, % (seed 0); elsewhere is the patch embedding.", ""]
    lines += ["| | " + " | ".join(part.removeprefix("block ") for part in parts) + " |", "|---|" + "---:|" * len(parts)]
    for name, shares in found.items():
        lines.append(f"| {LABELS[name]} | " + " | ".join(f"{100 * share:.1f}" for share in shares.values()) + " |")
    return [*lines, ""]


def few_table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{TITLES['flowers']}; as many validation images as training images, at most 4 a class; about 36 steps;",
        "learning rates of the refuse runs; 300 test images.",
        "",
        "| images of each class | "
        + " | ".join(LABELS[name] for name in FEW)
        + " | full minus GPS | linear minus GPS |",
        "|---:|" + "---:|" * (len(FEW) + 2),
    ]
    for shots, rows in found.items():
        cells = [percent(rows[name]["accuracy"]) if name in rows else "" for name in FEW]
        cells += [interval(rows.get(name, {}).get("accuracy_difference"), 100, 1) for name in ("full", "linear")]
        lines.append(f"| {shots} | " + " | ".join(cells) + " |")
    return [*lines, "", "![few-shot curve](ablations-few-shot.png)", ""]


def layer_kinds(values: dict[str, float]) -> dict[str, list[float]]:
    """By kind of layer, the values over the depth; the patch embedding stands alone."""
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        kinds.setdefault(name.removesuffix(".weight").split(".")[-1] if "blocks" in name else "patches", []).append(
            value
        )
    return kinds


def agreement_table(found: dict[int, Any]) -> list[str]:
    lines = [
        "Spearman's correlation with |w_full - w_0|: over all connections of the network; within each layer (mean over",
        "layers); within each neuron (mean over neurons and layers), which alone matters to a selection by neuron.",
        "",
        "| score | seed | network | within layers | within neurons |",
        "|---|---:|---:|---:|---:|",
    ]
    for seed, kinds in found.items():
        for kind in (kind for kind in COMPARED if kind in kinds):
            value = kinds[kind]
            means = [statistics.mean(value[key].values()) for key in ("layers", "neurons")]
            lines.append(f"| {kind} | {seed} | {value['network']:.3f} | {means[0]:.3f} | {means[1]:.3f} |")
    return [*lines, "", "![rank correlation by layer](ablations-agreement.png)", ""]


def overlap_tables(found: dict[str, Any]) -> list[str]:
    lines = [
        wrapped(
            "Shared: of the smaller selection's connections (K = 1 a neuron) the part that the other has too. Chance: "
            "its mean ± standard deviation for independent random choices with as many connections of each neuron. "
            "Above chance: 0 at chance, 1 for equal selections."
        ),
        "",
        "| selections by the gradient, or by | shared % | chance % | above chance |",
        "|---|---:|---:|---:|",
    ]
    named = [(f"tasks: {p['first']}, {p['second']}", p) for p in (found["tasks"] or {"pairs": []})["pairs"]]
    named += [(f"seeds: {p['first']}, {p['second']}", p) for p in (found["seeds"] or {"pairs": []})["pairs"]]
    for name, pairs in found["criteria"].items():
        named += [(f"{LABELS[name]}, and the oracle (seed {seed})", p) for seed, p in zip(SEEDS, pairs, strict=False)]
    for label, p in named:
        chance = f"{100 * p['chance']:.2f} ± {100 * p['chance_std']:.2f}"
        lines.append(f"| {label} | {100 * p['shared']:.1f} | {chance} | {p['above_chance']:.3f} |")
    for key, what in (("tasks", "three tasks"), ("seeds", "seeds")):
        if found[key] is not None:
            told = "; ".join(
                f"by {m}: {100 * seen:.1f} % (chance {100 * chance:.1f} %)"
                for m, (seen, chance) in enumerate(found[key]["chosen_by"], 1)
            )
            lines += ["", f"Of all connections that any of the {what} chose, chosen {told}."]
    return [*lines, "", "![overlap by block](ablations-overlap.png)", ""]


def write_page(out: Path, docs: Path) -> None:
    """Writes docs/ablations.md, .json and the plots; what stands from the reading's heading on is kept."""
    from ablations_plots import draw_all

    found = figures(out)
    page = docs / "ablations.md"
    earlier = page.read_text(encoding="utf-8") if page.exists() else ""
    reading = earlier[earlier.index(READING) :] if READING in earlier else f"{READING}\n\nNot yet written.\n"
    (docs / "ablations.json").write_text(json.dumps(found, indent=1) + "\n")
    page.write_text("\n".join([*introduction(), *sections(found), reading]), encoding="utf-8")
    draw_all(found, docs)
