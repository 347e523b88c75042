"""Task files put into a followed folder, and taken out of it, through the service."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fewtune.errors import DeltaError
from fewtune.files import write_bytes
from fewtune.serving.folder import TaskFolder


def store_file(folder: TaskFolder, name: str, content: bytes) -> None:
    """Adds a task to the bank and, once it is known to be good, its file to the folder.

    Raises:
        DeltaError: it is no task of this backbone.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"{name}.safetensors"
        file.write_bytes(content)
        try:
            folder.bank.add(name, file)
        except DeltaError as error:
            raise DeltaError(str(error).replace(str(file), "the body")) from None
    write_bytes(folder.path / f"{name}.safetensors", content)


def remove_file(folder: TaskFolder, name: str) -> None:
    """Removes a task from the bank and its file from the folder."""
    (folder.path / f"{name}.safetensors").unlink(missing_ok=True)
    if name in folder.bank.tasks():
        folder.bank.remove(name)
