"""The HTTP interface of the demo: its page, and the translation of an upload."""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from flallm_ds.demo.guard import Guard
from flallm_ds.demo.model import Asked, Event, Model, sentence_of
from flallm_ds.demo.refused import Refusal, Refused
from flallm_ds.demo.upload import receive
from flallm_ds.errors import UserError

# Path of a file of the page: (its name in the package, media type).
_PAGE = {
    "/": ("demo/page.html", "text/html"),
    "/page.css": ("demo/page.css", "text/css"),
    "/page.js": ("demo/page.js", "text/javascript"),
    "/heat_map.css": ("inference/heat_map.css", "text/css"),
    "/heat_map.js": ("inference/heat_map.js", "text/javascript"),
}
_LINES = "application/x-ndjson"
_LOG = logging.getLogger("uvicorn.error")
_BROKEN = "Cannot translate the video: the terminal of flallm demo shows why."


@dataclass(frozen=True)
class Limits:
    """The largest video in MB of 10**6 bytes, and the longest in seconds."""

    max_mb: float
    max_s: float


def make_app(model: Model, limits: Limits, title: str, host: str) -> FastAPI:
    """Return the application. title: name of the model. host: where the server listens."""
    # The pages of FastAPI about an API load scripts from the network.
    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard, host=host)
    for path, (name, media_type) in _PAGE.items():
        app.get(path)(_file(name, media_type))

    @app.get("/api/info")
    async def info() -> dict[str, Any]:
        """Say which model this is, whether it is loaded, and what it takes."""
        return _info(model, limits, title)

    @app.post("/api/translate")
    async def translate(request: Request) -> Response:
        """Translate the body, or the file of a form; as JSON, or as events while it runs."""
        events = _events(request, model, limits)
        if request.headers.get("accept") == _LINES:
            return await _as_lines(events)
        return await _as_json(events, request)

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> Response:
        return Refusal(error)

    @app.exception_handler(ClientDisconnect)
    async def leave(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def fail(request: Request, error: HTTPException) -> Response:
        sentence = f"Cannot {request.method} {request.url.path}: {error.detail}."
        return JSONResponse({"error": sentence}, error.status_code)

    @app.exception_handler(Exception)
    async def break_off(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": _BROKEN}, 500)

    return app


def _file(name: str, media_type: str) -> Callable[[], Response]:
    """Return the handler that answers with a file of the page."""
    # Not of flallm_ds.inference, whose import takes seconds.
    content = files("flallm_ds").joinpath(name).read_bytes()
    return lambda: Response(content, media_type=media_type)


def _info(model: Model, limits: Limits, title: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "title": title,
        "ready": False,
        "max_mb": limits.max_mb,
        "max_s": limits.max_s,
    }
    translator = model.translator
    if translator is None:
        return facts
    # They need torch, which is imported together with the translator.
    from flallm_ds.data.text.languages import tag_or_name
    from flallm_ds.export.model_card import spoken

    languages = []
    for name in spoken(translator.export.codec):
        languages.append({"name": name, "tag": tag_or_name(name)})
    beams = translator.beam.num_beams
    device = translator.device.type
    return facts | {
        "ready": True, "languages": languages, "beams": beams, "device": device,
    }  # fmt: skip


async def _events(
    request: Request, model: Model, limits: Limits
) -> AsyncGenerator[Event, None]:
    """Receive the upload of a request and translate it; yield what happens.

    The first event comes when the upload is complete. Raises Refused.
    """
    query = Asked.of_fields(request.query_params)  # before the upload
    async with AsyncExitStack() as stack:
        stack.enter_context(model.admitted())
        upload = await receive(request, limits.max_mb)
        stack.callback(upload.file.close)
        asked = query
        if upload.fields:
            asked = Asked.of_fields({**request.query_params, **_texts(upload.fields)})
        events = await stack.enter_async_context(aclosing(model.events(upload, asked)))
        try:
            async for event in events:
                yield event
        except UserError as error:  # of the model, which could not be loaded
            raise Refused(sentence_of(error), 503) from error


def _texts(fields: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.decode("utf-8", "replace") for name, value in fields.items()}


async def _as_json(events: AsyncGenerator[Event, None], request: Request) -> Response:
    """Return the whole translation."""
    async with aclosing(events):
        async for event in events:
            if "done" in event:
                return JSONResponse(event["done"])
            if await request.is_disconnected():
                break
    raise ClientDisconnect


async def _as_lines(events: AsyncGenerator[Event, None]) -> Response:
    """Return a stream with an event on each line, the last of which may be an error."""
    # Until the upload is complete, an error has a status of its own.
    first = await anext(events)

    async def lines() -> AsyncGenerator[str, None]:
        async with aclosing(events):
            yield _line(first)
            try:
                async for event in events:
                    yield _line(event)
            except Refused as error:
                yield _line({"error": str(error)})
            except Exception:  # noqa: BLE001 - an LLM with code of its own may raise anything
                _LOG.exception("Cannot translate a video.")
                yield _line({"error": _BROKEN})

    return _ClosedStream(lines(), media_type=_LINES)


def _line(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


class _ClosedStream(StreamingResponse):
    """A stream whose generator ends when the client leaves, so that its file is closed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
