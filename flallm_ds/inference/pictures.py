"""Draw pictures of runs: frames with sentences, training curves, gradient norms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flallm_ds import export
from flallm_ds.batch import Hypothesis
from flallm_ds.config import RunConfig
from flallm_ds.data.index import FeatureIndex
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.readers import VideoReader
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.errors import UserError
from flallm_ds.inference.report import read_hypotheses
from flallm_ds.training.records import read_records

# Maps the key of a gradient norm in metrics.jsonl to its label.
PROBED = {"language": "last language layer", "visual": "last visual layer"}
# Window of the running median, in measurements.
SMOOTHED_OVER = 15

# --- strips of frames


def strip_of_run(run: Path, out: Path, split: str, num_clips: int) -> None:
    """Draw clips of an evaluated split of a run, evenly spaced over the split.

    Raises UserError if the split was not evaluated on the shards of the run.
    """
    if num_clips < 1:
        raise UserError(f"--clips must be at least 1, got {num_clips}.")
    if not (run / "config.json").is_file():
        raise UserError(f"--run must be a folder with config.json, got {run}.")
    path = run / export.EVALUATION / f"{split}.hypotheses.jsonl"
    evaluate = f"Run deepspeed launch/evaluate.py --run {run} --split {split}"
    if not path.is_file():
        raise UserError(f"Cannot read {path}: {split} was not evaluated. {evaluate} first.")
    hypotheses = {clip.key: clip for clip in read_hypotheses(path)}
    data = RunConfig.load(run / "config.json").data
    reader = open_videos(data.shards, split, CacheOptions.of_run(data))
    index, keys = reader.index, reader.index.strings("key")
    if missing := set(keys) - set(hypotheses):
        raise UserError(
            f"Cannot draw clips of {path}: it has no hypothesis for {len(missing)} clips of "
            f"the shards of the run, e.g. {min(missing)}. {evaluate} without --shards."
        )
    clips = []
    for row in _evenly_spaced(num_clips, len(index)):
        clips.append((list(read_frames(reader, row)), hypotheses[keys[row]]))
    draw_strip(out, clips)


def open_videos(shards: Sequence[str], split: str, cache: CacheOptions) -> VideoReader:
    """Open the videos of a split, also of shards that contain cached features.

    Raises UserError if the shards cannot be read.
    """
    index = open_indexes(shards, split, cache)
    if isinstance(index, FeatureIndex):
        # Cached features contain no frames. Open the shards with the videos from which they
        # were computed; the keys of clips are the same.
        sources = [facts.source for facts in index.features]
        index = open_indexes(sources, split, cache)
    return VideoReader(index, FrameSampling(max_frames=10**9), seed=0, train=False)


def read_frames(reader: VideoReader, row: int, step: int = 1) -> np.ndarray:
    """Return every `step`th frame of a clip, uint8 (T, H, W, 3).

    Raises ValueError or OSError if the clip is damaged.
    """
    arrays = reader.index.arrays
    picks = np.arange(0, int(arrays["num_frames"][row]), step)
    height, width = int(arrays["height"][row]), int(arrays["width"][row])
    frames = np.empty((len(picks), height, width, 3), np.uint8)
    reader.read_into(frames, row, picks)
    return frames


def draw_strip(
    path: Path,
    clips: Sequence[tuple[Sequence[np.ndarray], Hypothesis]],
    frames_a_clip: int = 10,
) -> None:
    """Draw a PNG with a row of evenly spaced frames for each clip, and its sentences below.

    clips: pairs of frames, each uint8 (H, W, 3), and a hypothesis.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(clips), 1, figsize=(11, 2.35 * len(clips)), squeeze=False
    )
    for axis, (frames, clip) in zip(axes[:, 0], clips, strict=True):
        picked = [frames[i] for i in _evenly_spaced(frames_a_clip, len(frames))]
        axis.imshow(np.concatenate(picked, axis=1))
        axis.set_axis_off()
        axis.set_title(
            f"hypothesis   {clip.hypothesis}\nreference    {clip.reference}",
            y=-0.05,
            pad=0,
            va="top",
            loc="left",
            fontsize=11,
            parse_math=False,  # a dollar sign in a sentence does not start a formula
        )
    _save(figure, path)


def _evenly_spaced(count: int, length: int) -> list[int]:
    """Return `count` indices from 0 to `length` - 1, repeated if there are fewer."""
    picks: list[int] = np.linspace(0, length - 1, count).round().astype(int).tolist()
    return picks


# --- curves of training


def draw_curves(path: Path, runs: Sequence[Path]) -> None:
    """Draw a PNG with the mean training loss and BLEU-4 of runs over epochs.

    Raises UserError if a run has not finished a step.
    """
    pyplot = _pyplot()
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
    _save(figure, path)


def by_epoch(run: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Read {finished epochs: mean loss} and {finished epochs: BLEU-4} of a run folder.

    Raises UserError if the run has not finished a step.
    """
    losses: dict[int, list[float]] = {}
    bleus: dict[int, float] = {}
    for record in read_records(run):
        # Records with a loss number epochs from 0; those with scores count finished epochs.
        if "loss" in record:
            losses.setdefault(record["epoch"] + 1, []).append(record["loss"])
        if "bleu4" in record:
            bleus[record["epoch"]] = record["bleu4"]
    if not losses:
        raise UserError(f"Cannot draw the curves of {run}: no step is finished. Train it.")
    means = {epoch: float(np.mean(values)) for epoch, values in losses.items()}
    return means, bleus


# --- the dominance probe


def draw_probe(path: Path, runs: Sequence[Path]) -> None:
    """Draw a PNG with smoothed gradient norms of the last layers, one axis for each run.

    It shows whether the gradient of the visual encoder or of the language model is larger.
    Raises UserError if a run did not log gradient norms.
    """
    norms_of_runs = list(map(read_probe, runs))
    pyplot = _pyplot()
    size = (4.6 * len(runs), 3.4)
    figure, axes = pyplot.subplots(1, len(runs), figsize=size, sharey=True, squeeze=False)
    for axis, run, norms_of_layers in zip(axes[0], runs, norms_of_runs, strict=True):
        for name, (steps, norms) in norms_of_layers.items():
            axis.plot(steps, _smoothed(norms), label=PROBED[name])
        axis.set_title(run.name, parse_math=False)
        axis.set(xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("gradient norm")
    _save(figure, path)


def read_probe(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read {"language" or "visual": (steps, gradient norms)} of a run folder.

    A part that was not trained is missing. Raises UserError if the run has no norms.
    """
    records = read_records(run)
    found: dict[str, tuple[list[int], list[float]]] = {}
    for name in PROBED:
        steps, norms = [], []
        for record in records:
            if record["kind"] == "probe" and name in record:
                steps.append(record["global_step"])
                norms.append(record[name])
        if steps:
            found[name] = (steps, norms)
    if not found:
        raise UserError(
            f"Cannot draw the gradient norms of {run}: they were not logged. Train it with "
            "--train.probe_every=10."
        )
    return found


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return running medians, because norms of single batches differ by a factor of 100."""
    half = SMOOTHED_OVER // 2
    medians = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        medians.append(float(np.median(window)))
    return medians


# --- shared helpers


def _pyplot() -> Any:
    """Import matplotlib, which takes a second, and set it up to draw without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    """Write a figure to a file and close it. Raises UserError if this fails."""
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Give another --out."
        ) from error
    finally:
        _pyplot().close(figure)
