"""Measures of images of any number of classes, and of masks of several, as the tables of a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def any_number(test: Mapping[str, Any]) -> dict[str, Any]:
    """Where an image may have any number of classes: means, and each class, the worst average precision first."""
    means = {"mean average precision": "map", "F1, mean over classes": "f1", "F1, mean over images": "f1_images"}
    keys = ("class_names", "support", "average_precision", "f1_by_class", "precision", "recall", "thresholds")
    names = ("name", "images", "ap", "f1", "precision", "recall", "threshold")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(test[key] for key in keys), strict=True)]
    rows.sort(key=lambda row: 1.0 if row["ap"] is None else row["ap"])
    return {"means": {name: test[key] for name, key in means.items()}, "classes": rows}


def class_masks(test: Mapping[str, Any]) -> dict[str, Any]:
    """Measures of masks of several classes: means, and each class, the worst IoU first."""
    means = {"mean IoU over classes": "miou", "mean Dice over classes": "mdice", "Dice, mean over images": "dice"}
    pixels = [sum(row) for row in test["confusion"]]
    columns = (test["class_names"], pixels, test["iou_by_class"], test["dice_by_class"])
    rows = [dict(zip(("name", "pixels", "iou", "dice"), row, strict=True)) for row in zip(*columns, strict=True)]
    rows.sort(key=lambda row: 1.0 if row["iou"] is None else row["iou"])
    return {"means": {name: test[key] for name, key in means.items()}, "classes": rows}
