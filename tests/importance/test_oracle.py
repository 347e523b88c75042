"""The oracle |w_full - w_0|: as a score of the core, and from a recipe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fewtune
from fewtune import difference_importance
from fewtune.analysis import rank_correlation
from fewtune.config import recipe_from
from fewtune.errors import ConfigError, DeltaError, ImportanceError
from fewtune.tasks import fit
from runs import coloured_folder, tiny_recipe
from scored import WEIGHTS, batches, net


def _moved(by: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model, and the state of a copy whose weights were moved."""
    model = net()
    tuned = copy.deepcopy(model)
    for name, difference in by.items():
        tuned.get_parameter(name).data += difference
    return model, tuned.state_dict()


def test_scores_are_the_distances_that_the_weights_went() -> None:
    model = net()
    generator = torch.Generator().manual_seed(3)
    by = {n: torch.randn(model.get_parameter(n).shape, generator=generator, dtype=torch.float64) for n in WEIGHTS}
    model, tuned = _moved(by)
    scores = difference_importance(model, tuned)
    assert list(scores) == list(WEIGHTS)
    for name, difference in by.items():
        assert torch.allclose(scores[name], difference.abs())
    best = by["linear.weight"].abs().argmax(dim=1)
    assert torch.equal(fewtune.select(scores, k=1).places["linear.weight"].columns, best)


def test_half_precision_is_subtracted_in_float32() -> None:
    model, tuned = net(torch.float16), {n: p.float() + 1e-6 for n, p in net(torch.float16).state_dict().items()}
    scores = difference_importance(model, tuned)
    assert scores["linear.weight"].dtype is torch.float32
    assert torch.allclose(scores["linear.weight"], torch.tensor(1e-6), rtol=0.1)


def test_states_that_are_no_full_fine_tuning_are_refused() -> None:
    ones = {name: torch.tensor(1.0) for name in WEIGHTS}
    model, tuned = _moved(ones)
    with pytest.raises(ImportanceError, match=r"no linear\.weight \(of 1 weights"):
        difference_importance(model, {n: t for n, t in tuned.items() if n != "linear.weight"})
    with pytest.raises(ImportanceError, match=r"linear\.weight has shape \(6, 8\) and the model's \(8, 6\)"):
        difference_importance(model, {**tuned, "linear.weight": tuned["linear.weight"].T})
    with pytest.raises(ImportanceError, match=r"conv\.weight is the same"):
        difference_importance(*_moved({"linear.weight": torch.tensor(1.0)}))
    with pytest.raises(ImportanceError, match=r"not finite in conv\.weight"):
        difference_importance(model, {**tuned, "conv.weight": tuned["conv.weight"] * float("nan")})


def _one_step(optimizer: type[torch.optim.Optimizer]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model, and the state of a copy after one step of full fine-tuning on all data."""
    model, ((inputs, labels),) = net(), batches(1)
    tuned = copy.deepcopy(model)
    torch.nn.functional.cross_entropy(tuned(inputs), labels).backward()
    optimizer(tuned.parameters(), lr=1e-2).step()  # type: ignore[call-arg]
    return model, tuned.state_dict()


def test_after_one_step_of_descent_the_oracle_is_the_gradient() -> None:
    """The link that the paper's Eq. 3-4 make between the two holds exactly there; Adam's step cuts it at once."""
    gradient = fewtune.gradient_importance(net(), batches(1), fewtune.CrossEntropy())
    oracle = difference_importance(*_one_step(torch.optim.SGD))
    assert rank_correlation(gradient, oracle).network == pytest.approx(1)
    assert fewtune.select(oracle, k=2).places == fewtune.select(gradient, k=2).places
    equal = difference_importance(*_one_step(torch.optim.Adam))
    assert all(9e-3 < float(score.quantile(0.1)) <= float(score.max()) < 1.01e-2 for score in equal.values())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def full(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a full fine-tuning."""
    return fit(tiny_recipe(images, method="full", epochs=1), tmp_path_factory.mktemp("runs") / "full").folder.path


def test_a_recipe_selects_what_its_full_fine_tuning_moved_most(images: Path, full: Path, tmp_path: Path) -> None:
    from fewtune.models import load_backbone

    recipe = tiny_recipe(images, importance="oracle", oracle=str(full), epochs=1, k=2)
    result = fit(recipe, tmp_path / "run")
    selection = fewtune.Selection.load(result.folder.selection)

    before = load_backbone("timm:test_vit", num_classes=3, image_size=32, pretrained=False).model.state_dict()
    after = fewtune.load_delta(full / "delta.safetensors").whole
    for name, places in selection.places.items():
        distance = (after[name] - before[name]).abs().reshape(places.neurons, places.fan_in)
        threshold = distance.topk(2, dim=1).values[:, -1:]
        assert bool((distance[places.mask()].view(-1, 2) >= threshold).all())
        assert len(places) == 2 * places.neurons

    file = recipe.changed(oracle=str(full / "delta.safetensors"))
    again = fit(file, tmp_path / "by file")
    assert fewtune.Selection.load(again.folder.selection) == selection


def test_an_oracle_is_checked_before_anything_is_written(images: Path, full: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            fit(tiny_recipe(images, importance="oracle", epochs=1, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused(
        DeltaError,
        "no-such-run/delta.safetensors does not exist",
        oracle=str(tmp_path / "no-such-run/delta.safetensors"),
    )
    (tmp_path / "empty").mkdir()
    refused(ConfigError, "holds no delta.safetensors", oracle=str(tmp_path / "empty"))
    refused(DeltaError, "backbone", oracle=str(full), image_size=48)
    linear = fit(tiny_recipe(images, method="bias", epochs=1), tmp_path / "bias").folder
    refused(ConfigError, "of a run with method=bias; expected one of method=full", oracle=str(linear.path))


def test_oracle_and_importance_belong_together() -> None:
    base = {"model": "timm:test_vit", "data": "images"}
    with pytest.raises(ConfigError, match="importance=oracle needs a full fine-tuning"):
        recipe_from({**base, "importance": "oracle"})
    with pytest.raises(ConfigError, match="only importance=oracle reads it, and importance is gradient"):
        recipe_from({**base, "oracle": "runs/full"})
    assert recipe_from({**base, "importance": "oracle", "oracle": "runs/full"}).oracle == "runs/full"
