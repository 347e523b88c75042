"""A cache on disk of the first trained block's inputs, computed once for each image.

Below a reach every epoch computes the same. A folder holds the rows of one frozen part, named by its weights, the
transform and the precision; a row is named by the image's content and the number of its view. So resumed runs,
searches, grids and other seeds find what earlier ones computed. A shard is two files: the rows, which are
memory-mapped, and their names, written last: a shard without names is what a killed run left, and is ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fewtune.assets import cache_folder
from fewtune.config import Recipe
from fewtune.errors import ConfigError, TuningError
from fewtune.files import read_json, write_json
from fewtune.methods.reach import Border
from fewtune.progress import shown
from fewtune.quantised import dequantised
from fewtune.training.images import Labelled
from fewtune.training.loaders import seeded_all
from fewtune.training.seen import content_digests
from fewtune.training.shortcut import Shortcut

log = logging.getLogger("fewtune")
SHARD = 2**28
"""Bytes of a shard, about: so much is computed again at most where a run is killed."""
GB = 1e9
FORGOTTEN = 24 * 3600
"""Seconds after which rows without names are no longer being written."""


class Store:
    """The rows of one frozen part, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, tuple[np.ndarray, int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for names in sorted(folder.glob("*.json")):
            self._open(names)
        for rows in folder.glob("*.npy"):
            if not rows.with_suffix(".json").exists() and time.time() - rows.stat().st_mtime > FORGOTTEN:
                rows.unlink(missing_ok=True)

    def _open(self, names: Path) -> None:
        rows = np.load(names.with_suffix(".npy"), mmap_mode="r")
        self.rows |= {name: (rows, row) for row, name in enumerate(read_json(names))}

    def add(self, names: Sequence[str], row: tuple[int, ...], dtype: np.dtype, blocks: Iterator[np.ndarray]) -> None:
        """Write rows of this shape, given in blocks in the order of their names."""
        at_once = max(1, SHARD // (int(np.prod(row)) * dtype.itemsize))
        rest = np.empty((0, *row), dtype)
        for start in range(0, len(names), at_once):
            part = names[start : start + at_once]
            file = self.folder / f"{uuid.uuid4().hex}.npy"
            rows = np.lib.format.open_memmap(file, "w+", dtype, (len(part), *row))  # type: ignore[no-untyped-call]
            filled = 0
            while filled < len(part):
                block = rest if len(rest) else next(blocks)
                taken = block[: len(part) - filled]
                rows[filled : filled + len(taken)] = taken
                filled, rest = filled + len(taken), block[len(taken) :]
            rows.flush()
            del rows
            write_json(file.with_suffix(".json"), list(part))
            self._open(file.with_suffix(".json"))


class KeptImages(Dataset[tuple[Tensor, object, int]]):
    """(what the border is given, label, index) by (epoch, index); an epoch shows one view of every image."""

    def __init__(self, store: Store, names: Sequence[Sequence[str]], labels: Sequence[object]) -> None:
        self.rows = [[store.rows[name] for name in view] for view in names]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, object, int]:
        epoch, index = key
        rows, row = self.rows[epoch % len(self.rows)][index]
        return torch.from_numpy(np.array(rows[row])), self.labels[index], index


class _Views(Dataset[Tensor]):
    """Images by (view, index), drawn by the content of the image and the view alone, whatever the seed of the run."""

    def __init__(self, split: Labelled, wanted: Sequence[tuple[int, int]], contents: Sequence[bytes]) -> None:
        self.split, self.wanted, self.contents = split, wanted, contents

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, number: int) -> Tensor:
        view, index = self.wanted[number]
        with seeded_all(int.from_bytes(self.contents[index], "big"), view):
            image: Tensor = self.split[index][0]
        return image


@dataclass(frozen=True)
class KeptPrefix:
    """A model whose part below the border is kept.

    images: "train" and "val", as the loaders take them. dtype, last: of what the border is given, and whether its
    channels lie last in memory.
    """

    shortcut: Shortcut
    images: Mapping[str, KeptImages]
    dtype: torch.dtype
    last: bool

    @classmethod
    def of(cls, model: nn.Module, border: Border, recipe: Recipe, splits: Mapping[str, Labelled | None]) -> KeptPrefix:
        """Compute what is not kept yet, for the training and validation images; the model is on its device.

        Raises:
            ConfigError: it would take more than the recipe's `prefix_limit`, or than the disk has.
            TuningError: the model has a way around the border, or float16 cannot hold what it is given.
        """
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            return cls._filled(Shortcut(model, border), recipe, splits)
        finally:
            for module in training:
                module.training = True

    @classmethod
    def _filled(cls, shortcut: Shortcut, recipe: Recipe, splits: Mapping[str, Labelled | None]) -> KeptPrefix:
        device = next(shortcut.model.parameters()).device
        with seeded_all(0):
            train = splits["train"]
            assert train is not None
            few = torch.stack([train[i][0] for i in range(min(2, len(train)))])
        given = shortcut.check(few.to(device))
        last = given.ndim == 4 and not given.is_contiguous() and given.is_contiguous(memory_format=torch.channels_last)
        dtype, row = np.dtype(recipe.keep_prefix), tuple(_laid_out(given, last).shape[1:])
        key, images = _key_of(shortcut, recipe, given.dtype), {}
        for which, split in splits.items():
            if split is None:
                continue
            views = recipe.prefix_views or 1 if which == "train" else 1
            folder = cache_folder() / "prefixes" / f"{key}-{_digest(repr(split.transform))}"
            contents = content_digests(split)
            names = [[f"{content.hex()}-{view}" for content in contents] for view in range(views)]
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # of runs side by side one computes, and the others find it
                store = Store(folder)
                wanted = _lacking(store, names)
                if wanted:
                    _announce(store, which, len(wanted), len(wanted) * int(np.prod(row)) * dtype.itemsize, recipe)
                    batches = _batches(_Views(split, wanted, contents), which, recipe)
                    blocks = (_as_rows(shortcut.below(batch.to(device)), last, dtype) for batch in batches)
                    store.add([names[view][index] for view, index in wanted], row, dtype, blocks)
            images[which] = KeptImages(store, names, [split.label(index) for index in range(len(split))])
        return cls(shortcut, images, given.dtype, last)

    def outputs(self, kept: Tensor) -> object:
        """What the model returns for rows [B, ...] of kept images."""
        given = kept.to(self.dtype)
        return self.shortcut.above(given.movedim(-1, 1) if self.last else given)


def _batches(views: _Views, which: str, recipe: Recipe) -> Iterator[Tensor]:
    """The images in batches, behind a progress bar."""
    loader = DataLoader(
        views, recipe.batch_size, num_workers=recipe.workers,
        generator=torch.Generator(),  # else it would draw from the run's own random numbers
    )  # fmt: skip
    return shown(loader, f"frozen part: {which}", len(loader))


def _lacking(store: Store, names: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """(view, index) of the rows that are not there, each content once."""
    lacking: dict[str, tuple[int, int]] = {}
    for view, row in enumerate(names):
        for index, name in enumerate(row):
            if name not in store.rows:
                lacking.setdefault(name, (view, index))
    return list(lacking.values())


def _announce(store: Store, which: str, rows: int, needed: int, recipe: Recipe) -> None:
    """Say what will be kept; ConfigError where that is too much."""
    root = store.folder.parent
    held = sum(file.stat().st_size for file in root.rglob("*.npy"))
    size = f"{rows:,} rows of {which} images, {needed / GB:.3f} GB"
    advice = "take fewer images or views, keep_prefix=float16, or keep_prefix=none"
    if held + needed > recipe.prefix_limit * GB:
        raise ConfigError(
            f"keep_prefix: {size}, would let {root} grow to {(held + needed) / GB:.3f} GB, above "
            f"prefix_limit={recipe.prefix_limit:g}; raise it, delete what is there (it can be computed again), or "
            f"{advice}"
        )
    if needed > (free := shutil.disk_usage(root).free):
        raise ConfigError(f"keep_prefix: {size}, and {root} has room for {free / GB:.2f} GB; {advice}")
    log.info("computing once and keeping in %s: %s", root, size)


def _laid_out(given: Tensor, last: bool) -> Tensor:
    return given.movedim(1, -1) if last else given


def _as_rows(given: Tensor, last: bool, dtype: np.dtype) -> np.ndarray:
    rows = _laid_out(given, last).float().cpu().numpy().astype(dtype)
    if not np.isfinite(rows).all():
        raise TuningError(f"what the border is given does not fit into {dtype}; take keep_prefix=float32")
    return rows


def _key_of(shortcut: Shortcut, recipe: Recipe, dtype: torch.dtype) -> str:
    """A digest of all that the frozen part computes with."""
    border, held = shortcut.border, hashlib.sha256()
    named = dict(shortcut.model.named_parameters())
    tensors = {name: named[name] for name in border.bare}
    for name, module in border.below.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    for name, tensor in tensors.items():
        held.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        held.update(dequantised(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    said = [border.name, recipe.model, recipe.image_size, recipe.precision, recipe.keep_prefix, str(dtype)]
    return _digest(json.dumps([said, held.hexdigest()]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
