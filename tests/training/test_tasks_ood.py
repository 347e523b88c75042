"""ImageNet-A, -R and -C: the class mapping, and scores on miniatures, against what is counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import miniatures
from fewtune import recipes
from fewtune.classification.ood import ALEXNET_ERRORS, Scorer, mean_corruption_error, outputs_of, score, score_task
from fewtune.cli.app import app
from fewtune.data.formats.imagenet import CORRUPTIONS, SEVERITIES
from fewtune.data.transforms import eval_transform
from fewtune.errors import ConfigError, DataError
from fewtune.models import Backbone
from fewtune.tasks import fit

COLOURS = {wnid: (40 * i + 20, 200 - 30 * i, 10 * i) for i, wnid in enumerate(miniatures.WNIDS)}
"""One colour a class, so that a model can know the classes."""


class ByColour(nn.Module):
    """Knows the colour of each class: output j is the closeness to the colour of class j."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        super().__init__()
        known = [COLOURS.get(name, (255, 255, 255)) for name in class_names]
        self.register_buffer("colours", torch.tensor(known, dtype=torch.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = (images * 0.5 + 0.5).mean(dim=(2, 3)) * 255
        return -torch.cdist(seen, self.colours) / 10


def scorer(class_names: tuple[str, ...]) -> Scorer:
    model = ByColour(class_names)
    spec = Backbone(model, "", (), len(class_names), 8, (0.5,) * 3, (0.5,) * 3)
    return Scorer(model, eval_transform("plain", spec), class_names, accelerator="cpu")


def paint(folder: Path) -> None:
    """Every image of class folders in its class's colour."""
    for path in folder.rglob("*.*"):
        if path.parent.name in COLOURS:
            Image.new("RGB", (12, 12), COLOURS[path.parent.name]).save(path, format="PNG")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ood")
    for key in ("imagenet-a", "imagenet-r", "imagenet-c"):
        miniatures.build(key, root, test=4)
    paint(root)
    return root


def test_classes_are_found_by_name_wherever_they_stand(root: Path) -> None:
    names = miniatures.WNIDS
    for order in (names, names[::-1], ("n00000001", *names[2:], *names[:2], "n00000002")):
        for key in ("imagenet-a", "imagenet-r"):
            got = score(scorer(order), key, root)
            assert got["accuracy"]["value"] == 1.0, order
            assert got["accuracy_among_all_outputs"] == 1.0
            assert (got["images"], got["classes"]) == (12, 3)
        assert score(scorer(order), "imagenet-c", root)["accuracy"] == 1.0


def test_a_wrong_mapping_is_seen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set's own class numbers, 0, 1, 2, are not the model's outputs."""
    from fewtune.classification import ood

    monkeypatch.setattr(ood, "outputs_of", lambda folders, names, what: list(range(len(folders))))
    for key in ("imagenet-a", "imagenet-r"):
        assert score(scorer(miniatures.WNIDS), key, root)["accuracy"]["value"] < 1.0


def test_only_the_classes_of_the_set_compete(root: Path) -> None:
    """An output of another class that wins everywhere costs accuracy among all outputs only."""

    class Distracted(ByColour):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            scores = super().forward(images)
            scores[:, 0] += 50  # the first class is not in the miniature of ImageNet-A
            return scores

    judge = scorer(miniatures.WNIDS)
    got = score(replace(judge, model=Distracted(miniatures.WNIDS)), "imagenet-a", root)
    assert got["accuracy"]["value"] == 1.0
    assert got["accuracy_among_all_outputs"] == 0.0


def test_mapping_of_the_true_200_classes() -> None:
    """Against the lists that timm carries: names of the 200 classes, and their numbers among the 1,000."""
    timm_data = pytest.importorskip("timm.data")
    folder = Path(timm_data.__file__).parent / "_info"
    thousand = (folder / "imagenet_synsets.txt").read_text().split()
    assert len(thousand) == 1000
    for letter in "ar":
        names = (folder / f"imagenet_{letter}_synsets.txt").read_text().split()
        numbers = [int(n) for n in (folder / f"imagenet_{letter}_indices.txt").read_text().split()]
        assert len(names) == 200
        assert outputs_of(names, sorted(thousand), "ImageNet") == numbers


def test_unknown_classes_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"n01484850.*ImageNet-1k|such as n0.*ImageNet-1k"):
        score(scorer(("cat", "dog")), "imagenet-a", root)
    miniatures.build("cifar-100", root)
    with pytest.raises(DataError, match="imagenet-a, -r and -c"):
        score(scorer(miniatures.WNIDS), "cifar-100", root)


def test_corruptions_are_averaged_and_normalised(root: Path, tmp_path: Path) -> None:
    """One corruption in one severity is unreadable to the model: 1 of 75 cells, and its share of the mCE."""
    miniatures.build("imagenet-c", tmp_path)
    paint(tmp_path)
    for path in (tmp_path / "imagenet-c/fog/4").rglob("*.JPEG"):
        other = miniatures.WNIDS[(miniatures.WNIDS.index(path.parent.name) + 1) % 5]
        Image.new("RGB", (12, 12), COLOURS[other]).save(path, format="PNG")
    got = score(scorer(miniatures.WNIDS), "imagenet-c", tmp_path)
    assert got["accuracy"] == pytest.approx(74 / 75)
    assert got["corruptions"]["fog"] == [1, 1, 1, 0, 1]
    assert got["mce"] == pytest.approx(0.2 / 0.819324 / 15)
    (tmp_path / "imagenet-c/snow/5").rename(tmp_path / "snow5")
    with pytest.raises(DataError, match="snow/5 is missing"):
        score(scorer(miniatures.WNIDS), "imagenet-c", tmp_path)


def test_alexnet_has_a_corruption_error_of_1() -> None:
    assert (len(CORRUPTIONS), len(SEVERITIES)) == (15, 5)
    assert mean_corruption_error({name: [1 - error] * 5 for name, error in ALEXNET_ERRORS.items()}) == pytest.approx(1)
    perfect = {name: [1.0] * 5 for name in CORRUPTIONS}
    assert mean_corruption_error(perfect) == 0


def test_a_tuned_task_is_scored_from_its_file(root: Path, tmp_path: Path) -> None:
    miniatures.build("imagenet-1k", tmp_path, train=4, test=2)
    recipe = recipes.read(["imagenet-1k/vit_b16"], data=str(tmp_path)).changed(
        model="timm:test_vit", image_size=32, epochs=1, pretrained=False, accelerator="cpu", val_fraction=0.2
    )
    folder = fit(recipe, tmp_path / "run").folder
    by_file = score_task(folder.delta, ["imagenet-a", "imagenet-r"], root, accelerator="cpu")
    arguments = ["ood", "--delta", str(folder.delta), "--data", str(root), "--accelerator", "cpu", "--json"]
    printed = CliRunner().invoke(app, [*arguments, "imagenet-r"], catch_exceptions=False).stdout
    assert json.loads(printed) == {"imagenet-r": by_file["imagenet-r"]}
    with pytest.raises(DataError, match="ImageNet-A is not in"):
        score_task(folder.delta, ["imagenet-a"], tmp_path)


def test_a_recipe_with_ood_needs_the_sets_before_it_trains(tmp_path: Path) -> None:
    miniatures.build("imagenet-1k", tmp_path, train=4, test=2)
    recipe = recipes.read(["ood/imagenet-1k-vit_b16"], data=str(tmp_path)).changed(pretrained=False)
    with pytest.raises(DataError, match="ImageNet-A is not in"):
        fit(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match="ood needs a declared data set"):
        fit(recipe.changed(data=str(tmp_path / "imagenet-1k/train")), tmp_path / "run")
