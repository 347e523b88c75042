"""Metrics of the service for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fewtune.serving.bank import TaskBank


class Measures:
    """Counters of one service; they end with it."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, bank: TaskBank) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fewtune_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram("fewtune_request_seconds", "Seconds of a request", ["route"], registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.images = Histogram("fewtune_batch_images", "Images of a forward pass", buckets=sizes, registry=registry)
        self.tasks = Histogram("fewtune_batch_tasks", "Tasks of a forward pass", buckets=sizes, registry=registry)
        Gauge("fewtune_tasks", "Tasks held", registry=registry).set_function(lambda: len(bank.tasks()))
        Gauge("fewtune_task_bytes", "Bytes of the numbers of all tasks", registry=registry).set_function(
            lambda: bank.nbytes
        )

    def batch(self, images: int, tasks: int) -> None:
        """Counts a forward pass."""
        self.images.observe(images)
        self.tasks.observe(tasks)

    async def request(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Counts a request."""
        start, status = time.perf_counter(), 500
        try:
            response = await call_next(request)
            status = response.status_code
        finally:
            # By route, not by path: what strangers write into paths is without end.
            route = getattr(request.scope.get("route"), "path", "other")
            self.requests.labels(route, str(status)).inc()
            self.seconds.labels(route).observe(time.perf_counter() - start)
        return response

    def text(self) -> bytes:
        return generate_latest(self.registry)
