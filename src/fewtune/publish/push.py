"""`push`: a finished run -> a commit of a repository on the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewtune.errors import ConfigError, DeltaError, one_line
from fewtune.hub import TASK_FILE, Address, library, one_line_errors
from fewtune.methods import load_task_file
from fewtune.publish.card import model_card
from fewtune.publish.paths import without_folders
from fewtune.report.reading import read_run

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Published:
    """Where a run was published.

    Attributes:
        address: of the task file, at the commit that was made.
        url: of the repository's page.
        shortened: entries of the task file's metadata that held local paths, of which the last part is left.
    """

    address: Address
    url: str
    shortened: tuple[str, ...]


def push(run: Path, repo: str, *, private: bool = False, revision: str | None = None) -> Published:
    """Publishes the task file of a finished run with a model card (README.md), as one commit.

    What is published says nothing of the folders of this machine: of a local path in the task file's metadata only
    the last part is left. The file in the run's folder stays as it is.

    Args:
        run: the run's folder.
        repo: org/name; it is made where it does not exist.
        private: make a private repository. A repository that exists keeps its state.
        revision: the branch to commit to; it is made where it does not exist. Left out: the main branch.

    Raises:
        ConfigError: there is no finished run, or `repo` or `revision` is none; or `private` was asked for and the
            repository is a public one.
        DeltaError: the task file is damaged or says nothing of its backbone, there is no token, the token may not
            write, or the hub cannot be reached.
        MissingExtra: huggingface_hub is not installed.
    """
    if not _REPOSITORY.fullmatch(repo):
        raise ConfigError(f"expected a repository of the hub as org/name, got {repo}")
    if revision is not None and _COMMIT.fullmatch(revision):
        raise ConfigError(f"--revision names the branch to commit to, and {revision} is a commit")
    files, shortened = _files(run, repo)
    hub = library()
    if hub.get_token() is None:
        raise DeltaError("to publish, the hub must know who you are: `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi()
    with one_line_errors(Address(repo, revision), "nothing was published"), _upload_errors(repo):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise ConfigError(f"{repo} is public already: nothing was published; take another name for a private one")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        additions = [hub.CommitOperationAdd(name, content) for name, content in files.items()]
        made = api.create_commit(repo, additions, commit_message="Task file of fewtune", revision=revision)
    return Published(Address(repo, made.oid), str(url), tuple(shortened))


def _files(run: Path, repo: str) -> tuple[dict[str, bytes], list[str]]:
    """What is published, by its name in the repository, and which entries of the metadata were shortened."""
    finished = read_run(run)
    delta = load_task_file(run / TASK_FILE)
    lacking = [key for key in ("backbone", "method", "data", "recipe") if key not in delta.metadata]
    if lacking:
        raise DeltaError(f"{run / TASK_FILE} does not say its {' and '.join(lacking)}, so it has no model card")
    metadata, shortened = without_folders(delta.metadata)
    card = model_card(finished, metadata, repo, digests="seen" in metadata)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / TASK_FILE
        replace(delta, metadata=metadata).save(file)
        return {TASK_FILE: file.read_bytes(), "README.md": card.encode()}, shortened


@contextmanager
def _upload_errors(repo: str) -> Iterator[None]:
    """What the client raises of a failed upload: its cause where it has one, else a DeltaError."""
    from huggingface_hub import errors

    try:
        yield
    except RuntimeError as error:  # "Error while uploading", around what happened
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
    except ValueError as error:  # the hub refuses the card, or a file
        if isinstance(error, errors.HfHubHTTPError | errors.HFValidationError):
            raise  # said better by `one_line_errors`
        raise DeltaError(f"the hub refuses what was to be published in {repo}: {one_line(error, 200)}") from error


def told(published: Published) -> list[str]:
    """What a user is told: where it lies, and what was left out of it."""
    lines = [str(published.address), published.url]
    if published.shortened:
        lines.append(f"local folders were left out of what is published: {', '.join(published.shortened)}")
    return lines


def to_json(published: Published) -> dict[str, Any]:
    """The same as plain values."""
    address = published.address
    return {
        "task_file": str(address),
        "repository": address.repo,
        "commit": address.revision,
        "url": published.url,
        "shortened": list(published.shortened),
    }
