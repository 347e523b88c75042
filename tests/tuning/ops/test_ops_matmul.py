"""Matrix products by either library: the same numbers, and torch's own wherever a plain model would be compared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.tuning.ops import SelectedPlaces, fused_gradients, fused_keep, matmul, reference

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch is built without oneDNN")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every product goes to oneDNN, however small, on any machine; returns the shapes that went there."""
    monkeypatch.setattr(matmul, "WORTH", 0)
    monkeypatch.setattr(matmul, "DIVISIBLE", 0)
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    real, shapes = matmul._onednn(), []

    def counted(x: Tensor, weight: Tensor, *others: object) -> Tensor:
        assert weight.is_contiguous() or weight.t().is_contiguous(), "oneDNN would fall back to its reference code"
        shapes.append((*x.shape, weight.shape[0]))
        return real(x, weight, *others)

    monkeypatch.setattr(matmul, "_onednn", lambda: counted)
    return shapes


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if expected.numel():
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def strided(*shape: int) -> Tensor:
    """A matrix that is a part of a larger one."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


@needs_onednn
@pytest.mark.parametrize("lead", [(1,), (31,), (2, 131), (2, 3, 5), (), (0, 3)])
@pytest.mark.parametrize(("fan_in", "neurons"), [(1, 1), (17, 1), (1, 29), (67, 257)])
@pytest.mark.parametrize("make", [torch.randn, strided])
def test_linear_of_either_library_is_the_same(
    onednn: list, lead: tuple[int, ...], fan_in: int, neurons: int, make: object
) -> None:
    torch.manual_seed(0)
    x, weight, bias = make(*lead, fan_in), make(neurons, fan_in), make(neurons)
    close(matmul.linear(x, weight, bias), F.linear(x, weight, bias))
    close(matmul.linear(x, weight), F.linear(x, weight))
    assert len(onednn) == 2


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_either_library_are_the_same(onednn: list, transposed: bool) -> None:
    torch.manual_seed(0)
    a, b, c = torch.randn(131, 48), torch.randn(48, 67), torch.randn(131, 67)
    if transposed:  # as a matrix and as the view that a backward pass hands over
        a, b, c = a.t().contiguous().t(), b.t().contiguous().t(), c.t().contiguous().t()
    close(matmul.product(a, b), a @ b)
    close(matmul.transposed_product(a, c), a.t() @ c)
    assert len(onednn) == 2


@needs_onednn
def test_blocks_of_a_matrix_are_multiplied_without_their_gaps(onednn: list) -> None:
    torch.manual_seed(0)
    x, dy, weight = torch.randn(31, 20), torch.randn(31, 50), torch.randn(9, 40)
    close(matmul.transposed_product(x[:, 3:17], dy[:, 10:29]), x[:, 3:17].t() @ dy[:, 10:29])
    close(matmul.linear(x[:, :15], weight[:, 20:35]), F.linear(x[:, :15], weight[:, 20:35]))
    assert len(onednn) == 2


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_with_torch(onednn: list, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 7).to(dtype), torch.randn(3, 7).to(dtype)
    assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
    assert not onednn


@needs_onednn
def test_onednn_can_be_left_out(onednn: list) -> None:
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    with matmul.only_blas():
        matmul.linear(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        matmul.linear(x, weight)
    assert not onednn
    matmul.linear(x, weight)
    assert len(onednn) == 1


@needs_onednn
@pytest.mark.parametrize("ragged", [False, True])
def test_selected_gradient_is_the_references(onednn: list, ragged: bool) -> None:
    torch.manual_seed(0)
    chosen = torch.randint(6, (300, 2)).sort(1).values * 3 + torch.tensor([0, 1])
    flat = (torch.arange(300)[:, None] * 40 + chosen).flatten()
    places = SelectedPlaces.of((300, 40), flat[:-1] if ragged else flat)
    x, dy = torch.randn(61, 40), torch.randn(61, 300)
    dv, db = fused_gradients(dy, fused_keep(x, places), places)
    close(dv, reference.linear_selected_gradient(dy, x, places))
    close(db, dy.sum(0))
    assert onednn


@needs_onednn
def test_training_goes_to_onednn_and_evaluation_stays_with_torch(onednn: list) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 20))
    plain = nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 20))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(16, 30, requires_grad=True)
    tuner = fewtune.attach(model, fewtune.select(fewtune.random_importance(model, head=None), k=2))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert not onednn
    model(x).square().sum().backward()
    assert (16, 30, 40) in onednn
    assert (16, 40, 30) in onednn  # dx of the first layer
    got, x.grad = x.grad, None
    plain(x).square().sum().backward()
    close(got, x.grad)
    for name, values in tuner.named_parameters().items():
        expected = plain.get_parameter(name).grad
        places = tuner.selection.places.get(name)
        close(values.grad, expected if places is None else expected[places.mask()].view_as(values))


def test_the_faster_library_is_chosen_once_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ONEDNN:
        assert not matmul.onednn_is_faster.__wrapped__()
        return
    for blas, onednn, chosen in ((2.0, 1.0, True), (1.2, 1.0, False), (1.0, 2.0, False)):
        times = iter([blas, onednn] * 6)
        monkeypatch.setattr(matmul, "_seconds", lambda function, times=times: next(times))
        assert matmul.onednn_is_faster.__wrapped__() is chosen
