"""Memory and disk that a run took."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU where one is in use, else the process's largest resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this figure does not hold what a parent process needed before exec
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def file_size(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size
