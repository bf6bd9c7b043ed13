"""`flallm doctor`; under a launcher `deepspeed launch/doctor.py`, or `--module
flallm_ds.cli.doctor`."""

from datetime import timedelta
from pathlib import Path

from flallm_ds.command import main
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError

# Of a collective operation: a network that does not work is found soon.
TIMEOUT = timedelta(minutes=2)


def doctor(
    *, run: Path | None = None, shards: tuple[str, ...] = (), deepspeed: str = ""
) -> None:
    """Check the machines of a job, on as many ranks as the launcher starts.

    Prints a table: check, result, and what to do. The exit code is 2 if a check failed;
    warnings do not change it. A run checks the same before its first step, except
    compiler, limits and network.

    Example: deepspeed launch/doctor.py --run=runs/mine_llm --shards=data/mine

    Options:
        run: a run folder, which may be new; shards and JSON of an existing one are checked
        shards: shard folders or addresses
        deepspeed: a DeepSpeed JSON
    """
    if run is not None and (run / "config.json").is_file():
        saved = RunConfig.load(run / "config.json")
        shards = shards or saved.data.shards
        deepspeed = deepspeed or saved.train.deepspeed
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds import dist
    from flallm_ds.preflight import compare
    from flallm_ds.preflight.bandwidth import bandwidths
    from flallm_ds.preflight.facts import Places, gather_facts
    from flallm_ds.preflight.results import FAILURE, Result, table_of

    failed: list[str] = []

    def show(results: list[Result]) -> None:
        if results and world.is_main:
            print(table_of(results), flush=True)
        for result in results:
            if result.state == FAILURE:
                failed.append(result.check)

    runs = () if run is None else (run,)
    with dist.session(TIMEOUT) as world:
        places = Places(shards, runs, reads_addresses=True)
        facts = gather_facts(places, world)
        show([check(facts) for check in compare.OF_DOCTOR])
        if deepspeed:
            # Imports deepspeed, which takes seconds.
            from flallm_ds.preflight.settings import settings

            show(settings(deepspeed, facts[0].device))
        # Last, because it takes longest where the network does not work.
        show(bandwidths(facts, world))
    if failed:
        raise UserError(
            f"Cannot train on these machines: {len(failed)} "
            f"check{'s' if len(failed) > 1 else ''} failed ({', '.join(failed)}). See the "
            "table."
        )


if __name__ == "__main__":
    main(doctor)
