"""Local worker processes: one job at a time each; the death of one costs its job and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

from fewtune.bench.job import Job, begin_worker, do

POLL = 0.5
"""Seconds after which idle workers are offered jobs anew: one may have become possible while others run."""


@dataclass
class Worker:
    """A process, the way to talk to it, and what it is doing."""

    process: SpawnProcess
    connection: Connection
    job: Job | None = None


class LocalExecutor:
    """`count` processes of `threads` threads each, started by spawn when they are first needed."""

    def __init__(self, count: int, threads: int) -> None:
        self.threads = threads
        self.count = count
        self.workers: list[Worker] = []

    @property
    def room(self) -> int:
        """How many jobs are done side by side."""
        return self.count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        started = [worker for worker in self.workers if worker.process.pid is not None]
        for worker in started:
            worker.process.kill() if worker.job else worker.connection.send(None)
        for worker in started:
            worker.process.join()

    def work_off(self, offer: Callable[[list[Job]], Job | None], done: Callable[[Job, str | None], None]) -> None:
        """See `Executor`."""
        while True:
            while (worker := self._idle()) is not None and (job := offer(self.running)) is not None:
                self._start(worker, job)
            busy = [worker for worker in self.workers if worker.job is not None]
            if not busy:
                return
            ready = set(wait([worker.connection for worker in busy], timeout=POLL))
            for worker in busy:
                if worker.connection in ready:
                    assert worker.job is not None
                    job, worker.job = worker.job, None
                    done(job, self._outcome(worker))

    @property
    def running(self) -> list[Job]:
        """The jobs that are being done."""
        return [worker.job for worker in self.workers if worker.job is not None]

    def _idle(self) -> Worker | None:
        """A worker without a job, a new one if need be; None where all are at work."""
        idle = next((worker for worker in self.workers if worker.job is None), None)
        if idle is None and len(self.workers) < self.count:
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, self.threads))
            idle = Worker(process, ours)
            self.workers.append(idle)
        return idle

    def _start(self, worker: Worker, job: Job) -> None:
        if worker.process.pid is None:
            before = os.environ.get("OMP_NUM_THREADS")
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # read once, when the child's libraries start
            try:
                worker.process.start()
            finally:
                os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
        worker.connection.send(job)
        worker.job = job

    def _outcome(self, worker: Worker) -> str | None:
        try:
            return worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self.workers.remove(worker)
            code = worker.process.exitcode or 0
            ended = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with status {code}"
            return f"its process ended {ended}; was there too little memory?"


def _work(connection: Any, threads: int) -> None:
    """A worker's life: jobs, one after the other, until there are no more or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin_worker(threads)
    while (job := connection.recv()) is not None:
        connection.send(do(job))


def _end_with_parent() -> None:
    """End this process the moment its parent does, however that ended: two must never write into one folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
