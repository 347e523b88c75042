"""Task files elsewhere -> a local file: ``hf://org/name[@revision][/file]`` of the Hugging Face hub, with the commit it
is of, and ``s3://…`` of an object store.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fewtune import stores
from fewtune.errors import DeltaError, MissingExtra, one_line

TASK_FILE = "delta.safetensors"
"""The file of a repository that is meant where none is named; `fewtune push` writes it."""

WAIT = (2.5, 10.0, 10.0, 2.5)
"""Seconds to wait for a connection, for an answer, for sending, and for a free connection."""

READ_OFFLINE = "what was downloaded before is read by its whole commit hash"
"""What can be done without a network."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?")
_BEGINS = re.compile(r"hf:/")
# One slash or two: pathlib.Path makes one of two.


@dataclass(frozen=True)
class Address:
    """A file of a repository at a revision: a branch, a tag or a commit; None for the repository's main branch."""

    repo: str
    revision: str | None = None
    file: str = TASK_FILE

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision.replace('/', '%2F')}"
        return f"hf://{self.repo}{at}/{self.file}"


@dataclass(frozen=True)
class Fetched:
    """A task file at hand.

    path: where it lies.
    origin: its address, of the hub with the commit that was read; None for a file that was local.
    """

    path: Path
    origin: Address | str | None = None

    def __str__(self) -> str:
        return str(self.path if self.origin is None else self.origin)


def is_address(path: str | Path) -> bool:
    """Whether a path names a file of the hub."""
    return _BEGINS.match(str(path)) is not None


def pinned(path: str | None) -> str | None:
    """A path as it is, and the address of a file of the hub with the commit that it names now.

    Raises:
        DeltaError, MissingExtra: as `resolve`.
    """
    return path if path is None or not is_address(path) else str(resolve(path))


def address(text: str | Path) -> Address:
    """Reads ``hf://org/name[@revision][/file]``; a slash within a revision is written %2F.

    Raises:
        DeltaError: it is written otherwise.
    """
    match = _ADDRESS.fullmatch(str(text))
    if match is None or ".." in str(text).split("/"):
        raise DeltaError(f"expected hf://org/name, hf://org/name@revision or hf://org/name@revision/file, got {text}")
    revision = match["revision"]
    return Address(match["repo"], revision and unquote(revision), match["file"] or TASK_FILE)


def resolve(path: str | Path) -> Fetched:
    """A task file at hand: a local path as it is, a file of the hub downloaded into the hub's own cache, one of an
    object store into fewtune's; there the address of a run's folder stands for its task file.

    A branch or tag is looked up first and the file read at the commit it names then; a whole commit hash is not
    looked up, so a file that was downloaded before is read without a network. Private repositories are read by the
    user's token (`hf auth login`, or HF_TOKEN).

    Raises:
        DeltaError: there is no such repository, revision or file, it is private, or the hub or the store cannot be
            reached.
        MissingExtra: huggingface_hub, or the package of the store, is not installed.
    """
    if stores.is_address(path):
        named = stores.address(path)
        named = named if named.endswith(Path(TASK_FILE).suffix) else f"{named}/{TASK_FILE}"
        return Fetched(stores.fetch(named, DeltaError), named)
    if not is_address(path):
        return Fetched(Path(path))
    wanted = address(path)
    hub = library()
    with one_line_errors(wanted):
        commit = wanted.revision
        if not hub.constants.HF_HUB_OFFLINE and (commit is None or not _COMMIT.fullmatch(commit)):
            commit = hub.HfApi().model_info(wanted.repo, revision=wanted.revision, timeout=WAIT).sha
        local = _download(hub, wanted, commit)
    return Fetched(local, Address(wanted.repo, commit_of(local, wanted), wanted.file))


def _download(hub: Any, wanted: Address, commit: str | None) -> Path:
    """The file at a commit. What is not in the cache is asked for first, since the download itself retries for long."""
    cached = hub.try_to_load_from_cache(wanted.repo, wanted.file, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if not hub.constants.HF_HUB_OFFLINE:
        url = hub.hf_hub_url(wanted.repo, wanted.file, revision=commit)
        hub.get_hf_file_metadata(url, timeout=WAIT)
    return Path(hub.hf_hub_download(wanted.repo, wanted.file, revision=commit))


def commit_of(local: Path, wanted: Address) -> str:
    """The commit whose file lies at a path of the hub's cache: …/snapshots/COMMIT/FILE."""
    return local.parents[wanted.file.count("/")].name


def library() -> Any:
    """The module huggingface_hub; MissingExtra where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # which the package does not load by itself
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub") from None
    return huggingface_hub


@contextmanager
def one_line_errors(wanted: Address, offline: str = READ_OFFLINE) -> Iterator[None]:
    """What the hub's client raises, as a DeltaError that says in one line what to do; `offline`: without a network."""
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise DeltaError(f"{wanted.repo} has no revision {wanted.revision or 'main'} on the hub") from error
    except errors.RemoteEntryNotFoundError as error:
        at = f" at {wanted.revision}" if wanted.revision else ""
        raise DeltaError(f"{wanted.repo} has no file {wanted.file}{at}: name one as hf://org/name/FILE") from error
    except errors.GatedRepoError as error:
        raise DeltaError(f"{wanted.repo} is gated: ask for access on its page, then `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise DeltaError(
            f"there is no repository {wanted.repo} on the hub that you may read; if it is private, give a token of its "
            "owner: `hf auth login`, or HF_TOKEN"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DeltaError(
            f"{wanted} is not in the hub's cache and the hub is switched off (HF_HUB_OFFLINE) or cannot be reached"
        ) from error
    except errors.HfHubHTTPError as error:
        raise DeltaError(_refused(error, wanted)) from error
    except errors.HFValidationError as error:
        raise DeltaError(f"{wanted.repo} is no name of a repository: {one_line(error)}") from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise DeltaError(f"{wanted}: the hub cannot be reached ({one_line(error, 100)}); {offline}") from error


def _of_the_network(error: BaseException) -> bool:
    """Whether the client's HTTP library (httpx, and httpx2 of later versions) or the system could not connect."""
    library = type(error).__module__.partition(".")[0]
    return library in ("httpx", "httpx2") or isinstance(error, ConnectionError | TimeoutError)


def _refused(error: Any, wanted: Address) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not accept your token for {wanted.repo}: `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return (
            f"your token may not do this with {wanted.repo}: take one with that right (to push: a token that may write)"
        )
    return f"the hub did not answer for {wanted.repo}: {one_line(error, 200)}"
