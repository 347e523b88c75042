"""Ray clusters on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def ray_nodes(count: int, cpus: int = 1) -> Iterator[Any]:
    """So many raylets of this machine, to which this process is connected; skips the test without Ray."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'fewtune[ray]')")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": cpus, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's own 15 other work on this machine would come first
        started = Cluster(initialize_head=True, head_node_args=node)
        for _ in range(count - 1):
            started.add_node(**node)
        ray.init(started.address, log_to_driver=False)
        try:
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
