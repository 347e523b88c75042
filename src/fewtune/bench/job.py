"""One run of a grid, in a worker's process."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fewtune.allocator import keep_freed_memory
from fewtune.bench.plan import Kind, result_file, scores_file
from fewtune.config import Recipe
from fewtune.errors import FewtuneError, ImportanceError, one_line
from fewtune.files import read_tensors, write_json, write_text
from fewtune.importance import Scores
from fewtune.neurons import describe
from fewtune.progress import quiet_libraries
from fewtune.tasks import fit, prepare
from fewtune.training.fit import train
from fewtune.training.learner import NonFiniteLoss
from fewtune.training.loaders import seed_all
from fewtune.training.memory import reset_peak_memory
from fewtune.training.mirror import Mirror
from fewtune.training.run_folder import RunFolder
from fewtune.training.tuners import fit_at_once, method_of, prepared, score
from fewtune.training.work import Work

Epochs = Literal["all", "last", "best"]
"""Which epochs of a choosing run are judged: all of them as candidates, the last alone, or the best alone."""


@dataclass(frozen=True)
class Job:
    """A run, resolved: all that a worker's process needs."""

    kind: Kind
    name: str
    recipe: Recipe
    out: Path
    epochs: Epochs
    mirror: Mirror | None = None
    """Where `out` is sent to."""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.out / self.name

    @property
    def scores(self) -> Path | None:
        """Where its scores are kept for other runs."""
        return scores_file(self.recipe, self.out / self.name.partition("/")[0])

    @property
    def result(self) -> Path:
        """What stands in its folder when it is finished."""
        return result_file(self.kind, self.folder)

    @property
    def failure(self) -> Path:
        """The file that says why it failed."""
        return self.folder / "failed.txt"


def begin_worker(threads: int) -> None:
    """Set up a process that does jobs: threads, memory, and a log that goes into the folder of each run alone."""
    keep_freed_memory()
    quiet_libraries()
    torch.set_num_threads(threads)
    logging.getLogger("fewtune").setLevel(logging.INFO)
    logging.getLogger("fewtune").propagate = False


def do(job: Job) -> str | None:
    """Do a run; None when it is finished, else one line with the reason, which is kept in its folder too."""
    if job.mirror is None:
        return _do(job)
    try:
        reason = _do_and_send(job, job.mirror)
    except FewtuneError as error:
        reason = one_line(error)
    return None if reason is None else job.mirror.named(reason)


def _do_and_send(job: Job, mirror: Mirror) -> str | None:
    """The same where the folder is sent to a store; what is complete there or here is only looked at."""
    if not mirror.is_unsent(job.folder) and mirror.has(job.result):
        mirror.renew(job.folder)
        _begin(job)
        return None
    mirror.begin(job.folder)
    if job.result.exists():
        _begin(job)
        reason = None
    else:
        reason = _do(job)
    mirror.send(job.folder, job.result.name if reason is None else job.failure.name)
    return reason


def _do(job: Job) -> str | None:
    job.folder.mkdir(parents=True, exist_ok=True)
    job.failure.unlink(missing_ok=True)
    log = logging.FileHandler(job.folder / "log.txt")
    log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("fewtune").addHandler(log)
    try:
        reset_peak_memory()
        seed_all(job.recipe.seed)
        if job.kind == "choose":
            _try_choice(job)
        else:
            _train(job)
        RunFolder(job.folder).checkpoint.unlink(missing_ok=True)  # it holds several copies of all that is trained
    except Exception as error:
        reason = one_line(error)
        if not isinstance(error, FewtuneError | OSError):
            reason = f"{type(error).__name__}: {reason}"
        write_text(job.failure, f"{reason}\n\n{traceback.format_exc()}")
        return reason
    finally:
        logging.getLogger("fewtune").removeHandler(log)
        log.close()
    return None


def _begin(job: Job) -> RunFolder:
    """Write what is known before any work, or check that the run which lies there is this one."""
    folder = RunFolder(job.folder)
    if folder.config.exists():
        folder.resumed(job.recipe)
    else:
        folder.begin(job.recipe)
    return folder


def _train(job: Job) -> None:
    """Train on training and validation images, take the last epoch, read the test set once."""
    folder = _begin(job)
    if job.scores is not None and not folder.selection.exists():
        _select(job, prepare(job.recipe), folder)
        reset_peak_memory()
    fit(job.recipe, folder.path, resume=True)


def _try_choice(job: Job) -> None:
    """Train on the training images and judge every epoch on the validation images; no test image is read."""
    folder, started = _begin(job), time.perf_counter()
    work = prepare(job.recipe).untested()
    if job.scores is not None and not folder.selection.exists():
        _select(job, work, folder)
    result: dict[str, Any] = {}
    try:
        result["candidates"] = _candidates(work, folder, job.epochs)
    except NonFiniteLoss as error:
        result = {"candidates": [], "diverged": str(error)}
    write_json(folder.path / "validation.json", {**result, "seconds": time.perf_counter() - started})


def _candidates(work: Work, folder: RunFolder, epochs: Epochs) -> list[dict[str, Any]]:
    """What this run gives to choose from: {"setting": …, "accuracy": …, "loss": …} of the validation images."""
    if not method_of(work).trains_by_epochs(work.recipe.task):
        return [asdict(candidate) for candidate in fit_at_once(work).candidates]
    module = train(work, folder)
    measure = f"val_{module.measure}"
    match epochs:
        case "all":
            judged = module.history
        case "last":
            judged = module.history[-1:]
        case "best":
            judged = [max(module.history, key=lambda entry: (entry[measure], -entry["val_loss"]))]
    return [
        {
            "setting": {"stop_after": int(entry["epoch"]) + 1} if epochs == "all" else {},
            "accuracy": entry[measure],
            "loss": entry["val_loss"],
        }
        for entry in judged
    ]


def _select(job: Job, work: Work, folder: RunFolder) -> None:
    """Choose the connections from scores that are computed for the first run and kept for all that need the same."""
    path = job.scores
    assert path is not None
    if not path.exists() and (job.mirror is None or not job.mirror.fetch(path)):
        started = time.perf_counter()
        scores = score(work)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path, seconds=str(time.perf_counter() - started))
        if job.mirror is not None:
            job.mirror.send_file(path)
    scores, noted = _scores(path, work)
    prepared(work, scores).save(folder.selection)
    write_json(folder.path / "importance.json", {"seconds": float(noted["seconds"])})


def _scores(path: Path, work: Work) -> tuple[Scores, dict[str, str]]:
    """The scores that are kept for a group of runs, and what was noted with them."""
    tensors, header = read_tensors(path, ImportanceError)
    if "fewtune" in header:
        return Scores.load(path)
    return Scores(tensors, describe(work.backbone.model, work.backbone.head)), header  # a file of version 0.1.0
