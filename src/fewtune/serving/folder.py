"""A folder of task files that a bank follows: what appears is added, what changes replaced, what goes removed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from fewtune.errors import DataError, FewtuneError
from fewtune.serving.bank import TaskBank

LOG = logging.getLogger(__name__)
Stamp = tuple[int, int, int]


class TaskFolder:
    """Keeps a bank's tasks those of a folder's ``*.safetensors`` files; a file's name without its end is its task's.

    A file that is damaged or of another backbone is told in the log and left out; where it replaced a good one, the
    good one stays until the file changes again. Tasks that were added otherwise are left alone.

    Args:
        bank: the bank.
        path: the folder.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, bank: TaskBank, path: str | Path) -> None:
        self.bank, self.path = bank, Path(path)
        if not self.path.is_dir():
            raise DataError(f"there is no folder of task files at {self.path}")
        self._seen: dict[str, Stamp] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refresh(self) -> dict[str, str]:
        """Looks once; gives what was wrong with each file that is new or changed and could not be taken."""
        stamps = {path.stem: (path, _stamp(path)) for path in sorted(self.path.glob("*.safetensors"))}
        for name in self._seen.keys() - stamps.keys():
            del self._seen[name]
            if name in self.bank.tasks():
                self.bank.remove(name)
                LOG.info("task %s is gone", name)
        wrong = {}
        for name, (path, stamp) in stamps.items():
            if stamp is None or self._seen.get(name) == stamp:
                continue
            self._seen[name] = stamp
            try:
                self.bank.add(name, path)
                LOG.info("task %s: %s", name, path)
            except FewtuneError as error:
                wrong[name] = str(error)
                LOG.warning("task %s is left out: %s", name, error)
        return wrong

    def start(self, seconds: float = 2.0) -> None:
        """Looks again and again, in a thread of its own, until `stop`."""

        def follow() -> None:
            while not self._stop.wait(seconds):
                self.refresh()

        self._stop.clear()
        self._thread = threading.Thread(target=follow, name="task folder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file does; None where it has just gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
