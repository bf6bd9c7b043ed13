"""Checks of the machines of a job: before the first step, and by `flallm doctor`.

Each rank describes itself and its machine (`facts`); one gather brings all of these to
every rank; then each check is a small function from the facts to a `Result`.
"""

from collections.abc import Sequence
from pathlib import Path

from flallm_ds.config import RunConfig
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.preflight import compare
from flallm_ds.preflight.facts import Places, gather_facts
from flallm_ds.preflight.results import FAILURE, WARNING


def preflight(configs: Sequence[RunConfig], world: World) -> None:
    """Check in well under a second that the machines fit each other and the runs.

    Every rank must call it. Rank 0 prints warnings. Raises UserError on every rank for the
    first failure, with rank and host.
    """
    facts = gather_facts(places_of(configs), world)
    for check in compare.BEFORE_A_RUN:
        result = check(facts)
        if result.state == FAILURE:
            raise UserError(f"Cannot start on these machines: {result.sentence}")
        if result.state == WARNING and world.is_main:
            print(f"warning: {result.sentence}", flush=True)


def places_of(configs: Sequence[RunConfig]) -> Places:
    """Return the folders that runs use, each once."""
    shards: dict[str, None] = {}
    runs: dict[Path, None] = {}
    for config in configs:
        shards |= dict.fromkeys(config.data.shards)
        runs[Path(config.run)] = None
    return Places(tuple(shards), tuple(runs), CacheOptions.of_run(configs[0].data))
