"""Backbones by name: timm, torchvision, transformers. Small models with random weights, and no network."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fewtune.errors import ConfigError, MissingExtra, ModelError
from fewtune.models import (
    SOURCES,
    Backbone,
    LoadOptions,
    Source,
    backbone_from_description,
    load_backbone,
    logits,
    online,
)
from fewtune.plugins import Deferred, Table
from hub_server import hub_server

TINY = "timm:vit_tiny_patch16_224"


def random_backbone(source: str = TINY, num_classes: int | None = 3, image_size: int | None = 32, **options):
    return load_backbone(source, num_classes=num_classes, image_size=image_size, pretrained=False, **options)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def fails(source: str, *words: str, **options) -> None:
    """load_backbone raises a ModelError of one line that holds all the words."""
    with pytest.raises(ModelError) as caught:
        random_backbone(source, **options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# What holds for every source


@pytest.mark.parametrize(
    ("source", "image_size", "head"),
    [
        (TINY, 32, ("head",)),
        ("timm:resnet10t", 40, ("fc",)),
        ("timm:convnext_atto", 40, ("head.fc",)),
        ("timm:deit_tiny_distilled_patch16_224", 32, ("head", "head_dist")),
        ("torchvision:resnet18", 40, ("fc",)),
        ("torchvision:vit_b_32", 32, ("heads.head",)),
        ("torchvision:squeezenet1_1", 64, ("classifier.1",)),
        ("demo:vit-small", 28, ("head",)),
        ("demo:efficientnet-lite0", 32, ("classifier",)),
    ],
)
def test_fresh_head_and_size(source: str, image_size: int, head: tuple[str, ...]) -> None:
    backbone = random_backbone(source, num_classes=3, image_size=image_size)
    assert backbone.head == head
    assert (backbone.num_classes, backbone.image_size) == (3, image_size)
    assert not backbone.model.training
    with torch.no_grad():
        output = logits(backbone.model(torch.zeros(2, 3, image_size, image_size)))
    assert output.shape == (2, 3)
    for name in head:
        layer = backbone.model.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        assert layer.weight.shape[0] == 3
        assert 0.01 < layer.weight.std() < 0.03
        assert not layer.bias.any()  # type: ignore[union-attr]


def test_seed_decides_the_weights_and_the_callers_stream_is_untouched() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, twin, other = random_backbone(), random_backbone(), random_backbone(seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(one.model.state_dict(), twin.model.state_dict())
    assert not torch.equal(one.model.get_parameter("head.weight"), other.model.get_parameter("head.weight"))


def test_no_number_of_classes_keeps_the_models_own_head() -> None:
    assert random_backbone(num_classes=None).num_classes == 1000
    assert random_backbone("torchvision:resnet18", num_classes=None).num_classes == 1000
    assert random_backbone(num_classes=0).head == ()


def test_normalisation_and_size_are_the_models_own() -> None:
    augreg = load_backbone("timm:vit_tiny_patch16_224.augreg_in21k", num_classes=2, pretrained=False)
    assert (augreg.mean, augreg.std, augreg.image_size) == ((0.5,) * 3, (0.5,) * 3, 224)
    assert (augreg.interpolation, augreg.crop_pct) == ("bicubic", 0.9)
    resnet = load_backbone("torchvision:resnet18", num_classes=2, pretrained=False)
    assert (resnet.mean, resnet.image_size, resnet.interpolation) == ((0.485, 0.456, 0.406), 224, "bilinear")
    assert resnet.crop_pct == pytest.approx(224 / 256)


@pytest.mark.parametrize("source", [TINY, "torchvision:convnext_tiny"])
def test_drop_path_reaches_the_model(source: str) -> None:
    def rates(backbone) -> float:
        found = (getattr(m, "drop_prob", None) or getattr(m, "p", 0.0) for m in backbone.model.modules())
        return max(rate for rate in found if isinstance(rate, float))

    assert rates(random_backbone(source, drop_path=0.25)) == pytest.approx(0.25)
    assert random_backbone(source, drop_path=0.25).arguments["drop_path"] == 0.25


@pytest.mark.parametrize("source", [TINY, "torchvision:resnet18", "demo:vit-small"])
def test_description_makes_the_same_backbone_again(source: str) -> None:
    size = 28 if source.startswith("demo") else 32
    backbone = random_backbone(source, num_classes=4, image_size=size, seed=3)
    description = json.loads(json.dumps(backbone.describe()))
    again = backbone_from_description(description, 4)
    assert same(backbone.model.state_dict(), again.model.state_dict())
    assert again.describe() == backbone.describe()
    assert backbone_from_description(description, 7).num_classes == 7
    moved = backbone_from_description({**description, "mean": [0.1, 0.2, 0.3]}, 4)
    assert moved.mean == (0.1, 0.2, 0.3)
    with pytest.raises(ModelError, match="crop_pct"):
        backbone_from_description({k: v for k, v in description.items() if k != "crop_pct"}, 4)


def test_logits_of_any_output() -> None:
    tensor = torch.rand(2, 3)
    assert logits(tensor) is tensor
    assert logits(SimpleNamespace(logits=tensor)) is tensor
    assert logits((tensor, torch.rand(1))) is tensor
    with pytest.raises(ModelError, match="dict"):
        logits({"a": tensor})


# Mistakes


def test_wrong_names_are_answered_with_the_nearest() -> None:
    fails("timm:vit_smal_patch16_224", "vit_small_patch16_224")
    fails("vit_smal_patch16_224", "vit_small_patch16_224")
    fails("timm:zzzz", "list_models")
    fails("torchvision:resnet19", "resnet18")
    fails("torchvision:fasterrcnn_resnet50_fpn", "classification")
    fails("demo:vit", "demo:vit-small")
    fails("keras:vit", "timm, hf, torchvision, file, demo")
    fails("timm:", "a name is missing")


def test_arguments_that_a_model_does_not_take() -> None:
    fails("torchvision:resnet18", "drop path", drop_path=0.1)
    fails("timm:vgg11", "drop_path_rate", drop_path=0.1)
    fails(TINY, "8 px, less than one patch", image_size=8)
    for wrong in ({"image_size": 0}, {"drop_path": 1.0}, {"drop_path": float("nan")}, {"num_classes": -1}):
        with pytest.raises(ConfigError):
            random_backbone(**wrong)  # type: ignore[arg-type]


def test_unknown_weights_of_a_known_model() -> None:
    with pytest.raises(ModelError, match=r"vit_tiny_patch16_224\.augreg_in21k"):
        load_backbone("timm:vit_tiny_patch16_224.nonsense", num_classes=2)


# transformers


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with 5 classes and its processor, as a user's folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config.num_labels = 5
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_hugging_face_folder(vit: Path) -> None:
    own = load_backbone(f"hf:{vit}", num_classes=None)
    fresh = load_backbone(f"hf:{vit}", num_classes=3)
    assert (own.num_classes, fresh.num_classes) == (5, 3)
    assert own.head == fresh.head == ("classifier",)
    assert (fresh.image_size, fresh.mean, fresh.std) == (32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (fresh.interpolation, fresh.crop_pct) == ("bilinear", 1.0)
    with torch.no_grad():
        assert logits(fresh.model(torch.zeros(2, 3, 32, 32))).shape == (2, 3)
    one, other = own.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one if not key.startswith("classifier"))
    assert torch.equal(other["classifier.bias"], torch.zeros(3))
    again = backbone_from_description(json.loads(json.dumps(fresh.describe())), 3)
    assert same(other, again.model.state_dict())


def test_hugging_face_weights_must_come_from_the_checkpoint(vit: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ModelError, match=r"position_embeddings at 64 px \(leave the image size out\)"):
        load_backbone(f"hf:{vit}", num_classes=3, image_size=64)
    for file in vit.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(vit / "model.safetensors")
    lost = next(key for key in state if key.endswith("layernorm.weight"))
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="does not give"):
        load_backbone(f"hf:{tmp_path}", num_classes=3)


@pytest.mark.parametrize("family", ["ConvNext", "Swin", "ResNet", "Dinov2"])
def test_hugging_face_families(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4},
        "ResNet": {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
        "Dinov2": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    }
    config = getattr(transformers, f"{family}Config")(**small[family])
    config.num_labels = 4
    getattr(transformers, f"{family}ForImageClassification")(config).save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}", num_classes=3)
    assert backbone.head == ("classifier",)
    size = getattr(config, "image_size", 32)
    with torch.no_grad():
        assert logits(backbone.model(torch.zeros(1, 3, size, size))).shape == (1, 3)


@contextmanager
def silent_hub() -> Iterator[tuple[str, list[object]]]:
    """The address of a server that takes connections and never answers, and the connections."""
    taken: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            with suppress(OSError):
                while True:
                    taken.append(server.accept())

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("source", ["hf:nobody/nothing", "timm:vit_tiny_patch16_224.augreg_in21k"])
def test_a_hub_that_does_not_answer_is_asked_once(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client alone asks six times for every file, over half a minute."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(online, "WAIT", (0.3,))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with silent_hub() as (address, taken):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(
            ModelError, match=r"not in the hub's cache, and the hub cannot be reached; is there"
        ) as told:
            load_backbone(source, num_classes=2)
    assert "\n" not in str(told.value)
    assert len(taken) == 1
    assert not constants.HF_HUB_OFFLINE  # asked again next time


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    with hub_server() as hub:  # it answers 404
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        with online.hub_or_cache():
            assert not constants.HF_HUB_OFFLINE
        asked = len(hub.asked)
        with online.hub_or_cache():
            assert not constants.HF_HUB_OFFLINE
        assert len(hub.asked) == asked  # one answer is enough


# Sources of one's own


def test_a_source_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, options: LoadOptions) -> Backbone:
        return replace(SOURCES["timm"].load(f"test_{name}", options), source=f"mine:{name}")

    monkeypatch.setitem(SOURCES, "mine", Source(load))
    backbone = random_backbone("mine:vit", num_classes=4)
    assert (backbone.source, backbone.num_classes, backbone.image_size) == ("mine:vit", 4, 32)
    again = backbone_from_description(json.loads(json.dumps(backbone.describe())), 4)
    assert same(backbone.model.state_dict(), again.model.state_dict())


def test_a_source_whose_library_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    table: Table[Source] = Table("fewtune.sources", "source", deferred={"x": Deferred("a.b:C", ("no_such_lib",), "hf")})
    with pytest.raises(MissingExtra, match=r"no_such_lib is not installed.*fewtune\[hf\]"):
        table["x"]


def test_hugging_face_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails("hf:nobody/nothing", "could not be loaded", "network")
    fails(f"hf:{tmp_path}", "could not be loaded")


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_segment_anything_without_its_task_says_what_to_add(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in (f"hf:{tmp_path}", "sam:vit-b"):
        with pytest.raises(ModelError, match=rf"{name} is a segmenter.*add task=segmentation.*; "):
            load_backbone(name, num_classes=3, pretrained=False)
