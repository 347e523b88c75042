"""Jobs as tasks of a Ray cluster: a node that is lost costs nothing but time.

All nodes see the grid's folder under the same path, have fewtune installed, and find the data where the grid says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock

from fewtune.bench.job import Job, begin_worker, do
from fewtune.errors import ConfigError, MissingExtra, one_line

log = logging.getLogger("fewtune")

POLL = 0.5
"""Seconds after which jobs are offered anew: one may have become possible while others run."""
AHEAD = 64
"""At least so many jobs are given to the cluster at once, so that one that grows by itself sees what waits."""
RETRIES = 5
"""How often a job is begun again whose process or node was lost; it goes on after its last finished epoch."""
LEAVING = 120.0
"""Seconds that a job waits for its own earlier process to be gone, where the node was only thought lost."""


@dataclass(frozen=True)
class Share:
    """What a job needs of a node."""

    cpus: int = 1
    gpus: float = 0.0
    memory_gb: float | None = None

    def options(self) -> dict[str, Any]:
        """The same for Ray."""
        memory = {} if self.memory_gb is None else {"memory": self.memory_gb * 2**30}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory}

    def fits(self, resources: dict[str, float]) -> int:
        """How many such jobs a node with these resources takes at once."""
        needs = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory_gb or 0) * 2**30}
        return min(int(resources.get(name, 0) // need) for name, need in needs.items() if need)


class RayExecutor:
    """Every job that can be done is a task of the cluster, which places it where there is room.

    Args:
        address: of the cluster; None takes the one of RAY_ADDRESS or of this machine, or begins one here.
        share: what each job needs.

    Raises:
        MissingExtra: Ray is not installed.
        ConfigError: there is no cluster at the address.
    """

    def __init__(self, address: str | None, share: Share) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise MissingExtra("Ray", "ray") from None
        self.ray, self.share = ray, share
        self.running: dict[Any, Job] = {}
        self.begun_here = not ray.is_initialized()
        if self.begun_here:
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"there is no Ray cluster at {address or 'this machine'}: {one_line(error)}"
                ) from None
        self.task = ray.remote(**share.options(), max_retries=RETRIES)(_do)
        self.places = sum(share.fits(node["Resources"]) for node in ray.nodes() if node["Alive"])
        if not self.places:
            log.warning("no node of the cluster has %s; the runs wait for one", share)
        self.places = max(1, self.places)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        if self.begun_here:
            self.ray.shutdown()

    def work_off(self, offer: Callable[[list[Job]], Job | None], done: Callable[[Job, str | None], None]) -> None:
        """See `Executor`."""
        while True:
            ahead = max(AHEAD, 2 * self.places)
            while len(self.running) < ahead and (job := offer(list(self.running.values()))) is not None:
                self.running[self.task.remote(replace(job, out=job.out.resolve()), os.getcwd(), self.share.cpus)] = job
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
    if Path(folder).is_dir():
        os.chdir(folder)
    begin_worker(threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(job.folder / ".lock", timeout=LEAVING):  # the lock is gone when its holder is
        return None if job.result.exists() else do(job)
