"""Where the runs of a grid are done: in processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from fewtune.bench.grid import Grid
from fewtune.bench.job import Job
from fewtune.training.cluster import Cluster, Needs, cluster_of


class Executor(Protocol):
    """Does jobs, several at once. It is a context, which frees what it holds at its end."""

    @property
    def room(self) -> int:
        """About how many jobs are done side by side."""

    def work_off(self, offer: Callable[[list[Job]], Job | None], done: Callable[[Job, str | None], None]) -> None:
        """Do the jobs that `offer(running)` gives until it gives none and none is running.

        `done(job, reason)` is called in this process after each; `reason` is None where the job went well.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def executor(on: str, grid: Grid) -> Executor:
    """The executor of a grid.

    Args:
        on: "local"; "ray", the cluster of RAY_ADDRESS or of this machine; or a cluster's address, "ray://HOST:PORT".

    Raises:
        ConfigError: there is no such executor, or no cluster at the address.
        MissingExtra: Ray is not installed.
    """
    address = cluster_of(on)
    if address is None:
        from fewtune.bench.executors.local import LocalExecutor

        return LocalExecutor(grid.workers, grid.threads)
    from fewtune.bench.executors.cluster import RayExecutor

    return RayExecutor(Cluster(address), Needs(grid.threads, grid.gpus, grid.memory_gb))
