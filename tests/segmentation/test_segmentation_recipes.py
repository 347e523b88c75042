"""The recipe for Kvasir-SEG: its values, a run of it on a miniature, and its peers."""

from __future__ import annotations

from pathlib import Path

import pytest

import miniatures
from fewtune import recipes
from fewtune.tasks import fit
from segmenters import saved_sam

NAME = "kvasir-seg/sam_vit_b"


def test_values() -> None:
    recipe = recipes.read([NAME])
    assert (recipe.task, recipe.model, recipe.image_size) == ("segmentation", "hf:facebook/sam-vit-base", 1024)
    assert (recipe.optimizer, recipe.lr, recipe.min_lr, recipe.weight_decay) == ("adam", 2e-4, 1e-7, 0.0)
    assert (recipe.epochs, recipe.warmup, recipe.batch_size, recipe.per_neuron) == (20, 0, 1, 1.0)
    assert (recipe.augment, recipe.objective, recipe.norm) == ("flip", "segmentation", "none")


def test_a_run_with_a_small_sam(tmp_path: Path) -> None:
    miniatures.build("kvasir-seg", tmp_path, train=22, test=3)
    recipe = recipes.read([NAME], data=str(tmp_path))
    small = recipe.changed(model=saved_sam(tmp_path / "sam"), image_size=64, epochs=1, accelerator="cpu", limit_train=6)
    metrics = fit(small, tmp_path / "run").metrics
    assert metrics["test"]["images"] == 3
    assert 0 <= metrics["test"]["dice"]["value"] <= 1


@pytest.mark.parametrize("path", sorted((recipes.PEERS / "segmentation").glob("*.yaml")), ids=lambda path: path.stem)
def test_peers_keep_the_recipe(path: Path) -> None:
    """The classification settings of a peer's paper are not brought in; a grid of learning rates is."""
    own, peer = recipes.read([NAME]), recipes.read([NAME, f"method={path.stem}"])
    other = {key for key, value in peer.model_dump().items() if value != getattr(own, key)}
    assert other == {"method", "search_lr"}
    assert own.lr in peer.search_lr
