"""Checks of a delta and of a model before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from fewtune.delta.contents import Contents
from fewtune.delta.fingerprint import Covered
from fewtune.errors import DeltaError
from fewtune.files import Json
from fewtune.neurons import Role, require_float, require_tunable
from fewtune.quantised import logical_shape, scheme


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the model and the flat positions in it that a delta overwrites (None: all)."""

    tensor: Tensor
    index: Tensor | None


def check_contents(delta: Contents) -> None:
    """Check that a delta is whole and agrees with itself.

    Raises:
        DeltaError: a tensor is missing, has a wrong shape or kind, or holds NaN or infinity.
    """
    choice, shapes = delta.choice, delta.choice.anatomy.shapes
    if delta.values.keys() != choice.places.keys():
        raise DeltaError("the delta's values and its places belong to different weights")
    if set(delta.whole) != {*choice.whole, *choice.head}:
        raise DeltaError("the delta's dense parameters are not those that its selection trains whole")
    if len(delta.positions) != len(delta.values) + len(delta.whole) + len(delta.buffers):
        raise DeltaError("the delta holds a tensor twice")
    known = {n: covered.shape for n, covered in delta.fingerprint.tensors.items()}
    original = {n: shape for n, shape in shapes.items() if choice.anatomy.roles.get(n) is not Role.HEAD}
    original |= {n: tuple(buffer.shape) for n, buffer in delta.buffers.items()}
    if any(known.get(name) != shape for name, shape in original.items()):
        raise DeltaError("the delta's fingerprint does not cover its backbone")
    for name, values in delta.values.items():
        if tuple(values.shape) != (len(choice.places[name]),):
            raise DeltaError(f"{name} has {len(choice.places[name])} places and values {list(values.shape)}")
        index = delta.positions[name]
        if index is None or not 0 <= int(index.min()) <= int(index.max()) < prod(shapes[name]):
            raise DeltaError(f"{name}: a place lies outside the weight")
    for name, tensor in delta.whole.items():
        if tuple(tensor.shape) != shapes[name]:
            raise DeltaError(f"{name} has the shape {list(tensor.shape)}; expected {list(shapes[name])}")
    for name, tensor in {**delta.values, **delta.whole}.items():
        if not tensor.is_floating_point():
            raise DeltaError(f"{name} is of {tensor.dtype}; only floating-point weights can be tuned")
    require_finite({**delta.values, **delta.whole, **delta.buffers}, "in the delta")


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises:
    DeltaError: a tensor holds NaN or infinity; names the first.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DeltaError(f"{name} holds NaN or infinite values {where}")


def as_json(metadata: Mapping[str, object]) -> Json:
    """A deep copy of what JSON keeps of it (tuples become lists).

    Raises:
        DeltaError: something in it is no JSON value, or a key is no string.
    """
    try:
        if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
            raise TypeError("not a mapping from strings")
        result: Json = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltaError(f"metadata must be JSON values by name: {error}") from error
    return result


@dataclass(frozen=True)
class Inventory:
    """A model's parameters by their first names, and these and its buffers together."""

    parameters: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]

    def replaced(self, parameters: Mapping[str, Tensor]) -> Inventory:
        """The same with other tensors under some parameters' names."""
        return Inventory({**self.parameters, **parameters}, {**self.tensors, **parameters})


def inventory(model: nn.Module) -> Inventory:
    """All tensors of a model, in one walk over its modules.

    Raises:
        DeltaError: a selection is attached to the model.
    """
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if "_fewtune" in vars(module):
            raise DeltaError(f"a selection is attached to this model (at {name or 'its root'}): detach its tuner first")
        for tensors, held in ((parameters, module._parameters), (buffers, module._buffers)):
            for attribute, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    tensors[f"{name}.{attribute}" if name else attribute] = tensor
    return Inventory(parameters, buffers | parameters)


def find_targets(delta: Contents, present: Inventory) -> dict[str, Target]:
    """The model's tensors that the delta overwrites.

    Raises:
        DeltaError: the model's names, shapes or kinds are not those of the delta's backbone with the delta's head.
    """
    _check_head(delta, present.parameters)
    shapes = delta.choice.anatomy.shapes
    if missing := [name for name in shapes if name not in present.parameters]:
        raise DeltaError(f"the delta belongs to another backbone: the model has no parameter {missing[0]}")
    if extra := [name for name in present.parameters if name not in shapes]:
        raise DeltaError(f"the delta belongs to another backbone: it has no parameter {extra[0]}, the model has one")
    for name, shape in shapes.items():
        if (got := logical_shape(present.parameters[name])) != shape:
            raise DeltaError(
                f"the delta belongs to another backbone: {name} is {list(shape)} in the delta and {list(got)} in the "
                "model"
            )
    _check_kinds(delta, present.tensors)
    return {name: Target(present.tensors[name], index) for name, index in delta.positions.items()}


def _check_head(delta: Contents, parameters: Mapping[str, Tensor]) -> None:
    """Check that the model's head is one that the delta's values fit."""
    anatomy = delta.choice.anatomy
    head = anatomy.named(Role.HEAD)
    advice = f"create the model with {_classes(delta)} classes (num_classes={_classes(delta)})"
    for name in head:
        expected = list(anatomy.shapes[name])
        if name not in parameters:
            raise DeltaError(f"the delta's head has {name} {expected} and the model has none: {advice}")
        if list(parameters[name].shape) != expected:
            raise DeltaError(
                f"the delta's head {name} is {expected} and the model's is {list(parameters[name].shape)}: {advice}"
            )


def _classes(delta: Contents) -> int:
    """The number of outputs of the head: of the last of its tensors."""
    shape = delta.choice.anatomy.shapes[delta.choice.head[-1]] if delta.choice.head else ()
    return shape[0] if shape else 0


def _check_kinds(delta: Contents, tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor the delta reads or writes is there, of the right shape and kind, whole and in memory."""
    require_tunable({n: tensors[n] for n in delta.values}, DeltaError)
    require_float({n: tensors[n] for n in delta.whole}, DeltaError)
    covered = delta.fingerprint.tensors
    for name, known in covered.items():
        if name not in tensors or logical_shape(tensors[name]) != known.shape:
            shape = list(known.shape)
            raise DeltaError(f"the delta belongs to another backbone: the model has no {name} of shape {shape}")
        _check_scheme(name, scheme(tensors[name]), delta.quantised.get(name))
        floating = known.floating
        if Covered.of(tensors[name]).floating != floating:
            kind = "floating-point" if floating else "integer"
            raise DeltaError(f"{name} is of {tensors[name].dtype} in the model; the delta expects {kind} numbers")
    for name in delta.positions:
        tensor = tensors[name]
        if tensor.is_meta:
            raise DeltaError(f"{name} is on the meta device: load the backbone's weights first")
        if hasattr(tensor, "full_tensor"):
            raise DeltaError(f"{name} is sharded: apply the delta to the model before it is wrapped")
        if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise DeltaError(f"{name} is an expanded tensor, whose entries share memory: make it contiguous first")


def _check_scheme(name: str, present: str | None, tuned: str | None) -> None:
    """Check that a weight is quantised as it was when it was tuned, or not at all."""
    if present is not None and present != tuned:
        so = "in full precision, not quantised" if tuned is None else f"quantised as {tuned}"
        raise DeltaError(
            f"{name} is of {present} in this model, and the task was tuned on it {so}: load the backbone that way"
        )
