"""The gradient functions under torch.compile, and as operators: schema, fake tensors, second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewtune.tuning.ops import (
    ConvShape,
    SelectedPlaces,
    conv,
    conv_keep,
    conv_selected_gradient,
    linear,
    linear_keep,
    linear_selected_gradient,
    reference,
)


class Linear(torch.autograd.Function):
    """The values' gradient as a tuned layer computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, weight: Tensor, places: SelectedPlaces) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(linear_keep(x, places))
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return None, linear_selected_gradient(dy, kept, ctx.places), None, None


class Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, places: SelectedPlaces, shape: ConvShape
    ) -> Tensor:
        ctx.places, ctx.shape, ctx.input_shape = places, shape, x.shape
        ctx.save_for_backward(conv_keep(x, places, shape))
        return F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        gradient = conv_selected_gradient(dy, kept, ctx.places, ctx.shape, ctx.input_shape)
        return None, gradient, None, None, None


def flat_index(neurons: int, fan_in: int, selection: str) -> Tensor:
    if selection == "ragged":
        return torch.randperm(neurons * fan_in)[: 2 * neurons].sort().values
    among = {"few": 4, "many": fan_in}[selection]
    index = torch.stack([torch.randperm(among)[:2].sort().values for _ in range(neurons)])
    return (torch.arange(neurons)[:, None] * fan_in + index).flatten()


def gradient(function: Any, x: Tensor, values: Tensor) -> Tensor:
    values.grad = None
    function(x, values).square().sum().backward()
    assert values.grad is not None
    return values.grad


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("selection", ["few", "many", "ragged"])
def test_a_linear_layer_compiles_whole(selection: str, backend: str) -> None:
    places = SelectedPlaces.of((30, 20), flat_index(30, 20, selection))
    weight = torch.randn(30, 20)
    values = torch.zeros(places.hot_index.shape, requires_grad=True)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return Linear.apply(x, values, weight, places)

    x = torch.randn(4, 5, 20)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradient(compiled, x, values), gradient(layer, x, values))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("selection", ["few", "many", "ragged"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_compiles_whole(selection: str, backend: str, last: bool, groups: int) -> None:
    shape = ConvShape((3, 3), (2, 1), (1, 1), (1, 2), groups)
    fan_in = 6 // groups * 9
    places = SelectedPlaces.of((8, fan_in), flat_index(8, fan_in, selection), groups=groups, taps=9)
    weight = torch.randn(8, 6 // groups, 3, 3)
    values = torch.zeros(places.hot_index.shape, requires_grad=True)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return Conv.apply(x, values, weight, places, shape)

    x = torch.randn(2, 6, 8, 9)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradient(compiled, x, values), gradient(layer, x, values))


@pytest.mark.parametrize("selection", ["few", "many", "ragged"])
def test_operators_are_registered_correctly(selection: str) -> None:
    places = SelectedPlaces.of((7, 12), flat_index(7, 12, selection))
    dy, x = torch.randn(9, 7, requires_grad=True), torch.randn(9, 12, requires_grad=True)
    rest = (places.hot_index, places.rows, places.hot, places.common, places.rare, places.rare_rows)
    torch.library.opcheck(linear._operator, (dy, x, *rest))
    shape = ConvShape((2, 3), (1, 1), (0, 1), (1, 1), 1)
    conv_places = SelectedPlaces.of((7, 12), flat_index(7, 12, selection), taps=6)
    dy, x = torch.randn(3, 7, 4, 5), torch.randn(3, 2, 5, 5)
    where = (conv_places.hot // 6, conv_places.hot_tap)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        conv._operator, (dy, x, conv_places.hot_index, conv_places.rows, *where, *shape), test_utils=tests
    )


@pytest.mark.parametrize("selection", ["few", "many", "ragged"])
def test_the_linear_gradient_can_be_differentiated(selection: str) -> None:
    places = SelectedPlaces.of((7, 12), flat_index(7, 12, selection))
    dy = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda dy, x: linear_selected_gradient(dy, x, places), (dy, x))


def test_reference_is_untouched_by_grad_mode() -> None:
    places = SelectedPlaces.of((7, 12), flat_index(7, 12, "few"))
    dy, x = torch.randn(9, 7), torch.randn(9, 12)
    with torch.no_grad():
        inside = reference.linear_selected_gradient(dy, x, places)
    assert torch.equal(inside, reference.linear_selected_gradient(dy, x, places))
