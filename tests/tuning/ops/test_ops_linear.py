"""The selected weight gradient of linear layers against the whole dense gradient, over awkward shapes and dtypes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from fewtune.tuning.ops import SelectedPlaces, fused, linear_keep, linear_selected_gradient, reference, torch_linear
from fewtune.tuning.ops.cost import KEEP_SHARE

# Largest error allowed, as a share of the layer's largest gradient.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

SHAPES = [
    (12, 20, (3, 5)),
    (7, 13, (1,)),
    (1, 31, (6,)),
    (29, 1, (11,)),
    (257, 67, (2, 131)),
    (5, 6, ()),
    (4, 9, (0, 3)),
]


def uniform(neurons: int, fan_in: int, k: int, hot: int | None = None) -> SelectedPlaces:
    """K random columns in every row, out of the first `hot` ones."""
    hot = fan_in if hot is None else hot
    index = torch.stack([torch.randperm(hot)[:k].sort().values for _ in range(neurons)])
    return SelectedPlaces.of((neurons, fan_in), (torch.arange(neurons)[:, None] * fan_in + index).flatten())


def ragged(neurons: int, fan_in: int, number: int) -> SelectedPlaces:
    """Random connections: most rows have different numbers of them, some none."""
    return SelectedPlaces.of((neurons, fan_in), torch.randperm(neurons * fan_in)[:number].sort().values)


def uneven(even: bool) -> SelectedPlaces:
    """Three columns a neuron (`even`; else the last has two), of which a few serve nearly all neurons."""
    torch.manual_seed(5)
    popularity = torch.logspace(0, -5, 400).log()
    noise = -(-torch.rand(1500, 400).log()).log()
    index = (popularity + noise).topk(3, dim=1).indices.sort(1).values
    flat = (torch.arange(1500)[:, None] * 400 + index).flatten()
    return SelectedPlaces.of((1500, 400), flat if even else flat[:-1])


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert (got.double() - expected.double()).abs().max().item() <= TOLERANCE[dtype] * scale


def check(places: SelectedPlaces, lead: tuple[int, ...], dtype: torch.dtype, whole: bool = False) -> None:
    x = torch.randn(*lead, places.fan_in).to(dtype)
    dy = torch.randn(*lead, places.neurons).to(dtype)
    kept = linear_keep(x, places, keep_whole=whole)
    got = linear_selected_gradient(dy, kept, places)
    assert_close(got, reference.linear_selected_gradient(dy.double(), x.double(), places), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("neurons", "fan_in", "lead"), SHAPES)
@pytest.mark.parametrize("k", [1, 3, "all"])
@pytest.mark.parametrize("whole", [False, True])
def test_uniform_selection_matches_reference(
    neurons: int, fan_in: int, lead: tuple[int, ...], k: int | str, dtype: torch.dtype, whole: bool
) -> None:
    torch.manual_seed(0)
    number = fan_in if k == "all" else min(int(k), fan_in)
    check(uniform(neurons, fan_in, number), lead, dtype, whole)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("neurons", "fan_in", "lead"), SHAPES)
@pytest.mark.parametrize("whole", [False, True])
def test_ragged_selection_matches_reference(
    neurons: int, fan_in: int, lead: tuple[int, ...], dtype: torch.dtype, whole: bool
) -> None:
    torch.manual_seed(1)
    places = ragged(neurons, fan_in, max(1, neurons * fan_in // 7))
    check(places, lead, dtype, whole)


@pytest.mark.parametrize("way", [torch_linear.by_gather, torch_linear.by_product])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("selection", ["uniform", "ragged"])
def test_every_way_and_many_blocks(
    way: object, dtype: torch.dtype, selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr(torch_linear, "BLOCK", 512)  # several blocks of neurons, of connections and of rows
    places = uniform(300, 40, 3) if selection == "uniform" else ragged(300, 40, 1000)
    x, dy = torch.randn(700, 40).to(dtype), torch.randn(700, 300).to(dtype)
    got = way(dy, x, places.hot[places.hot_index], places.rows)  # type: ignore[operator]
    assert_close(got, reference.linear_selected_gradient(dy.double(), x.double(), places), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("even", [False, True])
def test_columns_that_few_neurons_use_are_computed_one_by_one(dtype: torch.dtype, whole: bool, even: bool) -> None:
    places = uneven(even)
    assert 0 < places.common < places.hot.numel()
    assert places.rare.numel() > 0
    used = places.hot[places.hot_index].flatten()
    assert set(used[places.rare].tolist()).isdisjoint(places.hot[: places.common].tolist())
    rows = torch.arange(1500).repeat_interleave(3)[: places.nnz]
    assert torch.equal(places.rare_rows, rows[places.rare])
    check(places, (50,), dtype, whole)


def test_columns_that_no_two_neurons_share() -> None:
    places = SelectedPlaces.of((900, 900), torch.arange(900) * 901)
    assert places.rare.numel() == 900 - places.common > 0
    check(places, (50,), torch.float32)
    check(places, (50,), torch.float32, whole=True)


FUSED = {
    "a few columns": lambda: uniform(257, 67, 2, hot=9),
    "one column, one neuron": lambda: SelectedPlaces.of((1, 40), torch.tensor([7])),
    "ragged": lambda: SelectedPlaces.of((30, 60), torch.tensor([0, 1, 3, 60, 302, 1740])),
    "rare connections": lambda: uneven(True),
    "rare connections, ragged": lambda: uneven(False),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [fused.BLOCK, 2048])
@pytest.mark.parametrize("case", FUSED)
def test_fused_gradients_match_reference(
    case: str, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(6)
    monkeypatch.setattr(fused, "BLOCK", block)  # 2048: several blocks of neurons
    places = FUSED[case]()
    x, dy = torch.randn(50, places.fan_in, dtype=dtype), torch.randn(50, places.neurons, dtype=dtype)
    weight = bias = torch.empty(0, dtype=dtype)
    values = torch.empty(0, dtype=torch_linear.accumulator(x))  # a float32 master beside half precision
    assert fused.fusible(x, weight, values, bias, places)
    kept = fused.fused_keep(x, places)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size() < x.untyped_storage().nbytes()
    for gradient in (dy, dy.t().contiguous().t(), dy[:1].expand(50, -1), dy[:0]):
        rows = len(gradient)
        dv, db = fused.fused_gradients(gradient, kept[:rows], places)
        assert_close(dv, reference.linear_selected_gradient(gradient.double(), x[:rows].double(), places), dtype)
        assert_close(db, gradient.double().sum(0), dtype)


def test_what_is_not_fused() -> None:
    places, x = uniform(257, 67, 2, hot=9), torch.randn(5, 67)
    assert fused.fusible(x, x, x, None, places)
    assert not fused.fusible(x, x, x, x.half(), places), "a half-precision bias, added in float32"
    assert not fused.fusible(x.half(), x.half(), x, None, places), "half precision that is not bfloat16"
    assert not fused.fusible(x, x, x, None, uniform(257, 67, 60)), "nearly all columns are hot"
    assert not fused.fusible(x.to("meta"), x, x, None, places), "another device"


def test_a_fused_product_of_bfloat16_is_added_in_float32() -> None:
    # 4096 ones: a bfloat16 sum stops growing at 256.
    places = uniform(257, 67, 2, hot=9)
    ones = torch.ones(4096, 67, dtype=torch.bfloat16)
    dy = torch.ones(4096, 257, dtype=torch.bfloat16)
    dv, db = fused.fused_gradients(dy, fused.fused_keep(ones, places), places)
    assert dv.dtype is db.dtype is torch.float32
    assert torch.equal(dv, torch.full_like(dv, 4096.0))
    assert torch.equal(db, torch.full_like(db, 4096.0))


def test_non_contiguous_and_expanded_gradients() -> None:
    torch.manual_seed(3)
    places = uniform(16, 24, 2)
    x = torch.randn(6, 5, 24)
    for dy in (
        torch.randn(5, 6, 16).transpose(0, 1),
        torch.randn(6, 5, 32)[..., ::2],
        torch.randn(1, 1, 16).expand(6, 5, 16),
        torch.randn(()).expand(6, 5, 16),
    ):
        got = linear_selected_gradient(dy, linear_keep(x, places), places)
        assert_close(got, reference.linear_selected_gradient(dy.double(), x.double(), places), torch.float32)
    x = torch.randn(24, 5, 6).permute(2, 1, 0)
    dy = torch.randn(6, 5, 16)
    for whole in (False, True):
        got = linear_selected_gradient(dy, linear_keep(x, places, keep_whole=whole), places)
        assert_close(got, reference.linear_selected_gradient(dy.double(), x.double(), places), torch.float32)


def test_gradient_and_input_of_different_dtypes() -> None:
    torch.manual_seed(4)
    places = uniform(16, 24, 2)
    x, dy = torch.randn(40, 24), torch.randn(40, 16).bfloat16()
    got = linear_selected_gradient(dy, linear_keep(x, places), places)
    assert_close(got, reference.linear_selected_gradient(dy.double(), x.double(), places), torch.float32)


def test_half_inputs_are_added_in_float32() -> None:
    # 4096 ones: a bfloat16 sum stops growing at 256.
    places = uniform(3, 4, 1)
    ones = torch.ones(4096, 4, dtype=torch.bfloat16)
    got = linear_selected_gradient(ones[:, :3], linear_keep(ones, places), places)
    assert torch.equal(got, torch.full((3, 1), 4096.0))


def test_only_hot_columns_are_kept_and_own_their_memory() -> None:
    x = torch.randn(10, 40)
    few = uniform(8, 40, 2, hot=5)
    kept = linear_keep(x, few)
    assert kept.shape == (10, few.hot.numel())
    assert kept.untyped_storage().nbytes() == kept.numel() * 4
    assert torch.equal(kept, x[:, few.hot])
    assert linear_keep(x, few, keep_whole=True) is x
    many = uniform(40, 40, 2)
    assert many.hot.numel() > KEEP_SHARE * 40
    assert linear_keep(x, many) is x


def test_places_describe_the_selection() -> None:
    flat = torch.tensor([1, 3, 6, 9])
    places = SelectedPlaces.of((2, 5), flat)
    assert places.k == 2
    assert places.nnz == 4
    assert places.columns.tolist() == [[1, 3], [1, 4]]
    assert places.hot.tolist() == [1, 3, 4]  # the most used first
    assert places.hot_index.tolist() == [[0, 1], [0, 2]]
    uneven = SelectedPlaces.of((3, 5), flat)
    assert uneven.k is None
    assert uneven.rows is not None
    assert uneven.rows.tolist() == [0, 0, 1, 1]
    assert uneven.columns.tolist() == [1, 3, 1, 4]
    assert uneven.hot[uneven.hot_index].tolist() == [1, 3, 1, 4]


def test_places_of_a_grouped_convolution_count_columns_over_all_groups() -> None:
    # 4 neurons in 2 groups, 2 channels a group, 3 taps: neuron 2 belongs to the second group.
    places = SelectedPlaces.of((4, 6), torch.tensor([4, 6 + 4, 12 + 4, 18 + 5]), groups=2, taps=3)
    assert places.hot.tolist() == [4, 6 + 4, 6 + 5]
    assert places.hot_index.flatten().tolist() == [0, 0, 1, 2]
    assert places.hot_channels.tolist() == [1, 3]
    assert places.hot_channel.tolist() == [0, 1, 1]
    assert places.hot_tap.tolist() == [1, 1, 2]
    assert places.columns.flatten().tolist() == [4, 4, 4, 5]


def test_places_copy_pickle_and_move() -> None:
    places = uniform(6, 9, 2)
    for other in (copy.deepcopy(places), pickle.loads(pickle.dumps(places))):
        assert torch.equal(other.hot_index, places.hot_index)
        assert torch.equal(other.hot, places.hot)
    assert places.to("cpu") is places
    assert places.to("meta").hot_index.device.type == "meta"
