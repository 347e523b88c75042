"""Replacing a model's head by a task's head of another number of classes, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

OUTPUTS = ("out_features", "out_channels", "num_classes", "num_labels")
"""Attributes by which a layer says its number of outputs."""
CLASSES = ("num_classes", "num_labels")
"""Attributes by which a module around the layer says its number of classes."""


class Replaced(NamedTuple):
    """A parameter of the model's head, where it is held, and the task's in its place."""

    holder: nn.Module
    attribute: str
    old: nn.Parameter
    new: nn.Parameter


class Said(NamedTuple):
    """Something that says the number of classes: what it said before, and what it says with the task."""

    subject: object
    attribute: str
    old: object
    new: object


@dataclass(frozen=True, eq=False)
class Resizing:
    """The parameters of a head that have another size in a task, by name, and all that says their number.

    Empty where the task's head has the model's size.
    """

    parameters: Mapping[str, tuple[Replaced, ...]]
    said: tuple[Said, ...]

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Resizing:
        """What differs between a model's head and a task's of these shapes, where only the number of outputs does.

        Layers that are told to be linear or convolutions can be resized; of others nothing is listed here, and the
        shapes' own check refuses them.
        """
        replaced: dict[str, tuple[Replaced, ...]] = {}
        said: dict[tuple[int, str], Said] = {}
        for name, shape in shapes.items():
            old = parameters.get(name)
            if not isinstance(old, nn.Parameter) or old.shape[1:] != shape[1:] or old.shape == shape:
                continue
            holders = list(_holders(model, old))
            if not holders or not all(_resizable(module) for _, module, _ in holders):
                continue
            new = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device), old.requires_grad)
            replaced[name] = tuple(Replaced(module, attribute, old, new) for _, module, attribute in holders)
            for path, _, _ in holders:
                for one in _said(model, path, old.shape[0], shape[0]):
                    said.setdefault((id(one.subject), one.attribute), one)
        return cls(replaced, tuple(said.values()))

    @property
    def new(self) -> dict[str, Tensor]:
        """The task's parameters by name; they hold no numbers until these are written."""
        return {name: places[0].new for name, places in self.parameters.items()}

    def put_in(self) -> None:
        for holder, attribute, _, new in self._replaced():
            holder._parameters[attribute] = new
        for said in self.said:
            setattr(said.subject, said.attribute, said.new)

    def stands_in(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether what was put in is still held where it was put (a model may be given another head meanwhile)."""
        return all(
            place.holder._parameters.get(place.attribute) is tensors.get(name)
            for name, places in self.parameters.items()
            for place in places
        )

    def take_out(self) -> None:
        """The model's own parameters again, on the device and in the dtype that the model has by now."""
        for holder, attribute, old, _ in self._replaced():
            present = holder._parameters[attribute]
            assert present is not None
            if (present.device, present.dtype) != (old.device, old.dtype):
                old.data = old.data.to(present.device, present.dtype)
            old.requires_grad_(present.requires_grad)
            holder._parameters[attribute] = old
        for said in self.said:
            setattr(said.subject, said.attribute, said.old)

    def _replaced(self) -> Iterator[Replaced]:
        for places in self.parameters.values():
            yield from places


def _holders(model: nn.Module, parameter: nn.Parameter) -> Iterator[tuple[str, nn.Module, str]]:
    """Every place that holds a parameter: the module's name, the module, the attribute."""
    for name, module in model.named_modules():
        for attribute, held in module._parameters.items():
            if held is parameter:
                yield name, module, attribute


def _resizable(module: nn.Module) -> bool:
    """Whether dimension 0 of all of a module's parameters is its number of outputs."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1 and not isinstance(module, nn.modules.conv._ConvTransposeNd)
    return isinstance(module, nn.Linear)


def _said(model: nn.Module, path: str, old: int, new: int) -> Iterator[Said]:
    """All that says ``old`` of the layer at a path, in it and in the modules around it."""
    parts = path.split(".")
    for depth in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:depth]))
        for attribute in OUTPUTS if depth == len(parts) else CLASSES:
            if type(value := vars(module).get(attribute)) is int and value == old:
                yield Said(module, attribute, old, new)
        config = vars(module).get("config")  # transformers: the number of classes is that of the labels
        labels = getattr(config, "id2label", None)
        if isinstance(labels, dict) and len(labels) == old:
            names = {i: f"LABEL_{i}" for i in range(new)}
            yield Said(config, "id2label", labels, names)
            yield Said(config, "label2id", getattr(config, "label2id", None), {name: i for i, name in names.items()})
