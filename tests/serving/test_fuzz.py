"""Requests made up from the service's own description, and images damaged at random: no answer of 500, no crash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service's libraries are not installed (fewtune[serve])")
pytest.importorskip("schemathesis", reason="needs schemathesis (fewtune[dev])")
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from fewtune.serving.http import create_app
from fewtune.serving.limits import Limits
from services import opened, picture, task_file

TOKEN = "token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    bank = opened(tmp_path_factory.mktemp("fuzz") / "tasks")
    with TestClient(create_app(bank, Limits(body=100_000), TOKEN), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.schemas.BaseSchema:
    bank = opened(tmp_path_factory.mktemp("made up") / "tasks")
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(bank, Limits(body=100_000), TOKEN))


SOME = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
ROUTES = (
    "GET /health",
    "GET /metrics",
    "GET /tasks",
    "POST /tasks/{name}/predict",
    "PUT /tasks/{name}",
    "DELETE /tasks/{name}",
)


@pytest.mark.parametrize("route", ROUTES)
def test_made_up_requests_get_described_answers(schema: schemathesis.schemas.BaseSchema, route: str) -> None:
    method, _, path = route.partition(" ")

    @SOME
    @given(case=schema[path][method].as_strategy())
    def fuzz(case: schemathesis.Case) -> None:
        for headers in ({}, BEARER):
            reply = case.call(headers=headers)
            assert reply.status_code < 500
            case.validate_response(
                reply, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
            )

    fuzz()


def test_every_route_is_tried(schema: schemathesis.schemas.BaseSchema) -> None:
    assert {operation.ok().label for operation in schema.get_all_operations()} == set(ROUTES)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_images(client: TestClient, kind: str) -> None:
    rng = np.random.default_rng(0)
    good = picture(size=(50, 40), kind=kind)
    for _ in range(60):
        content = bytearray(good[: rng.integers(1, len(good) + 1)])
        for place in rng.integers(0, len(content), rng.integers(0, 20)):
            content[place] = rng.integers(256)
        reply = client.post("/tasks/birds/predict", content=bytes(content))
        assert reply.status_code in (200, 400), reply.text
    assert client.post("/tasks/birds/predict", content=good).status_code == 200


def test_damaged_task_files(client: TestClient, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = task_file(tmp_path / "a.safetensors", ("x", "y")).read_bytes()
    for _ in range(60):
        content = bytearray(good[: rng.integers(1, len(good) + 1)])
        for place in rng.integers(0, len(content), rng.integers(1, 20)):
            content[place] = rng.integers(256)
        assert client.put("/tasks/damaged", content=bytes(content), headers=BEARER).status_code == 400
    assert client.put("/tasks/good", content=good, headers=BEARER).status_code == 204
    assert client.delete("/tasks/good", headers=BEARER).status_code == 204
