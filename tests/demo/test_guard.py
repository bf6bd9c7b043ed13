"""Which Host headers a server accepts that other machines reach."""

import socket

import pytest
from starlette.datastructures import Headers

from flallm_ds.demo.app import make_app
from flallm_ds.demo.guard import Guard
from flallm_ds.demo.refused import Refused


def check(listening_on: str, host: str) -> None:
    guard = Guard(make_app, listening_on)  # the application is not called
    guard._check(Headers({"host": host, "origin": f"http://{host}"}))


@pytest.mark.parametrize("host", ["10.0.0.1:7860", "[fe80::1]:7860", "localhost:7860"])
def test_addresses_and_the_name_of_the_machine_are_accepted(host: str) -> None:
    check("0.0.0.0", host)
    check("0.0.0.0", f"{socket.gethostname()}:7860")
    check("node7.cluster", "NODE7.cluster:7860")


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1.evil.example", ""])
def test_other_names_are_refused(host: str) -> None:
    """A site can let any name of its own point to this machine."""
    for listening_on in ("0.0.0.0", "127.0.0.1"):
        with pytest.raises(Refused, match="The Host header must be"):
            check(listening_on, host)


def test_only_loopback_is_accepted_by_default() -> None:
    check("127.0.0.1", "[::1]:80")
    with pytest.raises(Refused, match=r"got '10\.0\.0\.1:7860'"):
        check("127.0.0.1", "10.0.0.1:7860")
