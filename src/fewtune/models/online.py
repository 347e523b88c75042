"""The Hugging Face hub's client without its long retries where there is no network."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from fewtune.hub import WAIT

UNREACHED = "not in the hub's cache, and the hub cannot be reached; is there a network, or is HF_HUB_OFFLINE set?"

_reached: set[str] = set()
"""The addresses that answered once."""


@contextmanager
def hub_or_cache(needed: bool = True) -> Iterator[None]:
    """Within, the hub's client reads its cache alone where the hub cannot be reached.

    By itself the client asks for every file six times over half a minute. The hub counts as unreachable where nothing
    answers within `fewtune.hub.WAIT[0]` seconds.
    """
    import huggingface_hub.constants as constants

    if not needed or constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT, WAIT[0]):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def answers(address: str, seconds: float) -> bool:
    """Whether a web address answers at all within a time, through the proxy that the environment names, if any."""
    if address not in _reached:
        # A thread, since looking up a name may take longer than any timeout allows.
        asking = threading.Thread(target=_ask, args=(address, seconds), daemon=True)
        asking.start()
        asking.join(seconds)
    return address in _reached


def unreached(error: BaseException | None) -> bool:
    """Whether the hub's client raised an error because it has no network, or is switched off, and lacks a file."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


def _ask(address: str, seconds: float) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # an answer too
    except (OSError, ValueError):
        return
    _reached.add(address)
