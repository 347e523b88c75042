"""The service's answers: right ones for images, clear ones for everything else."""

from __future__ import annotations

import asyncio
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="the service's libraries are not installed (fewtune[serve])")
pytest.importorskip("prometheus_client", reason="the service's libraries are not installed (fewtune[serve])")
from fastapi.testclient import TestClient

from fewtune.errors import DataError
from fewtune.serving.batching import Batcher, Busy
from fewtune.serving.http import create_app
from fewtune.serving.limits import Limits
from fewtune.serving.opening import OpenedBank
from services import CLASSES, expected, opened, picture, task_file

TOKEN = "not a secret"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = Limits(body=200_000, pixels=100_000)


@pytest.fixture
def bank(tmp_path: Path) -> OpenedBank:
    return opened(tmp_path / "tasks")


@pytest.fixture
def client(bank: OpenedBank) -> Iterator[TestClient]:
    with TestClient(create_app(bank, LIMITS, TOKEN), raise_server_exceptions=False) as client:
        yield client


def test_tasks_are_listed_with_their_classes(client: TestClient) -> None:
    assert {task["name"]: tuple(task["classes"]) for task in client.get("/tasks").json()} == CLASSES
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", CLASSES)
def test_an_image_gets_its_tasks_answer(client: TestClient, bank: OpenedBank, name: str, kind: str) -> None:
    content = picture(kind=kind)
    wanted = expected(bank, name, content)
    for reply in (
        client.post(f"/tasks/{name}/predict", content=content),
        client.post(f"/tasks/{name}/predict", files={"image": ("a", content, f"image/{kind.lower()}")}),
    ):
        assert reply.status_code == 200
        answer = reply.json()
        assert answer["probabilities"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert answer["label"] == max(wanted, key=wanted.__getitem__)


def bomb() -> bytes:
    """A PNG of 400 bytes that says it has 900 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


BAD = {
    "no image": (b"hello", "not an image"),
    "nothing": (b"", "not an image"),
    "cut short": (picture()[:500], "cannot read the image|damaged"),
    "a bomb": (bomb(), "pixels"),
    "too many pixels": (picture(size=(400, 300)), "400 x 300 pixels; at most 100,000"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_images_are_told_and_the_service_goes_on(client: TestClient, what: str) -> None:
    content, said = BAD[what]
    reply = client.post("/tasks/birds/predict", content=content)
    assert reply.status_code == 400
    assert re.search(said, reply.json()["detail"])
    assert client.post("/tasks/birds/predict", content=picture()).status_code == 200


def test_wrong_tasks_and_oversized_bodies_are_refused(client: TestClient) -> None:
    assert client.post("/tasks/cats/predict", content=picture()).status_code == 404
    assert client.post("/tasks/..%2Fbirds/predict", content=picture()).status_code in (404, 422)
    assert client.post("/tasks/birds/predict", content=bytes(LIMITS.body + 1)).status_code == 413
    parts = iter([bytes(LIMITS.body), b"1"])
    assert client.post("/tasks/birds/predict", content=parts).status_code == 413
    assert client.post("/tasks/birds/predict", data={"image": "text"}, files={"other": b"1"}).status_code == 400
    broken = {"Content-Type": "multipart/form-data"}
    assert client.post("/tasks/birds/predict", content=b"--x", headers=broken).status_code == 400
    assert client.get("/health").status_code == 200


def test_tasks_are_changed_with_the_token_only(client: TestClient, bank: OpenedBank, tmp_path: Path) -> None:
    new = task_file(tmp_path / "new.safetensors", ("a", "b", "c", "d"), seed=9).read_bytes()
    assert client.put("/tasks/new", content=new).status_code == 401
    assert client.put("/tasks/new", content=new, headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.delete("/tasks/birds").status_code == 401
    assert set(bank.bank.tasks()) == set(CLASSES)
    assert client.put("/tasks/new", content=new, headers=BEARER).status_code == 204
    assert (bank.folder.path / "new.safetensors").read_bytes() == new
    assert len(client.post("/tasks/new/predict", content=picture()).json()["probabilities"]) == 4
    refused = client.put("/tasks/new", content=new[:-9], headers=BEARER)
    assert refused.status_code == 400
    assert "the body is" in refused.json()["detail"]
    assert client.delete("/tasks/new", headers=BEARER).status_code == 204
    assert client.delete("/tasks/new", headers=BEARER).status_code == 404
    assert not (bank.folder.path / "new.safetensors").exists()
    assert client.post("/tasks/new/predict", content=picture()).status_code == 404


def test_without_a_token_nobody_changes_tasks(bank: OpenedBank) -> None:
    with TestClient(create_app(bank)) as client:
        assert client.put("/tasks/new", content=b"", headers=BEARER).status_code == 403
        assert client.delete("/tasks/birds", headers=BEARER).status_code == 403
        assert client.delete("/tasks/birds", headers={"Authorization": "Bearer None"}).status_code == 403
    assert "birds" in bank.bank.tasks()


def test_measures_count_requests_and_passes(client: TestClient) -> None:
    client.post("/tasks/birds/predict", content=picture())
    client.post("/tasks/birds/predict", content=b"no")
    text = client.get("/metrics").text
    assert 'fewtune_requests_total{route="/tasks/{name}/predict",status="200"} 1.0' in text
    assert 'fewtune_requests_total{route="/tasks/{name}/predict",status="400"} 1.0' in text
    assert "fewtune_batch_images_sum 1.0" in text
    assert "fewtune_tasks 3.0" in text


def test_the_page_asks_nobody_outside(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_images_of_several_tasks_share_a_pass(bank: OpenedBank) -> None:
    async def ask() -> list[tuple[int, int]]:
        passes: list[tuple[int, int]] = []
        batcher = Batcher(bank.bank, 8, 0.2, 16, lambda images, tasks: passes.append((images, tasks)))
        batcher.start()
        image = torch.zeros(3, 32, 32)
        answers = await asyncio.gather(*(batcher.predict(name, image) for name in [*CLASSES, "birds"]))
        assert [answer.task for answer in answers] == [*CLASSES, "birds"]
        await batcher.stop()
        return passes

    assert asyncio.run(ask()) == [(4, 3)]


def test_a_full_queue_is_told_and_a_removed_task_fails_its_own_images_only(bank: OpenedBank) -> None:
    async def ask() -> list[object]:
        batcher = Batcher(bank.bank, 8, 0.05, 3)
        batcher.start()
        image = torch.zeros(3, 32, 32)
        asked = [asyncio.ensure_future(batcher.predict(name, image)) for name in ("birds", "rust", "leaves", "birds")]
        await asyncio.sleep(0)
        bank.bank.remove("rust")
        results = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.stop()
        return results

    birds, rust, leaves, late = asyncio.run(ask())
    assert birds.task == "birds"
    assert leaves.task == "leaves"
    assert isinstance(rust, DataError)
    assert isinstance(late, Busy)


def test_a_full_service_answers_503(bank: OpenedBank) -> None:
    app = create_app(bank, Limits(queue=1))
    with TestClient(app) as client:

        class Full:
            def full(self) -> bool:
                return True

        queue, app.state.service.batcher.queue = app.state.service.batcher.queue, Full()
        reply = client.post("/tasks/birds/predict", content=picture())
        app.state.service.batcher.queue = queue
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert client.post("/tasks/birds/predict", content=picture()).status_code == 200


def test_a_slow_body_is_given_up(bank: OpenedBank) -> None:
    from fewtune.serving.body import BodyLimit

    async def never() -> dict:
        await asyncio.sleep(60)
        raise AssertionError

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    limit = BodyLimit(create_app(bank), limit=10, seconds=0.05)
    asyncio.run(limit({"type": "http", "headers": []}, never, send))
    assert sent[0]["status"] == 408


def test_an_animated_and_a_grey_image_are_read(client: TestClient) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (20, 20), 90).save(file, format="GIF", save_all=True, append_images=[Image.new("L", (20, 20), 9)])
    assert client.post("/tasks/rust/predict", content=file.getvalue()).status_code == 200
