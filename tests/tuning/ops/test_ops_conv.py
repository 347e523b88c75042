"""The selected weight gradient of convolutions against the whole dense gradient: every kind, layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewtune.tuning.ops import (
    ConvShape,
    SelectedPlaces,
    conv_keep,
    conv_selected_gradient,
    patches,
    reference,
    torch_conv,
)

# Largest error allowed, as a share of the layer's largest gradient.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def shape(kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int = 1) -> ConvShape:
    return ConvShape(kernel, stride, padding, dilation, groups)


# name: (images, in channels, neurons, input size, convolution)
KINDS = {
    "pointwise": (2, 6, 5, (7, 5), shape((1, 1), (1, 1), (0, 0), (1, 1))),
    "pointwise strided": (2, 6, 5, (7, 6), shape((1, 1), (2, 2), (0, 0), (1, 1))),
    "patches": (3, 3, 8, (8, 12), shape((4, 4), (4, 4), (0, 0), (1, 1))),
    "patches with a rest": (3, 3, 8, (9, 14), shape((4, 4), (4, 4), (0, 0), (1, 1))),
    "square": (2, 5, 7, (6, 6), shape((3, 3), (1, 1), (1, 1), (1, 1))),
    "oblong": (2, 5, 7, (9, 6), shape((3, 1), (2, 1), (2, 0), (1, 1))),
    "strided": (2, 4, 6, (11, 10), shape((3, 3), (2, 2), (1, 1), (1, 1))),
    "dilated": (2, 4, 6, (11, 10), shape((3, 3), (1, 2), (2, 3), (2, 3))),
    "gaps": (2, 4, 6, (11, 10), shape((2, 2), (3, 3), (0, 0), (1, 1))),
    "grouped": (2, 6, 9, (6, 6), shape((3, 3), (1, 1), (1, 1), (1, 1), 3)),
    "depthwise": (2, 6, 6, (9, 8), shape((5, 5), (1, 1), (2, 2), (1, 1), 6)),
    "depthwise strided": (2, 6, 12, (9, 8), shape((3, 3), (2, 2), (1, 1), (1, 1), 6)),
    "one channel": (2, 1, 3, (5, 5), shape((3, 3), (1, 1), (1, 1), (1, 1))),
    "one neuron": (1, 7, 1, (5, 5), shape((3, 3), (1, 1), (0, 0), (1, 1))),
    "one position": (3, 4, 5, (3, 3), shape((3, 3), (1, 1), (0, 0), (1, 1))),
    "line": (2, 5, 7, (13,), shape((3,), (2,), (1,), (2,))),
    "line depthwise": (2, 6, 6, (13,), shape((5,), (1,), (2,), (1,), 6)),
    "volume": (2, 3, 4, (5, 4, 6), shape((2, 3, 2), (1, 2, 1), (1, 1, 0), (1, 1, 2))),
}


def places_of(kind: str, selection: str) -> SelectedPlaces:
    """Selections: K of each neuron, all, ragged, or K = 1 out of two columns ("few": columns are worth keeping)."""
    _, channels, neurons, _, conv = KINDS[kind]
    taps = math.prod(conv.kernel_size)
    fan_in = channels // conv.groups * taps
    torch.manual_seed(len(kind))
    if selection == "ragged":
        flat = torch.randperm(neurons * fan_in)[: max(1, neurons * fan_in // 5)].sort().values
    else:
        k = {"one": 1, "two": min(2, fan_in), "all": fan_in, "few": 1}[selection]
        among = min(2, fan_in) if selection == "few" else fan_in
        index = torch.stack([torch.randperm(among)[:k].sort().values for _ in range(neurons)])
        flat = (torch.arange(neurons)[:, None] * fan_in + index).flatten()
    return SelectedPlaces.of((neurons, fan_in), flat, groups=conv.groups, taps=taps)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert (got.double() - expected.double()).abs().max().item() <= TOLERANCE[dtype] * scale


def tensors(kind: str, dtype: torch.dtype, x_last: bool, dy_last: bool) -> tuple[Tensor, Tensor]:
    images, channels, neurons, size, conv = KINDS[kind]
    x = torch.randn(images, channels, *size).to(dtype)
    dy = torch.randn(images, neurons, *conv.positions(size)).to(dtype)
    return patches.laid_out(x, x_last), patches.laid_out(dy, dy_last)


@pytest.mark.parametrize("selection", ["one", "two", "all", "few", "ragged"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_last", [False, True], ids=["planes", "pixels"])
@pytest.mark.parametrize("whole", [False, True])
def test_every_kind_matches_reference(kind: str, selection: str, x_last: bool, whole: bool) -> None:
    places, conv = places_of(kind, selection), KINDS[kind][-1]
    for dtype in TOLERANCE:
        for dy_last in (False, True):
            x, dy = tensors(kind, dtype, x_last, dy_last)
            kept = conv_keep(x, places, conv, keep_whole=whole)
            got = conv_selected_gradient(dy, kept, places, conv, x.shape)
            expected = reference.conv_selected_gradient(dy.double(), x.double(), places, *conv)
            assert_close(got, expected, dtype)


WAYS = [(kind, way) for kind in KINDS for way in ("_by_gather", "_by_library")]
WAYS += [(kind, "_by_product" if KINDS[kind][-1].groups == 1 else "_by_picking") for kind in KINDS]
PRICES = {"_by_product": "product", "_by_gather": "conv_gather", "_by_library": "library", "_by_picking": "pick"}


@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("selection", ["two", "few", "ragged"])
def test_every_way_and_many_blocks(kind: str, selection: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = KINDS[kind][-1]
    for block in (1, 100, 2**21):
        monkeypatch.setattr(torch_conv, "BLOCK", block)
        monkeypatch.setattr(torch_conv.cost, PRICES[way], lambda *_, **__: -1e9)
        used = []
        original = getattr(torch_conv, way)
        monkeypatch.setattr(torch_conv, way, lambda *a, **k: used.append(1) or original(*a, **k))  # noqa: B023
        places = places_of(kind, selection)
        for last in (False, True):
            x, dy = tensors(kind, torch.float32, last, last)
            column = (places.hot_index, places.rows, places.hot // places.taps, places.hot_tap)
            got = torch_conv.selected_gradient(dy, x, *column, *conv)
            expected = reference.conv_selected_gradient(dy.double(), x.double(), places, *conv)
            assert_close(got, expected, torch.float32)
        assert bool(used) != (way == "_by_picking" and places.rows is not None), "rows of one length are picked"
        monkeypatch.undo()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][-1].groups > 1])
def test_picked_columns_are_the_inputs_own_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an output gradient of one 1, dV is the number that the connection saw, bit for bit, and nothing unfolds."""
    monkeypatch.setattr(torch_conv.cost, "pick", lambda *_, **__: -1e9)
    monkeypatch.setattr(torch_conv.Unfolded, "of", lambda *_: pytest.fail("the input was unfolded"))
    places, conv = places_of(kind, "two"), KINDS[kind][-1]
    x, dy = tensors(kind, torch.float32, True, True)
    dy = torch.zeros_like(dy)
    dy.view(*dy.shape[:2], -1)[1, :, 3] = 1
    column = (places.hot_index, places.rows, places.hot // places.taps, places.hot_tap)
    expected = reference.conv_selected_gradient(dy.double(), x.double(), places, *conv)
    assert torch.equal(torch_conv.selected_gradient(dy, x, *column, *conv), expected.float())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][-1].groups == 1])
@pytest.mark.parametrize("selection", ["two", "few", "ragged"])
@pytest.mark.parametrize("block", [1, 100, 2**21])
def test_products_as_pointwise_convolutions(
    kind: str, selection: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few columns: of an input that is unfolded, and of columns that were kept."""
    monkeypatch.setattr(torch_conv, "BLOCK", block)
    monkeypatch.setattr(torch_conv.cost, "POINTWISE_COLUMNS", 0)
    monkeypatch.setattr(torch_conv.cost, "POINTWISE_WEIGHTS", 0)
    monkeypatch.setattr(torch_conv.cost, "product", lambda *_, **__: -1e9)
    used = []
    original = torch_conv._pointwise_gradient
    monkeypatch.setattr(torch_conv, "_pointwise_gradient", lambda *a: used.append(1) or original(*a))
    places, conv = places_of(kind, selection), KINDS[kind][-1]
    x, dy = tensors(kind, torch.float32, False, False)
    expected = reference.conv_selected_gradient(dy.double(), x.double(), places, *conv)
    channel, tap = places.hot // places.taps, places.hot_tap
    got = torch_conv.selected_gradient(dy, x, places.hot_index, places.rows, channel, tap, *conv)
    assert_close(got, expected, torch.float32)
    unfolded = patches.Unfolded.of(x, *conv[:4])
    kept = unfolded.columns(unfolded.offsets(channel, tap))
    assert len(used) > 0
    used.clear()
    got = torch_conv.selected_gradient(dy, kept, places.hot_index, places.rows, None, None, *conv)
    assert_close(got, expected, torch.float32)
    assert len(used) == (1 if not patches.channels_last(kept) else 0)  # all images at once: nothing is copied


@pytest.mark.parametrize("kind", ["pointwise", "square", "depthwise", "patches", "line"])
def test_awkward_gradients_and_empty_batch(kind: str) -> None:
    places, conv = places_of(kind, "two"), KINDS[kind][-1]
    x, dy = tensors(kind, torch.float32, False, False)
    for awkward in (
        dy[:1, :1].expand_as(dy),
        torch.randn(()).expand_as(dy),
        dy.transpose(0, -1).contiguous().transpose(0, -1),
        torch.stack([dy, dy], -1)[..., 0],
    ):
        for whole in (False, True):
            kept = conv_keep(x, places, conv, keep_whole=whole)
            got = conv_selected_gradient(awkward, kept, places, conv, x.shape)
            assert_close(got, reference.conv_selected_gradient(awkward.double(), x.double(), places, *conv), x.dtype)
    crooked = torch.stack([x, x], -1)[..., 0]
    got = conv_selected_gradient(dy, conv_keep(crooked, places, conv), places, conv, x.shape)
    assert_close(got, reference.conv_selected_gradient(dy.double(), x.double(), places, *conv), x.dtype)
    empty = conv_selected_gradient(dy[:0], conv_keep(x[:0], places, conv), places, conv, x[:0].shape)
    assert torch.equal(empty, torch.zeros(places.hot_index.shape))


@pytest.mark.parametrize("selection", ["two", "few"])
def test_an_input_without_batch(selection: str) -> None:
    places, conv = places_of("strided", selection), KINDS["strided"][-1]
    x, dy = tensors("strided", torch.float32, False, False)
    got = conv_selected_gradient(dy[0], conv_keep(x[0], places, conv), places, conv, x[0].shape)
    assert_close(got, reference.conv_selected_gradient(dy[:1].double(), x[:1].double(), places, *conv), x.dtype)


@pytest.mark.parametrize("last", [False, True])
def test_the_smallest_form_is_kept_and_owns_its_memory(last: bool) -> None:
    def kept_of(kind: str, selection: str) -> tuple[Tensor, Tensor, SelectedPlaces]:
        x, _ = tensors(kind, torch.float32, last, last)
        places = places_of(kind, selection)
        return x, conv_keep(x, places, KINDS[kind][-1]), places

    x, kept, places = kept_of("pointwise strided", "two")  # an output position is a quarter of the input's
    assert kept.shape == (2, places.hot.numel(), 4, 3)
    assert torch.equal(kept, x[:, places.hot, ::2, ::2])
    x, kept, places = kept_of("square", "few")  # two taps of one channel: the channel is the smaller
    assert kept.shape == (2, 1, 6, 6)
    assert torch.equal(kept, x[:, places.hot_channels])
    x, kept, _ = kept_of("square", "all")
    assert kept is x
    x, kept, places = kept_of("patches", "few")
    assert kept.shape == (3, 2, 2, 3)
    assert sorted(places.hot_tap.tolist()) == [0, 1]
    for position, tap in enumerate(places.hot_tap.tolist()):
        assert torch.equal(kept[:, position], x[:, 0, ::4, tap::4])
    for kind in ("pointwise strided", "square", "patches"):
        kept = kept_of(kind, "few")[1]
        assert kept.untyped_storage().nbytes() == kept.numel() * 4


def test_hot_columns_keep_the_memory_format() -> None:
    x = patches.laid_out(torch.randn(2, 8, 5, 5), True)
    places = SelectedPlaces.of((4, 8), torch.tensor([0, 8 + 3, 16, 24 + 3]))
    kept = conv_keep(x, places, shape((1, 1), (1, 1), (0, 0), (1, 1)))
    assert kept.shape == (2, 2, 5, 5)
    assert kept.is_contiguous(memory_format=torch.channels_last)
