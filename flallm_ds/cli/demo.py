"""`flallm demo`: a local page that translates videos."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flallm_ds.cli.checks import check_model
from flallm_ds.errors import UserError, require
from flallm_ds.process import end_at_once

if TYPE_CHECKING:
    from flallm_ds.inference.translator import Translator

_MAX_PORT = 65_535
_PACKAGES = ("fastapi", "uvicorn", "python_multipart")


def demo(
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_mb: float = 200.0,
    max_s: float = 600.0,
    bits: Literal[32, 16, 8, 4] | None = None,
    hub_code: bool = False,
) -> None:
    """Serve a page on which a model translates videos and recordings of the camera.

    The same server has an interface for programs: POST /api/translate.

    Example: flallm demo --model=runs/mine_llm

    Options:
        model: a run folder (its best export), an export, or USER/NAME on the hub
        host: address to listen on; by default, only this machine reaches it
        port: port to listen on (0: any free one)
        max_mb: largest video in MB
        max_s: longest video in seconds
        bits: of the LLM's weights; those of its training by default
        hub_code: run code that comes with the LLM on the hub
    """
    require(0 <= port <= _MAX_PORT, f"--port must be from 0 to {_MAX_PORT}, got {port}.")
    require(max_mb > 0, f"--max_mb must be above 0, got {max_mb:g}.")
    require(max_s > 0, f"--max_s must be above 0, got {max_s:g}.")
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"Cannot start the demo: the package {package} is not installed. Install "
                "flallm_ds with its extra [demo]."
            )
    check_model(model)
    # fastapi takes a moment to import: not for --help.
    from flallm_ds.demo.app import Limits
    from flallm_ds.demo.guard import LOOPBACK
    from flallm_ds.demo.server import Server, address, listen

    def load() -> "Translator":
        # torch takes seconds to import: the page answers before.
        from flallm_ds.inference.translator import Translator

        return Translator.from_pretrained(model, bits=bits, hub_code=hub_code)

    with listen(host, port) as listening:
        if host not in LOOPBACK:
            print(
                "warning: every machine that reaches this one can use the page; it has no "
                "password and no encryption.",
                file=sys.stderr,
            )
        title = Path(model).name if Path(model).exists() else model
        server = Server(load, Limits(max_mb, max_s), title, host)
        print(f"{address(listening, host)}  (Ctrl-C ends the demo)", flush=True)
        # Otherwise Ctrl-C would wait for the import of torch, or for a search.
        end_at_once()
        server.serve_until_stopped(listening)
