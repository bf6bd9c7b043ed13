"""Results to look at: the table of scores, the file of hypotheses, strips of frames with what was said."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flallm_ds import export
from flallm_ds.batch import Hypothesis
from flallm_ds.config import RunConfig
from flallm_ds.data.loader import ClipReader
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.errors import UserError
from flallm_ds.metrics.ceiling import is_low
from flallm_ds.metrics.columns import CEILING, COLUMNS
from flallm_ds.training.checkpoint import replace_file


def write_hypotheses(path: Path, hypotheses: Sequence[Hypothesis]) -> None:
    """JSON lines: key, hypothesis, reference, corpus, language, and nbest where several were asked for."""
    lines = [
        json.dumps({k: v for k, v in asdict(h).items() if k != "nbest" or v}, ensure_ascii=False)
        for h in hypotheses
    ]
    replace_file(path, "\n".join(lines) + "\n")


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """What `write_hypotheses` wrote."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    nbest = [tuple((said, score) for said, score in line.pop("nbest", ())) for line in lines]
    return [Hypothesis(**line, nbest=best) for line, best in zip(lines, nbest, strict=True)]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Scores by name of system, one row each, as text that is also Markdown.

    The last column is BLEU-4 of a perfect model, where that of any row is low.
    """
    columns = list(COLUMNS)
    if any(is_low(scores) for scores in rows.values()):
        columns.append(CEILING)
    width = max(map(len, rows))
    titles = " | ".join(f"{column.title:>7}" for column in columns)
    lines = [f"| {'':{width}} | {titles} |"]
    lines.append(f"|{'-' * (width + 2)}|" + "|".join("-" * 8 + ":" for _ in columns) + "|")
    for name, scores in rows.items():
        cells = " | ".join(f"{column.text(scores):>7}" for column in columns)
        lines.append(f"| {name:{width}} | {cells} |")
    return "\n".join(lines)


def draw_strip(
    path: Path, clips: Sequence[tuple[Sequence[np.ndarray], Hypothesis]], frames_a_clip: int = 10
) -> None:
    """A PNG: one row of evenly spaced frames a clip, its hypothesis and reference below.

    clips: (frames, each uint8 (H, W, 3); what was said).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(clips), 1, figsize=(11, 2.35 * len(clips)), squeeze=False)
    for axis, (frames, said) in zip(axes[:, 0], clips, strict=True):
        picks = np.linspace(0, len(frames) - 1, frames_a_clip).round().astype(int)
        axis.imshow(np.concatenate([frames[i] for i in picks], axis=1))
        axis.set_axis_off()
        axis.set_title(
            f"hypothesis   {said.hypothesis}\nreference    {said.reference}",
            y=-0.05,
            pad=0,
            va="top",
            loc="left",
            fontsize=11,
            parse_math=False,  # a dollar sign in a sentence is no formula
        )
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture and close it. Raises UserError where it cannot be written."""
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise UserError(
            f"the picture must go where it can be written, but {path}: {error.strerror}. Give another --out."
        ) from error
    finally:
        pyplot.close(figure)


def strip_of_run(run: Path, out: Path, split: str, num_clips: int) -> None:
    """Draw clips of an evaluated split of a run, evenly spaced over its hypotheses.

    Raises UserError where the split has not been evaluated, or not on the run's own shards.
    """
    if num_clips < 1:
        raise UserError(f"--clips must be at least 1, but is {num_clips}.")
    if not (run / "config.json").is_file():
        raise UserError(f"--run must name a run's folder, but {run} has no config.json.")
    path = run / export.EVALUATION / f"{split}.hypotheses.jsonl"
    if not path.is_file():
        raise UserError(
            f"{split} must have been evaluated, but there is no {path}. "
            f"Run deepspeed launch/evaluate.py --run {run} --split {split} first."
        )
    hypotheses = {h.key: h for h in read_hypotheses(path)}
    data = RunConfig.load(run / "config.json").data
    cache = CacheOptions.of_run(data)
    index = open_indexes(data.shards, split, cache)
    if index.features:  # of clips with the same keys
        index = open_indexes([facts.source for facts in index.features], split, cache)
    reader = ClipReader(index, FrameSampling(max_frames=10**9), seed=0, train=False)
    if missing := set(index.strings("key")) - set(hypotheses):
        raise UserError(
            f"{path} must hold a hypothesis for each clip of the run's own shards, but has none for "
            f"{len(missing)} ({min(missing)} for one). Run deepspeed launch/evaluate.py --run {run} "
            f"--split {split} again, without --shards."
        )
    clips = []
    for row in np.linspace(0, len(index) - 1, num_clips).round().astype(int).tolist():
        num_frames, height, width = (int(index.arrays[c][row]) for c in ("num_frames", "height", "width"))
        frames = np.empty((num_frames, height, width, 3), np.uint8)
        reader.read_into(frames, row, np.arange(num_frames))
        clips.append((list(frames), hypotheses[index.strings("key")[row]]))
    draw_strip(out, clips)


def draw_curves(path: Path, runs: Sequence[Path]) -> None:
    """A PNG of runs over their epochs: the mean training loss of each epoch, and BLEU-4 where it was scored.

    Raises UserError where a folder holds no finished step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6))
    for run in runs:
        losses, bleus = by_epoch(run)
        left.plot(list(losses), list(losses.values()), label=run.name.replace("$", r"\$"))
        right.plot(list(bleus), list(bleus.values()), marker="o")
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="BLEU-4", ylim=(0, 100))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend()
    save_figure(figure, path)


def by_epoch(run: Path) -> tuple[dict[int, float], dict[int, float]]:
    """{epochs done: mean loss} and {epochs done: BLEU-4} of a run folder."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = [json.loads(line) for line in lines]
    losses: dict[int, list[float]] = {}
    for entry in entries:
        if "loss" in entry:
            losses.setdefault(entry["epoch"] + 1, []).append(entry["loss"])
    if not losses:
        raise UserError(f"a run must have finished a step before its curves are drawn, but {run} has none.")
    bleus = {entry["epoch"]: entry["bleu4"] for entry in entries if "bleu4" in entry}
    return {epoch: float(np.mean(values)) for epoch, values in losses.items()}, bleus
