"""What only Python can say of a run: callbacks, loggers, a transform of the training images, an objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchvision.transforms import v2

import fewtune
from fewtune.errors import ConfigError
from fewtune.selection import Selection
from fewtune.tasks import evaluate, fit
from runs import coloured_folder, tiny_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("own") / "images", each=8)


class Epochs(Callback):
    """Counts the epochs."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seen.append(trainer.current_epoch)


def test_callbacks_and_loggers_join_fewtunes_own(images: Path, tmp_path: Path) -> None:
    epochs, logger = Epochs(), CSVLogger(tmp_path / "log", name="mine", version="one")
    recipe = tiny_recipe(images, epochs=2, importance="magnitude")
    result = fit(recipe, tmp_path / "run", callbacks=[epochs], loggers=[logger])
    assert epochs.seen == [0, 1]
    logged = (tmp_path / "log/mine/one/metrics.csv").read_text().splitlines()
    assert "train_loss" in logged[0]
    assert len(logged) > 2
    assert result.folder.history.exists()
    assert list(result.folder.tensorboard.glob("events.*"))
    with pytest.raises(ConfigError, match="method=linear has no epochs for callbacks"):
        fit(tiny_recipe(images, method="linear"), tmp_path / "linear", callbacks=[epochs])
    assert not (tmp_path / "linear").exists()


def test_training_and_importance_see_the_users_transform(images: Path, tmp_path: Path) -> None:
    shown: list[Any] = []
    plain = v2.Compose([v2.PILToTensor(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)])

    def mine(image: Any) -> Tensor:
        shown.append(image.size)
        return plain(image)

    result = fit(tiny_recipe(images, epochs=2), tmp_path / "run", train_transform=mine)
    trained = result.metrics["train_images"]
    assert len(shown) == (2 + 2) * trained  # two views for importance, and two epochs
    tested = evaluate(result.folder.delta, str(images), accelerator="cpu")
    assert len(shown) == (2 + 2) * trained
    assert tested.to_json()["accuracy"]["value"] == result.metrics["test"]["accuracy"]["value"]


def test_importance_is_of_the_users_objective(images: Path, tmp_path: Path) -> None:
    asked = []

    def first_class(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
        asked.append(len(labels))
        return -model(torch.cat(tuple(inputs))).log_softmax(1)[:, 0].mean()

    recipe = tiny_recipe(images, epochs=1)
    fit(recipe, tmp_path / "usual")
    result = fit(recipe, tmp_path / "run", objective=first_class)
    assert sum(asked) == result.metrics["train_images"]
    chosen, usual = (Selection.load(tmp_path / name / "selection.safetensors") for name in ("run", "usual"))
    assert any(not torch.equal(chosen.places[name].flat, usual.places[name].flat) for name in usual.places)
    assert fewtune.load_delta(result.folder.delta).metadata["method"] == "gps"
