"""Tasks of methods that add modules: a copy of the network's structure around the backbone's own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fewtune.methods import MethodFile
from fewtune.serving.changes import class_names, tensors_of


@dataclass(frozen=True, eq=False)
class InsertedTask:
    """A network of one task, which shares with the backbone all tensors that the task leaves alone.

    Such a task takes a pass of its own: its modules stand in the way of other tasks' images.
    """

    model: nn.Module
    added: tuple[Tensor, ...]
    classes: int
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, task: MethodFile, backbone: nn.Module) -> InsertedTask:
        """From a task file; the backbone is not changed.

        Raises:
            DeltaError: the task is of another backbone.
        """
        model, _ = task.beside(backbone)
        shared = {id(tensor) for tensor in tensors_of(backbone).values()}
        added = tuple(t for t in tensors_of(model).values() if id(t) not in shared)
        return cls(model.eval().requires_grad_(False), added, list(task.shapes.values())[-1][0], task.metadata)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the task file, or numbers where it names none."""
        return class_names(self.metadata, self.classes)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the numbers that are not the backbone's."""
        return sum(tensor.nbytes for tensor in self.added)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Any:
        """What the network returns, [B, ...]."""
        return self.model(images)
