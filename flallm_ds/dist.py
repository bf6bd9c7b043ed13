"""Ranks: who this process is under any launcher, and the few collectives outside DeepSpeed."""

import os
import random
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import locked

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
START_WITH = (
    "Start with deepspeed, torchrun, Open MPI's mpirun, or launch/slurm/train.sbatch."
)

was_started = False  # whether this process ever joined a process group
_told_by_start: set[str] = set()  # names of the environment that no launcher had set


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # Under `srun --gpus-per-task=1` each rank sees one GPU, whatever its local rank.
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT under
    any launcher.

    deepspeed and torchrun set the first ones themselves; Open MPI's `mpirun` tells them
    as OMPI_COMM_WORLD_*, `srun python` as SLURM_*, with the rendezvous exported by
    launch/slurm/run.sh; a plain `python` is a world of one. Raises UserError where a
    launcher told only half of it.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        found = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            found[name] = _told(env, name, "RANK or WORLD_SIZE")
        found["LOCAL_WORLD_SIZE"] = (
            env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or found["WORLD_SIZE"]
        )
    # under SLURM, too: srun started mpirun's daemons
    elif int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        found = {}
        for name in RANK_NAMES:
            theirs = f"OMPI_COMM_WORLD_{name.replace('WORLD_', '')}"
            found[name] = _told(env, theirs, "OMPI_COMM_WORLD_SIZE")
    elif "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        found = {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": _told(env, "SLURM_LOCALID", "SLURM_PROCID"),
            "LOCAL_WORLD_SIZE": _tasks_per_node(env) or "1",
        }
    elif int(env.get("PMI_SIZE", "1")) > 1:
        raise UserError(
            f"RANK and WORLD_SIZE must be set where PMI_SIZE says {env['PMI_SIZE']} "
            f"processes, but are not. {START_WITH}"
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
                f"{name} must be set where there are {found['WORLD_SIZE']} ranks, but is "
                f"not. {START_WITH}"
            )
        found[name] = env[name]
    return found


def _told(env: Mapping[str, str], name: str, because: str) -> str:
    """A launcher's variable: a rank that lacks one would take itself for the only one, or
    for the first."""
    if name not in env:
        raise UserError(f"{name} must be set where {because} is, but is not. {START_WITH}")
    return env[name]


def _tasks_per_node(env: Mapping[str, str]) -> str:
    """Return the tasks of this step on its first node, of SLURM's "4(x2),3"; empty if unset."""
    return env.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0].split(",")[0]


def start(timeout: timedelta = timedelta(minutes=30)) -> World:
    """Join the process group (nccl where there are GPUs, gloo elsewhere) and return this
    process's World."""
    told = rank_environment(os.environ)
    _told_by_start.update(told.keys() - os.environ.keys())
    os.environ.update(told)
    rank, size, local_rank, local_size = (int(told[name]) for name in RANK_NAMES)
    world = World(rank, size, local_rank, local_size)
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Threads that wait for one another spin: with more of them than cores, a step
        # takes 30 times as long.
        torch.set_num_threads(cores_of_rank(local_size, os.environ))
    if not dist.is_initialized():
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=size)
        global was_started
        was_started = True
    return world


def cores_of_rank(local_size: int, env: Mapping[str, str]) -> int:
    """CPU cores for this rank: those that srun bound it to alone, else its share of those
    of all here."""
    cores = len(os.sched_getaffinity(0))
    tasks_here = int(_tasks_per_node(env) or "0")
    if tasks_here == local_size and cores <= int(env.get("SLURM_CPUS_PER_TASK", "0")):
        return cores
    return max(1, cores // local_size)


def stop() -> None:
    """Leave the process group; the environment is as it was before `start`."""
    if dist.is_initialized():
        # it keeps the group and others made of it
        deepspeed = sys.modules.get("deepspeed.comm")
        group_holder: Any = deepspeed if deepspeed and deepspeed.is_initialized() else dist
        group_holder.destroy_process_group()
    # A later group, or a child's, would find this one's port taken: it may be held on to.
    for name in _told_by_start:
        os.environ.pop(name, None)
    _told_by_start.clear()


@contextmanager
def session() -> Iterator[World]:
    """This process's World; at the end it leaves the process group, unless it was in it
    before."""
    begins = not dist.is_initialized()
    world = start()
    try:
        yield world
    finally:
        if begins:
            stop()


def free_port() -> int:
    """A TCP port that nobody uses now, below those handed out to connections: it is bound
    later."""
    # by the clock and the system, whatever seed torch or the caller has set
    draw = random.Random()
    while True:
        with socket.socket() as s, suppress(OSError):
            s.bind(("", draw.randrange(16_384, 32_768)))
            return int(s.getsockname()[1])


def all_reduce_sum(values: Iterable[float], world: World) -> list[float]:
    """Element-wise sum over ranks, in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(tensor)
    return list(tensor.tolist())


def gather_objects(local: Any, world: World) -> list[Any]:
    """What each rank holds, on every rank, in the order of ranks (plain lists of our own
    making only)."""
    if world.size == 1:
        return [local]
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, local)
    return gathered


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def main_first(action: Any, world: World) -> Any:
    """Run `action()` on rank 0 alone and return its value on all ranks.

    Its UserError is raised by every rank; an OSError becomes one.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if world.is_main:
        try:
            outcome = (action(), None)
        except (UserError, OSError) as error:
            outcome = (None, _sentence(error))
    value, sentence = broadcast_object(outcome, world)
    if sentence is not None:
        raise UserError(sentence)
    return value


@contextmanager
def locked_by_main(path: Path, what: str, advice: str, world: World) -> Iterator[None]:
    """Hold the lock file `path` on rank 0 for all ranks, by `files.locked`.

    Raises its UserError on every rank, also for an OSError.
    """
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(path, what, advice))

        main_first(take, world)
        yield


def on_each_machine(action: Callable[[], None], world: World) -> None:
    """Run `action()` on one rank of each machine.

    The first UserError of any is raised by every rank; an OSError becomes one.
    """
    sentence = None
    if world.local_rank == 0:
        try:
            action()
        except (UserError, OSError) as error:
            sentence = _sentence(error)
    for said in gather_objects(sentence, world):
        if said is not None:
            raise UserError(said)


def _sentence(error: UserError | OSError) -> str:
    return file_problem(error) if isinstance(error, OSError) else str(error)
