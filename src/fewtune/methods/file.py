"""The task file of a method that adds modules: one safetensors file that knows its method and its backbone.

Tensors: ``added.NAME``, ``values.NAME`` (head, and what the method trains of the model), ``buffers.NAME``,
``arrays.NAME`` (settings that are tensors), and ``fingerprint``, the backbone's hashes. The header's only entry,
``fewtune``, is JSON: format, version, checksum, method, settings, head, backbone, metadata. Nothing in a file is
executed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fewtune.delta import Delta, applied, frozen_buffers, swap
from fewtune.delta.checks import as_json, inventory, require_finite
from fewtune.delta.entries import read
from fewtune.delta.fingerprint import Covered, Fingerprint, fast_positions
from fewtune.delta.format import write_file
from fewtune.delta.head import Resizing
from fewtune.errors import DeltaError
from fewtune.files import Json, read_versioned
from fewtune.methods.base import Insertion, State, TaskFile, Tuner
from fewtune.neurons import Anatomy, Role
from fewtune.quantised import logical_shape

FORMAT = "fewtune-method"
VERSION = 1
GROUPS = ("added", "values", "buffers")
Reader = Callable[[str, Json, Mapping[str, Tensor]], Insertion]


def known_by(tensors: Mapping[str, Tensor], anatomy: Anatomy, model: nn.Module) -> Fingerprint:
    """The fingerprint of a plain model: of its parameters outside the head, and of the buffers saved with it."""
    backbone = {n: tensors[n] for n in anatomy.shapes if anatomy.roles.get(n) is not Role.HEAD}
    backbone |= frozen_buffers(model)
    covered = {n: Covered.of(t) for n, t in backbone.items()}
    return Fingerprint.of(backbone.items(), covered, {})


@dataclass(frozen=True, eq=False)
class MethodFile:
    """A task of a method that adds modules. Not to be changed.

    Attributes:
        method: with its settings.
        head: names of the head's modules.
        state: what the tuner's `state_dict` gave.
        shapes: of the head's parameters.
        backbone_parameters: number of the backbone's parameters.
        fingerprint: of the backbone.
        metadata: what its maker noted: JSON values by name.
    """

    method: Insertion
    head: tuple[str, ...]
    state: State
    shapes: Mapping[str, tuple[int, ...]]
    backbone_parameters: int
    fingerprint: Fingerprint
    metadata: Json = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        method: Insertion,
        head: tuple[str, ...],
        anatomy: Anatomy,
        state: State,
        fingerprint: Fingerprint,
        metadata: Mapping[str, object],
    ) -> MethodFile:
        """From a tuner's parts.

        Raises:
            DeltaError: values that are NaN or infinite, or metadata that is no JSON.
        """
        saved = {group: {n: t.detach().to("cpu", copy=True) for n, t in state[group].items()} for group in GROUPS}
        require_finite({n: t for group in saved.values() for n, t in group.items()}, "in the task")
        shapes = {name: anatomy.shapes[name] for name in anatomy.named(Role.HEAD)}
        return cls(method, head, saved, shapes, anatomy.backbone_parameters, fingerprint, as_json(metadata))

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for group in ("added", "values") for tensor in self.state[group].values())

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """New running statistics, where training changed them."""
        return self.state["buffers"]

    @property
    def connections(self) -> int:
        """Number of selected connections of the backbone's own weights (SPT)."""
        return sum(len(array) for array in self.method.arrays().values())

    def per_layer(self) -> dict[str, int]:
        """Numbers of trained parameters by name."""
        return {n: tensor.numel() for group in ("added", "values") for n, tensor in self.state[group].items()}

    def summary(self) -> str:
        """A table of what is trained."""
        counts = self.per_layer()
        width = max(map(len, counts))
        head = sum(counts[name] for name in self.shapes)
        share = 100 * (self.trained - head) / self.backbone_parameters
        settings = {key: value for key, value in self.method.settings().items() if not isinstance(value, list)}
        said = ", ".join(f"{key}={value}" for key, value in settings.items()) or "nothing to set"
        return "\n".join(
            [
                f"{self.method.name}: {said}",
                *(f"{name:<{width}}  {count:>9,}" for name, count in counts.items()),
                f"trained: {self.trained:,}; without the head {self.trained - head:,} = {share:.3f} % of "
                f"{self.backbone_parameters:,}",
            ]
        )

    def save(self, path: str | Path) -> None:
        """Writes the task as one safetensors file, whole or not at all.

        Raises:
            DeltaError: the file cannot be written.
        """
        tensors = {f"{group}.{name}": t.contiguous() for group in GROUPS for name, t in self.state[group].items()}
        tensors |= {f"arrays.{name}": array.contiguous() for name, array in self.method.arrays().items()}
        tensors["fingerprint"] = torch.frombuffer(bytearray(self.fingerprint.to_bytes()), dtype=torch.uint8)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method.name,
            "settings": self.method.settings(),
            "head": list(self.head),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "backbone_parameters": self.backbone_parameters,
            "covered": {name: [list(shape), floating] for name, (shape, floating) in self.fingerprint.tensors.items()},
            "metadata": self.metadata,
        }
        header["checksum"] = checksum(tensors, header)
        write_file(Path(path), safetensors.torch.save(tensors, {"fewtune": json.dumps(header)}))

    def apply(self, model: nn.Module) -> Tuner:
        """Puts the method and its trained values into a plain model of the same backbone; gives the tuner.

        A head of another number of classes is replaced by one of the task's size, as `Delta.apply` does. There is no
        way back: `beside` leaves the model as it is.

        Raises:
            DeltaError: another backbone, another kind of head, or a model that carries a task already. It is unchanged.
        """
        present = inventory(model)
        head = Resizing.of(model, present.parameters, self.shapes)
        for new in head.new.values():
            nn.init.zeros_(new)  # until the task's values are loaded
        resized = present.replaced(head.new)
        self._check(resized.parameters, resized.tensors)
        head.put_in()
        try:
            tuner = self.method.attach(model, self.head)
        except BaseException:
            head.take_out()
            raise
        tuner.load_state_dict(self.state)
        return tuner

    def beside(self, model: nn.Module) -> tuple[nn.Module, Tuner]:
        """As `apply`, to a copy of the model that shares with it every tensor which the task leaves alone.

        Returns:
            The copy, and its tuner; the model itself stays plain.

        Raises:
            DeltaError: as `apply`.
        """
        changed = {name for group in ("values", "buffers") for name in self.state[group]}
        shared = {id(tensor): tensor for name, tensor in inventory(model).tensors.items() if name not in changed}
        beside = copy.deepcopy(model, shared)
        return beside, self.apply(beside)

    def _check(self, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        classes = list(self.shapes.values())[-1][0]
        for name, shape in self.shapes.items():
            got = list(parameters[name].shape) if name in parameters else "missing"
            if got != list(shape):
                raise DeltaError(
                    f"the task's head {name} is {list(shape)} and the model's is {got}: create the model with "
                    f"{classes} classes (num_classes={classes})"
                )
        covered = self.fingerprint.tensors
        if extra := [name for name in parameters if name not in covered and name not in self.shapes]:
            raise DeltaError(f"the task belongs to another backbone: it has no parameter {extra[0]}, the model has one")
        for name, (shape, _) in covered.items():
            if name not in tensors or logical_shape(tensors[name]) != shape:
                raise DeltaError(
                    f"the task belongs to another backbone: the model has no {name} of shape {list(shape)}"
                )
        positions = fast_positions(covered, {})
        parts = [tensors[n] if index is None else read(tensors[n], index) for n, index in positions.items()]
        if (different := self.fingerprint.first_difference(parts, "fast")) is not None:
            raise DeltaError(
                f"the task belongs to another backbone: {different} has other values in this model; load the "
                "checkpoint that was tuned"
            )


def put_in(task: Delta | MethodFile, model: nn.Module) -> tuple[nn.Module, Tuner | None]:
    """A task in the place of the one that a model carries, whatever their numbers of classes.

    Returns:
        The model with the task in it: a copy `beside` it, and its tuner, where the method adds modules.

    Raises:
        DeltaError: the task is of another backbone; the model carries what it carried before.
    """
    if isinstance(task, Delta):
        swap(model, task)
        return model, None
    present = applied(model)
    if present is not None:
        present.revert(model)
    try:
        return task.beside(model)
    except BaseException:
        if present is not None:
            present.apply(model, verify="none")  # it stood there a moment ago
        raise


def require_in_place(task: TaskFile, model: nn.Module) -> None:
    """Check that `put_in` was not asked for another task since.

    Args:
        task: what was put in.
        model: what it was put into, or beside.

    Raises:
        DeltaError: another task stands in the model now.
    """
    if applied(model) is not (task if isinstance(task, Delta) else None):
        raise DeltaError("another task was put into this backbone since this one was loaded: load this one again")


def checksum(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> str:
    """SHA-256 of all tensors and of the header without its checksum."""
    plain = {key: value for key, value in header.items() if key != "checksum"}
    total = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_method_file(path: str | Path, method: Reader) -> MethodFile:
    """Reads what `MethodFile.save` wrote; `method` makes a method's modules from its name, settings and arrays.

    Raises:
        DeltaError: the file is missing, of another kind, of a newer version, truncated or altered.
    """
    said, tensors = read_versioned(Path(path), (FORMAT, VERSION), DeltaError)
    try:
        if said["checksum"] != checksum(tensors, said):
            raise DeltaError(f"{path} is truncated or altered: its checksum does not agree; get the file again")
        groups = {group: _named(tensors, group) for group in GROUPS}
        covered = {name: Covered(tuple(shape), floating) for name, (shape, floating) in said["covered"].items()}
        return MethodFile(
            method(said["method"], said["settings"], _named(tensors, "arrays")),
            tuple(said["head"]),
            groups,
            {name: tuple(shape) for name, shape in said["shapes"].items()},
            int(said["backbone_parameters"]),
            Fingerprint.from_bytes(covered, tensors["fingerprint"].numpy().tobytes()),
            said["metadata"],
        )
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DeltaError(f"{path} is not a task file, or it is damaged ({error})") from error


def _named(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}."): t for name, t in tensors.items() if name.startswith(f"{group}.")}
