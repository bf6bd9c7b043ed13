"""Find rank and world size under any launcher, and run collectives outside DeepSpeed."""

import math
import os
import random
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from flallm_ds.errors import RankError, UserError, file_problem, require
from flallm_ds.files import locked

T = TypeVar("T")

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
START_WITH = (
    "Start with deepspeed, torchrun, Open MPI's mpirun, or launch/slurm/train.sbatch."
)

# Whether this process ever joined a process group.
was_started = False
# Of a collective, as `start` set it.
_timeout = timedelta(minutes=30)
# Environment variables that `start` set because no launcher had set them.
_set_by_start: set[str] = set()


@dataclass(frozen=True)
class World:
    """Rank of this process, and numbers of processes in all and on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def device(self) -> torch.device:
        """Return the GPU of this rank, or the CPU if there is no GPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Modulo, because each rank sees a single GPU under `srun --gpus-per-task=1`.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0


def rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of torch.distributed under any launcher.

    These are RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    deepspeed and torchrun set them. Open MPI's `mpirun` sets OMPI_COMM_WORLD_*, and `srun
    python` sets SLURM_*; there launch/slurm/run.sh exports the master address. A plain
    `python` has world size 1. Raises UserError if a launcher set only some of them.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        found = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            found[name] = _required(env, name, "RANK or WORLD_SIZE")
        found["LOCAL_WORLD_SIZE"] = (
            env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or found["WORLD_SIZE"]
        )
    # Before SLURM, because srun starts the daemons of mpirun.
    elif int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        found = {}
        for name in RANK_NAMES:
            mpi_name = f"OMPI_COMM_WORLD_{name.replace('WORLD_', '')}"
            found[name] = _required(env, mpi_name, "OMPI_COMM_WORLD_SIZE")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        found = {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": _required(env, "SLURM_LOCALID", "SLURM_PROCID"),
            "LOCAL_WORLD_SIZE": _tasks_per_node(env) or "1",
        }
    elif int(env.get("PMI_SIZE", "1")) > 1:
        raise UserError(
            f"RANK and WORLD_SIZE must be set if PMI_SIZE is {env['PMI_SIZE']}, got none. "
            f"{START_WITH}"
        )
    else:
        port = env["MASTER_PORT"] if "MASTER_PORT" in env else str(free_port())
        return {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise UserError(
                f"{name} must be set if the world size is {found['WORLD_SIZE']}, got none. "
                f"{START_WITH}"
            )
        found[name] = env[name]
    return found


def _required(env: Mapping[str, str], name: str, because: str) -> str:
    """Return an environment variable that the launcher must set.

    Raises UserError if it is missing: with a default, the process would act as rank 0 or
    with world size 1. because: the variable that identified the launcher.
    """
    if name not in env:
        raise UserError(f"{name} must be set if {because} is set, got none. {START_WITH}")
    return env[name]


def _tasks_per_node(env: Mapping[str, str]) -> str:
    """Return the number of tasks on the first node, "4" of "4(x2),3"; empty if unset."""
    return env.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]


def start(timeout: timedelta | None = None) -> World:
    """Join the process group (nccl if there are GPUs, else gloo) and return the World.

    timeout: of a collective; default: DEEPSPEED_TIMEOUT in minutes, or 30.
    """
    found = rank_environment(os.environ)
    _set_by_start.update(found.keys() - os.environ.keys())
    os.environ.update(found)
    rank, size, local_rank, local_size = (int(found[name]) for name in RANK_NAMES)
    world = World(rank, size, local_rank, local_size)
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Waiting OpenMP threads spin. With more threads than cores, a step takes 30 times
        # as long.
        torch.set_num_threads(cores_of_rank(local_size, os.environ))
    if not dist.is_initialized():
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        global was_started, _timeout
        _timeout = timeout or default_timeout(os.environ)
        store, _, _ = next(rendezvous("env://", rank, size, timeout=_timeout))
        check_same_device(store, world.device.type, rank)
        dist.init_process_group(
            backend,
            store=PrefixStore("ranks", store),
            timeout=_timeout,
            rank=rank,
            world_size=size,
        )
        was_started = True
    return world


def check_same_device(store: Store, device: str, rank: int) -> None:
    """Raise RankError if this rank has a GPU and rank 0 has none, or the reverse.

    Ranks with nccl and ranks with gloo would wait for each other. store: that of the
    launcher, which needs neither. device: "cuda" or "cpu".
    """
    host = socket.gethostname()
    if rank == 0:
        store.set("device of rank 0", f"{device} {host}")
        return
    first, _, first_host = store.get("device of rank 0").decode().partition(" ")
    if first != device:
        raise RankError(
            f"Cannot start: rank {rank} on {host} has device {device}, rank 0 on "
            f"{first_host} has {first}. Check the driver of both with nvidia-smi, and "
            "CUDA_VISIBLE_DEVICES."
        )


def default_timeout(env: Mapping[str, str]) -> timedelta:
    """Return the timeout of collectives. Raises UserError if it is set to no number."""
    minutes = env.get("DEEPSPEED_TIMEOUT", "30")
    require(
        minutes.isdecimal() and int(minutes) > 0,
        f"DEEPSPEED_TIMEOUT must be a number of minutes above 0, got {minutes!r}.",
    )
    return timedelta(minutes=int(minutes))


def set_timeouts() -> None:
    """Give the timeout of `start` to all groups that exist.

    A group that DeepSpeed makes has torch's default, which is 10 minutes with nccl:
    `deepspeed.comm.new_group` passes no timeout on.
    """
    for group in dist.distributed_c10d._world.pg_map:
        group.set_timeout(_timeout)


def cores_of_rank(local_size: int, env: Mapping[str, str]) -> int:
    """Return the number of CPU cores for this rank.

    This is all that srun bound to its task alone, else its share of those of the machine.
    """
    cores = len(os.sched_getaffinity(0))
    tasks_here = int(_tasks_per_node(env) or "0")
    if tasks_here == local_size and cores <= int(env.get("SLURM_CPUS_PER_TASK", "0")):
        return cores
    return max(1, cores // local_size)


def host_memory_of_rank(world: World) -> float:
    """Return the free host memory for this rank, in bytes: its share of the machine's.

    A memory limit of the job (cgroup v2, as SLURM sets it) counts, too.
    """
    free = math.inf
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024.0 * int(line.split()[1])
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit: the file says "max"
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        free = min(free, limit - used)
    return free / world.local_size


def stop() -> None:
    """Leave the process group and restore the environment that `start` changed."""
    if dist.is_initialized():
        # DeepSpeed keeps references to the group and to groups that it created.
        deepspeed = sys.modules.get("deepspeed.comm")
        group_holder: Any = deepspeed if deepspeed and deepspeed.is_initialized() else dist
        group_holder.destroy_process_group()
    # Else a later group or a child process would reuse the port, which may still be in use.
    for name in _set_by_start:
        os.environ.pop(name, None)
    _set_by_start.clear()


@contextmanager
def session(timeout: timedelta | None = None) -> Iterator[World]:
    """Yield the World. At the end leave the process group, unless it existed before."""
    begins = not dist.is_initialized()
    world = start(timeout)
    try:
        yield world
    finally:
        if begins:
            stop()


def free_port() -> int:
    """Return an unused TCP port.

    It is below the ephemeral ports, so that no connection takes it before it is bound.
    """
    # Seeded by the system, so that two runs with the same seed get different ports.
    draw = random.Random()
    while True:
        with socket.socket() as s, suppress(OSError):
            s.bind(("", draw.randrange(16_384, 32_768)))
            return int(s.getsockname()[1])


def all_reduce_sum(values: Iterable[float], world: World) -> list[float]:
    """Sum each value over ranks, in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(tensor)
    return list(tensor.tolist())


def gather_values(values: Iterable[float], world: World) -> list[list[float]]:
    """Return the values of all ranks, in the order of ranks, as float64, on every rank."""
    own = torch.tensor(list(values), dtype=torch.float64, device=world.device)
    if world.size == 1:
        return [own.tolist()]
    # gloo needs a flat output.
    together = own.new_empty(world.size * len(own))
    dist.all_gather_into_tensor(together, own)
    return list(together.view(world.size, -1).tolist())


def gather_objects(local: Any, world: World) -> list[Any]:
    """Return the objects of all ranks, in the order of ranks, on every rank.

    Objects are pickled, so pass only plain values made by this program.
    """
    if world.size == 1:
        return [local]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, local)
    return gathered


def broadcast_object(value: Any, world: World) -> Any:
    """Return the value of rank 0 on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def main_first(action: Any, world: World) -> Any:
    """Run `action()` on rank 0 only and return its value on all ranks.

    A UserError of rank 0 is raised on every rank. An OSError becomes a UserError.
    """
    # All ranks take part in the broadcast even if rank 0 fails, so that none waits for it.
    outcome: tuple[Any, str | None] = (None, None)
    if world.is_main:
        try:
            outcome = (action(), None)
        except (UserError, OSError) as error:
            outcome = (None, _message(error))
    value, message = broadcast_object(outcome, world)
    if message is not None:
        raise UserError(message)
    return value


@contextmanager
def locked_by_main(path: Path, what: str, advice: str, world: World) -> Iterator[None]:
    """Hold the lock file `path` on rank 0 for all ranks, with `files.locked`.

    Raises UserError on every rank if rank 0 cannot lock it.
    """
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(path, what, advice))

        main_first(take, world)
        yield


def on_every_rank(action: Callable[[], T], world: World) -> T:
    """Run `action()` on every rank and return its value of this rank.

    The first UserError of any rank is raised on every rank, with the name of the machine
    if there are several. An OSError becomes a UserError.
    """
    found: list[T] = []
    message = None
    host = f" (On {socket.gethostname()}.)" if world.size > world.local_size else ""
    try:
        found.append(action())
    except (UserError, OSError) as error:
        message = f"{_message(error)}{host}"
    for of_rank in gather_objects(message, world):
        if of_rank is not None:
            raise UserError(of_rank)
    return found[0]


def on_each_machine(action: Callable[[], None], world: World) -> None:
    """Run `action()` on one rank of each machine; errors are those of `on_every_rank`."""

    def run() -> None:
        if world.local_rank == 0:
            action()

    on_every_rank(run, world)


def _message(error: UserError | OSError) -> str:
    """Return the text that a user sees."""
    return file_problem(error) if isinstance(error, OSError) else str(error)
