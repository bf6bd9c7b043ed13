"""`flallm evaluate`, and under a launcher `deepspeed launch/evaluate.py`."""

from typing import Literal

from flallm_ds.command import main
from flallm_ds.errors import UserError


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
) -> None:
    """BLEU-1..4, ROUGE-L, chrF, the blind control and a file of hypotheses for the best
    export of a run.

    run: a run's folder or an export. nbest: as many hypotheses of each clip, with scores,
    into the file; the best one counts. length_penalty: default the run's; above 0 for
    longer sentences. shards: default those the run was trained on. bits: of the LLM's
    weights; default those of its training. hub_code: run code that comes with the LLM.
    The results go to RUN/evaluation/SPLIT.json and SPLIT.hypotheses.jsonl.
    """
    if beams < 1:
        raise UserError(f"--beams must be at least 1, but is {beams}.")
    # torch takes seconds to import: the options are known to be right by now.
    from flallm_ds import dist
    from flallm_ds.inference.evaluate import Search, evaluate_run

    search = Search(beams, nbest, length_penalty, bits, hub_code)
    with dist.session() as world:
        evaluate_run(run, split, world, search, shards=shards, threads=threads)


if __name__ == "__main__":
    main(evaluate)
