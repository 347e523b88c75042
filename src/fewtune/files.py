"""Files that are whole or absent: bytes, text, JSON, CSV and tensors."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewtune.errors import FewtuneError

Json = dict[str, Any]
"""A JSON object: plain values by name. Whoever reads one checks what it needs of it."""


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: a temporary file in the same folder, flushed to disk, then renamed."""
    try:
        _write_whole(path, content)
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say where it is full


def _write_whole(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all. OSError where the disk is full or the folder may not be written."""
    write_bytes(Path(path), text.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write plain dicts, lists and numbers as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What stands in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the same keys as CSV."""
    write_text(path, csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as CSV; the first row's keys are the header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and a header of strings as one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, dict(metadata)))


def save_state(state: dict[str, Tensor], out: Path) -> None:
    """Write tensors as one safetensors file, whole or not at all."""
    write_tensors(out, {name: tensor.clone() for name, tensor in state.items()}, {"format": "pt"})


def read_tensors(path: Path, error: type[FewtuneError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file; ``error`` is raised, in one line, where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist") from cause
    except (OSError, SafetensorError, ValueError, RuntimeError) as cause:
        raise error(f"{path} cannot be read as a safetensors file: {cause}") from cause


Kind = tuple[str, int]
"""What a file says that it is: its format and the version of it."""


def write_versioned(path: Path, kind: Kind, header: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors and a header of JSON values as a file that says its kind."""
    text = json.dumps({"format": kind[0], "version": kind[1], **header})
    write_tensors(path, tensors, {"fewtune": text})


def read_versioned(path: Path, kind: Kind, error: type[FewtuneError]) -> tuple[Json, dict[str, Tensor]]:
    """The header and the tensors of a file of `write_versioned`.

    Raises ``error``, in one line, where the file is missing, damaged, of another kind, or of a newer version.
    """
    tensors, metadata = read_tensors(path, error)
    try:
        header = dict(json.loads(metadata["fewtune"]))
        stated, version = header["format"], int(header["version"])
    except (LookupError, TypeError, ValueError, RecursionError) as cause:
        what = kind[0].removeprefix("fewtune-").replace("-", " ")
        raise error(f"{path} is not a {what} file, or it is damaged ({cause})") from cause
    if stated != kind[0]:
        raise error(f"{path} is a {stated} file; expected a {kind[0]}")
    if version > kind[1]:
        raise error(f"{path} has version {version}; this fewtune reads up to {kind[1]}: update fewtune")
    return header, tensors
