"""Memory and disk that a run needs, and how to need less."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch
from torch import nn

from fewtune.errors import ConfigError


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU where one is in use, else the process's largest resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    told = _status("VmHWM:")  # unlike getrusage's, this figure does not hold what a parent process needed before exec
    if told is not None:
        return told
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory() -> int:
    """Bytes that are held now: on the GPU where one is in use, else the process's resident set (0 if it is unknown)."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        return torch.cuda.memory_allocated()
    return _status("VmRSS:") or 0


def _status(key: str) -> int | None:
    """Bytes that Linux says of this process; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def reset_peak_memory() -> None:
    """Count the peak from here, where the system allows it: on a GPU, and on Linux (freed memory is given back first).

    For processes that do several runs one after the other.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone can be asked for freed memory
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def file_size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size


def recompute_activations(model: nn.Module, name: str) -> None:
    """Switch it on in a timm or transformers model, for training mode; ConfigError where `model` cannot do it."""
    for switch in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        enable = getattr(model, switch, None)
        if callable(enable):
            try:
                enable()
            except (ValueError, AssertionError, NotImplementedError, AttributeError) as error:
                raise ConfigError(
                    f"{name} cannot recompute activations ({error}); leave checkpoint_activations out"
                ) from error
            return
    raise ConfigError(f"{name} cannot recompute activations; leave checkpoint_activations out")
