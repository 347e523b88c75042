"""Segment Anything from files: the original's layout and transformers' give one model; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewtune.errors import ModelError
from fewtune.segmentation.models import load_segmenter, segmenter_from_description
from fewtune.segmentation.models.sam_layout import converted
from segmenters import images, original_layout, random_sam, sam_configuration, saved_sam

State = dict[str, Tensor]


@pytest.fixture
def configuration(tmp_path: Path) -> str:
    """The architecture of the small model: a folder with a configuration and no weights."""
    sam_configuration().save_pretrained(tmp_path / "configuration")
    return f"hf:{tmp_path / 'configuration'}"


def file_of(state: State, path: Path) -> str:
    torch.save(state, path)
    return f"file:{path}"


@pytest.fixture
def original(tmp_path: Path) -> str:
    return file_of(original_layout(random_sam()), tmp_path / "sam_tiny.pth")


def test_both_layouts_give_the_same_model(original: str, configuration: str, tmp_path: Path) -> None:
    theirs = load_segmenter(original, architecture=configuration)
    ours = load_segmenter(saved_sam(tmp_path / "hf"))
    assert torch.equal(theirs.model(images()), ours.model(images()))
    state = ours.model.state_dict()
    assert theirs.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in theirs.model.state_dict().items())
    box = torch.tensor([[3.0, 4.0, 50.0, 60.0]] * 2)
    assert torch.equal(theirs.model(images(), boxes=box), ours.model(images(), boxes=box))
    assert (theirs.image_size, theirs.mean, theirs.head) == (ours.image_size, ours.mean, ours.head)


def test_the_original_layout_has_every_weight_once() -> None:
    sam = random_sam()
    state = original_layout(sam)
    back = converted(state)
    assert back.keys() == sam.state_dict().keys()
    assert len(state) == len(back) - 1  # transformers holds the matrix of frequencies twice


def test_safetensors_and_transformers_names_are_read_too(configuration: str, tmp_path: Path) -> None:
    sam = random_sam()
    save_file({k: v.contiguous().clone() for k, v in original_layout(sam).items()}, tmp_path / "a.safetensors")
    one = load_segmenter(f"file:{tmp_path / 'a.safetensors'}", architecture=configuration)
    two = load_segmenter(file_of({"model": sam.state_dict()}, tmp_path / "b.pth"), architecture=configuration)
    assert torch.equal(one.model(images()), two.model(images()))


def test_a_description_makes_the_same_model(original: str, configuration: str) -> None:
    segmenter = load_segmenter(original, architecture=configuration, image_size=96)
    described = json.loads(json.dumps(segmenter.describe()))
    again = segmenter_from_description(described)
    assert again.describe() == segmenter.describe()
    assert again.mean == (0.485, 0.456, 0.406)
    assert torch.equal(again.model(images(size=96)), segmenter.model(images(size=96)))
    del described["mean"]
    with pytest.raises(ModelError, match="description of the segmenter is not complete"):
        segmenter_from_description(described)


def test_a_file_of_another_image_size_keeps_its_own(configuration: str, tmp_path: Path) -> None:
    """Checkpoints fine-tuned at another size hold a position grid of that size."""
    state = original_layout(random_sam())
    state["image_encoder.pos_embed"] = torch.zeros(1, 6, 6, 48)
    for i in (1, 3):
        for name in ("rel_pos_h", "rel_pos_w"):
            state[f"image_encoder.blocks.{i}.attn.{name}"] = torch.zeros(11, 16)
    segmenter = load_segmenter(file_of(state, tmp_path / "small.pth"), architecture=configuration)
    assert segmenter.image_size == 96
    assert segmenter.model(images(size=96)).shape == (2, 1, 24, 24)


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "image_encoder.neck.2.weight"), r"1 missing \(vision_encoder\.neck\.conv2\.weight\)"),
        (lambda s: s | {"image_encoder.extra": torch.zeros(2)}, r"1 unexpected \(vision_encoder\.extra\)"),
        (lambda s: s | {"adapter.weight": torch.zeros(2)}, r"1 unexpected \(adapter\.weight\)"),
        (
            lambda s: s | {"mask_decoder.mask_tokens.weight": torch.zeros(4, 8)},
            r"1 of another shape \(mask_decoder\.mask_tokens\.weight\)",
        ),
    ],
    ids=["missing", "unexpected", "foreign", "shape"],
)
def test_a_file_that_does_not_fit(configuration: str, tmp_path: Path, change, message: str) -> None:
    source = file_of(change(original_layout(random_sam())), tmp_path / "wrong.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_segmenter(source, architecture=configuration)
    assert "wrong.pth does not fit SamModel" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_architecture(original: str) -> None:
    with pytest.raises(ModelError, match=r"does not fit SamModel: \d+ missing .*of another shape .*architecture right"):
        load_segmenter(original, architecture="sam:vit-b")


class Harmful:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


def test_code_in_a_file_is_not_run(configuration: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"image_encoder.pos_embed": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ModelError, match="weights_only=True"):
        load_segmenter(f"file:{tmp_path / 'bad.pth'}", architecture=configuration)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("file:none.pth", {"architecture": "sam:vit-b"}, r"none\.pth does not exist"),
        (
            "file:none.pth",
            {"architecture": "sam:vit_b"},
            r"did you mean 'sam:vit-b'\?\); there is sam:vit-b, sam:vit-l, sam:vit-h",
        ),
        ("file:none.pth", {}, "say which model the file holds"),
        ("sam:vit-b", {}, 'give source="file:PATH" with architecture="sam:vit-b"'),
    ],
)
def test_names_that_do_not_exist(source: str, options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_segmenter(source, **options)


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    source = saved_sam(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    save_file(without(state, "vision_encoder.neck.conv1.weight"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"does not give vision_encoder\.neck\.conv1\.weight"):
        load_segmenter(source)
    with pytest.raises(ModelError, match="has no drop path"):
        load_segmenter(source, drop_path=0.1)


def test_random_weights_are_alive_and_the_same_for_one_seed(configuration: str) -> None:
    first, again = (load_segmenter(configuration, pretrained=False, seed=3) for _ in range(2))
    assert torch.equal(first.model(images()), again.model(images()))
    other = load_segmenter(configuration, pretrained=False, seed=4)
    assert not torch.equal(first.model(images()), other.model(images()))
    weight = first.model.sam.vision_encoder.layers[0].attn.qkv.weight
    assert 0.01 < float(weight.std()) < 0.03
