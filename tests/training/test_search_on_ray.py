"""The search's short runs side by side on a Ray cluster: the same study, and killed processes' trials tried again."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from clusters import ray_nodes
from fewtune.tasks import fit
from runs import coloured_folder, tiny_recipe

pytest.importorskip("optuna")
IMAGES, TRIALS = 27, 3
"""Of training and validation, and of the search."""


def ending(folder: Path, count: int) -> Any:
    """A transform that ends its process at the first image after `count` were seen by all, once.

    Made within a function, so that it reaches the processes of the cluster by its code and not by a module's name.
    """

    def transform(image: Any) -> Any:
        with (folder / "seen").open("ab") as file:
            file.write(b".")
            seen = file.tell()
        if seen > count and not (folder / "ended").exists():
            (folder / "ended").touch()
            os._exit(1)
        return plain(image)

    plain = shown_as()
    return transform


def shown_as() -> Any:
    """The same transform without an end."""
    steps = [
        v2.Resize((32, 32)),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    return v2.Compose(steps)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The search's table without times, by learning rate; trials end in any order."""
    with (folder / "search.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: float(row["lr"]))


@pytest.mark.slow
def test_a_search_on_a_cluster_is_that_of_one_process(tmp_path: Path) -> None:
    images = coloured_folder(tmp_path / "images")
    recipe = tiny_recipe(
        images, epochs=1, search_lr=[1e-4, 1e-3, 1e-2], search_k=[1, 2], search_trials=TRIALS, search_epochs=1,
    )  # fmt: skip
    within_a_trial = ending(tmp_path, 2 * IMAGES + IMAGES // 2)  # the pass that scores shows images twice
    with ray_nodes(1, cpus=2):
        ray = fit(recipe, tmp_path / "ray", search=True, on="ray", train_transform=within_a_trial)
    assert (tmp_path / "ended").exists()
    local = fit(recipe, tmp_path / "local", search=True, train_transform=shown_as())
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "local")
    assert len(rows_of(tmp_path / "ray")) == TRIALS
    assert (tmp_path / "ray/delta.safetensors").read_bytes() == (tmp_path / "local/delta.safetensors").read_bytes()
    assert ray.metrics["validation"] == local.metrics["validation"]
