"""The command line: one short file a command.

Results go to stdout, logs and progress to stderr. A user's mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version

from fewtune.errors import FewtuneError, MissingExtra

LIBRARIES = {"typer": "train", "rich": "train", "pydantic": "train", "yaml": "train", "lightning": "train",
             "timm": "train", "torchvision": "train", "torchmetrics": "train", "sklearn": "train",
             "PIL": "train", "imagehash": "train", "matplotlib": "train", "jinja2": "train", "tensorboard": "train",
             "transformers": "hf", "datasets": "hf",
             "fastapi": "serve", "uvicorn": "serve", "prometheus_client": "serve"}  # fmt: skip


def main() -> None:
    """Run the command line and exit: 0 when all went well, 2 for a user's mistake, 130 when interrupted."""
    logging.basicConfig(handlers=[_Stderr()], format="%(message)s", level=logging.WARNING)
    logging.getLogger("fewtune").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are told by the one line of the error
    if sys.argv[1:] == ["--version"]:  # needs no optional library
        print(f"fewtune {version('fewtune')}")
        return
    try:
        from fewtune.cli.app import app

        status = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment: while a bar is drawn, lines must stand above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _one_line(error: Exception) -> str | None:
    """What to tell of a mistake that a user can mend; None for a fault of our own."""
    match error:
        case FewtuneError():
            text = str(error)
        case ModuleNotFoundError() if error.name and error.name.partition(".")[0] in LIBRARIES:
            library = error.name.partition(".")[0]
            text = str(MissingExtra(library, LIBRARIES[library]))
        case OSError() if error.strerror:
            text = error.strerror + (f": {error.filename}" if error.filename else "")
        case _ if hasattr(error, "format_message"):  # Typer's own complaints about arguments
            text = error.format_message()
        case _:
            return None
    return " ".join(text.split())
