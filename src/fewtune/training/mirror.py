"""A folder of an object store, and the local one in which it is worked on.

Work is done in the local folder and sent when it is complete. A store writes each object whole or not at all, and the
file that says that a folder is complete is sent last: a killed process leaves a folder that counts as not done.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fewtune.errors import ConfigError
from fewtune.files import read_json, write_json
from fewtune.stores import address, cache_folder, filesystem, one_line_errors

UNSENT = ".unsent"
"""Stands in a local folder from the beginning of its work until all of it is sent; without it, it is a copy."""
SMALL = (".json", ".yaml", ".csv", "failed.txt")
"""How the names of files end from which a reader learns what became of a run."""
STAYS_HERE = (".lock", UNSENT, ".ckpt")
"""How the names of files end that no other machine has a use for."""


@dataclass(frozen=True)
class Mirror:
    """A folder of a store; all paths that its methods take and give are of the local one.

    Raises:
        ConfigError: the store cannot be reached, or something in it not read or written; from every method.
        MissingExtra: the package of the store is not installed.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    @classmethod
    def of(cls, path: str | Path) -> Mirror:
        """The mirror of an address."""
        return cls(address(path))

    @property
    def local(self) -> Path:
        """In the cache folder, one for each address."""
        named = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        return cache_folder() / "mirrors" / f"{self.address.rpartition('/')[2]}-{named}"

    def pull(self, names: tuple[str, ...] = SMALL) -> None:
        """Bring the local copies of files up to date whose names end so; folders that are being worked on stay."""
        system, root = filesystem(self.address, ConfigError)
        self.local.mkdir(parents=True, exist_ok=True)
        index = self.local.with_name(f"{self.local.name}.json")  # which object a copy is of
        before: dict[str, str] = read_json(index) if index.exists() else {}
        with one_line_errors(self.address, ConfigError):
            there = {_below(name, root): _told(facts) for name, facts in system.find(root, detail=True).items()}
            known = {name: told for name, told in before.items() if name in there}
            for name in [name for name in there if name.endswith(names)]:
                target = self.local / name
                if not self.is_unsent(target.parent) and (known.get(name) != there[name] or not target.exists()):
                    _get(system, f"{root}/{name}", target)
                    known[name] = there[name]
        self._drop({path for path in self.local.rglob("*") if path.name.endswith(names)}, there)
        write_json(index, known)

    def _drop(self, copies: set[Path], there: Mapping[str, str]) -> None:
        """Delete copies of what is no longer there."""
        for path in copies:
            if path.relative_to(self.local).as_posix() not in there and not self.is_unsent(path.parent):
                path.unlink()

    def is_unsent(self, folder: Path) -> bool:
        """Whether a folder was worked on here and is not sent."""
        return (folder / UNSENT).exists()

    def renew(self, folder: Path) -> None:
        """Copy a folder that is complete in the store; an older copy of it is thrown away."""
        shutil.rmtree(folder, ignore_errors=True)
        self.copy(folder)

    def begin(self, folder: Path) -> None:
        """Mark a folder as worked on, from here on; an older copy of it is thrown away."""
        if folder.exists() and not self.is_unsent(folder):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNSENT).touch()

    def send(self, folder: Path, last: str) -> None:
        """Send a folder that was worked on, the file `last`, which says that it is complete, at the end."""
        files = {path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(STAYS_HERE)}
        system, _ = filesystem(self.address, ConfigError)
        with one_line_errors(self.address, ConfigError):
            there = self._there(folder)
            for name in map(str, system.find(there)):  # of an older run: until all of this one is sent it is none
                path = folder / _below(name, there)
                if path not in files or path.name == last:
                    system.rm_file(name)
        for path in sorted(files, key=lambda path: (path.name == last, path)):
            self.send_file(path)
        (folder / UNSENT).unlink(missing_ok=True)

    def send_unsent(self, results: Sequence[str]) -> None:
        """Send the folders that were not, and hold one of the files `results`, which says that they are complete."""
        for folder in [marker.parent for marker in self.local.rglob(UNSENT)]:
            for last in [name for name in results if (folder / name).exists()]:
                self.send(folder, last)

    def send_file(self, path: Path) -> None:
        """Send one file."""
        system, _ = filesystem(self.address, ConfigError)
        with one_line_errors(self.address, ConfigError):
            there = self._there(path)
            system.makedirs(there.rpartition("/")[0], exist_ok=True)
            system.put_file(str(path), there)

    def fetch(self, path: Path) -> bool:
        """Get a file that does not lie here; whether it lies here then."""
        system, _ = filesystem(self.address, ConfigError)
        if not path.exists() and self.has(path):
            with one_line_errors(self.address, ConfigError):
                _get(system, self._there(path), path)
        return path.exists()

    def copy(self, folder: Path, names: tuple[str, ...] = SMALL) -> None:
        """Get the files of a complete folder that do not lie here and whose names end so."""
        system, _ = filesystem(self.address, ConfigError)
        with one_line_errors(self.address, ConfigError):
            there = self._there(folder)
            for name in map(str, system.find(there)):
                path = folder / _below(name, there)
                if name.endswith(names) and not path.exists():
                    _get(system, name, path)

    def has(self, path: Path) -> bool:
        """Whether the store has a file."""
        system, _ = filesystem(self.address, ConfigError)
        with one_line_errors(self.address, ConfigError):
            return bool(system.exists(self._there(path)))

    def remove(self, folder: Path) -> None:
        """Delete a folder of the store."""
        system, _ = filesystem(self.address, ConfigError)
        with one_line_errors(self.address, ConfigError):
            if system.exists(self._there(folder)):
                system.rm(self._there(folder), recursive=True)

    def named(self, text: str) -> str:
        """A message about local paths as one about the store's."""
        return text.replace(str(self.local), self.address)

    def _there(self, path: Path) -> str:
        return f"{filesystem(self.address, ConfigError)[1]}/{path.relative_to(self.local).as_posix()}"


def _below(name: str, root: str) -> str:
    return name.removeprefix(root).lstrip("/")


def _told(facts: Mapping[str, object]) -> str:
    """What tells an object from the one that was there before: its facts, as its store has them."""
    return hashlib.sha256(repr(sorted((key, str(value)) for key, value in facts.items())).encode()).hexdigest()[:16]


def _get(system: object, there: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    system.get_file(there, str(part))  # type: ignore[attr-defined]
    os.replace(part, path)
