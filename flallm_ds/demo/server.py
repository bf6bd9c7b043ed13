"""Run the server of the demo: from the first check of its port to its end."""

import errno
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from flallm_ds.demo.app import Limits, make_app
from flallm_ds.demo.model import Model
from flallm_ds.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds: the page answers before
    from flallm_ds.inference.translator import Translator

# Seconds that open connections have to end if the model cannot be loaded.
_GRACE_S = 1


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. port: 0 for any free one.

    Raises UserError if the port is in use, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server((host, port), family=found[0][0])
    except socket.gaierror as error:
        raise UserError(
            f"--host must be an address of this machine, got {host!r} ({error.strerror})."
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Cannot listen on {host}:{port}: the port is in use. Give another --port, "
                "or --port=0 for any free one."
            ) from error
        raise UserError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Give another --host or --port."
        ) from error


def address(listening: socket.socket, host: str) -> str:
    """Return the URL of the page."""
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """The server of the demo, which ends if its model cannot be loaded.

    load: returns the translator; called in another thread. title: name of the model.
    """

    def __init__(
        self, load: "Callable[[], Translator]", limits: Limits, title: str, host: str
    ) -> None:
        self.model = Model(load, limits.max_s)
        config = uvicorn.Config(
            make_app(self.model, limits, title, host),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield

    def serve_until_stopped(self, listening: socket.socket) -> None:
        """Answer requests until the process ends, or loading the model fails.

        Raises what the loading raised.
        """
        loading = self.model.loading
        loading.add_done_callback(self._report)
        try:
            self.run(sockets=[listening])
        finally:
            self.model.close()
        if loading.done() and not loading.cancelled():
            loading.result()

    def _report(self, loading: "Future[Translator]") -> None:
        if loading.cancelled():
            return
        if loading.exception() is not None:
            self.should_exit = True
            return
        print("The model is loaded.", flush=True)
