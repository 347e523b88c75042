"""Requests gathered into batches: whatever tasks they ask for, they share a forward pass."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fewtune.errors import DataError
from fewtune.serving.bank import Prediction, TaskBank

LOG = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full: the service answers 503 and the client tries again."""

    def __init__(self) -> None:
        super().__init__("too many images wait already: try again")


@dataclass(frozen=True)
class Waiting:
    """One image that waits for its answer."""

    task: str
    image: Tensor
    answer: asyncio.Future[Prediction]


class Batcher:
    """Takes images one by one and answers them in batches, the oldest first.

    A batch starts when it is full, or when its oldest image has waited ``wait`` seconds; while a batch is being
    computed, the next one gathers. Images of different sizes go into different passes.

    Args:
        bank: who answers.
        size: images in a batch, at most.
        wait: seconds.
        queue: images that may wait; beyond that `Busy` is raised.
        observe: told of every batch: its number of images, and of tasks.
    """

    def __init__(
        self, bank: TaskBank, size: int, wait: float, queue: int, observe: Callable[[int, int], None] | None = None
    ) -> None:
        self.bank, self.size, self.wait, self.places, self.observe = bank, size, wait, queue, observe

    def start(self) -> None:
        """Begins to answer, within a running event loop; again after `stop`, in another loop too."""
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue(self.places)
        self._thread = ThreadPoolExecutor(1, "forward pass")
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answers what waits and ends."""
        await self.queue.join()
        self._loop.cancel()
        self._thread.shutdown()

    async def predict(self, task: str, image: Tensor) -> Prediction:
        """The answer for one image, [channels, height, width].

        Raises:
            Busy: too many wait already.
            DataError: there is no such task (any more).
        """
        waiting = Waiting(task, image, asyncio.get_running_loop().create_future())
        try:
            self.queue.put_nowait(waiting)
        except asyncio.QueueFull:
            raise Busy from None
        return await waiting.answer

    async def _run(self) -> None:
        while True:
            batch = await self._gather()
            wanted = [waiting for waiting in batch if not waiting.answer.cancelled()]
            try:
                by_shape: dict[torch.Size, list[Waiting]] = {}
                for waiting in wanted:
                    by_shape.setdefault(waiting.image.shape, []).append(waiting)
                for some in by_shape.values():
                    await self._answer(some)
            finally:
                for _ in batch:
                    self.queue.task_done()

    async def _gather(self) -> list[Waiting]:
        batch = [await self.queue.get()]
        ends = asyncio.get_running_loop().time() + self.wait
        while len(batch) < self.size:
            if not self.queue.empty():
                batch.append(self.queue.get_nowait())
                continue
            left = ends - asyncio.get_running_loop().time()
            if left <= 0:
                break
            try:
                batch.append(await asyncio.wait_for(self.queue.get(), left))
            except TimeoutError:
                break
        return batch

    async def _answer(self, waiting: Sequence[Waiting]) -> None:
        """One pass; where it fails, one an image, so that a task just removed fails its own images only."""
        try:
            predictions = await asyncio.get_running_loop().run_in_executor(self._thread, self._predict, waiting)
        except Exception as error:
            if len(waiting) > 1:
                for one in waiting:
                    await self._answer([one])
                return
            if not isinstance(error, DataError):
                LOG.exception("a forward pass failed")
            if not waiting[0].answer.done():
                waiting[0].answer.set_exception(error)
            return
        if self.observe is not None:
            self.observe(len(waiting), len({one.task for one in waiting}))
        for one, prediction in zip(waiting, predictions, strict=True):
            if not one.answer.done():
                one.answer.set_result(prediction)

    def _predict(self, waiting: Sequence[Waiting]) -> list[Prediction]:
        images = torch.stack([one.image for one in waiting])
        return self.bank.predict(images, [one.task for one in waiting])
