"""A score for every connection of a model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewtune.errors import ImportanceError
from fewtune.neurons import ASK_MODEL, Anatomy, HeadSpec, Role, describe, require_floating
from fewtune.objectives import Objective, SupCon, pooled_features


class Scores(Mapping[str, Tensor]):
    """Scores of connections: parameter name -> non-negative tensor of the weight's shape.

    ``anatomy`` carries the role of every other parameter, so that `select` needs no model.

    Raises:
        ImportanceError: scores of a weight that are not finite, negative or all zero; the message names the weights.
    """

    def __init__(self, scores: Mapping[str, Tensor], anatomy: Anatomy) -> None:
        if not scores:
            raise ImportanceError("the model has no weight to select from outside its head")
        broken = [name for name, score in scores.items() if not bool(score.isfinite().all())]
        if broken:
            raise ImportanceError(
                f"scores are not finite in {_names(broken)}; look for NaN in the images or a learning objective that "
                "overflows in half precision (importance may be computed in float32)"
            )
        negative = [name for name, score in scores.items() if bool((score < 0).any())]
        if negative:
            raise ImportanceError(f"scores are negative in {_names(negative)}; expected a modulus")
        zero = [name for name, score in scores.items() if not bool(score.any())]
        if zero:
            raise ImportanceError(
                f"all scores are zero in {_names(zero)}: nothing tells its connections apart. If no batch held two "
                "images of one class, use a larger batch or two views; if the objective does not reach the layer, "
                "leave it out with roles={'pattern of its parameter names': 'other'}"
            )
        self._scores = dict(scores)
        self.anatomy = anatomy

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)


def _names(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def scored_weights(
    model: nn.Module, head: HeadSpec, roles: Mapping[str, str | Role] | None
) -> tuple[Anatomy, dict[str, Tensor]]:
    """A model's anatomy and its neurons' weights; arguments as in `fewtune.neurons.describe`.

    Raises:
        ImportanceError: a weight is not floating-point.
    """
    anatomy, named = describe(model, head, roles), dict(model.named_parameters())
    weights: dict[str, Tensor] = {name: named[name] for name in anatomy.views}
    require_floating(weights, ImportanceError)
    return anatomy, weights


def gradient_importance(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective | None = None,
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
    train_mode: bool = False,
    limit: int | None = None,
    passes: int = 1,
    store: torch.device | str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Scores:
    r"""The modulus of the summed gradient of every connection (Eq. 1).

    .. math:: s_{ij} = \Big| \sum_b \partial L_b / \partial w_{ij} \Big|

    Signed gradients are summed over the batches in float32 (float64 for float64 weights) and the modulus is taken
    once, at the end. Each gradient is freed as soon as it is added, so that one layer's gradient is alive at a time.
    The model is left as it was found: mode, flags, gradients, buffers and random state.

    Args:
        model: on its device; batches are moved there.
        loader: yields ``(images, labels)`` or ``((view1, view2), labels)``.
        objective: (model, inputs, labels) -> scalar; `SupCon` where left out.
        head: see `fewtune.neurons.describe`.
        roles: roles set by hand, see `fewtune.neurons.describe`.
        train_mode: run in training mode (dropout, batch statistics) instead of evaluation mode.
        limit: use this many batches at most.
        passes: read the data this many times, each time for a part of the layers: the gradients of the other parts
            are not formed, for a model that hardly fits. The loader must yield the same batches each time.
        store: device of the sums, such as "cpu" for a model that hardly fits; the weight's own where left out.
        progress: called as (batches done, batches in all or None).

    Raises:
        ImportanceError: NaN or all-zero scores, an empty loader, or one that yields something else; a limit or a number
            of passes below 1.
        ModelError: ``head`` names no module.
    """
    for option, value in {"limit": limit, "passes": passes}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ImportanceError(f"{option}={value!r}; expected a whole number above 0")
    anatomy, weights = scored_weights(model, head, roles)
    objective = objective if objective is not None else SupCon()
    if isinstance(objective, SupCon) and objective.features is None:
        objective = replace(objective, features=partial(pooled_features, head=head))
    names, sums = list(weights), dict[str, Tensor]()
    with left_as_found(model, train_mode):
        for part in range(min(passes, len(names))):
            chosen = {name: weights[name] for name in names[part::passes]}
            with _summing_gradients(model, chosen, store) as part_sums:
                _backward_all(model, loader, objective, limit, progress)
            sums.update(part_sums)
    reduce_over_processes(sums, weights)
    return Scores({name: sums[name].abs_() for name in names}, anatomy)


def _backward_all(
    model: nn.Module,
    loader: Iterable[Any],
    objective: Objective,
    limit: int | None,
    progress: Callable[[int, int | None], None] | None,
) -> None:
    device = next(model.parameters()).device
    length = len(loader) if isinstance(loader, Sized) else None
    total = limit if length is None else min(limit or length, length)
    done = 0
    for batch in islice(loader, limit):
        inputs, labels = _batch(batch, device)
        loss = objective(model, inputs, labels)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ImportanceError(f"the objective gave {loss!r}; expected a scalar tensor")
        if not loss.requires_grad:
            raise ImportanceError("the objective does not depend on the model's weights")
        loss.backward()
        done += 1
        if progress is not None:
            progress(done, total)
    if not done:
        raise ImportanceError("the loader yielded no batch; expected (images, labels) or ((view1, view2), labels)")


def _batch(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ImportanceError(
            f"the loader yielded {type(batch).__name__}; expected (images, labels) or ((view1, view2), labels)"
        )
    return _moved(batch[0], device), batch[1].to(device)


def _moved(inputs: Any, device: torch.device) -> Any:
    match inputs:
        case Tensor():
            return inputs.to(device)
        case tuple() | list():
            return tuple(_moved(x, device) for x in inputs)
        case Mapping():
            return {key: _moved(x, device) for key, x in inputs.items()}
        case _:
            return inputs


@contextlib.contextmanager
def _summing_gradients(
    model: nn.Module, weights: Mapping[str, Tensor], store: torch.device | str | None
) -> Iterator[dict[str, Tensor]]:
    """Within, every backward pass adds the weights' gradients to the yielded sums and frees them."""
    sums = {
        name: torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=store or w.device)
        for name, w in weights.items()
    }

    def add(name: str, weight: Tensor) -> None:
        if weight.grad is not None:
            sums[name] += weight.grad.to(sums[name])
            weight.grad = None

    for p in model.parameters():
        p.requires_grad_(False)
    hooks = []
    try:  # from the first hook on: one that outlived a refusal would swallow the gradients of later training
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(partial(add, name)))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def left_as_found(model: nn.Module, train_mode: bool) -> Iterator[None]:
    """Restores modes, flags, gradients, buffers and random state, whatever happens within."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad():
            for p, _, _ in flags:
                p.grad = None
            model.train(train_mode)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes:
            module.training = training
        for p, requires_grad, grad in flags:
            p.requires_grad_(requires_grad)
            p.grad = grad
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer  # a module may have put another tensor in its place
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def reduce_over_processes(sums: dict[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Adds the sums of all processes of torch.distributed, so that every process selects the same."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for name, weight in weights.items():
            total = sums[name].to(weight.device)  # where the processes can talk; sums may be stored elsewhere
            torch.distributed.all_reduce(total)
            sums[name] = total.to(sums[name].device)


def magnitude_importance(
    model: nn.Module, head: HeadSpec = ASK_MODEL, *, roles: Mapping[str, str | Role] | None = None
) -> Scores:
    """|w| of every connection (the paper's "Magnitude"); arguments as in `gradient_importance`."""
    anatomy, weights = scored_weights(model, head, roles)
    return Scores({name: weight.detach().abs() for name, weight in weights.items()}, anatomy)


def random_importance(
    model: nn.Module,
    seed: int = 0,
    head: HeadSpec = ASK_MODEL,
    *,
    roles: Mapping[str, str | Role] | None = None,
) -> Scores:
    """Uniform random scores, the same for one seed on any device.

    With granularity "neuron" the paper's random choice per neuron, with "network" over the whole network.
    """
    anatomy, _ = scored_weights(model, head, roles)
    generator = torch.Generator("cpu").manual_seed(seed)
    return Scores(
        {name: torch.rand(v.shape, generator=generator, device="cpu") for name, v in anatomy.views.items()}, anatomy
    )
