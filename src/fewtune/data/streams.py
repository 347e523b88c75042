"""`hf:NAME?stream`: a data set of Hugging Face's datasets that lies in parquet files, read where it lies.

Nothing is downloaded as a whole. The column of labels is read once; an image is read with its row group, of which the
latest stay in memory. Training shuffles blocks, and images within a few blocks (`EpochSampler`), so that an epoch reads
every row group about once. Which images an epoch shows, and in which order, depends on the seed and the epoch alone.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qsl

from PIL import Image

from fewtune.data.images import read_image
from fewtune.data.libraries import hf_column, numbered_splits, options_of
from fewtune.data.listing import SPLIT_NAMES
from fewtune.data.sampling import WINDOW
from fewtune.data.split import ImageData
from fewtune.errors import DataError, MissingExtra, Progress, one_line

_reading = threading.Lock()
"""Threads that want images of one row group wait for the first of them."""


class Row(NamedTuple):
    """Where an image lies."""

    file: str
    group: int
    row: int
    name: str


@dataclass(frozen=True)
class RowImage:
    """Reads the image of a row: the bytes in a column of its file."""

    column: str

    def __call__(self, record: Row) -> Image.Image:
        with _reading:
            held = _group(record.file, record.group, self.column)[record.row]
        content = held["bytes"] if isinstance(held, dict) else held
        if not isinstance(content, bytes):
            raise DataError(
                f"{record.name}: the column {self.column} holds no bytes of images, so it cannot be streamed"
            )
        return read_image(io.BytesIO(content), record.name)

    @staticmethod
    def block(record: Row) -> tuple[str, int]:
        """What is read at once."""
        return record.file, record.group


def is_streamed(spec: str) -> bool:
    """Whether ``NAME?stream`` is asked for."""
    return "stream" in dict(parse_qsl(spec.partition("?")[2], keep_blank_values=True))


def stream_data(spec: str, progress: Progress | None = None) -> ImageData:
    """ "ID?stream" or "FOLDER?stream", with "&image=COLUMN&label=COLUMN" where the types of columns do not tell.

    Raises:
        DataError: there is no such set, its files are not parquet, or a file cannot be read.
        MissingExtra: datasets is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "hf") from None
    name, options = options_of(spec, ("image", "label", "stream"))
    try:
        found = dict(datasets.load_dataset_builder(name).config.data_files or {})
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the data set hf:{name} could not be found ({one_line(error, 120)}); is the name right?"
        ) from error
    files = {
        SPLIT_NAMES[str(key).lower()]: list(map(str, found[key])) for key in found if str(key).lower() in SPLIT_NAMES
    }
    other = next((file for some in files.values() for file in some if not file.endswith(".parquet")), None)
    if "train" not in files or other is not None:
        what = f"it holds {other}" if other is not None else f"it has the splits {', '.join(map(str, found)) or 'none'}"
        raise DataError(f"hf:{name} cannot be streamed: expected a train split in parquet files, and {what}")
    with _parquet(files["train"][0]) as first:
        features = datasets.Features.from_arrow_schema(first.schema_arrow)
    image = hf_column(name, features, datasets.Image, options.get("image"), ("image", "img"))
    label = hf_column(name, features, datasets.ClassLabel, options.get("label"), ("label", "labels", "fine_label"))
    rows, raw = {}, {}
    for split, paths in files.items():
        if progress:
            progress(f"reading the labels of {split} ({len(paths)} files)")
        rows[split], raw[split] = _listed(f"{name}/{split}", paths, label)
    classes = getattr(features[label], "names", None)
    return numbered_splits(name, raw, classes, {split: (RowImage(image), rows[split]) for split in rows})


def _listed(named: str, files: Sequence[str], label: str) -> tuple[list[Row], list[Any]]:
    """Every row of some files, in their order, and its label."""
    rows: list[Row] = []
    labels: list[Any] = []
    for path in files:
        with _parquet(path) as file:
            if label not in file.schema_arrow.names:
                raise DataError(f"{path} has no column {label}; it has {', '.join(file.schema_arrow.names)}")
            labels += file.read(columns=[label]).column(label).to_pylist()
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                rows += [Row(path, group, row, f"{named}/{len(rows) + row}") for row in range(count)]
    return rows, labels


@lru_cache(2 * WINDOW)
def _group(path: str, group: int, column: str) -> list[Any]:
    """A column of a row group."""
    with _parquet(path) as file:
        return list(file.read_row_group(group, columns=[column]).column(column).to_pylist())


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import fsspec
    import pyarrow.parquet as pq

    try:
        opened: IO[bytes]
        with fsspec.open(path, "rb") as opened, pq.ParquetFile(opened) as file:
            yield file
    except (OSError, ValueError, ImportError) as error:  # pyarrow's own are ValueErrors
        raise DataError(f"the parquet file {path} cannot be read: {one_line(error)}") from error
