"""Where the trials of a search are done: here, one after the other, or side by side on a Ray cluster."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch

from fewtune.allocator import keep_freed_memory
from fewtune.config import Recipe
from fewtune.errors import ConfigError, FewtuneError, one_line
from fewtune.kinds import KINDS
from fewtune.progress import quiet_libraries
from fewtune.training.cluster import RETRIES, Cluster, Needs, cluster_of, enter
from fewtune.training.task import Task
from fewtune.training.trial import Outcome, Params, Shared, try_out
from fewtune.training.work import Work


class Asked(Protocol):
    """A trial as an executor needs it."""

    @property
    def number(self) -> int:
        """Of all that were asked for."""

    @property
    def params(self) -> Params:
        """Its settings."""


Offer = Callable[[], "Asked | None"]
"""A trial that can be begun now, if there is one."""
Judgement = Callable[[Any, int, float], bool]
"""(trial, epoch, what validation measured) -> whether it shall end."""
Done = Callable[[Any, Outcome], None]
"""Told what came of a trial."""


class Executor(Protocol):
    """Does trials."""

    def work_off(self, offer: Offer, hopeless: Judgement, done: Done) -> None:
        """Do the trials that `offer()` gives until it gives none and none is running; all three are called here."""

    def close(self) -> None:
        """End what is still running."""


def executor_of(on: str, work: Work, threads: int = 1) -> Executor:
    """Where the trials of a search are done.

    Args:
        on: "local"; "ray", the cluster of RAY_ADDRESS or of this machine; or a cluster's address, "ray://HOST:PORT".
        threads: of each trial on a cluster; it has a GPU too where the recipe's accelerator is gpu, or auto and the
            cluster has some.

    Raises:
        ConfigError: there is no such place, or no cluster at the address.
        MissingExtra: Ray is not installed.
    """
    address = cluster_of(on)
    if address is None:
        return LocalExecutor(work)
    cluster, accelerator = Cluster(address), work.recipe.accelerator
    with_gpu = Needs(threads, gpus=1)
    gpu = accelerator == "gpu" or (accelerator == "auto" and cluster.room(with_gpu) > 0)
    return RayExecutor(cluster, work, with_gpu if gpu else Needs(threads))


class LocalExecutor:
    """This process, which does one trial after the other."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def work_off(self, offer: Offer, hopeless: Judgement, done: Done) -> None:
        """See `Executor`."""
        shared = Shared.of(self.work)
        while (trial := offer()) is not None:
            done(trial, try_out(self.work, trial.params, shared, functools.partial(hopeless, trial)))

    def close(self) -> None:
        """Nothing is left running."""


class Mail:
    """An actor of the cluster: trials send it their curves and wait for an answer of the process that has the study."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[tuple[int, int, float]] = asyncio.Queue()
        self.answers: dict[tuple[int, int], asyncio.Future[bool]] = {}

    async def hopeless(self, number: int, epoch: int, value: float) -> bool:
        """Asked by a trial."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.answers[number, epoch] = answer
        await self.sent.put((number, epoch, value))
        return await answer

    async def next(self) -> tuple[int, int, float]:
        """The next question."""
        return await self.sent.get()

    async def answer(self, number: int, epoch: int, hopeless: bool) -> None:
        """Answered; nobody may wait any more where a node was lost."""
        waiting = self.answers.pop((number, epoch), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(hopeless)


class RayExecutor:
    """A cluster, which does as many trials side by side as it has room for.

    The study stays with this process, the only one that writes it. What all trials share is computed by a task of the
    cluster and lies in its object store. A trial whose process or node was lost begins again elsewhere.

    Args:
        needs: of each trial.
    """

    def __init__(self, cluster: Cluster, work: Work, needs: Needs) -> None:
        self.cluster, self.ray = cluster, cluster.ray
        self.room = cluster.side_by_side(needs)
        self.mail = self.ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mail).remote()
        remote = self.ray.remote(**needs.options(), max_retries=RETRIES)
        self.share, self.try_out = remote(_share), remote(_try_out)
        self.given = _Given(work.recipe, work.train_transform, work.importance_objective, os.getcwd(), needs.cpus)
        self.running: dict[Any, Asked] = {}
        self.question: Any = None

    def work_off(self, offer: Offer, hopeless: Judgement, done: Done) -> None:
        """See `Executor`."""
        shared = self.share.remote(self.given)
        self.question = self.mail.next.remote()
        while True:
            while len(self.running) < self.room and (trial := offer()) is not None:
                params = dict(trial.params)
                self.running[self.try_out.remote(self.given, params, shared, self.mail, trial.number)] = trial
            if not self.running:
                return
            ready, _ = self.ray.wait([self.question, *self.running])
            if ready[0] == self.question:
                number, epoch, value = self._got(self.question)
                asking = next((trial for trial in self.running.values() if trial.number == number), None)
                self.mail.answer.remote(number, epoch, asking is None or hopeless(asking, epoch, value))
                self.question = self.mail.next.remote()
            else:
                outcome = self._got(ready[0])
                done(self.running.pop(ready[0]), outcome)

    def _got(self, reference: Any) -> Any:
        """A result of the cluster; ConfigError of what a user can mend."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise
        except self.ray.exceptions.RayError as error:
            raise ConfigError(
                f"a short run's process or node was lost {RETRIES + 1} times; was there too little memory? "
                f"({one_line(error)})"
            ) from None

    def close(self) -> None:
        """End the trials that are still running, and leave the cluster."""
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        if self.question is not None:
            self.ray.cancel(self.question)
        self.cluster.close()


@dataclass(frozen=True)
class _Given:
    """All that a process of the cluster needs to prepare the search's run; transform and objective: a user's own."""

    recipe: Recipe
    transform: Any
    objective: Any
    folder: str
    threads: int

    def work(self) -> Work:
        """The run, prepared once in each process."""
        enter(self.folder)
        keep_freed_memory()
        quiet_libraries()
        torch.set_num_threads(self.threads)
        prepared = _prepared(self.recipe)
        return replace(prepared, train_transform=self.transform, importance_objective=self.objective)


_PREPARED: list[Work] = []
"""What this process prepared last; trials of one search follow each other."""


def _prepared(recipe: Recipe) -> Work:
    if not _PREPARED or _PREPARED[0].recipe != recipe:
        _PREPARED[:] = [cast(Task, KINDS[recipe.task]).prepare(recipe)]
    return _PREPARED[0]


@contextmanager
def _one_line() -> Iterator[None]:
    """What a user can mend, as an error that every process can read: a library may be missing in the other one."""
    try:
        yield
    except FewtuneError as error:
        raise ConfigError(one_line(error)) from None


def _share(given: _Given) -> Shared:
    with _one_line():
        return Shared.of(given.work())


def _try_out(given: _Given, params: Params, shared: Shared, mail: Any, number: int) -> Outcome:
    import ray

    def hopeless(epoch: int, value: float) -> bool:
        return bool(ray.get(mail.hopeless.remote(number, epoch, value)))

    with _one_line():
        return try_out(given.work(), params, shared, hopeless)
