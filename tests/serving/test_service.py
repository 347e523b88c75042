"""The service as a process of its own: its page in a browser, ended gently and by force."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the service's libraries are not installed (fewtune[serve])")
from browser import needs_browser
from browser import opened as in_browser
from fewtune.serving.opening import open_bank
from services import CLASSES, expected, picture, task_folder

PATIENCE = 120.0
"""Seconds until a service must answer; a busy machine takes long to start one."""
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fewtune", "serve", "--tasks", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends and process.poll() is None:
        try:
            if ask(port, "GET", "/health")[0] == 200:
                return process
        except OSError:
            time.sleep(0.1)
    process.kill()
    raise AssertionError("the service does not answer")


@contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    process = start(folder, port, *options)
    try:
        yield port, process
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, path, body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def test_killed_and_started_again_it_gives_no_wrong_answer(tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks")
    own = open_bank(folder)
    contents = [picture(seed) for seed in range(3)]
    wanted = {(name, i): expected(own, name, content) for name in CLASSES for i, content in enumerate(contents)}
    answered, wrong, over = [], [], threading.Event()

    def client(name: str, port: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            try:
                status, body = ask(port, "POST", f"/tasks/{name}/predict", contents[turn % 3])
            except (OSError, http.client.HTTPException):  # killed: try again
                time.sleep(0.02)
                continue
            if status == 200 and json.loads(body)["probabilities"] == pytest.approx(
                wanted[name, turn % 3], rel=1e-3, abs=1e-5
            ):
                answered.append(name)
            elif status != 503:
                wrong.append((status, body))

    port = free_port()
    process = start(folder, port)
    threads = [threading.Thread(target=client, args=(name, port)) for name in [*CLASSES, *CLASSES]]
    try:
        for thread in threads:
            thread.start()
        for _ in range(2):
            before = len(answered)
            ends = time.monotonic() + PATIENCE
            while len(answered) < before + 30 and time.monotonic() < ends:
                time.sleep(0.05)
            assert len(answered) >= before + 30
            process.kill()
            process.wait()
            process = start(folder, port)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        process.kill()
        process.wait()
    assert not wrong


def test_told_to_stop_it_answers_what_was_begun(tmp_path: Path) -> None:
    with running(task_folder(tmp_path / "tasks"), "--wait-ms", "1500") as (port, process):
        replies: list[int] = []
        asking = threading.Thread(
            target=lambda: replies.append(ask(port, "POST", "/tasks/birds/predict", picture())[0])
        )
        asking.start()
        time.sleep(0.7)  # it waits for others to share its pass
        process.send_signal(signal.SIGTERM)
        asking.join()
        assert replies == [200]
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)


@needs_browser
@pytest.mark.parametrize("width", [1200, 380])
def test_the_page_shows_the_tasks_side_by_side(tmp_path: Path, width: int) -> None:
    pytest.importorskip("playwright", reason="needs playwright (fewtune[dev])")
    file = tmp_path / "picture.jpg"
    file.write_bytes(picture(size=(300, 200)))
    with running(task_folder(tmp_path / "tasks")) as (port, _), in_browser(f"http://127.0.0.1:{port}/", width) as seen:
        page = seen.page
        page.locator("#tasks input").first.wait_for()
        assert page.locator("#tasks label").all_inner_texts() == [
            f" {n} ({len(CLASSES[n])} classes)" for n in sorted(CLASSES)
        ]
        page.set_input_files("#file", str(file))
        for name, classes in CLASSES.items():
            box = page.locator("article", has=page.get_by_role("heading", name=name))
            box.locator(".row").first.wait_for()
            assert box.locator(".row").count() == len(classes)
        page.get_by_label("rust").uncheck()
        page.locator("article .row").first.wait_for()
        assert page.locator("article").count() == len(CLASSES) - 1
        if shots := os.environ.get("FEWTUNE_TEST_SCREENSHOTS"):
            page.screenshot(path=str(Path(shots) / f"serve-{width}.png"), full_page=True)
        assert not seen.overflows()
        assert not seen.complaints
        assert not seen.broken_pictures()
        assert not seen.faults()
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "blob:", "data:")) for url in seen.requests)
