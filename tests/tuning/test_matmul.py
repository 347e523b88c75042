"""Matrix products by either library: the same numbers, for every model and method alike, and torch's own outside."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.errors import TuningError
from fewtune.tuning import matmul
from fewtune.tuning.ops import SelectedPlaces, fused_gradients, fused_keep, reference

needs_onednn = pytest.mark.skipif(not matmul.onednn_available(), reason="this torch is built without oneDNN")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Within the context every product goes to oneDNN, however small; the shapes (N, M, O) that went there."""
    monkeypatch.setattr(matmul, "WORTH", 0)
    monkeypatch.setattr(matmul, "DIVISIBLE", 0)
    real, went = matmul._onednn, []

    def counted(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        went.append((*a.shape, b.shape[1]))
        return real(a, b, bias)

    monkeypatch.setattr(matmul, "_onednn", counted)
    return went


@pytest.fixture
def onednn(shapes: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    with fewtune.matrix_library("onednn"):
        yield shapes


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
    shapes: list, lead: tuple[int, ...], fan_in: int, neurons: int, make: object
) -> None:
    torch.manual_seed(0)
    x, weight, bias = make(*lead, fan_in), make(neurons, fan_in), make(neurons)
    expected = F.linear(x, weight, bias), F.linear(x, weight)
    with fewtune.matrix_library("onednn"):
        got = F.linear(x, weight, bias), F.linear(x, weight)
    # Of the terms' size, not of the sum's: a single sum of seventeen may cancel.
    scale = F.linear(x.abs(), weight.abs(), bias.abs()).amax() if x.numel() else 0.0
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert not x.numel() or (one - other).abs().max() <= 1e-6 * scale
    assert shapes or not x.numel() or not lead  # a vector is no matrix


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_either_library_are_the_same(shapes: list, transposed: bool) -> None:
    torch.manual_seed(0)
    a, b, c, d = torch.randn(131, 48), torch.randn(48, 67), torch.randn(131, 67), torch.randn(131, 67)
    if transposed:  # as a matrix and as the view that a backward pass hands over
        a, b, c = a.t().contiguous().t(), b.t().contiguous().t(), c.t().contiguous().t()
    expected = a @ b, a.t() @ c, torch.addmm(d, a, b), torch.addmm(d[0], a, b, beta=0.5, alpha=2)
    with fewtune.matrix_library("onednn"):
        got = a @ b, a.t() @ c, torch.addmm(d, a, b), torch.addmm(d[0], a, b, beta=0.5, alpha=2)
    for one, other in zip(got, expected, strict=True):
        close(one, other)
    assert len(shapes) == 2


@needs_onednn
def test_blocks_of_a_matrix_are_multiplied_without_their_gaps(onednn: list, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, dy, weight = torch.randn(31, 20), torch.randn(31, 50), torch.randn(9, 40)
    dense = matmul._dense
    seen = []
    monkeypatch.setattr(matmul, "_dense", lambda w: seen.append(dense(w)) or seen[-1])
    close(x[:, 3:17].t() @ dy[:, 10:29], (x[:, 3:17].double().t() @ dy[:, 10:29].double()).float())
    close(F.linear(x[:, :15], weight[:, 20:35]), F.linear(x[:, :15].double(), weight[:, 20:35].double()).float())
    assert len(seen) == 2
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in seen), "oneDNN would fall back to its slow code"


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_with_torch(shapes: list, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 7).to(dtype), torch.randn(3, 7).to(dtype)
    expected = F.linear(x, weight)
    with fewtune.matrix_library("onednn"):
        assert torch.equal(F.linear(x, weight), expected)
    assert not shapes


@needs_onednn
def test_what_is_too_small_is_torchs_to_the_bit() -> None:
    x, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    expected = F.linear(x, weight, bias), F.linear(x, weight)
    with fewtune.matrix_library("onednn"):
        assert torch.equal(F.linear(x, weight, bias), expected[0])
        assert torch.equal(F.linear(x, weight), expected[1])


@needs_onednn
def test_contexts_nest_and_leave_nothing_behind(shapes: list) -> None:
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of kernels that are overridden by mistake
        with fewtune.matrix_library("onednn"):
            F.linear(x, weight)
            with fewtune.matrix_library("torch"):
                F.linear(x, weight)
            with fewtune.matrix_library("onednn"):
                F.linear(x, weight)
            F.linear(x, weight)
            other = threading.Thread(target=F.linear, args=(x, weight))
            other.start()
            other.join()
        with pytest.raises(ZeroDivisionError), fewtune.matrix_library("onednn"):
            raise ZeroDivisionError
        F.linear(x, weight)
    assert len(shapes) == 4


@needs_onednn
def test_torchs_own_switch_of_onednn_is_obeyed(onednn: list) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        F.linear(torch.randn(5, 7), torch.randn(3, 7))
    assert not onednn


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TuningError, match="expected one of torch, onednn"), fewtune.matrix_library("mkl"):
        pass
    monkeypatch.setattr(matmul, "onednn_available", lambda: False)
    with pytest.raises(TuningError, match="built without oneDNN"), fewtune.matrix_library("onednn"):
        pass


@needs_onednn
@pytest.mark.parametrize("ragged", [False, True])
def test_selected_gradient_is_the_references(onednn: list, ragged: bool) -> None:
    torch.manual_seed(0)
    chosen = torch.randint(6, (300, 2)).sort(1).values * 3 + torch.tensor([0, 1])
    flat = (torch.arange(300)[:, None] * 40 + chosen).flatten()
    places = SelectedPlaces.of((300, 40), flat[:-1] if ragged else flat)
    x, dy = torch.randn(61, 40), torch.randn(61, 300)
    dv, db = fused_gradients(dy, fused_keep(x, places), places)
    assert onednn
    with fewtune.matrix_library("torch"):
        close(dv, reference.linear_selected_gradient(dy, x, places))
    close(db, dy.sum(0))


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 20))


def full(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def bias(model: nn.Module) -> dict[str, Tensor]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def selected(model: nn.Module) -> dict[str, Tensor]:
    return fewtune.attach(
        model, fewtune.select(fewtune.random_importance(model, head=None), k=2)
    ).named_parameters()  # fmt: skip


@needs_onednn
@pytest.mark.parametrize("method", [full, bias, selected])
def test_every_method_multiplies_with_the_same_library(shapes: list, method: object) -> None:
    """Training and evaluation, forward and backward."""
    x = torch.randn(16, 30, requires_grad=True)
    gradients, outputs = {}, {}
    for library in ("torch", "onednn"):
        model = two_layers()
        trained = method(model)
        shapes.clear()
        x.grad = None
        with fewtune.matrix_library(library):
            model(x).square().sum().backward()
            with torch.inference_mode():
                outputs[library] = model(x)
        gradients[library] = [x.grad, *(p.grad for p in trained.values())]
        forward, backward = (16, 30, 40), (16, 40, 30)  # and dx of the first layer
        assert [shapes.count(shape) for shape in (forward, backward)] == ([0, 0] if library == "torch" else [2, 1])
    for got, expected in zip(*gradients.values(), strict=True):
        close(got, expected)
    close(outputs["onednn"], outputs["torch"])


def test_training_is_torchs_own_to_the_bit_by_default() -> None:
    """A tuned model's outputs are the plain model's, in training and in evaluation."""
    plain, model = two_layers(), two_layers()
    selected(model)
    x = torch.randn(4096, 30)  # large enough for any library
    assert torch.equal(model(x), plain(x))
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
