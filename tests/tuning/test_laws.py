"""The law suite: what must hold for every layer kind, dtype, K, optimiser, decay, accumulation and autocast.

`LAWS` are functions of a case; `test_law` checks each on cases drawn by hypothesis. Laws 1 to 6 take a fault that is
planted in the training, and `test_law_fails_under_fault` shows that each of them notices each fault; the law of
importance has faults of its own.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fewtune
from fewtune.quantised import dequantised
from fewtune.tuning import layers, trained
from fewtune.tuning.reference import DenseMask
from fewtune.tuning.tensors import Selected
from layer_kinds import CLASSES, KINDS, Net

warnings.filterwarnings("ignore", message=".*weight_norm.*")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=0.05, weight_decay=decay),
    "momentum": lambda p, decay: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=decay),
    "momentum, foreach": lambda p, decay: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=decay, foreach=True),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=0.01, weight_decay=decay),
    "adam, foreach": lambda p, decay: torch.optim.Adam(p, lr=0.01, weight_decay=decay, foreach=True),
    "adamw, fused": lambda p, decay: torch.optim.AdamW(p, lr=0.01, weight_decay=decay, fused=True),
    "rmsprop": lambda p, decay: torch.optim.RMSprop(p, lr=0.003, weight_decay=decay),
}

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of a gradient, relative to the layer's largest."""
STEPS = {torch.float64: 1e-10, torch.float32: 1e-3}
"""Of values after five steps, absolute; float32 is the dense way's own noise under adaptive steps."""


@dataclass(frozen=True)
class Case:
    kind: str
    dtype: torch.dtype = torch.float64
    k: int = 2
    granularity: str = "neuron"
    optimizer: str = "adam"
    decay: float = 0.1
    accumulate: int = 1
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if KINDS[self.kind].quantised and self.dtype is torch.float64:  # torchao knows none
            object.__setattr__(self, "dtype", torch.float32)

    def net(self, dense: bool = False) -> Net:
        return KINDS[self.kind].net(self.dtype, self.seed, dense)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        x = torch.randn((6, *KINDS[self.kind].shape), generator=generator).to(self.dtype)
        return x, torch.tensor([0, 1, 2, 0, 1, 2]) % CLASSES

    def select(self, net: Net) -> fewtune.Selection:
        scores = fewtune.random_importance(net, seed=self.seed)
        return fewtune.select(scores, k=self.k, granularity=self.granularity)  # type: ignore[arg-type]

    def loss(self, net: nn.Module, step: int) -> Tensor:
        x, y = self.batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = net(x)
        return F.cross_entropy(logits.float() if self.dtype is torch.bfloat16 else logits, y)


Fault = Callable[[nn.Module, fewtune.Selection], contextlib.AbstractContextManager[Any]]


class Training:
    """Training steps of an attached net; ``step_extra`` is where faults lie."""

    def __init__(self, case: Case, fault: str | None = None) -> None:
        self.case, self.fault = case, fault
        self.net = case.net()
        self.before, self.classes = plain(self.net), [type(m) for m in self.net.modules()]
        self.selection = case.select(self.net)
        with planted_at_attach(fault):
            self.tuner = fewtune.attach(self.net, self.selection)
        self.net.train()
        self.frozen = [
            module._parameters[attribute]
            for module in self.net.modules()
            if isinstance(module, layers.Tuned)
            for attribute, tensor in module._fewtune.tuned.items()
            if isinstance(tensor, Selected)
        ]
        if fault == "mask ignored":
            for weight in self.frozen:
                weight.requires_grad_(True)
        also = self.frozen if fault in ("mask ignored", "decay on frozen weights") else []
        self.optimizer = OPTIMIZERS[case.optimizer]([*self.tuner.parameters(), *dict.fromkeys(also)], case.decay)

    def backward(self, step: int) -> None:
        self.optimizer.zero_grad()
        for part in range(self.case.accumulate):
            (self.case.loss(self.net, self.case.accumulate * step + part) / self.case.accumulate).backward()
        if self.fault == "decay on frozen weights":
            for weight in self.frozen:
                weight.grad = torch.zeros_like(weight)

    def run(self, steps: int = 2) -> Training:
        for step in range(steps):
            self.backward(step)
            self.optimizer.step()
        return self


@contextlib.contextmanager
def planted_at_attach(fault: str | None) -> Iterator[None]:
    """Faults that lie in what attach builds: an index shifted by one; a weight handed out with its dense gradient."""
    with pytest.MonkeyPatch.context() as patch:
        if fault == "index shifted by one":
            right = trained.tune_selected

            def shifted(selection: fewtune.Selection, name: str, held: Any, *more: Any) -> Any:
                tuned = right(selection, name, held, *more)
                places, view = selection.places[name], selection.anatomy.views[name]
                flat = (places.rows * places.fan_in + (places.columns + 1) % places.fan_in).sort().values
                tensor = held[0].module._fewtune.tuned[held[0].attribute]
                shape = (places.neurons, places.fan_in)
                tensor.index = view.stored_index(flat).view(tensor.index.shape)
                tensor.places = type(tensor.places).of(
                    shape, flat, groups=tensor.places.groups, taps=tensor.places.taps
                )
                return tuned

            patch.setattr(trained, "tune_selected", shifted)
        if fault == "mask ignored":
            patch.setattr(Selected, "with_gradient", lambda self, values, frozen: frozen + 0 * values.sum())
            patch.setattr(layers, "fast_forward", lambda base: None)
            patch.setattr(layers, "_subclass", layers._subclass.__wrapped__)
            right_rebuild = layers.tune

            def tune(module: nn.Module, attribute: str, tensor: Any, values: nn.Parameter) -> None:
                right_rebuild(module, attribute, tensor, values)
                if isinstance(tensor, Selected):  # the frozen tensor itself, whose dense gradient is then kept
                    body = {attribute: property(lambda self, a=attribute: self._parameters[a])}
                    module.__class__ = type(type(module).__name__, (type(module),), body)

            patch.setattr(layers, "tune", tune)
        yield


FAULTS = ("index shifted by one", "mask ignored", "decay on frozen weights")


def plain(net: nn.Module) -> dict[str, Tensor]:
    """The numbers of a net's state; of a quantised weight those that it stands for."""
    return {name: dequantised(tensor).clone() for name, tensor in net.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def dense_reference(case: Case) -> tuple[Net, DenseMask]:
    net = case.net(dense=True)
    selection = case.select(net)
    dense = DenseMask(net, selection)
    return net, dense


def law_gradients(case: Case, tmp: Path, fault: str | None = None) -> None:
    """1. Gradients at the selected places are dense autograd's; nothing else gets any."""
    training = Training(case, fault)
    training.backward(0)
    net, _ = dense_reference(case)
    for part in range(case.accumulate):
        (case.loss(net, part) / case.accumulate).backward()
    expected = dict(net.named_parameters())
    for name, parameter in training.tuner.named_parameters().items():
        grad = expected[name].grad
        assert grad is not None
        assert parameter.grad is not None, name
        ours, largest = parameter.grad.double(), grad.double().abs().max()
        if name in training.selection.places:
            flat = training.selection.anatomy.views[name].matrix(grad).reshape(-1)
            grad = flat[training.selection.places[name].flat].view(ours.shape)
        tolerance = 1e-2 if case.autocast else TOLERANCE[case.dtype]
        torch.testing.assert_close(ours, grad.double(), rtol=0, atol=float(tolerance * largest) + 1e-300, msg=name)
    assert all(weight.grad is None for weight in training.frozen)


def law_steps(case: Case, tmp: Path, fault: str | None = None) -> None:
    """2. Five steps give the weights of the dense mask (Eq. 5-6), in float64 to 1e-10."""
    training = Training(case, fault).run(5)
    net, dense = dense_reference(case)
    optimizer = OPTIMIZERS[case.optimizer](dense.parameters(), case.decay)
    for step in range(5):
        optimizer.zero_grad()
        for part in range(case.accumulate):
            (case.loss(net, case.accumulate * step + part) / case.accumulate).backward()
        dense.mask_gradients()
        optimizer.step()
        dense.restore_unselected()
    ours, theirs = training.tuner.plain_state_dict(), net.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=STEPS[case.dtype], msg=name)


def law_frozen(case: Case, tmp: Path, fault: str | None = None) -> None:
    """3. What is not selected stays as it was, bit for bit; what is selected moves."""
    training = Training(case, fault).run()
    after, selection = training.tuner.plain_state_dict(), training.selection
    whole = {*selection.whole, *selection.head}
    names = dict(training.net.named_parameters())
    moved = 0
    for name, before in training.before.items():
        if name in selection.places:
            view, places = selection.anatomy.views[name], selection.places[name]
            keep = ~view.stored(places.mask())
            assert torch.equal(after[name][keep], before[keep]), name
            moved += int((after[name] != before).sum())
        elif name in names and name not in whole:
            assert torch.equal(after[name], before), name
    assert moved > 0 or case.dtype is torch.bfloat16


def law_detach(case: Case, tmp: Path, fault: str | None = None) -> None:
    """4. attach, training, detach(keep=False) is the identity: bits, classes, flags."""
    training = Training(case, fault).run()
    training.tuner.detach(keep=False)
    assert_same(plain(training.net), training.before)
    assert [type(m) for m in training.net.modules()] == training.classes
    assert all(p.requires_grad for p in training.net.parameters())


def law_revert(case: Case, tmp: Path, fault: str | None = None) -> None:
    """5. apply makes the backbone the tuned model, revert makes it the backbone again, bit for bit."""
    training = Training(case, fault).run()
    delta = training.tuner.delta({"task": "law"})
    training.tuner.detach(keep=True)
    net = case.net()
    delta.apply(net)
    assert_same(plain(net), plain(training.net))
    delta.revert(net)
    assert_same(plain(net), training.before)
    with delta.applied_to(net):
        assert_same(plain(net), plain(training.net))
    assert_same(plain(net), training.before)


def law_load(case: Case, tmp: Path, fault: str | None = None) -> None:
    """6. load(save) is the identity, of a selection and of a delta."""
    training = Training(case, fault).run()
    training.selection.save(tmp / "selection.safetensors")
    assert fewtune.Selection.load(tmp / "selection.safetensors") == training.selection
    training.tuner.delta({"task": "law"}).save(tmp / "delta.safetensors")
    loaded = fewtune.load_delta(tmp / "delta.safetensors")
    assert loaded.metadata["task"] == "law"
    net = case.net()
    loaded.apply(net)
    assert_same(plain(net), training.tuner.plain_state_dict())


LAWS = (law_gradients, law_steps, law_frozen, law_detach, law_revert, law_load)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(KINDS)))
    half = [torch.bfloat16] if KINDS[kind].half else []
    dtype = draw(st.sampled_from([torch.float64, torch.float32, *half]))
    return Case(
        kind=kind,
        dtype=dtype,
        k=draw(st.sampled_from([1, 2, 3, 50])),
        granularity=draw(st.sampled_from(["neuron", "neuron", "layer", "network"])),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        decay=draw(st.sampled_from([0.0, 0.1])),
        accumulate=draw(st.sampled_from([1, 3])),
        autocast=draw(st.booleans()) and KINDS[kind].half and dtype is torch.float32,
        seed=draw(st.integers(0, 3)),
    )


def holds(law: Callable[..., None], case: Case, tmp: Path) -> None:
    if law is law_steps and (case.dtype is torch.bfloat16 or case.autocast):
        case = Case(**(case.__dict__ | {"dtype": torch.float64, "autocast": False}))
    if law is law_gradients and (case.dtype is torch.bfloat16 or case.autocast):
        # Sums over steps cancel, so that the reference's own rounding is no longer small beside the largest.
        case = Case(**(case.__dict__ | {"accumulate": 1}))
    law(case, tmp)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_law(law: Callable[..., None], tmp_path: Path, case: Case) -> None:
    holds(law, case, tmp_path)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_for_every_kind(law: Callable[..., None], kind: str, tmp_path: Path) -> None:
    law(Case(kind), tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", sorted({"linear", "linear, int8", "conv2d", "attention, packed"} & KINDS.keys()))
def test_law_fails_under_fault(law: Callable[..., None], fault: str, kind: str, tmp_path: Path) -> None:
    case = Case(kind, optimizer="adam")
    law(case, tmp_path)
    with pytest.raises((AssertionError, fewtune.FewtuneError)):
        law(case, tmp_path, fault)


def law_importance(case: Case, spoil: Callable[[nn.Module], None] = lambda net: None) -> None:
    """7. Importance leaves the model as found: bits, mode, flags, gradients, random state."""
    net = case.net().train()
    next(net.parameters()).requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    got = (plain(net), [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    grads = [p.grad for p in net.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    fewtune.gradient_importance(net, [case.batch(0), case.batch(1)], train_mode=True)
    spoil(net)
    assert_same(plain(net), got[0])
    assert [m.training for m in net.modules()] == got[1]
    assert [p.requires_grad for p in net.parameters()] == got[2]
    assert all(now is before for now, before in zip((p.grad for p in net.parameters()), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_importance_leaves_the_model_as_found(kind: str) -> None:
    law_importance(Case(kind))


SPOILERS: dict[str, Callable[[nn.Module], Any]] = {
    "mode": lambda net: net.eval(),
    "flag": lambda net: net.requires_grad_(True),
    "gradient": lambda net: net.zero_grad(),
    "buffer": lambda net: net.body[1].running_mean.add_(1),
    "random state": lambda net: torch.rand(1),
}


@pytest.mark.parametrize("fault", sorted(SPOILERS))
def test_law_of_importance_fails_under_fault(fault: str) -> None:
    with pytest.raises(AssertionError):
        law_importance(Case("batch normalisation"), SPOILERS[fault])


def test_copies_are_independent() -> None:
    training = Training(Case("linear"))
    copied = copy.deepcopy(training.net)
    training.run()
    now = copied.state_dict()
    assert_same({name: now[name] for name in training.before}, training.before)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 5), (2, 3, 4)),
        (nn.Linear(4, 5, bias=False), (2, 3, 4)),
        (nn.Conv1d(4, 5, 3), (2, 4, 6)),
        (nn.Conv2d(4, 5, 3), (2, 4, 6, 5)),
    ],
    ids=lambda value: str(value),
)
def test_output_may_be_changed_in_place(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """As a plain layer's may, though the library's product of more than two dimensions is a view."""
    net = nn.Sequential(layer)
    tuner = fewtune.attach(net, fewtune.select(fewtune.random_importance(net, head=None), k=1))
    net(torch.randn(shape)).mul_(2).sum().backward()
    assert all(p.grad is not None for p in tuner.parameters())
