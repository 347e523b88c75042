"""What training asks of a run's images, whatever the kind of task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from PIL import Image
from torch import Tensor

Transform = Callable[..., object]
"""From a PIL image to what the model is given; of masks from (image, mask) to both."""
Sample = tuple[Tensor, Tensor, Tensor]
"""A batch as loaders give it: images, labels or masks, and the indices of the images."""


class Listed(Protocol):
    """Images that are listed and not opened."""

    @property
    def names(self) -> Sequence[str]:
        """What messages call each image."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The image as RGB."""

    def file(self, index: int) -> Path | None:
        """Its file, where it is one."""

    def subset(self, indices: Iterable[int]) -> Self:
        """The images at `indices`."""


class Items(Protocol):
    """(Image, label or mask) by number, as a transform gives them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class Images(Listed, Items, Protocol):
    """A split of a run's data."""


class Labelled(Images, Protocol):
    """A split whose images have labels, which are at hand without the images."""

    @property
    def transform(self) -> Transform | None:
        """From a PIL image to what the model is given."""

    def label(self, index: int) -> object:
        """The label of an image."""
