"""What a rank says about itself, its machine, and the folders that it sees."""

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flallm_ds.data.index import fingerprint, read_manifest
from flallm_ds.data.storage.store import CacheOptions, open_store
from flallm_ds.dist import (
    World,
    all_reduce_sum,
    cores_of_rank,
    gather_objects,
    main_first,
)
from flallm_ds.errors import UserError, file_problem
from flallm_ds.local_disk import (
    cache_folder,
    existing,
    file_system,
    free_bytes,
    temporary_folder,
)
from flallm_ds.run_check import PROBE
from flallm_ds.training.extensions import compiler_problem
from flallm_ds.training.provenance import code_digest, driver_version, versions

# A network disk may show a new file late: the list of a folder is cached for a moment.
SEEN_WITHIN_S = 5.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Places:
    """The folders that a job uses.

    shards: folders or addresses. cache: of the shards at addresses. reads_addresses: read
    index.json of an address, too, which takes time.
    """

    shards: tuple[str, ...] = ()
    runs: tuple[Path, ...] = ()
    cache: CacheOptions = field(default_factory=CacheOptions)
    reads_addresses: bool = False

    @property
    def has_addresses(self) -> bool:
        return any("://" in folder for folder in self.shards)


@dataclass(frozen=True)
class Disk:
    """A folder, and the space on its disk. least: needed bytes."""

    what: str
    path: str
    free: int
    least: int
    kind: str


@dataclass(frozen=True)
class Device:
    """The device of a rank. capability: of CUDA, "9.0"; empty on a CPU."""

    name: str
    gigabytes: int = 0
    capability: str = ""

    def __str__(self) -> str:
        if not self.capability:
            return self.name
        return f"{self.name} ({self.gigabytes} GB, compute capability {self.capability})"


@dataclass(frozen=True)
class Shards:
    """What a machine sees in a shard folder. fingerprint: of all splits."""

    fingerprint: str = ""
    error: str = ""


@dataclass(frozen=True)
class Machine:
    """What one rank of each machine says about it.

    shards: by their folder. unseen: files of rank 0 that this
    machine does not see. compiler: what is missing to compile operators.
    """

    code: str
    shards: dict[str, Shards]
    unseen: tuple[str, ...]
    disks: tuple[Disk, ...]
    driver: str
    compiler: str | None
    shared_memory: int


@dataclass(frozen=True)
class Facts:
    """What a rank says. clock: seconds since 1970, at one moment on all ranks."""

    rank: int
    host: str
    clock: float
    device: Device
    versions: dict[str, str] = field(default_factory=dict)
    cores: int = 1
    open_files: int = 0
    machine: Machine | None = None

    @property
    def where(self) -> str:
        return f"rank {self.rank} on {self.host}"


def gather_facts(places: Places, world: World) -> list[Facts]:
    """Return the facts of all ranks, in the order of ranks, on every rank.

    Every rank must call it. Raises UserError on every rank if rank 0 cannot write to the
    parent of a run folder.
    """
    with _probes(places.runs if world.size > 1 else (), world) as probes:
        all_reduce_sum([1.0], world)  # every rank leaves this at nearly the same moment
        clock = time.time()
        own = Facts(
            rank=world.rank,
            host=socket.gethostname(),
            clock=clock,
            device=_device(world),
            versions=versions(),
            cores=cores_of_rank(world.local_size, os.environ),
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            machine=_machine(places, probes) if world.local_rank == 0 else None,
        )
        # No rank deletes the files before all ranks have looked for them.
        return gather_objects(own, world)


@contextmanager
def _probes(runs: Sequence[Path], world: World) -> Iterator[list[Path]]:
    """Yield the paths of files that rank 0 has written in the folders of runs.

    A run folder that does not exist yet is not created: its nearest parent gets the file.
    """
    files = []

    def write() -> list[Path]:
        for folder in dict.fromkeys(map(existing, runs)):
            if not folder.is_dir():
                continue  # a file: opening the run folder raises an error about it
            # Closed and removed below, on errors too.
            file = tempfile.NamedTemporaryFile(prefix=PROBE, dir=folder)  # noqa: SIM115
            files.append(file)
        return [Path(file.name) for file in files]

    try:
        yield main_first(write, world)
    finally:
        for file in files:
            file.close()


def _device(world: World) -> Device:
    if world.device.type != "cuda":
        return Device("CPU")
    found = torch.cuda.get_device_properties(world.device)
    capability = f"{found.major}.{found.minor}"
    return Device(found.name, round(found.total_memory / 2**30), capability)


def _machine(places: Places, probes: Sequence[Path]) -> Machine:
    shards = {}
    for folder in places.shards:
        if "://" not in folder or places.reads_addresses:
            shards[folder] = _shards(folder, places.cache)
    unseen = [str(probe) for probe in probes if not _is_seen(probe)]
    disks = [_disk("temporary folder", temporary_folder(os.environ), 10**9)]
    for run in places.runs:
        # A checkpoint takes 14 bytes for each trained parameter.
        disks.append(_disk("run folder", run, 10 * 10**9))
    if places.has_addresses:
        cache = places.cache.folder or cache_folder(os.environ)
        largest = int(places.cache.max_gb * 1e9)
        disks.append(_disk("cache", cache, max(0, largest - _used(cache))))
    return Machine(
        code=code_digest(),
        shards=shards,
        unseen=tuple(unseen),
        disks=tuple(disks),
        driver=driver_version() or "",
        compiler=compiler_problem(os.environ),
        shared_memory=_total(SHARED_MEMORY),
    )


def _shards(folder: str, cache: CacheOptions) -> Shards:
    try:
        manifest = read_manifest(open_store(folder, cache))
    except UserError as error:
        return Shards(error=str(error))
    except OSError as error:
        return Shards(error=file_problem(error))
    parts = []
    for split, entry in sorted(manifest["splits"].items()):
        parts.append(f"{split} {fingerprint(entry)}")
    return Shards(", ".join(parts))


def _is_seen(path: Path) -> bool:
    """Return whether a file of another machine appears within a few seconds."""
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > SEEN_WITHIN_S:
            return False
        time.sleep(0.1)
        # Listing the folder updates what a network disk caches of it.
        if path.parent.is_dir():
            list(path.parent.iterdir())
    return True


def _disk(what: str, path: Path, least: int) -> Disk:
    try:
        free = free_bytes(path)
    except OSError:
        free = 0
    return Disk(what, str(path), free, least, file_system(path))


def _used(cache: Path) -> int:
    """Return the bytes of cached shards, complete or not."""
    return sum(path.stat().st_size for path in cache.glob("*/shards/*"))


def _total(folder: Path) -> int:
    """Return the size of a file system, 0 if there is none."""
    return shutil.disk_usage(folder).total if folder.is_dir() else 0
