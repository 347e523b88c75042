"""The penalty on the change of an image's logits since the last epoch, and runs with it and with noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewtune
from fewtune.errors import ConfigError
from fewtune.tasks import fit
from fewtune.training.consistency import Consistency
from runs import coloured_folder, tiny_recipe
from stopping import Stop


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def test_the_penalty_is_the_equation_from_the_second_epoch_on() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(6, 4, generator=generator) for _ in range(3))
    consistency, order = Consistency(0.3, 6), torch.tensor([4, 0, 5, 1, 3, 2])
    for indices in order.split(2):
        assert consistency.penalty(first[indices], indices) == 0
    consistency.end_epoch(lambda values: values)
    again = Consistency(0.3, 6)
    again.load_state_dict(consistency.state_dict())
    logits = second.clone().requires_grad_()
    for indices in order.flip(0).split(3):
        expected = 0.3 * sum(((logits[i] - first[i]) ** 2).sum() for i in indices) / 3
        for one in (consistency, again):
            torch.testing.assert_close(one.penalty(logits[indices], indices), expected)
    (gradient,) = torch.autograd.grad(consistency.penalty(logits[:2], torch.tensor([0, 1])), logits)
    torch.testing.assert_close(gradient[:2], 0.3 * (second - first)[:2])  # none goes into the epoch before
    again.end_epoch(lambda values: values)
    indices = torch.arange(6)
    torch.testing.assert_close(again.penalty(third, indices), 0.3 * ((third - second) ** 2).sum() / 6)


def test_a_run_goes_on_to_the_bit(images: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(images, noise=0.5, consistency=0.1, lr=5e-3)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "parts", callbacks=[Stop(2)])
    whole, parts = fit(recipe, tmp_path / "whole"), fit(recipe, tmp_path / "parts", resume=True)
    one, other = (fewtune.load_delta(run.folder.delta).values for run in (whole, parts))
    assert all(torch.equal(one[name], value) for name, value in other.items())
    for off in ({"noise": 0.0}, {"consistency": 0.0}):  # each of the two does something
        less = fewtune.load_delta(fit(recipe.changed(**off), tmp_path / next(iter(off))).folder.delta).values
        assert any(not torch.equal(one[name], value) for name, value in less.items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise": 0.5, "method": "lora"}, "noise: method=lora does not train connections"),
        ({"consistency": 0.1, "mixup": 0.2}, "with mixup no image is shown twice"),
        ({"consistency": 0.1, "task": "segmentation"}, "there is no consistency"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_recipe(tmp_path, **settings)
