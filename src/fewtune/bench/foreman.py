"""Run a grid: what is done is skipped, what was killed goes on, what fails is told and the rest goes on."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fewtune.bench.choices import next_choice
from fewtune.bench.estimate import Sizes, median_a_pass, seconds_a_pass, sizes_of
from fewtune.bench.executors import executor
from fewtune.bench.grid import Grid, write_grid
from fewtune.bench.job import Job
from fewtune.bench.ledger import Ledger
from fewtune.bench.plan import KINDS, Run, plan, result_file
from fewtune.config import Recipe
from fewtune.errors import ConfigError, FewtuneError
from fewtune.files import read_json, write_json, write_text
from fewtune.progress import counted, duration
from fewtune.stores import is_address
from fewtune.tasks import TASKS
from fewtune.training.cluster import LOCAL
from fewtune.training.mirror import Mirror
from fewtune.training.run_folder import RunFolder

log = logging.getLogger("fewtune")


@dataclass
class Progress:
    """Where a grid stands: names of runs, and of those that failed why."""

    runs: dict[str, Run]
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def waiting(self) -> list[str]:
        """Runs that are neither done nor failed."""
        ended = {*self.done, *self.failed}
        return [name for name in self.runs if name not in ended]


def run_grid(grid: Grid, out: str | Path, on: str = LOCAL) -> Progress:
    """Do every run of the grid that is not done yet; failed ones are tried again.

    A run goes on after its last finished epoch where it was killed; on a CPU the numbers are those of an uninterrupted
    grid. The runs' folders, what was chosen (TASK/METHOD/chosen.json) and the grid lie below `out`.

    Args:
        out: a folder, or the address of one in an object store: each run's folder is sent there when it has ended.
        on: where: "local", in `grid.workers` processes; "ray" or "ray://HOST:PORT", on a cluster whose nodes all see
            `out`.

    Raises:
        ConfigError: the data of a task is not there or not as its settings say (all tasks are named at once); another
            grid is at work in `out`, or a folder of other things; a store cannot be reached.
    """
    mirror = Mirror.of(out) if is_address(out) else None
    if mirror is not None:
        mirror.pull()
        mirror.send_unsent([result_file(kind, Path()).name for kind in KINDS])
    return _run_grid(grid, Path(out) if mirror is None else mirror.local, on, mirror)


def _run_grid(grid: Grid, out: Path, on: str, mirror: Mirror | None) -> Progress:
    sizes = _sizes_of_what_is_left(grid, out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "grid.yaml").exists())):
        raise ConfigError(f"{mirror or out} is not the folder of a grid; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        write_text(out / "grid.yaml", write_grid(grid))
        if mirror is not None:
            mirror.send_file(out / "grid.yaml")
        with executor(on, grid) as executing:
            foreman = _Foreman(grid, out, sizes, executing.room, mirror)
            foreman.tell_time()
            with counted("runs", before=foreman.ended) as told:
                executing.work_off(foreman.offer, partial(foreman.finish, told))
        return foreman.progress


def status(grid: Grid, out: Path) -> Progress:
    """What is done and what has failed, without doing anything."""
    return _Foreman(grid, out, None).progress


def _sizes_of_what_is_left(grid: Grid, out: Path) -> dict[str, Sizes]:
    """Task -> its images, for the tasks that have runs which are not done."""
    seen = status(grid, out)
    left = [run for name, run in seen.runs.items() if name not in set(seen.done)]
    first = {task: next((run for run in left if run.task == task), None) for task in grid.tasks}
    return sizes_of({task: run.recipe(grid, {}) for task, run in first.items() if run is not None})


class _Foreman:
    """Hands out jobs and notes what became of them.

    Args:
        sizes: task -> its images; None only looks and writes nothing.
        room: how many runs are done side by side.
        mirror: of `out`.
    """

    def __init__(
        self, grid: Grid, out: Path, sizes: dict[str, Sizes] | None, room: int = 1, mirror: Mirror | None = None
    ) -> None:
        self.mirror, self.scored = mirror, set[Path]()
        self.grid, self.out, self.sizes, self.quiet = grid, out, sizes or {}, sizes is None
        self.room = room
        self.ledger = Ledger(grid, out)
        self.added: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.progress = Progress(plan(grid))
        self.done_here: list[tuple[float, float]] = []  # passes and seconds
        for kind in KINDS:  # the plan grows with what has been tried
            for run in [run for run in self.progress.runs.values() if run.kind == kind]:
                self._look(run)
        self.progress.done.sort(key=list(self.progress.runs).index)

    def _look(self, run: Run) -> None:
        """Note what became of a run before; where the choices grow by it, look at the added runs too."""
        failure = self.out / run.name / "failed.txt"
        try:
            if set(run.needs) <= set(self.progress.done) and self.ledger.holds(run, self._recipe_of(run)):
                self.progress.done.append(run.name)
            elif self.quiet and failure.exists():
                self.progress.failed[run.name] = failure.read_text(encoding="utf-8").partition("\n")[0]
        except FewtuneError as error:
            text = str(error) if self.mirror is None else self.mirror.named(str(error))
            self.progress.failed[run.name] = f"{text}; delete the folder to make it anew"
        if run.kind == "choose" and run.name in self.progress.done:
            for new in self._grow(run.task, run.method):
                self._look(new)

    def _grow(self, task: str, method: str) -> list[Run]:
        """Add a choice where all of them are judged and the best lies at an edge; the runs that try it."""
        given, added = self.grid.choices_of(method), self.added.setdefault((task, method), [])
        judged = [
            run for run in self.progress.runs.values() if (run.kind, run.task, run.method) == ("choose", task, method)
        ]
        if not self.grid.grow or not {run.name for run in judged} <= set(self.progress.done):
            return []
        best, _ = self.ledger.best(judged)
        more = next_choice(best, [*given, *added], self.grid.grow, given)
        if not more:
            return []
        added.append(more)
        before, self.progress.runs = self.progress.runs, plan(self.grid, self.added)
        return [run for name, run in self.progress.runs.items() if name not in before]

    def _recipe_of(self, run: Run) -> Recipe:
        """Its recipe, with what was chosen on validation images once that is finished."""
        if run.needs and not self.quiet:
            best, rows = self.ledger.best([self.progress.runs[name] for name in run.needs])
            folder = self.out / run.task / run.method
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "chosen.json", {"chosen": best, "tried": rows})
            if self.mirror is not None:
                self.mirror.send_file(folder / "chosen.json")
        return self.ledger.recipe(run, self.progress.runs)

    def offer(self, running: list[Job]) -> Job | None:
        """A run that can be done now; one that needs scores which another is computing must wait for them."""
        busy = {job.name for job in running}
        pending = {scores for scores in {job.scores for job in running} if not self._is_there(scores)}
        for name in self.progress.waiting:
            run = self.progress.runs[name]
            if name in busy or not set(run.needs) <= set(self.progress.done) | set(self.progress.failed):
                continue
            lost = [need for need in run.needs if need in self.progress.failed]
            if lost:
                self._fail(name, f"nothing could be chosen for it, since {lost[0]} failed")
                continue
            job = Job(run.kind, name, self._recipe_of(run), self.out, self.grid.judged, self.mirror)
            if job.scores not in pending:
                return job
        return None

    def _is_there(self, scores: Path | None) -> bool:
        """Whether scores need not be waited for; those of a store are asked for until they are there."""
        if scores is None or scores.exists() or scores in self.scored:
            return True
        if self.mirror is None or not self.mirror.has(scores):
            return False
        self.scored.add(scores)
        return True

    def finish(self, told: Callable[[int, int | None], None], job: Job, reason: str | None) -> None:
        """Note how a job ended, and say it in one line; `told` is called with (ended, all)."""
        if reason is not None:
            self._fail(job.name, reason)
        else:
            self.progress.done.append(job.name)
            run = self.progress.runs[job.name]
            if self.mirror is not None:  # a node of its own may have done it
                self.mirror.copy(job.folder)
            self.done_here.append((self._passes(job.name), self.ledger.seconds(run)))
            if run.kind == "choose":
                self._grow(run.task, run.method)
            log.info("%s %s: %s%s", self._count(), job.name, self._told(job), self._left())
        told(self.ended, len(self.progress.runs))
        self._forget_scores(job.name.partition("/")[0])

    def _fail(self, name: str, reason: str) -> None:
        self.progress.failed[name] = reason
        log.error("%s %s failed: %s", self._count(), name, reason)

    @property
    def ended(self) -> int:
        """How many runs are done or have failed."""
        return len(self.progress.done) + len(self.progress.failed)

    def _count(self) -> str:
        return f"[{self.ended} of {len(self.progress.runs)}]"

    def _told(self, job: Job) -> str:
        if job.kind == "train":
            metrics = read_json(RunFolder(job.folder).metrics)
            test = metrics.get("test")
            measure = TASKS[job.recipe.task].metric
            return "trained" if test is None else f"test {measure} {100 * test[measure]['value']:.1f} %"
        judged = read_json(job.folder / "validation.json")["candidates"]
        best = max((candidate["accuracy"] for candidate in judged), default=None)
        return "its loss became infinite" if best is None else f"at best {100 * best:.1f} % on validation images"

    def tell_time(self) -> None:
        """Say how long the runs that are left will take, by runs that lie here or by two steps of each model."""
        seconds = 0.0
        for task in self.sizes:
            runs = [run for run in self.progress.runs.values() if run.task == task]
            left = [run.name for run in runs if run.name in set(self.progress.waiting)]
            done = [(self._passes(run.name), self.ledger.seconds(run)) for run in runs if self.ledger.lies_here(run)]
            if left:
                recipe = self.progress.runs[left[0]].recipe(self.grid, {})
                seconds += sum(map(self._passes, left)) * seconds_a_pass(done, recipe, self.grid.threads)
        if self.progress.waiting:
            seconds /= self.room
            long = "an unknown time" if math.isnan(seconds) else f"about {duration(seconds)}"
            log.info("%d runs are left: %s, %d side by side", len(self.progress.waiting), long, self.room)

    def _passes(self, name: str) -> float:
        run = self.progress.runs[name]
        return self.sizes[run.task].passes(run.kind, run.recipe(self.grid, {}))

    def _left(self) -> str:
        waiting = self.progress.waiting
        seconds = median_a_pass(self.done_here) * sum(map(self._passes, waiting)) / self.room
        return f"; about {duration(seconds)} for the other {len(waiting)}" if waiting else ""

    def _forget_scores(self, task: str) -> None:
        """Scores are as large as the model: they go as soon as no run of their task is left."""
        if not any(self.progress.runs[name].task == task for name in self.progress.waiting):
            shutil.rmtree(self.out / task / "scores", ignore_errors=True)
            if self.mirror is not None:
                self.mirror.remove(self.out / task / "scores")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """ConfigError where another process runs a grid in this folder; the lock is gone when its holder is."""
    try:
        lock = FileLock(out / ".lock", blocking=False).acquire()
    except Timeout:
        raise ConfigError(f"another process is running a grid in {out}; wait for it or stop it") from None
    with lock:
        yield
