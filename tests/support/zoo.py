"""What every model of the zoo must show, whatever its layers: the whole way from scores to a reverted delta.

A member is a small random instance. Random instances have zero-initialised branches, gains and biases, batch
normalisation that has seen no data, and neurons that a rectifier shuts for every input: all parameters are moved a
little, biases centre their neurons and running statistics are those of some noise, as in a model that was trained.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewtune
from fewtune.delta import Delta
from fewtune.importance import Scores
from fewtune.neurons import ASK_MODEL, Role, describe

CLASSES = 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of a gradient, relative to the layer's largest."""

Batch = tuple[Any, Tensor]


def image(size: int, channels: int = 3) -> Callable[[torch.Generator], Tensor]:
    """Makes batches of six square images: noise of different colours and contrasts, so that pooled features differ."""

    def batch(generator: torch.Generator) -> Tensor:
        noise = torch.randn(6, channels, size, size, generator=generator, dtype=torch.float64)
        contrast = 0.3 + 1.2 * torch.rand(6, 1, 1, 1, generator=generator, dtype=torch.float64)
        colour = torch.randn(6, channels, 1, 1, generator=generator, dtype=torch.float64)
        return contrast * noise + colour

    return batch


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """Scores of the classes; of a segmentation model the mean over the pixels."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    output = output if isinstance(output, Tensor) else output.logits
    return output.flatten(2).mean(2) if output.ndim > 2 else output


@dataclass(frozen=True)
class Member:
    """A model of the zoo.

    ``unreached``: parameter-name patterns of weights that the model's forward pass does not use, with the reason.
    ``unknown``: patterns of bare parameters that have no known role, with the reason.
    ``dead``: how many selected places have no gradient in either batch, with the reason.
    ``scores``: other scores than the contrastive gradient's, where there are no pooled features.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any] = field(default_factory=lambda: image(32))
    outputs: Callable[[nn.Module, Any], Tensor] = logits
    k: float = 2
    dtype: torch.dtype = torch.float64
    head: Any = ASK_MODEL
    unreached: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    dead: tuple[int, str] = (0, "")
    scores: Callable[[nn.Module, list[Batch]], Scores] | None = None

    @property
    def roles(self) -> dict[str, str]:
        return dict.fromkeys(self.unreached, "other")

    def model(self) -> nn.Module:
        """A new instance in evaluation mode."""
        torch.manual_seed(0)
        with _quiet():
            model = self.build()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model = model.to(self.dtype)
        settle(model, partial(self.outputs, model, joined(self.batch(0)[0], self.batch(1)[0])))
        return model.eval()

    def batch(self, step: int) -> Batch:
        """Inputs and labels; another step gives others."""
        inputs = self.inputs(torch.Generator().manual_seed(step))
        if isinstance(inputs, Tensor):
            inputs = inputs.to(self.dtype)
        return inputs, torch.arange(6) % 3

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(model, batch[0]), batch[1])

    def importance(self, model: nn.Module) -> Scores:
        batches = [self.batch(0), self.batch(1)]
        if self.scores is not None:
            return self.scores(model, batches)
        return fewtune.gradient_importance(model, batches, head=self.head, roles=self.roles)


def joined(first: Any, second: Any) -> Any:
    """Two batches as one."""
    if isinstance(first, Mapping):
        return {key: torch.cat([first[key], second[key]]) for key in first}
    return torch.cat([first, second])


@torch.no_grad()
def settle(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Running statistics as of one run of the model, and biases that centre the outputs of their neurons in it."""

    def centre(layer: Any, _: Any, output: Tensor) -> Tensor:
        kept = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
        others = [d for d in range(output.ndim) if d != kept]
        mean = output.mean(others)
        constant = output.amax(others) - output.amin(others) < 1e-9  # it must not become zero
        mean += constant * 0.05 * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        layer.bias -= mean
        return output - (mean if output.ndim - 1 == kept else mean.view(-1, *[1] * (output.ndim - 2)))

    generator = torch.Generator().manual_seed(2)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and m.bias is not None]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for _ in range(2):  # either changes what the other saw
        for norm in norms:
            norm.momentum = 1.0
        model.train(bool(norms))
        run()
        model.eval()
        hooks = [layer.register_forward_hook(centre) for layer in layers]
        run()
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_member(member: Member) -> None:
    """Roles, selection, gradients in two batches, training step, detach, delta, revert: the zoo's law."""
    model = member.model()
    check_roles(model, member)
    selection = fewtune.select(member.importance(model), k=member.k)
    before = copy.deepcopy(model)
    tuner = fewtune.attach(model, selection)
    check_gradients(model, before, tuner, member)
    optimizer = torch.optim.Adam(tuner.parameters(), lr=1e-3)
    optimizer.step()
    tuned = {name: tensor.clone() for name, tensor in tuner.plain_state_dict().items()}
    delta = tuner.delta({"model": "zoo"})
    tuner.detach(keep=False)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert_same_bits(model.state_dict(), before.state_dict())
    check_delta(model, delta, tuned, before)


def check_roles(model: nn.Module, member: Member) -> None:
    """No bare parameter is unknown but for those listed with a reason, and nothing is listed in vain."""
    anatomy = describe(model, member.head)
    known = anatomy.with_roles(dict.fromkeys(member.unknown, Role.EMBEDDING) or None)
    assert known.named(Role.OTHER) == ()
    for pattern in member.unknown:
        others = dict.fromkeys(p for p in member.unknown if p != pattern)
        left = anatomy.with_roles(dict.fromkeys(others, Role.EMBEDDING) or None).named(Role.OTHER)
        assert left, f"{pattern} is listed in vain"


def check_gradients(model: nn.Module, before: nn.Module, tuner: fewtune.Tuner, member: Member) -> None:
    """Every trained number has the dense gradient's value in both batches; selected ones are reached in one of them."""
    places = {
        name: tuner.selection.anatomy.views[name].stored_index(p.flat) for name, p in tuner.selection.places.items()
    }
    dense = dict(before.named_parameters())
    reached = {name: torch.zeros(len(index), dtype=torch.bool) for name, index in places.items()}
    for step in (0, 1):
        for p in (*tuner.parameters(), *dense.values()):
            p.grad = None
        member.loss(model, member.batch(step)).backward()
        member.loss(before, member.batch(step)).backward()
        largest = largest_by_layer(before)
        for name, parameter in tuner.named_parameters().items():
            expected = dense[name].grad
            assert expected is not None, f"{name} is not reached"
            assert parameter.grad is not None, f"{name} has no gradient"
            at = expected.reshape(-1)[places[name]] if name in places else expected.reshape(-1)
            error = (parameter.grad.reshape(-1) - at).abs().max() / largest[name.rpartition(".")[0]]
            assert error <= TOLERANCE[member.dtype], f"{name}: gradient off by {error:.1e} of the layer's largest"
            if name in places:
                reached[name] |= parameter.grad.reshape(-1) != 0
    dead = {name: int((~mask).sum()) for name, mask in reached.items() if not bool(mask.all())}
    assert sum(dead.values()) == member.dead[0], f"places without a gradient: {dead}"


def largest_by_layer(model: nn.Module) -> dict[str, float]:
    """Module name -> the largest gradient of its parameters."""
    largest: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.numel():
            layer = name.rpartition(".")[0]
            largest[layer] = max(largest.get(layer, 0.0), float(parameter.grad.abs().max()))
    return largest


def check_delta(model: nn.Module, delta: Delta, tuned: Mapping[str, Tensor], before: nn.Module) -> None:
    """Applying gives the tuned model, reverting the model as it was, bit for bit."""
    delta.apply(model)
    assert_same_bits(model.state_dict(), tuned)
    changed = sum(not torch.equal(t, tuned[name]) for name, t in before.state_dict().items())
    assert changed >= len(delta.values), "a step changes every weight that has selected connections"
    delta.revert(model)
    assert_same_bits(model.state_dict(), before.state_dict())


def assert_same_bits(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


def parametrize(zoo: Mapping[str, Member]) -> Any:
    return pytest.mark.parametrize("name", zoo)
