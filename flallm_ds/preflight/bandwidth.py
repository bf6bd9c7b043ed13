"""The bandwidth of an all-reduce, within a machine and between machines."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flallm_ds.dist import World, gather_objects
from flallm_ds.preflight.facts import Facts
from flallm_ds.preflight.results import OK, WARNING, Result

BYTES = 16 * 10**6
REPEATS = 5
TIMEOUT = timedelta(seconds=60)
# GB/s of a rank below which something is wrong: GPUs within a machine reach 10 and more over
# PCIe, a network of 25 Gbit/s reaches 3. gloo on CPUs reaches about 1 in both.
LEAST_WITHIN = {"cuda": 5.0, "cpu": 0.1}
LEAST_BETWEEN = {"cuda": 1.0, "cpu": 0.1}


def bandwidths(facts: Sequence[Facts], world: World) -> list[Result]:
    """Measure both bandwidths. Every rank must call this.

    facts: of all ranks, in their order.
    """
    ranks_of: dict[str, list[int]] = {}
    for other in facts:
        ranks_of.setdefault(other.host, []).append(other.rank)
    device = world.device.type
    # All ranks create all groups, in the same order, even those that they are not in.
    within = [ranks for ranks in ranks_of.values() if len(ranks) > 1]
    between = [ranks[0] for ranks in ranks_of.values()]
    results = []
    if within:
        speeds = _measured(within, world)
        results.append(_result("within a machine", speeds, LEAST_WITHIN[device], facts))
    if len(between) > 1:
        speeds = _measured([between], world)
        results.append(_result("between machines", speeds, LEAST_BETWEEN[device], facts))
    return results


def _measured(groups: Sequence[Sequence[int]], world: World) -> dict[int, float]:
    """Return the GB/s of each group at once, by its first rank."""
    own: tuple[int, float] | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=TIMEOUT)
        if world.rank in ranks:
            own = ranks[0], _gigabytes_per_s(group, len(ranks), world.device)
    found = [pair for pair in gather_objects(own, world) if pair is not None]
    # The ranks of a group differ by their start only; the slowest saw all of it.
    speeds: dict[int, float] = {}
    for first, speed in found:
        speeds[first] = min(speed, speeds.get(first, speed))
    return speeds


def _gigabytes_per_s(group: Any, num_ranks: int, device: torch.device) -> float:
    """Return the bytes that a rank sends in an all-reduce per second, in GB/s."""
    tensor = torch.ones(BYTES // 4, device=device)
    dist.all_reduce(tensor, group=group)  # connects the ranks
    began = _now(device)
    for _ in range(REPEATS):
        dist.all_reduce(tensor, group=group)
    seconds = (_now(device) - began) / REPEATS
    sent = 2 * (num_ranks - 1) / num_ranks * BYTES
    return sent / seconds / 1e9


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _result(
    where: str, speeds: dict[int, float], least: float, facts: Sequence[Facts]
) -> Result:
    first = min(speeds, key=lambda rank: speeds[rank])
    found = f"{speeds[first]:.2f} GB/s for each rank"
    name = f"all-reduce {where}"
    if speeds[first] >= least:
        return Result(name, OK, found)
    return Result(
        name,
        WARNING,
        f"{found} in the group of {facts[first].where}, less than {least} GB/s",
        "Look at the network that NCCL_DEBUG=INFO names; NCCL_SOCKET_IFNAME (or "
        "GLOO_SOCKET_IFNAME) chooses another.",
    )
