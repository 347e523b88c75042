"""`keep_prefix`: what lies below the reach is computed once for each image, and training is the same as without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from fewtune.errors import ConfigError, TuningError
from fewtune.files import read_json
from fewtune.methods.reach import Border, find_border
from fewtune.tasks import fit, prepare
from fewtune.training.kept import KeptPrefix
from fewtune.training.loaders import seeded_all
from fewtune.training.seen import content_digests
from fewtune.training.shortcut import Shortcut
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefixes"


def rows_in(cache: Path) -> int:
    return sum(len(read_json(names)) for names in cache.rglob("*.json"))


def losses(folder: Path) -> list[tuple[float, ...]]:
    keys = ("train_loss", "val_loss", "val_accuracy")
    return [tuple(entry[key] for key in keys) for entry in read_json(folder / "history.json")]


@pytest.mark.parametrize(
    ("model", "reach"), [("timm:test_vit", 2), ("timm:test_convnext", 2), ("timm:test_efficientnet", 1)]
)
def test_training_is_the_same_as_without(model: str, reach: int, images: Path, tmp_path: Path, cache: Path) -> None:
    common: dict[str, Any] = {"model": model, "reach": reach, "epochs": 2, "drop_path": 0.2}
    if "efficientnet" in model:
        del common["drop_path"]
    plain = fit(tiny_recipe(images, **common), tmp_path / "plain")
    kept = fit(tiny_recipe(images, **common, keep_prefix="float32"), tmp_path / "kept")
    half = fit(tiny_recipe(images, **common, keep_prefix="float16"), tmp_path / "half")
    data = prepare(tiny_recipe(images)).data
    assert data.val is not None
    assert rows_in(cache) == 2 * (len(data.train) + len(data.val))
    torch.testing.assert_close(losses(tmp_path / "kept"), losses(tmp_path / "plain"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(tmp_path / "half"), losses(tmp_path / "plain"), rtol=2e-3, atol=2e-3)
    assert kept.metrics["test"]["accuracy"] == plain.metrics["test"]["accuracy"]
    assert half.metrics["delta_bytes"] < 2 * plain.metrics["delta_bytes"]  # nothing that is kept is in the task file


def test_other_seeds_and_later_runs_find_what_was_computed(images: Path, tmp_path: Path, cache: Path) -> None:
    weights = timm.create_model("test_vit", img_size=32).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    common: dict[str, Any] = {"reach": 1, "epochs": 1, "keep_prefix": "float32", "pretrained": True}
    common |= {"model": f"file:{tmp_path / 'weights.pth'}", "arch": "timm:test_vit"}
    fit(tiny_recipe(images, **common), tmp_path / "first")
    rows, known = rows_in(cache), set(cache.iterdir())
    fit(tiny_recipe(images, **common, lr=0.01), tmp_path / "second")
    assert rows_in(cache) == rows  # nothing anew
    fit(tiny_recipe(images, **common, seed=1), tmp_path / "third")
    assert rows_in(cache) == rows  # the same images, split into training and validation otherwise
    assert set(cache.iterdir()) == known
    weights["blocks.0.norm1.weight"] += 1
    torch.save(weights, tmp_path / "weights.pth")
    fit(tiny_recipe(images, **common), tmp_path / "fourth")
    assert rows_in(cache) == 2 * rows


def test_views_are_kept_and_shown_in_turn(images: Path) -> None:
    recipe = tiny_recipe(images, reach=2, augment="flip", keep_prefix="float32", prefix_views=2)
    work = prepare(recipe)
    model, train = work.backbone.model, work.train
    kept = KeptPrefix.of(model, find_border(model, 2), recipe, {"train": train, "val": None})
    content, below = content_digests(train)[3], Shortcut(model, find_border(model, 2)).below
    for epoch in range(3):
        with seeded_all(int.from_bytes(content, "big"), epoch % 2):
            image, label = train[3]
        row, kept_label, index = kept.images["train"][epoch, 3]
        torch.testing.assert_close(row, below(image[None])[0], rtol=1e-5, atol=1e-6)
        assert (kept_label, index) == (label, 3)


def test_what_a_killed_run_left_is_computed_again(images: Path, tmp_path: Path, cache: Path) -> None:
    recipe = tiny_recipe(images, reach=1, epochs=1, keep_prefix="float32")
    fit(recipe, tmp_path / "first")
    rows = rows_in(cache)
    for names in cache.rglob("*.json"):
        names.unlink()
    again = fit(recipe, tmp_path / "second")
    assert rows_in(cache) == rows
    assert again.metrics["test"] == read_json(tmp_path / "first" / "metrics.json")["test"]


def test_the_limit_holds_and_is_told_beforehand(images: Path, tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"above prefix_limit=1e-05"):
        fit(tiny_recipe(images, reach=1, keep_prefix="float32", prefix_limit=1e-5), tmp_path / "run")
    assert not list(cache.rglob("*.npy"))
    assert not (tmp_path / "run" / "selection.safetensors").exists()  # said before anything was selected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "without a reach nothing lies below it"),
        ({"reach": 1, "mixup": 0.5}, "with mixup images do not go"),
        ({"reach": 1, "augment": "flip"}, "take augment=plain, or prefix_views=4"),
    ],
)
def test_what_cannot_be_kept_is_refused(settings: dict[str, Any], message: str, images: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(images, keep_prefix="float16", **settings)


def models() -> Iterator[Any]:
    yield pytest.param(lambda: timm.create_model("test_resnet", num_classes=3), 2, id="ResNet of timm")
    yield pytest.param(lambda: torchvision.models.resnet18(num_classes=3), 1, id="ResNet of torchvision")
    yield pytest.param(
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", num_classes=3, img_size=32, window_size=4, embed_dim=16, depths=(1, 2),
            num_heads=(2, 2),
        ), 1, id="Swin",
    )  # fmt: skip


@pytest.mark.parametrize(("make", "reach"), models())
def test_the_halves_of_other_networks_give_what_the_whole_gives(make: Any, reach: int) -> None:
    model = make().eval()
    halves, images = Shortcut(model, find_border(model, reach)), torch.randn(3, 3, 32, 32)
    halves.check(images)
    more = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(halves.above(halves.below(more)), model(more))
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_a_way_around_the_border_is_noticed() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = self.stem(x)
            return self.block(low) + low

    model = Around()
    with pytest.raises(TuningError, match="depends on more from below block"):
        Shortcut(model, Border("block", model.block, {"stem": model.stem}, ())).check(torch.randn(2, 4))
