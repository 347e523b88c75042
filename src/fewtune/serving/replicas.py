"""The service on a Ray cluster: replicas of the very application of one machine, as many as are needed.

Every replica holds the backbone and all tasks, and gathers mixed batches of its own. The task travels in the request's
path: Ray's multiplexing would give each replica some of the tasks, so that batches would hold one task each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewtune.allocator import keep_freed_memory, share_freed_memory
from fewtune.errors import ConfigError, MissingExtra, Progress, one_line
from fewtune.serving.limits import Limits
from fewtune.serving.opening import open_bank
from fewtune.training.loaders import pick_device


@dataclass(frozen=True)
class Replicas:
    """How many there are, and what each needs of its node.

    least, most: Ray adds replicas while requests wait, and takes them away when few come.
    """

    least: int = 1
    most: int = 1
    cpus: float = 1
    gpus: float = 0

    @classmethod
    def of(cls, text: str, cpus: float = 1, gpus: float = 0) -> Replicas:
        """From "2", or "1:8".

        Raises:
            ConfigError: it is neither.
        """
        least, _, most = text.partition(":")
        if not least.isdigit() or not (most or least).isdigit() or not 0 < int(least) <= int(most or least):
            raise ConfigError(f"replicas are a number or a range, such as 2 or 1:8, got '{text}'")
        return cls(int(least), int(most or least), cpus, gpus)

    def options(self, limits: Limits) -> dict[str, Any]:
        """The same for Ray Serve."""
        number: dict[str, Any] = {"num_replicas": self.least}
        if self.most > self.least:
            scaling = {"min_replicas": self.least, "max_replicas": self.most, "target_ongoing_requests": limits.batch}
            number = {"autoscaling_config": scaling}
        needs = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        return {**number, "ray_actor_options": needs, "max_ongoing_requests": limits.queue}


def serve_on_ray(
    tasks: str | Path,
    backbone: str | None = None,
    *,
    replicas: Replicas,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    token: str | None = None,
    accelerator: str = "auto",
    progress: Progress | None = None,
    blocking: bool = True,
) -> None:
    """Serves a folder of tasks, which all nodes see under the same path, on the cluster of RAY_ADDRESS or of this
    machine, or on one that begins here; until it is told to stop.

    Args:
        blocking: False comes back when the replicas answer.

    Raises:
        MissingExtra: Ray or the libraries of the service are not installed.
        DataError, ModelError: see `open_bank`; told before anything is started.
        ConfigError: the cluster cannot be reached.
    """
    try:
        import ray
        from ray import serve

        import fewtune.serving.http  # noqa: F401  (what the replicas need)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "Ray", "ray,serve") from None
    folder, limits = Path(tasks).resolve(), limits or Limits()
    open_bank(folder, backbone)  # a mistake is told here in one line, not by every replica in its log
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"there is no Ray cluster to serve on: {one_line(error)}") from None
    serve.start(http_options={"host": host, "port": port})
    application = serve.ingress(_application(folder, backbone, limits, token, accelerator))()
    deployment = serve.deployment(name="fewtune", **replicas.options(limits))(application)
    serve.run(deployment.bind(), name="fewtune", route_prefix="/")
    if progress is not None:
        progress(f"{replicas.least} replicas at http://{host}:{port} (Ctrl-C ends)")
    if blocking:
        _until_interrupted()
        serve.shutdown()


def _application(
    folder: Path, backbone: str | None, limits: Limits, token: str | None, accelerator: str
) -> Callable[[], Any]:
    """What makes the application, in each replica."""

    def make() -> Any:
        from fewtune.serving.http import create_app

        keep_freed_memory()
        share_freed_memory()
        opened = open_bank(folder, backbone, device=pick_device(accelerator))
        return create_app(opened, limits, token)

    return make


def _until_interrupted() -> None:
    import signal
    import threading

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
