"""`flallm evaluate`; under a launcher `deepspeed launch/evaluate.py`."""

from typing import Literal

from flallm_ds.cli.checks import check_evaluation, check_search
from flallm_ds.command import main
from flallm_ds.metrics.controls import BLIND, check_controls


def evaluate(
    *,
    run: str,
    split: str = "test",
    beams: int = 5,
    nbest: int = 1,
    length_penalty: float | None = None,
    shards: tuple[str, ...] = (),
    threads: int = 0,
    bits: Literal[32, 16, 8, 4] | None = None,
    hub_code: bool = False,
    controls: tuple[str, ...] = (BLIND,),
) -> None:
    """Score the best export of a run on a split, with 95 % intervals.

    Writes RUN/evaluation/SPLIT.json, with the scores of controls and of parts of the split,
    and RUN/evaluation/SPLIT.hypotheses.jsonl.

    Example: deepspeed launch/evaluate.py --run=runs/mine_llm --split=test

    Options:
        run: a run folder or an export
        split: a split of the shards
        beams: beam size of the search
        nbest: number of hypotheses of each clip in the file; the best one is scored
        length_penalty: above 0 for longer sentences; that of the run by default
        shards: shard folders; those of the run by default
        threads: data-loading threads of each rank; 0 shares the cores among the ranks
        bits: of the LLM's weights; those of its training by default
        hub_code: run code that comes with the LLM on the hub
        controls: the same model without what the video shows: blind and another_signer
            (always scored), shuffled_frames, blank; the last two search all clips again
    """
    check_search(beams, nbest, length_penalty)
    check_evaluation(run, split, shards, threads)
    check_controls(controls)
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds import dist
    from flallm_ds.inference.evaluate import Search, evaluate_run

    search = Search(beams, nbest, length_penalty, bits, hub_code)
    with dist.session() as world:
        evaluate_run(
            run, split, world, search, shards=shards, threads=threads, controls=controls
        )


if __name__ == "__main__":
    main(evaluate)
