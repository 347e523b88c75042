"""The exceptions that a user meets.

Every message says what was got, what was expected and what to do; the command line prints it as one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches


class FewtuneError(Exception):
    """Base of all errors that are a user's to mend."""


class ModelError(FewtuneError):
    """A model cannot be loaded, or is not what an operation needs."""


class ImportanceError(FewtuneError):
    """Scores cannot be computed: NaN, all zero, or a loader that yields something else than was expected."""


class SelectionError(FewtuneError):
    """A selection is empty, impossible, or does not belong to the model at hand."""


class TuningError(FewtuneError):
    """A selection cannot be attached or detached, or an attached model was used in a way that breaks it."""


class DeltaError(FewtuneError):
    """A task file is damaged, or belongs to another backbone."""


class DataError(FewtuneError):
    """Images or labels are missing, unreadable or inconsistent."""


class ConfigError(FewtuneError):
    """A configuration or a command-line argument is wrong."""


class ExportError(FewtuneError):
    """A task cannot be exported, or what was exported does not predict what the task does."""


class MissingExtra(FewtuneError):
    """An optional library is needed; the message names the extra that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed, and this needs it: pip install 'fewtune[{extra}]'")


Progress = Callable[[str], None]
"""Told in words what slow work goes on."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """What an error adds after an unknown name: " (did you mean 'x'?)", or nothing where no known name is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean '{near[0]}'?)" if near else ""


def one_line(error: BaseException) -> str:
    """What another library's error says, in one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
