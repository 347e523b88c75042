"""Safetensors files, written atomically and read with one clear error."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewtune.errors import FewtuneError


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: a temporary file in the same folder, flushed to disk, then renamed."""
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors and a header of strings as one safetensors file, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.torch.save(plain, dict(metadata)))


def read_tensors(path: Path, error: type[FewtuneError]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file; ``error`` is raised, in one line, where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist") from cause
    except (OSError, SafetensorError, ValueError, RuntimeError) as cause:
        raise error(f"{path} cannot be read as a safetensors file: {cause}") from cause
