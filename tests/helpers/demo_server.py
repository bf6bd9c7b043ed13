"""The server of `flallm demo` in a thread of the test."""

import http.client
import json
import threading
from collections.abc import Callable
from typing import Any

from flallm_ds.demo.app import Limits
from flallm_ds.demo.server import Server, listen
from flallm_ds.errors import UserError
from flallm_ds.inference.translator import Translator


class Running:
    """A server in a thread, and requests to it."""

    def __init__(self, load: Callable[[], Translator], max_mb: float = 2) -> None:
        self.listening = listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        self.server = Server(load, Limits(max_mb, max_s=60), "tiny", "127.0.0.1")
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.server.serve_until_stopped(self.listening)
        except UserError as error:
            self.error = error

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.listening.close()
        assert not self.thread.is_alive()

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), content

    def post(self, body: Any, query: str = "", **headers: str) -> tuple[int, Any]:
        path = f"/api/translate{query}"
        status, _, content = self.ask("POST", path, body, **headers)
        return status, json.loads(content)
