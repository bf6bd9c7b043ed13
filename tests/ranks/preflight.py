"""Started under a launcher by test_two_ranks.py: the preflight with planted differences.

Each rank counts as a machine of its own. The differences are on rank 1. The sentence of
each case is written to CASE.rank-0 and CASE.rank-1, empty if nothing is wrong.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from flallm_ds import dist
from flallm_ds.cli.doctor import doctor
from flallm_ds.command import main
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.preflight import facts, preflight


@contextmanager
def difference(case: str, world: dist.World, out: Path) -> Iterator[None]:
    """Make this rank differ from the others."""
    versions, now, seen = facts.versions, time.time, facts._is_seen
    changes: dict[str, tuple[Any, str, Any]] = {
        "versions": (facts, "versions", lambda: versions() | {"deepspeed": "0.18.0"}),
        "code": (facts, "code_digest", lambda: "ab" * 32),
        "clocks": (time, "time", lambda: now() + 60),
        "run": (facts, "_is_seen", lambda path: seen(path.with_name("missing"))),
    }
    if case == "shards":  # a relative path leads to other shards on each machine
        os.chdir(out / f"machine-{world.rank}")
    if world.rank == 1 and case in changes:
        owner, name, value = changes[case]
        with mock.patch.object(owner, name, value):
            yield
    else:
        yield


def cases(*, out: Path) -> None:
    found = dist.start()
    world = dist.World(found.rank, found.size, local_rank=0, local_size=1)
    facts.SEEN_WITHIN_S = 0.5
    for case in ("equal", "versions", "code", "clocks", "run", "shards"):
        config = RunConfig("visual", str(out / "new" / "run"))
        config = config.with_overrides({"data.shards": "shards"})
        sentence = ""
        began = time.perf_counter()
        with difference(case, world, out):
            try:
                preflight((config,), world)
            except UserError as error:
                sentence = str(error)
        if world.is_main:
            print(f"{case}: {time.perf_counter() - began:.3f} s", flush=True)
        (out / f"{case}.rank-{world.rank}").write_text(sentence)
    doctor(run=out / "new", shards=("shards",))
    dist.stop()


main(cases)
