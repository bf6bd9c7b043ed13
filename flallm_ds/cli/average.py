"""`flallm average`: one model from the weights of several checkpoints of a run."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from flallm_ds.cli.checkpoints import folders_by_step, write_export
from flallm_ds.cli.checks import check_new_folder, check_shards
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError, require
from flallm_ds.training.records import read_records

KEEP = (
    "A run keeps its newest checkpoints: train with a higher --train.keep_checkpoints "
    "(2 by default) to have more."
)


def average(
    run: Path,
    *,
    out: Path,
    last: int | None = None,
    best: int | None = None,
    steps: tuple[int, ...] = (),
    split: str = "",
) -> None:
    """Write a model with the mean of the weights of several checkpoints of a run.

    Without --last, --best or --steps all checkpoints are averaged. The folder is an export
    like best/ of the run. One process without DeepSpeed writes it on a CPU; its memory holds
    the weights once, for any number of checkpoints.

    Example: flallm average runs/mine_llm --best=5 --out=runs/mine_llm_average

    Options:
        out: the folder to write
        last: average so many checkpoints, the newest ones
        best: average so many checkpoints, those with the highest BLEU-4 on the dev split
        steps: average the checkpoints of these steps, as `flallm checkpoints ls` lists them
        split: score the model on this split, such as dev, as `flallm evaluate` does
    """
    check_new_folder("--out", out)
    by_step = folders_by_step(run)
    config = RunConfig.load(run / "config.json")
    chosen = _chosen(run, config.eval.split, list(by_step), last, best, steps)
    shards = config.data.shards
    if split:
        check_shards(shards, (split,))
    print(f"averaging the checkpoints of steps {_listed(chosen)}", flush=True)
    write_export(run, [by_step[step] for step in chosen], out)
    print(f"{out} is ready.", flush=True)
    if not split:
        words = ["flallm", "evaluate", f"--run={out}", f"--split={config.eval.split}"]
        words += [f"--shards={','.join(shards)}"]
        if config.llm.hub_code:
            words.append("--hub_code=true")
        print(f"next: {shlex.join(words)}")
        return
    # Imports torch, which takes seconds.
    from flallm_ds.cli.evaluate import evaluate

    evaluate(run=str(out), split=split, shards=shards, hub_code=config.llm.hub_code)


def _chosen(
    run: Path,
    split: str,
    found: Sequence[int],
    last: int | None,
    best: int | None,
    steps: Sequence[int],
) -> list[int]:
    """Return the steps of the checkpoints to average, in order. Raises UserError.

    split: that the run scores. found: the steps of all checkpoints, in order.
    """
    given = {"--last": last, "--best": best, "--steps": steps or None}
    names = [name for name, value in given.items() if value is not None]
    require(
        len(names) <= 1,
        "The checkpoints must be chosen by one of --last, --best and --steps, got "
        f"{' and '.join(names)}. Leave the others out.",
    )
    if steps:
        return _of_steps(run, found, steps)
    if best is not None:
        ranked = _by_score(run, split, found)
        what = f"the number of checkpoints of {run} that were scored on {split}"
        _check_count("--best", best, len(ranked), what)
        return sorted(ranked[:best])
    if last is not None:
        _check_count("--last", last, len(found), f"the number of checkpoints of {run}")
        return list(found[-last:])
    if len(found) < 2:
        raise UserError(f"Cannot average the checkpoints of {run}: it has one. {KEEP}")
    return list(found)


def _check_count(option: str, count: int, most: int, what: str) -> None:
    """Raise UserError for a number of checkpoints that cannot be averaged."""
    require(
        count >= 2,
        f"{option} must be at least 2, got {count}. flallm checkpoints export writes the "
        "model of one checkpoint.",
    )
    require(count <= most, f"{option} must be at most {what} ({most}), got {count}. {KEEP}")


def _of_steps(run: Path, found: Sequence[int], steps: Sequence[int]) -> list[int]:
    """Return --steps in order. Raises UserError for a step without a checkpoint."""
    require(
        len(set(steps)) == len(steps) >= 2,
        f"--steps must be at least two different steps, got {_listed(steps)}. Name each "
        "checkpoint once.",
    )
    missing = [step for step in steps if step not in found]
    require(
        not missing,
        f"--steps must be those of checkpoints of {run} ({_listed(found)}), got "
        f"{_listed(missing)}. {KEEP}",
    )
    return sorted(steps)


def _by_score(run: Path, split: str, found: Sequence[int]) -> list[int]:
    """Return the steps whose checkpoint was scored, the best first, as the run chooses its
    best model: by BLEU-4, then chrF, then the earlier one."""
    scores: dict[int, tuple[float, float]] = {}
    for record in read_records(run):
        if record["kind"] == split and record["global_step"] in found:
            scores[record["global_step"]] = record["bleu4"], record["chrf"]
    return sorted(scores, key=lambda step: (*(-score for score in scores[step]), step))


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
