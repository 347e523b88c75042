"""Batches whose order and augmentation depend on (seed, epoch, image) alone.

So a resumed run, any number of loading workers and any number of processes see the very same images.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from fewtune.data.sampling import WINDOW, block_order
from fewtune.errors import DataError
from fewtune.training.images import Items, Sample

WORTH_WORKERS = 8
"""Batches from which on processes that decode are worth their start."""


class EpochSampler(DistributedSampler[Any]):
    """Yields (epoch, index); shuffled by seed and epoch, and dealt out to `num_replicas` processes.

    Args:
        blocks: of each item, with which others it is read at once; the order then keeps those near each other. Where
            there are few blocks, which stay in memory, the order is that of items that are read one by one.
    """

    def __init__(
        self,
        items: Sized,
        *,
        blocks: Sequence[Hashable] | None,
        shuffle: bool,
        num_replicas: int,
        rank: int,
        seed: int,
    ) -> None:
        self.blocks = blocks if shuffle and blocks is not None and len(set(blocks)) > WINDOW else None
        plain = shuffle and self.blocks is None
        super().__init__(cast("Dataset[Any]", items), num_replicas=num_replicas, rank=rank, shuffle=plain, seed=seed)

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        order = None if self.blocks is None else block_order(self.blocks, seed_of(self.seed, self.epoch))
        for index in super().__iter__():
            yield self.epoch, index if order is None else int(order[index])


class SeededImages(Dataset[tuple[object, object, int]]):
    """A split whose items are (image, label, index), with all randomness fixed by (seed, epoch, index)."""

    def __init__(self, split: Items, seed: int) -> None:
        self.split = split
        self.seed = seed

    @property
    def blocks(self) -> Sequence[Hashable] | None:
        """Of each image, with which others it is read at once; None where a split says nothing of it."""
        blocks: Sequence[Hashable] | None = getattr(self.split, "blocks", None)
        return blocks

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[object, object, int]:
        epoch, index = key
        with seeded_all(self.seed, epoch, index):
            image, label = self.split[index]
        return image, label, index


def seed_all(*key: int) -> None:
    """torch (every device), NumPy and Python draw from now on from a state that is a function of `key`."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def seed_of(*key: int) -> int:
    """A 32-bit seed from several numbers; near keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def seeded_all(*key: int) -> Iterator[None]:
    """Within the block, torch, NumPy and Python draw from a state that is a function of `key`; then as before."""
    seed = seed_of(*key)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def image_loader(
    split: Items,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    workers: int | None = 0,
    world: int = 1,
    rank: int = 0,
) -> DataLoader[Sample]:
    """Batches (images, labels, indices) of a split, this process's share of them; see `keyed_loader`.

    workers: processes that decode; None leaves it to `decoding_workers`, which is right for images that are seen once.
    """
    if workers is None:
        workers = decoding_workers(len(split), batch_size)
    shared: dict[str, Any] = {"shuffle": shuffle, "workers": workers, "world": world, "rank": rank}
    return keyed_loader(SeededImages(split, seed), batch_size, seed=seed, epoch=epoch, **shared)


class ImageLoader(DataLoader[Any]):
    """A DataLoader that says what is wrong with an image in one line, wherever the image was decoded."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except DataError as error:  # that of a worker process holds its whole traceback
            text = str(error).strip().rpartition(f"{DataError.__name__}: ")[2]
            raise DataError(text.strip()) from error


def decoding_workers(images: int, batch_size: int) -> int:
    """Processes that decode images which are seen once: one a core, at most 8; none for a few batches, which would be
    over before the processes have begun, or on a single core."""
    available = getattr(os, "sched_getaffinity", None)
    cores = len(available(0)) if available else os.cpu_count() or 1
    return min(cores, 8) if cores > 1 and images >= WORTH_WORKERS * batch_size else 0


def keyed_loader(
    items: Dataset[tuple[object, object, int]],
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    world: int = 1,
    rank: int = 0,
) -> DataLoader[Sample]:
    """Batches of what `items[epoch, index]` gives, (images, labels, indices), this process's share of them.

    Shares of several processes have equal length; the last ones repeat an image where the split does not divide,
    and the indices tell which.
    """
    blocks = items.blocks if isinstance(items, SeededImages) and shuffle else None
    sampler = EpochSampler(cast(Sized, items), blocks=blocks, shuffle=shuffle, num_replicas=world, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    return ImageLoader(
        items,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else every new iterator draws from the global state
    )


def pick_device(accelerator: str = "auto") -> torch.device:
    """The device of work in one process: the first GPU where there is one, unless "cpu" is asked for."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if accelerator == "mps" else "cpu")
