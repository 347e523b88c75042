"""Compiled attached models: one graph, the same numbers, and steps that need no recompilation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fewtune
from attaching import batch, choose, same_bits, small_convnet, small_vit, state_of
from fewtune.tuning import Tuner, attach

MODELS = {"vit": lambda: small_vit(depth=1), "convnet": small_convnet}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attached(kind: str, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, Tuner]:
    model = MODELS[kind]().to(dtype)
    return model, attach(model, choose(model, **options))


def train(run: Callable[[Tensor], Tensor], tuner: Tuner, steps: int = 3) -> list[Tensor]:
    """Losses of a few steps of training through ``run``."""
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for number in range(steps):
        images, labels = batch(number, dtype=next(tuner.model.parameters()).dtype)
        optimizer.zero_grad()
        loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize(
    ("kind", "training", "granularity"),
    [
        ("vit", True, "neuron"),
        ("vit", True, "network"),
        ("convnet", True, "neuron"),
        ("convnet", False, "network"),
    ],
)
def test_compiled_training_is_eager_training(kind: str, training: bool, granularity: str) -> None:
    """One graph, compiled once; every step's values are seen by the next."""
    eager, tuner = attached(kind, granularity=granularity)
    model, others = attached(kind, granularity=granularity)
    eager.train(training)
    model.train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses = train(compiled, others)
    torch.testing.assert_close(losses, train(eager, tuner), rtol=1e-10, atol=1e-10)
    assert losses[0] != losses[-1]
    assert counter.frame_count == 1
    torch.testing.assert_close(others.state_dict(), tuner.state_dict(), rtol=1e-9, atol=1e-10)

    counter.clear()
    images = batch(7)[0]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), eager.eval()(images), rtol=1e-9, atol=1e-9)
        for parameter in others.parameters():
            parameter.add_(0.01)
        others.sync()
        torch.testing.assert_close(compiled(images), copy.deepcopy(model)(images), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", MODELS)
def test_compiled_under_autocast(kind: str) -> None:
    eager, tuner = attached(kind, torch.float32)
    model, others = attached(kind, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def within(images: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return network(images).float()

        return within

    torch.testing.assert_close(train(run(compiled), others), train(run(eager), tuner), rtol=1e-2, atol=1e-2)


def test_half_precision_backbone() -> None:
    eager, tuner = attached("vit", torch.bfloat16)
    model, others = attached("vit", torch.bfloat16)
    losses = train(torch.compile(model, fullgraph=True, backend="aot_eager"), others)
    torch.testing.assert_close(losses, train(eager, tuner), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_default_backend(kind: str) -> None:
    """Code is generated and run, where the machine has a compiler for it."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"no C++ compiler: {error}")
    eager, tuner = attached(kind, torch.float32)
    model, others = attached(kind, torch.float32)
    losses = train(torch.compile(model, fullgraph=True), others, steps=2)
    torch.testing.assert_close(losses, train(eager, tuner, steps=2), rtol=1e-4, atol=1e-5)


def test_detach_after_compilation_leaves_the_tuned_model() -> None:
    model, tuner = attached("vit")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    train(compiled, tuner)
    tuner.sync()
    images = batch(5)[0]
    model.eval()
    expected = model(images).detach()
    plain = {n: t.detach().clone() for n, t in tuner.plain_state_dict().items()}
    tuner.detach(keep=True)
    assert same_bits(state_of(model), plain)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-10, atol=1e-10)


def test_a_compiled_step_of_the_optimizer() -> None:
    """As torch's tutorial has it: the step itself is compiled, and the weights follow the values all the same."""
    model, tuner = attached("vit")
    eager, others = attached("vit")
    optimizer = torch.optim.Adam(tuner.parameters(), lr=0.01)
    images, labels = batch()
    F.cross_entropy(model(images), labels).backward()
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    step()
    F.cross_entropy(eager(images), labels).backward()
    torch.optim.Adam(others.parameters(), lr=0.01).step()
    with torch.no_grad():
        torch.testing.assert_close(model(images), eager(images), rtol=1e-4, atol=1e-4)  # Adam's powers are in float32
    for name, places in tuner.selection.places.items():
        weight = tuner.plain_state_dict()[name].detach().reshape(-1)[places.flat]
        assert torch.equal(weight, tuner.named_parameters()[name].detach().reshape(-1))
        assert not torch.equal(weight, MODELS["vit"]().double().state_dict()[name].reshape(-1)[places.flat])


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="the compiler of torch 2.9 cannot do it; versions before 2.14 were not tried",
)
@pytest.mark.parametrize("kind", ["linear", *MODELS])
def test_sizes_that_the_compiler_takes_for_unknown(kind: str) -> None:
    """dynamic=True: another batch size needs no other graph, and the gradients are those of the eager model."""
    torch.manual_seed(0)
    make = MODELS.get(kind, lambda: nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 7)))
    model = make().double()
    tuner = attach(model, choose(model) if kind in MODELS else fewtune.select(_random(model), k=2))
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (4, 9):
        x = torch.randn(size, 20).double() if kind == "linear" else batch(size)[0].double()[:size]
        gradients = []
        for run in (compiled, model):
            tuner.model.zero_grad()
            run(x).square().sum().backward()
            gradients.append([p.grad for p in tuner.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1]) > 0
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected)


def _random(model: nn.Module) -> fewtune.Scores:
    return fewtune.random_importance(model, head=None)
