"""Addresses of object stores, ``s3://…``, ``gs://…`` and all else that fsspec opens: a file of one at hand.

fsspec comes with torch; the package of a store (s3fs, gcsfs) does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewtune.errors import FewtuneError, MissingExtra, one_line

_ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/+(?P<rest>.*)")
# Two letters at least: C:/ is a drive. One slash or more: pathlib.Path makes one of two.
_OTHERS = ("hf",)
"""What is no address of a store: the Hugging Face hub has its own."""
LOCAL = ("file", "local")
"""Protocols whose paths are whole."""


def cache_folder() -> Path:
    """Where fetched and converted files are kept: FEWTUNE_CACHE, else XDG_CACHE_HOME/fewtune, else ~/.cache/fewtune."""
    if folder := os.environ.get("FEWTUNE_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fewtune"


def is_address(path: str | Path) -> bool:
    """Whether a path is an address of an object store."""
    match = _ADDRESS.fullmatch(str(path))
    return match is not None and match["protocol"] not in _OTHERS


def address(path: str | Path) -> str:
    """An address as fsspec reads it, whatever pathlib has made of its slashes."""
    match = _ADDRESS.fullmatch(str(path))
    assert match is not None
    slashes = ":///" if match["protocol"] in LOCAL else "://"
    return f"{match['protocol']}{slashes}{match['rest']}".rstrip("/")


def fetch(path: str | Path, error: type[FewtuneError]) -> Path:
    """A file of a store as a local one, which fsspec keeps in the cache folder and reads anew once it has changed.

    Raises:
        FewtuneError: of the type ``error``: there is no such file, or the store cannot be reached.
        MissingExtra: the package of the store is not installed.
    """
    import fsspec

    kept = {"cache_storage": str(cache_folder() / "stores"), "check_files": True}
    with one_line_errors(path, error):
        return Path(fsspec.open_local(f"filecache::{address(path)}", filecache=kept))


def filesystem(path: str | Path, error: type[FewtuneError]) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it; raises as `fetch`."""
    from fsspec.core import url_to_fs

    with one_line_errors(path, error):
        system, inside = url_to_fs(address(path), use_listings_cache=False)
    return system, inside


@contextmanager
def one_line_errors(path: str | Path, error: type[FewtuneError]) -> Iterator[None]:
    """What a store's package raises, as an error that says in one line what is wrong with which address."""
    try:
        yield
    except FileNotFoundError as cause:
        raise error(f"{address(path)} does not exist") from cause
    except ImportError as cause:
        raise MissingExtra(cause.name or one_line(cause), "stores") from None
    except (FewtuneError, KeyboardInterrupt):
        raise
    except Exception as cause:  # of the package's own HTTP library, credentials and all
        raise error(f"{address(path)} cannot be read or written: {one_line(cause)}") from cause
