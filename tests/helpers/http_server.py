"""A real HTTP server on loopback that serves a folder, and fails on request."""

import http.server
import re
import threading
import time
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges. `faults[name]` is a list of what goes wrong with the
    next requests."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges = folder, True
        self.faults: dict[str, list[str]] = {}
        self.gets: list[tuple[str, str | None]] = []  # (name, range) of each GET
        self.sent = 0
        self.headers: list[dict[str, str]] = []
        self.go_on = threading.Event()  # ends stalls
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data"

    def num_gets(self, name: str) -> int:
        return sum(got == name for got, _ in self.gets)

    def wait_until_kept(self, name: str, num_bytes: int) -> None:
        """A client may lose what it has received but not yet read when the connection breaks."""
        for _ in range(200):
            parts = [*self.folder.parent.glob(f"cache/*/shards/*-{name}.*.part")]
            if not self.ranges or any(part.stat().st_size >= num_bytes for part in parts):
                break
            time.sleep(0.01)

    def __exit__(self, *error: object) -> None:
        self.go_on.set()
        self.shutdown()  # else its thread spins on a socket that is closed
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        pass  # clients that are killed are part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        name = self.path.split("?")[0].rpartition("/")[2]
        fault = self.server.faults[name].pop(0) if self.server.faults.get(name) else ""
        asked = self.headers.get("Range")
        self.server.headers.append({**self.headers, "path": self.path})
        if body:
            self.server.gets.append((name, asked))
        path = self.server.folder / name
        if fault == "hang up":
            self.close_connection = True
            return
        status = int(fault) if fault.isdigit() else 404 if not path.is_file() else 200
        data = path.read_bytes() if status == 200 else b"nothing here"
        if status == 200 and asked and self.server.ranges:
            status, data = 206, data[int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) :]
        if fault == "corrupt":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "longer":
            data += b"x" * 10
        if fault == "truncated":
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        half = fault in ("drop", "stall")
        sent = data[: len(data) // 2] if half else data
        self.server.sent += len(sent)  # before the client can have it
        self.wfile.write(sent)
        if half:
            self.server.wait_until_kept(
                name, len(path.read_bytes()) - len(data) + len(sent)
            )
        if fault == "stall":
            self.server.go_on.wait(20)
        self.close_connection = half
