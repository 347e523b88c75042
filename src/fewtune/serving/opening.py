"""A bank from a folder of task files, and what each task does to an image before the backbone sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewtune.data.transforms import Transform, eval_transform
from fewtune.errors import DataError, FewtuneError, Progress
from fewtune.methods import load_task_file
from fewtune.models import Backbone, backbone_from_description, channels_last, load_backbone
from fewtune.serving.bank import TaskBank
from fewtune.serving.folder import TaskFolder

INPUTS = ("image_size", "mean", "std", "interpolation", "crop_pct")
"""What a task file says of the images that its backbone was shown."""


@dataclass
class OpenedBank:
    """A bank whose tasks are those of a folder, with the transforms of its tasks."""

    bank: TaskBank
    folder: TaskFolder
    backbone: Backbone
    device: torch.device
    _transforms: dict[tuple[Any, ...], Transform] = field(default_factory=dict)

    def prepare(self, task: str, image: Any) -> Tensor:
        """A PIL RGB image as the task saw images when it was trained, [3, size, size].

        Raises:
            DataError: there is no such task.
        """
        metadata = self.bank.task(task).metadata
        said: dict[str, Any] = {n: v for n, v in metadata.get("backbone", {}).items() if n in INPUTS}
        said |= {name: tuple(said[name]) for name in ("mean", "std") if name in said}
        kind = metadata.get("transform", "plain")
        key = kind, *said.items()
        if key not in self._transforms:
            self._transforms[key] = eval_transform(kind, replace(self.backbone, **said))
        return self._transforms[key](image)


def open_bank(
    tasks: str | Path,
    backbone: str | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> OpenedBank:
    """A bank of the task files in a folder.

    Args:
        tasks: the folder.
        backbone: as `fewtune.models.load_backbone` takes it; left out, the first readable task file names it.
        device: where the backbone goes.

    Raises:
        DataError: there is no such folder, or no task file in it that names a backbone.
        ModelError: the backbone cannot be had.
    """
    folder = Path(tasks)
    if not folder.is_dir():
        raise DataError(f"there is no folder of task files at {folder}")
    if backbone is None:
        # With a head of the size it had then: where weights are random, the head's size decides what all of them are.
        described = _described_backbone(folder)
        loaded = backbone_from_description(described, described.get("num_classes") or 1, progress)
    else:
        loaded = load_backbone(backbone, num_classes=1, progress=progress)
    channels_last(loaded.model).to(device)
    bank = TaskBank(loaded)
    followed = TaskFolder(bank, folder)
    followed.refresh()
    return OpenedBank(bank, followed, loaded, torch.device(device))


def _described_backbone(folder: Path) -> dict[str, Any]:
    """What the first task file that can be read and names its backbone says of it."""
    said = "there is none"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            described = load_task_file(file).metadata.get("backbone")
        except FewtuneError as error:
            said = str(error)
            continue
        if described:
            return dict(described)
        said = f"{file} names none"
    raise DataError(f"{folder} holds no task file that names its backbone ({said}): name it with --backbone")
