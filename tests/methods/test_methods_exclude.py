"""`exclude`: nothing is trained in the modules that it names, or the method says that it cannot leave any out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewtune.errors import ConfigError, SelectionError, TuningError
from fewtune.methods import METHODS, Tuner, load_task_file
from fewtune.tasks import prepare
from fewtune.training.tuners import Share
from runs import coloured_folder, tiny_recipe

BELOW_THE_LAST = tuple(f"blocks.{block}." for block in range(5))
SETTINGS: dict[str, dict[str, Any]] = {
    "gps": {},
    "bias": {},
    "adapter": {"bottleneck": 4},
    "lora": {"rank": 2},
    "ssf": {},
    "spt-adapter": {"spt_budget": 8_000, "rank": 2},
    "spt-lora": {"spt_budget": 8_000, "rank": 2},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return coloured_folder(tmp_path_factory.mktemp("data") / "images")


def tuner_of(images: Path, method: str, **changes: Any) -> tuple[Tuner, torch.nn.Module]:
    """A method attached as a run attaches it, and the model."""
    work = prepare(tiny_recipe(images, method=method, **SETTINGS.get(method, {}), **changes))
    run, chosen = Share(work, torch.device("cpu")), METHODS[method]
    prepared = None if chosen.prepare is None else chosen.prepare(run, None)
    return chosen.attach(run, prepared), run.model


@pytest.mark.parametrize("method", SETTINGS)
def test_nothing_is_trained_in_a_module_that_is_left_out(method: str, images: Path, tmp_path: Path) -> None:
    whole, _ = tuner_of(images, method)
    part, model = tuner_of(images, method, exclude=["blocks.0", "patch_embed*"])
    outside = ("blocks.0.", "patch_embed.")
    assert any(name.startswith(outside) for name in whole.named_parameters())
    assert not [name for name in part.named_parameters() if name.startswith(outside)]
    assert any(name.startswith("blocks.1.") for name in part.named_parameters())
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name.startswith(outside)]
    part.delta().save(tmp_path / "task.safetensors")
    again, fresh = load_task_file(tmp_path / "task.safetensors"), prepare(tiny_recipe(images)).backbone.model
    again.apply(fresh)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SETTINGS])
def test_a_method_that_cannot_leave_modules_out_says_so(method: str, images: Path) -> None:
    with pytest.raises(ConfigError, match=rf"exclude: method={method} cannot leave modules out; take gps, bias, ada"):
        tiny_recipe(images, method=method, exclude=["blocks.0"])


@pytest.mark.parametrize("method", SETTINGS)
def test_a_pattern_that_matches_nothing_or_everything_is_refused(method: str, images: Path) -> None:
    with pytest.raises(SelectionError, match=r"no module matches 'block\.0'"):
        tuner_of(images, method, exclude=["block.0"])
    if method != "bias":  # it still trains the head
        with pytest.raises((SelectionError, TuningError), match="exclude fewer modules"):
            tuner_of(images, method, exclude=["*"])


@pytest.mark.parametrize("method", SETTINGS)
def test_nothing_is_trained_below_the_reach(method: str, images: Path) -> None:
    tuner, model = tuner_of(images, method, reach=1)
    assert not [name for name in tuner.named_parameters() if name.startswith(("patch_embed.", *BELOW_THE_LAST))]
    assert any(name.startswith("blocks.5.") for name in tuner.named_parameters())
    given = []
    model.train()
    model.blocks[5].register_forward_pre_hook(lambda module, args: given.append(args[0].requires_grad))
    model(torch.randn(2, 3, 32, 32))
    assert given == [False]
