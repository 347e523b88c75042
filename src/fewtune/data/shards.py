"""`wds:` data: shards in WebDataset's form, tar files whose images are read one by one, in any order.

A sample is the members whose names agree up to the first dot: an image, and its class in `.cls` (a whole number or a
word) or in `.json` ({"label": …}). The headers of all shards are read once; after that an image is one read at its
offset. So training draws the images of an epoch exactly as from a folder, and a resumed run goes on to the same ones.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from PIL import Image

from fewtune.data.images import SUFFIXES, read_image
from fewtune.data.listing import SPLIT_NAMES, in_label_order
from fewtune.data.split import ImageData, Split
from fewtune.errors import DataError, Progress, one_line

CLASSES = "classes.txt"
"""Names of the classes, one a line, in a folder of shards."""


class Member(NamedTuple):
    """Where an image lies."""

    shard: str
    offset: int
    size: int
    name: str


def shard_data(spec: str, progress: Progress | None = None) -> ImageData:
    """The images of some shards.

    Args:
        spec: a folder of train*.tar, val*.tar and test*.tar; or training shards by a path or an address with braces
            ("s3://bucket/train-{000..099}.tar") or, on a disk, stars. Addresses are opened by fsspec.

    Raises:
        DataError: there are no shards, one cannot be read, or a sample has no image or no class.
    """
    shards = _shards(spec)
    samples: dict[str, list[tuple[Member, Any]]] = {}
    for split, paths in shards.items():
        for number, path in enumerate(paths, 1):
            if progress:
                progress(f"reading the headers of {split} shard {number} of {len(paths)}")
            samples.setdefault(split, []).extend(_samples(path))
    if not samples.get("train"):
        raise DataError(f"wds:{spec} holds no training images")
    classes = in_label_order({label for _, label in samples["train"]})
    number_of = {label: i for i, label in enumerate(classes)}
    splits = {split: _split(split, some, number_of) for split, some in samples.items()}
    return ImageData(f"wds:{spec}", _class_names(Path(spec), classes), **splits)


def read_member(member: Member) -> Image.Image:
    """The image as 8-bit RGB."""
    with _opened(member.shard) as file:
        file.seek(member.offset)
        content = file.read(member.size)
    return read_image(io.BytesIO(content), member.name)


def write_shards(data: ImageData, out: Path, images: int = 1000) -> list[Path]:
    """The images of a data set as shards of so many images each, with the names of its classes.

    Files are taken over byte by byte; images that are no files become PNG. The same data gives the same shards.

    Raises:
        DataError: images may have several classes.
    """
    data.require_one_class()
    out.mkdir(parents=True, exist_ok=True)
    (out / CLASSES).write_text("\n".join(data.class_names) + "\n", encoding="utf-8")
    written = []
    for name, split in data.splits.items():
        for number, start in enumerate(range(0, len(split), images)):
            path = out / f"{name}-{number:06d}.tar"
            temporary = path.with_suffix(".part")
            with tarfile.open(temporary, "w") as shard:
                for index in range(start, min(start + images, len(split))):
                    suffix, content = _content(split, index)
                    _add(shard, f"{index:09d}{suffix}", content)
                    _add(shard, f"{index:09d}.cls", str(split.labels[index]).encode())
            temporary.replace(path)
            written.append(path)
    return written


def _shards(spec: str) -> dict[str, list[str]]:
    """Split -> its shards."""
    folder = Path(spec)
    if folder.is_dir():
        shards: dict[str, list[str]] = {}
        for path in sorted(folder.glob("*.tar")):
            word = re.match(r"[A-Za-z]*", path.name)
            shards.setdefault(SPLIT_NAMES.get(word[0].lower() if word else "", "train"), []).append(str(path))
    else:
        paths = [path for braced in _braces(spec) for path in _starred(braced)]
        shards = {"train": paths} if paths else {}
    if not shards:
        raise DataError(f"there are no shards (.tar) at {spec}: give a folder of them, or their paths with braces")
    return shards


def _starred(path: str) -> list[str]:
    return [path] if "://" in path or not glob.has_magic(path) else sorted(glob.glob(path))


def _braces(text: str) -> Iterator[str]:
    """ "a-{00..02}.tar" -> a-00.tar, a-01.tar, a-02.tar; "{x,y}" -> x, y."""
    braces = re.search(r"\{([^{}]*)\}", text)
    if braces is None:
        yield text
        return
    first, dots, last = braces[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        parts = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        parts = braces[1].split(",")
    for part in parts:
        yield from _braces(text[: braces.start()] + part + text[braces.end() :])


def _samples(path: str) -> Iterator[tuple[Member, Any]]:
    """Every image of a shard with its class, in the shard's order."""
    images: dict[str, Member] = {}
    labels: dict[str, Any] = {}
    try:
        with _opened(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for entry in shard:
                inside = PurePosixPath(entry.name)
                if not entry.isfile() or inside.name.startswith("."):
                    continue
                key, _, suffix = inside.name.partition(".")
                key, suffix = str(inside.with_name(key)), suffix.lower()
                if f".{suffix}" in SUFFIXES:
                    images[key] = Member(path, entry.offset_data, entry.size, f"{path}/{entry.name}")
                elif suffix in ("cls", "json"):
                    content = shard.extractfile(entry)
                    labels[key] = _label(suffix, b"" if content is None else content.read(), f"{path}/{entry.name}")
    except (OSError, tarfile.TarError, ImportError, ValueError) as error:
        raise DataError(f"the shard {path} cannot be read: {one_line(error)}") from error
    for key in {**images, **labels}:
        if key not in images or key not in labels:
            what = "image" if key in labels else "class (.cls, or .json with a label)"
            raise DataError(f"the sample {key} of the shard {path} has no {what}")
        yield images[key], labels[key]


def _label(suffix: str, content: bytes, name: str) -> int | str:
    try:
        text = content.decode().strip()
        label = json.loads(text)["label"] if suffix == "json" else text
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{name} says no class: {one_line(error)}") from error
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise DataError(f"{name} says no class: expected a whole number or a word, got {label!r}")
    return int(label) if str(label).isdigit() else label


def _split(name: str, samples: list[tuple[Member, Any]], number_of: dict[Any, int]) -> Split:
    for member, label in samples:
        if label not in number_of:
            raise DataError(f"{member.name} ({name}) has the class {label!r}, which no training image has")
    return Split(
        records=[member for member, _ in samples],
        labels=[number_of[label] for _, label in samples],
        names=[member.name for member, _ in samples],
        read=read_member,
    )


def _class_names(folder: Path, classes: list[Any]) -> tuple[str, ...]:
    """Of classes.txt where classes are numbers and it lies there; else the labels themselves."""
    file = (folder if folder.is_dir() else folder.parent) / CLASSES
    if all(isinstance(label, int) for label in classes) and file.is_file():
        names = file.read_text(encoding="utf-8").split("\n")
        if classes and classes[-1] < len(names):
            return tuple(names[label] for label in classes)
    return tuple(map(str, classes))


def _opened(path: str) -> IO[bytes]:
    if "://" not in path:
        return Path(path).open("rb")
    import fsspec

    file: IO[bytes] = fsspec.open(path, "rb").open()
    return file


def _content(split: Split, index: int) -> tuple[str, bytes]:
    file = split.file(index)
    if file is not None:
        return file.suffix.lower(), file.read_bytes()
    buffer = io.BytesIO()
    split.image(index).save(buffer, format="PNG")
    return ".png", buffer.getvalue()


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))
