"""Limits on the size and the duration of request bodies."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Reads a request's body before the application sees it: 413 where it is too large, 408 where it is too slow.

    Args:
        app: the application.
        limit: bytes.
        seconds: until the last byte is there.
    """

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(413, scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                messages = await self._body(receive)
        except TimeoutError:
            await self._refuse(408, scope, receive, send)
            return
        if messages is None:
            await self._refuse(413, scope, receive, send)
            return
        pending = iter(messages)

        async def replay() -> Message:
            return next(pending, None) or await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> list[Message] | None:
        """All messages of the body; None where they hold too much."""
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self.limit:
                return None
            if message["type"] != "http.request" or not message.get("more_body"):
                return messages

    async def _refuse(self, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        why = f"the body is larger than {self.limit:,} bytes" if status == 413 else f"it took over {self.seconds:g} s"
        await JSONResponse({"detail": why}, status, {"Connection": "close"})(scope, receive, send)
