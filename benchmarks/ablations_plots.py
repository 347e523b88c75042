"""The plots of docs/ablations.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ablations_grid import BLOCKS, CRITERIA, FEW, FIRST, MANY
from ablations_page import LABELS, layer_kinds

COLOURS = {"gps": "tab:green", "full": "tab:red", "linear": "tab:gray"}
NEURONS = "within neurons"


def draw_all(found: dict[str, Any], docs: Path) -> None:
    """Every plot for which there are figures."""
    if "gps" in found["trials"]:
        differences(found["trials"], docs / "ablations-differences.png")
        if any(name.startswith(("k", "without")) for name in found["trials"]):
            amount(found["trials"], docs / "ablations-amount.png")
    if found["few_shot"]:
        few_shot(found["few_shot"], docs / "ablations-few-shot.png")
    if found["agreement"]:
        agreement(found["agreement"], docs / "ablations-agreement.png")
    if found["overlap"]["tasks"] and found["location"]:
        overlap(found, docs / "ablations-overlap.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)


def differences(rows: dict[str, Any], path: Path) -> None:
    """Accuracy and loss of every variant minus GPS's: intervals over images, and each seed's difference."""
    names = [n for n in (*CRITERIA, "linear", "full") if n != "gps" and "accuracy_difference" in rows.get(n, {})][::-1]
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.42 * len(names) + 1.6), sharey=True, layout="constrained")
    for panel, key, scale in zip(panels, ("accuracy_difference", "loss_difference"), (100, 1), strict=True):
        for place, name in enumerate(names):
            value, low, high = (scale * v for v in rows[name][key])
            panel.plot([low, high], [place, place], color="tab:gray", linewidth=2)
            panel.plot(value, place, "o", color=COLOURS.get(name, "tab:blue"))
            if key == "accuracy_difference":
                seeds = [100 * v for v in rows[name]["difference_by_seed"]]
                panel.plot(seeds, [place] * len(seeds), "|", color="black", markersize=9)
        panel.axvline(0, color="tab:green", linewidth=1)
    panels[0].set_yticks(range(len(names)), [f"{LABELS[n]} ({rows[n]['common_seeds']})" for n in names])
    panels[0].set_xlabel("accuracy minus GPS, points (black: single seeds)")
    panels[1].set_xlabel("test loss minus GPS, nats (right is worse)")
    _save(figure, path)


def amount(rows: dict[str, Any], path: Path) -> None:
    """Accuracy over K, over the first blocks left out, over the one block left out; bars: standard error of images."""
    series = {
        "connections per neuron, K": {1: "gps", **{k: f"k{k}" for k in MANY}},
        "first blocks left out": {0: "gps", **{n: f"without-first-{n}" for n in FIRST}},
        "the one block left out": {b + 1: f"without-block-{b}" for b in range(BLOCKS)},
    }
    series = {title: {x: n for x, n in names.items() if n in rows} for title, names in series.items()}
    series = {title: names for title, names in series.items() if set(names.values()) - {"gps"}}
    size = (4 * len(series), 3.4)
    figure, (panels,) = plt.subplots(1, len(series), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, (title, names) in zip(panels, series.items(), strict=True):
        for x, name in names.items():
            values = [100 * a for a in rows[name]["accuracy"]]
            panel.plot([x] * len(values), values, "o", color="tab:blue", alpha=0.5, markersize=4)
        means = [statistics.mean(rows[name]["accuracy"]) for name in names.values()]
        errors = [(a * (1 - a) / rows[n]["test_images"]) ** 0.5 for a, n in zip(means, names.values(), strict=True)]
        line = "none" if "one" in title else "-"
        panel.errorbar(
            list(names),
            [100 * a for a in means],
            [100 * e for e in errors],
            color="tab:blue",
            linestyle=line,
            capsize=3,
        )
        for reference in ("full", "linear", "gps"):
            if reference in rows:
                mean = 100 * statistics.mean(rows[reference]["accuracy"])
                panel.axhline(mean, color=COLOURS[reference], linestyle=":", label=LABELS[reference].split(":")[0])
        panel.set_xlabel(title)
    panels[0].set_xscale("log")
    panels[0].set_xticks([1, *MANY], [str(k) for k in (1, *MANY)])
    panels[0].minorticks_off()
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(fontsize=8)
    _save(figure, path)


def few_shot(found: dict[str, Any], path: Path) -> None:
    """Accuracy over the number of images of each class."""
    figure, panel = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name in FEW:
        points = {int(shots): rows[name]["accuracy"] for shots, rows in found.items() if name in rows}
        means = [100 * statistics.mean(values) for values in points.values()]
        panel.plot(list(points), means, "-", color=COLOURS[name], label=LABELS[name].split(":")[0])
        for shots, values in points.items():
            panel.plot([shots] * len(values), [100 * v for v in values], "o", color=COLOURS[name], alpha=0.6)
    panel.set_xscale("log")
    panel.set_xticks([int(shots) for shots in found], list(found))
    panel.minorticks_off()
    panel.set(xlabel="training images of each class", ylabel="test accuracy, %")
    panel.legend()
    _save(figure, path)


def agreement(found: dict[int, Any], path: Path) -> None:
    """Rank correlation of the gradient with |w_full - w_0| over the depth, by kind of layer."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, key, title in zip(panels, ("layers", "neurons"), ("within a layer", NEURONS), strict=True):
        by_seed = [layer_kinds(kinds["gradient"][key]) for kinds in found.values()]
        for kind in by_seed[0]:
            mean = [statistics.mean(values) for values in zip(*(seed[kind] for seed in by_seed), strict=True)]
            depth = range(1, len(mean) + 1) if len(mean) > 1 else [0]
            panel.plot(depth, mean, "o-" if len(mean) > 1 else "s", label=kind, markersize=4)
        panel.axhline(0, color="tab:gray", linewidth=0.8)
        panel.set(title=title, xlabel="block (0: the patch embedding)")
    panels[0].set_ylabel("Spearman, gradient and |w_full - w_0|")
    panels[1].legend(fontsize=8)
    _save(figure, path)


def overlap(found: dict[str, Any], path: Path) -> None:
    """Overlap above chance by block, over tasks and seeds; and where the connections of each granularity lie."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    blocks = range(1, BLOCKS + 1)
    for key in ("tasks", "seeds"):
        if found["overlap"][key]:
            left.plot(blocks, list(found["overlap"][key]["above_chance_by_block"].values()), "o-", label=f"over {key}")
    left.axhline(0, color="tab:gray", linewidth=0.8)
    left.set(xlabel="block", ylabel="overlap above chance (1: equal)")
    left.set_ylim(-0.02, None)
    left.legend()
    for (name, shares), style in zip(found["location"].items(), ("o-", "x--", "s-", "^:"), strict=False):
        values = [100 * shares["elsewhere"], *(100 * share for part, share in shares.items() if part != "elsewhere")]
        right.plot([0, *blocks], values, style, markersize=5, label=LABELS[name])
    right.set(xlabel="block (0: the patch embedding)", ylabel="% of the selected connections", yscale="symlog")
    right.set_ylim(0, 110)
    right.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    right.legend(fontsize=8)
    _save(figure, path)
