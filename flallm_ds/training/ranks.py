"""What the ranks report to each other in every step, in the collective that sums the loss."""

import resource
import socket
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flallm_ds.dist import World, gather_objects, gather_values


class RankReport(NamedTuple):
    """A step of one rank.

    waited_s: seconds until the data of the step was there. own_s: these, and the seconds
    of its forward passes until each loss is on the host. device_bytes, host_bytes: peak
    memory since the start; device_bytes is 0 on a CPU.

    own_s tells the ranks apart, the time of a whole step does not: in backward passes and
    updates, every rank waits for the slowest. Up to ZeRO-2, a forward pass waits for no
    other rank. Under ZeRO-3 it gathers weights, so there only waited_s differs.
    """

    loss_sum: float
    waited_s: float
    own_s: float
    device_bytes: float
    host_bytes: float


def report(loss_sum: float, waited_s: float, own_s: float, world: World) -> RankReport:
    """Return the report of this rank."""
    device_bytes = 0
    if world.device.type == "cuda":
        device_bytes = torch.cuda.max_memory_allocated(world.device)
    # In units of 1024 bytes, on Linux.
    host_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return RankReport(loss_sum, waited_s, own_s, device_bytes, host_bytes)


def exchange(own: RankReport, world: World) -> list[RankReport]:
    """Return the reports of all ranks, in their order. Every rank must call this."""
    return [RankReport(*values) for values in gather_values(own, world)]


def slowest(own_s: Sequence[float]) -> int:
    """Return the rank with the longest own time."""
    return max(range(len(own_s)), key=own_s.__getitem__)


def hosts(world: World) -> list[str]:
    """Return the name of the machine of each rank. Every rank must call this."""
    return gather_objects(socket.gethostname(), world)
