"""The service as two replicas on a Ray cluster of this machine, one of which is killed while clients go on asking."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_service import free_port

from fewtune.cli import main
from fewtune.errors import ConfigError, DataError, MissingExtra
from fewtune.serving.limits import Limits
from fewtune.serving.replicas import Replicas, serve_on_ray
from services import CLASSES, expected, opened, picture, task_folder


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Two replicas of the service, on this port of this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'fewtune[ray]')")
    from ray import serve

    monkeypatch.setenv("RAY_worker_niceness", "0")  # at Ray's own 15 other work on this machine would come first
    port = free_port()
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        folder, half = task_folder(tmp_path / "tasks"), Replicas(2, 2, cpus=0.5)
        serve_on_ray(folder, replicas=half, port=port, accelerator="cpu", blocking=False)
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(port: int, name: str, content: bytes) -> dict[str, float]:
    address = f"http://127.0.0.1:{port}/tasks/{name}/predict"
    with urllib.request.urlopen(urllib.request.Request(address, content), timeout=60) as reply:
        answer: dict[str, float] = json.load(reply)["probabilities"]
    return answer


def processes() -> dict[int, Any]:
    """The replicas of this session's cluster, by process id."""
    import psutil

    listed = psutil.process_iter(["cmdline", "create_time"])
    begun = psutil.Process().create_time()
    return {
        p.pid: p
        for p in listed
        if "ServeReplica:fewtune" in " ".join(p.info["cmdline"] or []) and p.info["create_time"] > begun
    }


@pytest.mark.slow
def test_replicas_agree_and_one_that_is_killed_is_replaced(port: int, tmp_path: Path) -> None:
    bank, content = opened(tmp_path / "tasks"), picture()
    alone = {name: expected(bank, name, content) for name in CLASSES}
    wrong: list[Any] = []
    right = lost = 0
    ended = threading.Event()

    def client() -> None:
        nonlocal right, lost
        while not ended.is_set():
            for name in CLASSES:
                try:
                    answer = ask(port, name, content)
                except OSError:  # what the killed replica was answering
                    lost += 1
                    continue
                near = all(abs(answer[label] - value) < 1e-5 for label, value in alone[name].items())
                right += near
                if not near:
                    wrong.append((name, answer))

    clients = [threading.Thread(target=client) for _ in range(3)]
    for thread in clients:
        thread.start()
    try:
        first = processes()
        assert len(first) == 2
        _until(lambda: len(_counted(port)) == 2, "both replicas answer")
        killed, survivor = sorted(first)
        first[killed].kill()
        before = right
        _until(lambda: right > before + 10, "requests go on")
        _until(lambda: len(set(processes()) - {killed}) == 2, "the killed replica is replaced")
        _until(lambda: len(_counted(port)) == 3, "the new one answers")
    finally:
        ended.set()
        for thread in clients:
            thread.join()
    assert not wrong
    assert survivor in processes()
    assert lost <= 2 * len(clients) + 4


_seen: set[str] = set()


def _counted(port: int) -> set[str]:
    """When the counter of predictions began, of the replicas that happen to be asked."""
    for _ in range(8):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        _seen.update(
            re.findall(r'fewtune_requests_created\{route="/tasks/\{name\}/predict",status="200"\} (\S+)', text)
        )
    return _seen


def _until(true: Any, what: str, seconds: float = 240) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, what
        time.sleep(0.3)


def test_numbers_of_replicas() -> None:
    assert Replicas.of("2").options(Limits())["num_replicas"] == 2
    scaling = Replicas.of("1:8", gpus=0.5).options(Limits(batch=4))
    assert scaling["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 4}
    assert scaling["ray_actor_options"]["num_gpus"] == 0.5
    for wrong in ("0", "3:2", "many", "1:x", ":2"):
        with pytest.raises(ConfigError, match="such as 2 or 1:8"):
            Replicas.of(wrong)


def test_mistakes_are_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(DataError, match="no folder of task files"):
        serve_on_ray(tmp_path / "nowhere", replicas=Replicas())
    monkeypatch.setattr(sys, "argv", ["fewtune", "serve", "--tasks", str(tmp_path), "--replicas", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "give --ray too" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"fewtune\[ray,serve\]"):
        serve_on_ray(tmp_path, replicas=Replicas())
