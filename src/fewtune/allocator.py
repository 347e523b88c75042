"""How this process's memory allocator treats what was freed."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""glibc's numbers of mallopt's settings."""


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process and does not give it back to the system; False where glibc is not there.

    Activations of some megabytes come and go with every batch. glibc returns them or keeps them as chance has it, and
    getting them back page by page takes up to a fifth of a pass's time. For processes of our own alone (the command
    line, workers, the service): a user's program decides for itself.
    """
    return _set(TRIM_THRESHOLD, 2**31 - 1) and _set(MMAP_THRESHOLD, 2**30)


def share_freed_memory() -> bool:
    """Lets a thread use what another has freed; False where glibc is not there.

    glibc gives threads pools of their own. In a service that decodes images in many threads these grew for as long as
    it was watched, by a third in ten minutes; with one pool for all its memory stays flat.
    """
    return _set(ARENA_MAX, 1)


def _set(setting: int, value: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and bool(mallopt(setting, value))
