"""How this process's memory allocator treats what was freed."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of mallopt's settings."""


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process and does not give it back to the system; False where glibc is not there.

    Activations of some megabytes come and go with every batch. glibc returns them or keeps them as chance has it, and
    getting them back page by page takes up to a fifth of a pass's time. For processes of our own alone (the command
    line, workers, the service): a user's program decides for itself.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(MMAP_THRESHOLD, 2**30))
