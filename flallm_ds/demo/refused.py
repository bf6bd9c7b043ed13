"""The error of a request, and the answer to it."""

import asyncio
from contextlib import suppress

from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

# A client that is still sending when its connection is closed may lose the answer. So the
# rest of an upload is read and dropped, but not for longer than this.
_DROP_S = 2.0


class Refused(Exception):
    """A request that is not answered with a translation. status: of HTTP."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Refusal(JSONResponse):
    """The answer to a refused request: {"error": sentence}. It closes the connection."""

    def __init__(self, error: Refused) -> None:
        headers = {"Connection": "close"}
        if error.status == 503:
            headers["Retry-After"] = "30"
        super().__init__({"error": str(error)}, error.status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer at once, then drop what the client still sends."""
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_DROP_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
