"""Find a free TCP port of this node for the rendezvous of a job, and reserve it.

    python launch/slurm/port.py JOB_ID

Prints the port, then waits until its input ends. Meanwhile no other job gets the port. Uses
the standard library alone.
"""

import errno
import socket
import sys
from contextlib import suppress

# Below the ephemeral ports of Linux, so that no outgoing connection takes the port.
LOWEST, COUNT = 10_000, 20_000


def reserve(port: int) -> socket.socket | None:
    """Return a socket that reserves a port while it is open, or None if it is taken."""
    # An abstract socket: its name is free again when its process ends, and it belongs to a
    # network namespace, as ports do.
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0flallm-port-{port}")
        # A program may listen on one of IPv4 and IPv6: try both.
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return claim


def main(job_id: int) -> None:
    """Reserve the first free port after that of the job's number, and print it."""
    for number in range(COUNT):
        port = LOWEST + (job_id + number) % COUNT
        claim = reserve(port)
        if claim is None:
            continue
        print(port, flush=True)
        # Ctrl-C ends the wait, too.
        with claim, suppress(KeyboardInterrupt):
            sys.stdin.read()
        return
    sys.exit("Cannot find a free port: 10000 to 29999 are all in use on this node.")


if __name__ == "__main__":
    main(int(sys.argv[1]))
