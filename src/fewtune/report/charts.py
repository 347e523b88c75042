"""The charts of a report, as SVG that stands in the page and takes its colour of text from it."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewtune.metrics import Interval

History = Sequence[Mapping[str, float]]
"""One entry an epoch."""
INK = "#010203"
"""Stands for the page's colour of text in what matplotlib draws, so that a chart can be read in light and dark."""
COLOURS = ("#2f7ed8", "#d9622b", "#2a9d5c", "#a05ac8", "#c2950c", "#c83f6d", "#3aa6b9", "#7a7f87")
"""Of lines and bars: each has a contrast of at least 3 to the page's light and dark ground."""
SHAPES = "os^DvPX*"
"""Of the marks of classes, beside their colours."""
OTHERS = "other classes"
FEW_IN_BIN = 5
"""Images of a bin under which their share of right ones is no figure."""


def losses(histories: Mapping[str, History]) -> str:
    """Training loss (dashed) and validation loss over the epochs, run by run."""
    figure, (axes,) = _figure(1, 1, (4.6, 2.9))
    for colour, (name, history) in zip(cycle(COLOURS), histories.items(), strict=False):
        epochs, before = _epochs(history), "" if len(histories) == 1 else f"{name}: "
        axes.plot(epochs, [entry["train_loss"] for entry in history], "--", color=colour, label=f"{before}training")
        if "val_loss" in history[0]:
            axes.plot(epochs, [entry["val_loss"] for entry in history], color=colour, label=f"{before}validation")
    axes.set(title="loss", xlabel="epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure, "Loss over the epochs")


def validation(histories: Mapping[str, History], kept: Mapping[str, int | None]) -> str | None:
    """What validation measured over the epochs; a ring marks the epoch that was kept. None where nothing was."""
    figure, (axes,) = _figure(1, 1, (4.6, 2.9))
    for colour, (name, history) in zip(cycle(COLOURS), histories.items(), strict=False):
        for key in [key for key in history[0] if key.startswith("val_") and key != "val_loss"]:
            values = [100 * entry[key] for entry in history]
            axes.plot(_epochs(history), values, color=colour, label=name)
            axes.set(title=f"validation {key.removeprefix('val_')}, %", xlabel="epoch")
            if (epoch := kept.get(name)) is not None and epoch < len(values):
                axes.plot(epoch + 1, values[epoch], "o", mfc="none", mec=colour, markersize=9)
    if not axes.lines:
        return None
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(histories) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure, "Validation measure over the epochs")


def _epochs(history: History) -> list[int]:
    return [int(entry["epoch"]) + 1 for entry in history]


def reliability(confidence: np.ndarray, hit: np.ndarray, bins: int = 10) -> str:
    """Share of right predictions against their stated probability; how many images stand in a bin is drawn below.

    A bin of fewer than `FEW_IN_BIN` images has no point: its share says nothing.
    """
    figure, (axes, counts) = _figure(2, 1, (4.4, 3.8), heights=(3, 1))
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1]), 0, bins - 1)
    number = np.bincount(place, minlength=bins)
    enough = number >= min(FEW_IN_BIN, number.max())
    stated = np.bincount(place, confidence, bins)[enough] / number[enough]
    right = np.bincount(place, hit, bins)[enough] / number[enough]
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1, label="as right as stated")
    axes.plot(stated, right, "o-", color=COLOURS[0], label="this model")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is right")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    counts.bar((edges[:-1] + edges[1:]) / 2, number, width=0.9 / bins, color=COLOURS[7])
    counts.set(xlim=(0, 1), xlabel="stated probability of the prediction", ylabel="images")
    return _svg(figure, "Share of right predictions against the stated probability")


def heat_map(counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix of many classes: rows are the truth, a darker cell is a larger share of its row."""
    matrix = np.asarray(counts, dtype=float)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure, (axes,) = _figure(1, 1, (5.2, 5.0))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted class, by number", ylabel="true class, by number")
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return _svg(figure, f"Confusion matrix of {len(matrix)} classes")


def histogram(values: Sequence[float], unit: str) -> str:
    """How often each score occurs, in bins of 0.05 from 0 to 1."""
    figure, (axes,) = _figure(1, 1, (5.2, 2.6))
    axes.hist(np.clip(values, 0, 1), bins=np.linspace(0, 1, 21), color=COLOURS[0], rwidth=0.92)
    axes.set(xlabel=unit, ylabel="images", xlim=(0, 1))
    return _svg(figure, f"Histogram of {unit} over {len(values)} images")


def differences(intervals: Mapping[str, Interval], unit: str) -> str:
    """Differences with their intervals, one row a name, and a line at zero."""
    figure, (axes,) = _figure(1, 1, (4.8, 0.8 + 0.36 * len(intervals)))
    for row, one in enumerate(intervals.values()):
        told = one.low > 0 or one.high < 0
        colour = COLOURS[0] if told else COLOURS[7]
        axes.plot([100 * one.low, 100 * one.high], [row, row], color=colour, linewidth=2)
        axes.plot(100 * one.value, row, "o", color=colour)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(intervals)), list(intervals))
    axes.invert_yaxis()
    axes.margins(y=0.3)
    axes.set_xlabel(unit)
    return _svg(figure, f"{unit} with intervals, {len(intervals)} rows")


def plane(title: str, places: np.ndarray, labels: Sequence[str], coloured: Sequence[str], wrong: np.ndarray) -> str:
    """Positions [N, 2] of images; a class is a colour and a shape, rings mark what is wrong.

    Args:
        title: above the chart.
        places: where the images lie.
        labels: the class of every image.
        coloured: classes with a colour; all others are one grey.
        wrong: bool [N]; none of them where no prediction is shown.
    """
    figure, (axes,) = _figure(1, 1, (4.6, 4.8))
    kinds = np.array([label if label in coloured else OTHERS for label in labels])
    colours = dict(zip(coloured, COLOURS, strict=False))
    if OTHERS in kinds:
        colours[OTHERS] = COLOURS[-1]
    for (name, colour), shape in zip(colours.items(), SHAPES, strict=False):
        here = places[kinds == name]
        axes.scatter(here[:, 0], here[:, 1], s=16, color=colour, marker=shape, linewidths=0, label=name)
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(True)
    if wrong.any():
        marked = places[wrong]
        axes.scatter(marked[:, 0], marked[:, 1], s=60, facecolors="none", edgecolors=INK, linewidths=0.8, label="wrong")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure, f"Features of {len(labels)} test images in the plane: {title}")


def _figure(rows: int, columns: int, size: tuple[float, float], heights: Sequence[float] | None = None) -> tuple:
    """A figure on a transparent ground, drawn in the page's ink, and its axes as a flat list."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink: dict[Any, Any] = {
        f"{part}color": INK for part in ("text.", "axes.label", "axes.edge", "axes.title", "xtick.", "ytick.")
    }
    sizes: dict[Any, Any] = {"axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}
    with rc_context({**ink, **sizes, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    flat = list(grid.reshape(-1))
    for axes in flat:
        axes.patch.set_alpha(0)
    return figure, flat


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element that scales with the page and names itself to a screen reader."""
    from html import escape

    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fewtune"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: (\d+)[^;\"]*?'[^;\"]*", lambda m: f"font: {m[1]}px sans-serif", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    shape = f'<svg role="img" aria-label="{escape(title)}" style="max-width:{width[1] if width else 600}pt"'
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    return _unique_ids(text.replace("<svg", shape, 1))


def _unique_ids(svg: str) -> str:
    """Ids that start with a digest of the chart: several charts stand in one page, where an id may occur once."""
    prefix = f"c{hashlib.sha256(svg.encode()).hexdigest()[:8]}-"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    return re.sub(r'(url\(#|href="#)', rf"\1{prefix}", svg)
