"""The exceptions that a user meets.

Every message says what was got, what was expected and what to do; the command line prints it as one line.
"""

from __future__ import annotations

import sys
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
    """An optional library is needed; the message names the extra that installs it.

    Raised while an ImportError is handled that is no lack of a module, it says that the library is there and broken:
    as a rule its version and that of another do not fit.
    """

    def __init__(self, library: str, extra: str) -> None:
        cause, text = sys.exc_info()[1], f"{library} is not installed, and this needs it: pip install"
        if isinstance(cause, ImportError) and not isinstance(cause, ModuleNotFoundError):
            text = f"{library} cannot be imported ({one_line(cause)}); versions that fit: pip install --upgrade"
        super().__init__(f"{text} 'fewtune[{extra}]'")


Progress = Callable[[str], None]
"""Told in words what slow work goes on."""


def nearest(
    word: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.5, prefix: str = "", otherwise: str = ""
) -> str:
    """What an error adds after an unknown name: " (did you mean 'x'?)", or `otherwise` where no known name is near.

    Args:
        count: how many names are told at most.
        cutoff: how alike they must be, 0 to 1 (difflib's ratio, upper and lower case alike).
        prefix: of each name, as the user has to write it.
    """
    by_lower = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), by_lower, n=count, cutoff=cutoff)
    names = " or ".join(f"'{prefix}{by_lower[name]}'" for name in close)
    return f" (did you mean {names}?)" if names else otherwise


def one_line(error: BaseException, limit: int | None = None) -> str:
    """What another library's error says, in one line, without addresses, of at most `limit` characters; its class where
    it says nothing."""
    text = " ".join(word for word in str(error).split() if "://" not in word) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
