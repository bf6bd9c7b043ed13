"""Checks of the facts of all ranks. Each returns one `Result`; rank 0 is the reference."""

from collections.abc import Callable, Iterable, Sequence

from flallm_ds.preflight.facts import Disk, Facts, Machine
from flallm_ds.preflight.results import FAILURE, OK, WARNING, Result

# Heartbeats count as stale after 12.5 s, by the clocks of two machines.
MOST_CLOCK_S = 5.0
# NCCL keeps its buffers between the ranks of a machine there. Containers often have 64 MB.
LEAST_SHARED_MEMORY = 10**9
LEAST_OPEN_FILES = 1024
# A rank decodes frames with its other cores.
LEAST_CORES = 2


def versions(facts: Sequence[Facts]) -> Result:
    """Compare the versions of Python and of packages of all ranks."""
    first = facts[0]
    for other in facts:
        for name, version in first.versions.items():
            found = other.versions.get(name)
            if found != version:
                return Result(
                    "versions",
                    FAILURE,
                    f"{other.where} has {name} {found}, {first.where} has {version}",
                    "Install the same versions on all nodes, or use one .venv that all "
                    "nodes share.",
                )
    shown = ("python", "torch", "deepspeed", "transformers", "flallm_ds")
    text = ", ".join(f"{name} {first.versions.get(name)}" for name in shown)
    return Result("versions", OK, f"{text} on {_ranks(facts)}")


def code(facts: Sequence[Facts]) -> Result:
    """Compare the code of flallm_ds, which may be a checkout with changes."""
    first, machine = facts[0], _machine_of(facts[0])
    for other, its in _machines(facts):
        if its.code != machine.code:
            return Result(
                "code",
                FAILURE,
                f"{other.where} runs other code of flallm_ds than {first.where}",
                "Use one checkout that all nodes share, or copy the same commit to all.",
            )
    return Result("code", OK, f"digest {machine.code[:12]} on {_hosts(facts)}")


def devices(facts: Sequence[Facts]) -> Result:
    """Compare the devices of all ranks."""
    first = facts[0]
    for other in facts:
        if other.device == first.device:
            continue
        is_mixed = bool(other.device.capability) != bool(first.device.capability)
        return Result(
            "devices",
            FAILURE if is_mixed else WARNING,
            f"{other.where} has {other.device}, {first.where} has {first.device}",
            "Check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES."
            if is_mixed
            else "All ranks wait for the slowest, and the smallest memory must suffice: "
            "request nodes of one kind.",
        )
    return Result("devices", OK, f"{_ranks(facts)} on {first.device}")


def clocks(facts: Sequence[Facts]) -> Result:
    """Compare the clocks of all machines."""
    first = facts[0]
    worst = max(facts, key=lambda other: abs(other.clock - first.clock))
    offset = worst.clock - first.clock
    if abs(offset) <= MOST_CLOCK_S:
        return Result("clocks", OK, f"within {abs(offset):.1f} s on {_hosts(facts)}")
    side = "ahead of" if offset > 0 else "behind"
    return Result(
        "clocks",
        WARNING,
        f"the clock of {worst.where} is {abs(offset):.0f} s {side} that of {first.where}",
        "Reports of ranks that hang will be wrong: let an NTP client set the clocks.",
    )


def same_shards(facts: Sequence[Facts]) -> Result:
    """Check that all machines see the same shards."""
    first, machine = facts[0], _machine_of(facts[0])
    for other, its in _machines(facts):
        for folder, expected in machine.shards.items():
            found = its.shards[folder]
            if found.fingerprint == expected.fingerprint:
                continue
            reason = found.error or expected.error or "the fingerprints differ"
            return Result(
                "shards on all machines",
                FAILURE,
                f"{other.where} does not see the same shards {folder} as {first.where} "
                f"({reason.rstrip('.')})",
                "Put them on a file system that all nodes share, or copy them to the same "
                "path of each node.",
            )
    return Result("shards on all machines", OK, f"the same on {_hosts(facts)}")


def run_folder(facts: Sequence[Facts]) -> Result:
    """Check that all machines see a file that rank 0 has written to the run folder."""
    first = facts[0]
    for other, its in _machines(facts):
        for file in its.unseen:
            return Result(
                "run folder",
                FAILURE,
                f"{other.where} does not see {file}, which {first.where} wrote",
                "Name a --run on a file system that all nodes share.",
            )
    return Result("run folder", OK, f"shared by {_hosts(facts)}")


def free_space(facts: Sequence[Facts]) -> Result:
    """Check the free space for run folder, cache and temporary files on all machines."""
    texts: dict[str, str] = {}
    for other, its in _machines(facts):
        for disk in its.disks:
            if disk.free < disk.least:
                return Result(
                    "free space",
                    WARNING,
                    f"{other.where} has {_gigabytes(disk.free)} free for the {disk.what} "
                    f"{disk.path}, less than {_gigabytes(disk.least)}",
                    _advice(disk),
                )
            texts.setdefault(disk.what, f"{disk.what} {_gigabytes(disk.free)}")
    return Result("free space", OK, ", ".join(texts.values()))


def _advice(disk: Disk) -> str:
    if disk.what == "cache":
        return "Lower --data.cache_gb, or set --data.cache_dir to another disk."
    if disk.what == "run folder":
        return "A checkpoint takes 14 bytes for each trained parameter: free some space."
    return "Free some space, or set TMPDIR to another disk."


# --- only of `flallm doctor`


def readable_shards(facts: Sequence[Facts]) -> Result:
    """Check that rank 0 can read the shards. Opening them checks this in a run."""
    found = _machine_of(facts[0]).shards
    for content in found.values():
        if content.error:
            return Result("shards", FAILURE, content.error.rstrip("."))
    return Result("shards", OK, ", ".join(found) or "none given")


def drivers(facts: Sequence[Facts]) -> Result:
    """Compare the versions of NVIDIA's driver."""
    first, machine = facts[0], _machine_of(facts[0])
    for other, its in _machines(facts):
        if its.driver != machine.driver:
            return Result(
                "driver",
                WARNING,
                f"{other.where} has driver {its.driver or 'none'}, {first.where} has "
                f"{machine.driver or 'none'}",
                "Ask for nodes with the same driver.",
            )
    return Result("driver", OK, machine.driver or "none of NVIDIA")


def compiler(facts: Sequence[Facts]) -> Result:
    """Check for a C++ compiler, which CPU Adam needs with offload on a GPU."""
    has_gpu = bool(facts[0].device.capability)
    for other, its in _machines(facts):
        if its.compiler is not None:
            return Result(
                "C++ compiler",
                WARNING if has_gpu else OK,
                f"{other.where}: {its.compiler}",
                "Offload of the optimizer needs it.",
            )
    return Result("C++ compiler", OK, f"complete on {_hosts(facts)}")


def shared_memory(facts: Sequence[Facts]) -> Result:
    """Check that shared memory is large enough for NCCL."""
    smallest, machine = min(_machines(facts), key=lambda pair: pair[1].shared_memory)
    found = f"{_gigabytes(machine.shared_memory)} in /dev/shm"
    if machine.shared_memory >= LEAST_SHARED_MEMORY or len(facts) == 1:
        return Result("shared memory", OK, found)
    return Result(
        "shared memory",
        WARNING,
        f"{smallest.where} has {found}, less than {_gigabytes(LEAST_SHARED_MEMORY)}",
        "Start the container with a larger one (docker run --shm-size=8g).",
    )


def open_files(facts: Sequence[Facts]) -> Result:
    """Check that the limit of open files suffices for shards and connections."""
    least = min(facts, key=lambda other: _limit(other.open_files))
    # A rank has connections to all others.
    needed = LEAST_OPEN_FILES + 8 * len(facts) * (len(facts) > 16)
    limit = _limit(least.open_files)
    if limit >= needed:
        text = "unlimited" if least.open_files < 0 else f"{least.open_files:,}"
        return Result("open files", OK, f"limit {text}")
    return Result(
        "open files",
        WARNING,
        f"{least.where} may open {least.open_files:,} files, less than {needed:,}",
        f"Run ulimit -n {needed} before the job.",
    )


def cores(facts: Sequence[Facts]) -> Result:
    """Check that each rank has cores for its threads that decode frames."""
    least = min(facts, key=lambda other: other.cores)
    if least.cores >= LEAST_CORES:
        return Result("CPU cores", OK, f"at least {least.cores} for each rank")
    return Result(
        "CPU cores",
        WARNING,
        f"{least.where} has {least.cores}, so that decoding frames holds up the steps",
        "Give each rank more cores (SLURM: --cpus-per-task=8).",
    )


def _limit(open_files: int) -> float:
    """Return a limit as a number; the system writes -1 for none."""
    return float("inf") if open_files < 0 else open_files


# --- what the checks share


def _machines(facts: Iterable[Facts]) -> list[tuple[Facts, Machine]]:
    """Return the rank of each machine that describes it."""
    found = []
    for other in facts:
        if other.machine is not None:
            found.append((other, other.machine))
    return found


def _machine_of(first: Facts) -> Machine:
    assert first.machine is not None, "rank 0 describes its machine"
    return first.machine


def _ranks(facts: Sequence[Facts]) -> str:
    return f"{len(facts)} rank{'s' if len(facts) > 1 else ''}"


def _hosts(facts: Sequence[Facts]) -> str:
    count = len(_machines(facts))
    return f"{count} machine{'s' if count > 1 else ''}"


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


Check = Callable[[Sequence[Facts]], Result]
BEFORE_A_RUN: tuple[Check, ...] = (
    versions,
    code,
    devices,
    clocks,
    same_shards,
    run_folder,
    free_space,
)
OF_DOCTOR: tuple[Check, ...] = (
    readable_shards,
    *BEFORE_A_RUN,
    drivers,
    compiler,
    shared_memory,
    open_files,
    cores,
)
