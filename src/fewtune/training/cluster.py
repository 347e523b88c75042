"""A Ray cluster: how it is reached, and what a piece of work needs of its nodes."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewtune.errors import ConfigError, MissingExtra, one_line

log = logging.getLogger("fewtune")

LOCAL, RAY = "local", "ray"
"""Where work is done: here, or on a cluster; a cluster's address, ray://HOST:PORT, says the latter too."""
RETRIES = 5
"""How often work is begun again whose process or node was lost."""


@dataclass(frozen=True)
class Needs:
    """What a piece of work needs of a node."""

    cpus: int = 1
    gpus: float = 0.0
    memory_gb: float | None = None

    def options(self) -> dict[str, float]:
        """The same for Ray."""
        memory = {} if self.memory_gb is None else {"memory": self.memory_gb * 2**30}
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, **memory}

    def fits(self, resources: dict[str, float]) -> int:
        """How many such pieces a node with these resources takes at once."""
        needs = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory_gb or 0) * 2**30}
        return min(int(resources.get(name, 0) // need) for name, need in needs.items() if need)


def cluster_of(on: str) -> str | None:
    """The address of a cluster, "" for that of RAY_ADDRESS or of this machine; None where work is done here.

    Raises:
        ConfigError: `on` is none of local, ray and ray://HOST:PORT.
    """
    if on == LOCAL:
        return None
    if on == RAY or on.startswith(f"{RAY}://"):
        return "" if on == RAY else on
    raise ConfigError(f"runs are done on local, ray or ray://HOST:PORT, got '{on}'")


class Cluster:
    """A connection to a cluster; a context, which ends the connection that it began.

    Args:
        address: "" takes the cluster of RAY_ADDRESS or of this machine, or begins one here.

    Raises:
        MissingExtra: Ray is not installed.
        ConfigError: there is no cluster at the address.
    """

    def __init__(self, address: str = "") -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise MissingExtra("Ray", "ray") from None
        self.ray: Any = ray
        self.begun_here = not ray.is_initialized()
        if self.begun_here:
            try:
                ray.init(address or None, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"there is no Ray cluster at {address or 'this machine'}: {one_line(error)}"
                ) from None

    def room(self, needs: Needs) -> int:
        """How many pieces of work that need so much its nodes take at once; 0 where none takes one."""
        return sum(needs.fits(node["Resources"]) for node in self.ray.nodes() if node["Alive"])

    def side_by_side(self, needs: Needs) -> int:
        """How many are done at once; one where no node has room for it yet, which is told."""
        room = self.room(needs)
        if not room:
            log.warning("no node of the cluster has %s; the work waits for one", needs)
        return max(1, room)

    def close(self) -> None:
        """Leave the cluster, and end it where it was begun here."""
        if self.begun_here:
            self.ray.shutdown()


def enter(folder: str) -> None:
    """In a process of the cluster: work in the folder where the command was given, where the node has it."""
    if Path(folder).is_dir():
        os.chdir(folder)
