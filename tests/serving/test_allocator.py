"""Memory that one thread has freed is used by the next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GROWTH = """
import sys, threading
from fewtune.allocator import keep_freed_memory, share_freed_memory

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

keep_freed_memory()
if sys.argv[1] == "shared":
    share_freed_memory()
def work(worked):
    bytearray(2**23).replace(b"\\0", b"x")
    worked.set()
    done.wait()

done = threading.Event()
before = resident()
for _ in range(8):  # alive beside each other, but at work one after the other
    worked = threading.Event()
    threading.Thread(target=work, args=[worked]).start()
    worked.wait()
print((resident() - before) / 2**23)
done.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_threads_share_what_was_freed() -> None:
    def growth(how: str) -> float:
        """In blocks, of which each of eight threads held two for a moment."""
        command = [sys.executable, "-c", GROWTH, how]
        return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout)

    assert growth("shared") < 5 < 10 < growth("apart")
