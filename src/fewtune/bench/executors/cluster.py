"""Jobs as tasks of a Ray cluster: a node that is lost costs nothing but time.

All nodes have fewtune installed, find the data where the grid says, and see the grid's folder under the same path or
reach the store that it lies in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from fewtune.bench.job import Job, begin_worker, do
from fewtune.errors import one_line
from fewtune.training.cluster import RETRIES, Cluster, Needs, enter

POLL = 0.5
"""Seconds after which jobs are offered anew: one may have become possible while others run."""
AHEAD = 64
"""At least so many jobs are given to the cluster at once, so that one that grows by itself sees what waits."""
LEAVING = 120.0
"""Seconds that a job waits for its own earlier process to be gone, where the node was only thought lost."""


class RayExecutor:
    """Every job that can be done is a task of the cluster, which places it where there is room.

    One whose process or node was lost goes on after its last finished epoch.

    Args:
        needs: of each job.
    """

    def __init__(self, cluster: Cluster, needs: Needs) -> None:
        self.cluster, self.ray, self.needs = cluster, cluster.ray, needs
        self.running: dict[Any, Job] = {}
        self.task = self.ray.remote(**needs.options(), max_retries=RETRIES)(_do)
        self.room = cluster.side_by_side(needs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.cluster.close()

    def work_off(self, offer: Callable[[list[Job]], Job | None], done: Callable[[Job, str | None], None]) -> None:
        """See `Executor`."""
        while True:
            ahead = max(AHEAD, 2 * self.room)
            while len(self.running) < ahead and (job := offer(list(self.running.values()))) is not None:
                self.running[self.task.remote(replace(job, out=job.out.resolve()), os.getcwd(), self.needs.cpus)] = job
            if not self.running:
                return
            ready, _ = self.ray.wait(list(self.running), timeout=POLL)
            for reference in ready:
                job = self.running.pop(reference)
                done(job, self._outcome(reference))

    def _outcome(self, reference: Any) -> str | None:
        try:
            reason: str | None = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return f"its process or node was lost {RETRIES + 1} times; was there too little memory? ({one_line(error)})"
        return reason


def _do(job: Job, folder: str, threads: int) -> str | None:
    """A job in a process of the cluster, which works in the folder where the grid was begun if there is one."""
    enter(folder)
    begin_worker(threads)
    if job.mirror is not None:
        job = replace(job, out=job.mirror.local)  # of this node
    job.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder / ".lock", timeout=LEAVING):  # the lock is gone when its holder is
        return None if job.mirror is None and job.result.exists() else do(job)
