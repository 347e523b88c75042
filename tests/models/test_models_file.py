"""A backbone from a local checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewtune.errors import ModelError
from fewtune.models import Backbone, backbone_from_description, load_backbone

TINY = "timm:vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def trained() -> Backbone:
    """What somebody trained: five classes at 32 px, no two weights alike."""
    return load_backbone(TINY, num_classes=5, image_size=32, pretrained=False, seed=9)


@pytest.fixture
def state(trained: Backbone) -> dict[str, torch.Tensor]:
    return dict(trained.model.state_dict())


def load(path: Path, num_classes: int | None, image_size: int = 32, architecture: str | None = TINY) -> Backbone:
    return load_backbone(f"file:{path}", num_classes=num_classes, image_size=image_size, architecture=architecture)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "state_dict", "model of DDP"])
def test_every_way_to_store_weights(kind: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    match kind:
        case "safetensors":
            save_file(state, path)
        case "pth":
            torch.save(state, path)
        case "state_dict":
            torch.save({"epoch": 3, "state_dict": state}, path)
        case _:
            torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    backbone = load(path, num_classes=5)
    loaded = backbone.model.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert backbone.source == f"file:{path}"
    again = backbone_from_description(backbone.describe(), 5)
    assert torch.equal(again.model.get_parameter("head.weight"), state["head.weight"])


def test_head_of_another_task_is_fresh(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "x.safetensors")
    loaded = load(tmp_path / "x.safetensors", num_classes=3).model.state_dict()
    assert loaded["head.weight"].shape == (3, 192)
    assert not loaded["head.bias"].any()
    assert all(torch.equal(loaded[key], state[key]) for key in state if not key.startswith("head."))


def test_the_files_own_classes(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "x.safetensors")
    backbone = load(tmp_path / "x.safetensors", num_classes=None)
    assert backbone.num_classes == 5
    assert torch.equal(backbone.model.get_parameter("head.weight"), state["head.weight"])


def test_a_file_without_a_head(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors", num_classes=3).num_classes == 3
    assert load(tmp_path / "x.safetensors", num_classes=None).head == ()


@pytest.mark.parametrize("architecture", [TINY, "timm:convnext_atto"])
def test_a_model_without_a_head_takes_a_file_with_one(architecture: str, tmp_path: Path) -> None:
    whole = load_backbone(architecture, num_classes=4, image_size=32, pretrained=False, seed=2)
    save_file(whole.model.state_dict(), tmp_path / "x.safetensors")
    bare = load(tmp_path / "x.safetensors", num_classes=0, architecture=architecture)
    assert bare.head == ()
    assert all(torch.equal(value, whole.model.state_dict()[key]) for key, value in bare.model.state_dict().items())


def test_positions_are_resampled_for_another_size(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "x.safetensors")
    larger = load(tmp_path / "x.safetensors", num_classes=5, image_size=64).model.get_parameter("pos_embed")
    assert larger.shape == (1, 17, 192)
    assert torch.equal(larger[:, :1], state["pos_embed"][:, :1])  # the class token has no place in the grid
    grid = state["pos_embed"][0, 1:]
    assert torch.allclose(larger[0, 1:].mean(0), grid.mean(0), atol=0.02)


def test_keys_that_do_not_fit_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    lost = {k: v for k, v in state.items() if not k.startswith("blocks.3.")}
    save_file(lost, path)
    with pytest.raises(ModelError, match=r"12 missing \(blocks\.3\.norm1\.weight, .*…\); is the architecture right"):
        load(path, 5)
    save_file({**state, "extra.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"1 unexpected \(extra\.weight\)"):
        load(path, 5)
    save_file({**state, "norm.weight": torch.zeros(7)}, path)
    with pytest.raises(ModelError, match=r"1 of another shape \(norm\.weight\)"):
        load(path, 5)


class Anything:
    """What a checkpoint with code in it holds."""


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def fails(path: Path, words: str, architecture: str | None = TINY) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            load(path, 5, architecture=architecture)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "absent.pth", "does not exist")
    fails(tmp_path / "absent.pth", "architecture=timm:NAME", architecture=None)
    torch.save({"model": Anything()}, tmp_path / "code.pth")
    fails(tmp_path / "code.pth", "weights_only=True")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    fails(tmp_path / "broken.safetensors", "cannot be read")
    (tmp_path / "empty.pth").touch()
    fails(tmp_path / "empty.pth", "cannot be read")
    torch.save([1, 2], tmp_path / "list.pth")
    fails(tmp_path / "list.pth", "holds a list")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    fails(tmp_path / "none.pth", "no tensors; its keys are epoch")
