"""The bank as an HTTP service: a FastAPI application."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from torch import Tensor

from fewtune.errors import DataError, DeltaError
from fewtune.serving.batching import Batcher, Busy
from fewtune.serving.body import BodyLimit
from fewtune.serving.limits import Limits
from fewtune.serving.measures import Measures
from fewtune.serving.opening import OpenedBank
from fewtune.serving.storing import remove_file, store_file
from fewtune.serving.uploads import decode

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}$"
TaskName = Annotated[str, Path(pattern=NAME, description="A task's name: its file's, without the end.")]
IMAGE = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "schema": {
        "type": "object",
        "properties": {"image": {"type": "string", "format": "binary"}},
        "required": ["image"],
    }
}
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": IMAGE, "image/*": IMAGE, "multipart/form-data": FORM},
    }
}
FILE_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/octet-stream": IMAGE}}}
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)


class Problem(BaseModel):
    """What went wrong, in one line."""

    detail: str


class TaskAnswer(BaseModel):
    name: str
    classes: list[str]
    bytes: int


class PredictionAnswer(BaseModel):
    task: str
    label: str
    probability: float
    probabilities: dict[str, float]
    labels: dict[str, float]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


class Service:
    """What each route does.

    Args:
        opened: the bank; its folder is followed while the service runs.
        limits: what is taken at most.
        token: who sends it (``Authorization: Bearer TOKEN``) may add and remove tasks; without one nobody may.
    """

    def __init__(self, opened: OpenedBank, limits: Limits, token: str | None) -> None:
        self.opened, self.limits, self.token = opened, limits, token
        self.bank, self.measures = opened.bank, Measures(opened.bank)
        self.batcher = Batcher(opened.bank, limits.batch, limits.wait, limits.queue, self.measures.batch)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        self.batcher.start()
        self.opened.folder.start()
        yield
        await run_in_threadpool(self.opened.folder.stop)
        await self.batcher.stop()

    def page(self) -> HTMLResponse:
        text = files("fewtune.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    def health(self) -> dict[str, str]:
        """Whether the service answers."""
        return {"status": "ok"}

    def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self.measures.text(), media_type=self.measures.media_type)

    def tasks(self) -> list[TaskAnswer]:
        """The tasks, and the classes of each."""
        held = self.bank.held()
        return [TaskAnswer(name=n, classes=list(t.class_names), bytes=t.nbytes) for n, t in held.items()]

    async def predict(self, name: TaskName, request: Request) -> PredictionAnswer:
        """The class of an image: its bytes, or a form with the file `image`."""
        self._must_exist(name)
        content = await image_bytes(request)
        if self.batcher.queue.full():  # told before the work of decoding
            raise Busy
        image = await run_in_threadpool(self._prepared, name, content)
        return PredictionAnswer(**vars(await self.batcher.predict(name, image)))

    async def put(self, name: TaskName, request: Request) -> None:
        """Add a task, or replace it: the body is the task file. Needs the token."""
        if name not in self.bank.tasks() and len(self.bank.tasks()) >= self.limits.tasks:
            raise DataError(f"{self.limits.tasks} tasks are held already: remove one first")
        await run_in_threadpool(store_file, self.opened.folder, name, await request.body())

    def delete(self, name: TaskName) -> None:
        """Remove a task and its file. Needs the token."""
        self._must_exist(name)
        remove_file(self.opened.folder, name)

    def authorised(self, request: Request) -> None:
        """Raises HTTPException unless the request brings the token."""
        if self.token is None:
            raise HTTPException(403, "tasks cannot be changed through this service: it was started without a token")
        given = request.headers.get("authorization", "").encode("latin-1")
        if not secrets.compare_digest(given, f"Bearer {self.token}".encode()):
            raise HTTPException(401, "a token is needed to change tasks", {"WWW-Authenticate": "Bearer"})

    def _prepared(self, name: str, content: bytes) -> Tensor:
        return self.opened.prepare(name, decode(content, self.limits.pixels)).to(self.opened.device)

    def _must_exist(self, name: str) -> None:
        if name not in self.bank.tasks():
            raise HTTPException(404, f"there is no task {name!r}")


def create_app(opened: OpenedBank, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """The application of a `Service`; see there."""
    limits = limits or Limits()
    service = Service(opened, limits, token)
    app = FastAPI(
        title="fewtune", summary="Many tasks on one backbone.", lifespan=service.running, docs_url=None, redoc_url=None
    )
    app.add_middleware(BodyLimit, limit=limits.body, seconds=limits.receive)
    app.middleware("http")(service.measures.request)
    app.state.service = service
    for kind, status, headers in ((DataError, 400, {}), (DeltaError, 400, {}), (Busy, 503, {"Retry-After": "1"})):
        app.add_exception_handler(kind, partial(_said, status=status, headers=headers))
    text: Any = {200: {"content": {"text/plain": {}}}}
    changing: dict[str, Any] = {"status_code": 204, "dependencies": [Depends(service.authorised)]}
    app.get("/", include_in_schema=False)(service.page)
    app.get("/health")(service.health)
    app.get("/metrics", response_class=Response, responses=text)(service.metrics)
    app.get("/tasks")(service.tasks)
    app.post("/tasks/{name}/predict", openapi_extra=IMAGE_BODY, responses=problems(400, 404, 408, 413, 503))(
        service.predict
    )
    app.put("/tasks/{name}", openapi_extra=FILE_BODY, responses=problems(400, 401, 403, 408, 413), **changing)(
        service.put
    )
    app.delete("/tasks/{name}", responses=problems(400, 401, 403, 404), **changing)(service.delete)
    return app


async def _said(_: Request, error: Exception, status: int, headers: Mapping[str, str]) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status, headers)


async def image_bytes(request: Request) -> bytes:
    """The body, or the file `image` of a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return await request.body()
    async with request.form(max_files=1, max_fields=1) as form:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise DataError("the form has no file `image`")
        return await upload.read()
