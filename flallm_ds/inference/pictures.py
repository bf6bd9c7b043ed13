"""Draw pictures of runs: frames with sentences, training curves, gradient norms."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from flallm_ds.files import write_file
from flallm_ds.fonts import missing_characters
from flallm_ds.inference.hypothesis_file import read_hypotheses
from flallm_ds.inference.strips import strip_figure
from flallm_ds.training.records import read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
# Maps the key of a gradient norm in metrics.jsonl to its label.
PROBED = {"language": "language model, last layer", "visual": "visual encoder, last layer"}
_PROBE_COLORS = {"language": "C0", "visual": "C1"}
_PROBE_COLUMNS = 3
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
    """Draw a row of evenly spaced frames for each clip, and its sentences below.

    clips: pairs of frames, each uint8 (H, W, 3), and a hypothesis.
    """
    picked = []
    for frames, clip in clips:
        places = _evenly_spaced(frames_a_clip, len(frames))
        picked.append(([frames[place] for place in places], clip))
    _save(strip_figure(picked, frames_a_clip), path)


def _evenly_spaced(count: int, length: int) -> list[int]:
    """Return `count` indices from 0 to `length` - 1, repeated if there are fewer."""
    picks: list[int] = np.linspace(0, length - 1, count).round().astype(int).tolist()
    return picks


# --- curves of training


def draw_curves(path: Path, runs: Sequence[Path]) -> None:
    """Draw the mean training loss and BLEU-4 of runs over epochs.

    Raises UserError if a run has not finished a step.
    """
    _save(curves_figure(runs), path)


def curves_figure(runs: Sequence[Path]) -> "Figure":
    """Return the figure of `draw_curves`: the axes of the loss and of BLEU-4."""
    figure = _new_figure(width=11, height=4.2)
    left, right = figure.subplots(1, 2)
    num_scores = 0
    for number, run in enumerate(runs):
        losses, bleus = by_epoch(run)
        color = f"C{number % 10}"
        name = run.name.replace("$", r"\$")
        # One epoch is a point, not a line.
        left.plot(list(losses), list(losses.values()), color, marker=".", label=name)
        right.plot(list(bleus), list(bleus.values()), color, marker="o", markersize=4)
        if bleus:
            # Above and below in turn: the best scores of two runs may be close.
            _mark_best(right, bleus, color, offset_px=9 if number % 2 == 0 else -18)
        num_scores += len(bleus)
    left.set(
        title="Training loss, mean of an epoch", ylabel="cross entropy per token (nats)"
    )
    right.set(title="BLEU-4 during training (star: best)", ylabel="BLEU-4 (percent)")
    for axis in (left, right):
        axis.set_xlabel("finished epochs")
        axis.xaxis.set_major_locator(_whole_numbers())
        axis.grid(alpha=0.3)
        axis.margins(x=0.07, y=0.15)  # room for the value of the best point
    lowest, highest = right.get_ylim()
    right.set_ylim(max(0.0, lowest), highest)
    if not num_scores:
        right.text(0.5, 0.5, "no scores yet", transform=right.transAxes, ha="center")
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)))
    return figure


def _mark_best(axis: Any, values: Mapping[int, float], color: str, offset_px: int) -> None:
    """Mark the first of the highest values with a star and with its number."""
    best = max(values, key=values.__getitem__)
    axis.plot([best], [values[best]], "*", color=color, markersize=13)
    axis.annotate(
        f"{values[best]:.2f}",
        (best, values[best]),
        xytext=(0, offset_px),
        textcoords="offset points",
        ha="center",
        color=color,
    )


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
    """Draw the gradient norms of the last layers, one axis for each run.

    It shows whether the gradient of the visual encoder or of the language model is larger.
    Raises UserError if a run did not log gradient norms.
    """
    _save(probe_figure(runs), path)


def probe_figure(runs: Sequence[Path]) -> "Figure":
    """Return the figure of `draw_probe`. Thin lines are the values, thick ones medians."""
    norms_of_runs = list(map(read_probe, runs))
    num_columns = min(_PROBE_COLUMNS, len(runs))
    num_rows = math.ceil(len(runs) / num_columns)
    # Wide enough for the title of the whole figure.
    figure = _new_figure(width=max(7.5, 4.6 * num_columns), height=0.9 + 3.4 * num_rows)
    axes = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).ravel()
    for axis, run, norms_of_layers in zip(axes, runs, norms_of_runs, strict=False):
        for name, (steps, norms) in norms_of_layers.items():
            color = _PROBE_COLORS[name]
            axis.plot(steps, norms, color=color, alpha=0.25, lw=0.8)
            axis.plot(steps, _smoothed(norms), color=color, label=PROBED[name])
        axis.set_title(f"run {run.name}", parse_math=False)
        axis.set(xlabel="training step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes[::num_columns]:
        axis.set_ylabel("L2 norm of the gradient\n(log scale)")
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    figure.suptitle(
        "Gradient of the training loss in the last layer of each part\n"
        f"thin: each measurement; thick: running median of {SMOOTHED_OVER}",
        fontsize="medium",
    )
    return figure


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


def _new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, whose parts do not overlap."""
    # matplotlib takes a second to import. A Figure without pyplot needs no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _whole_numbers() -> Any:
    """Return the locator of an axis that counts epochs."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, min_n_ticks=1)


def _save(figure: "Figure", path: Path) -> None:
    """Write a figure to a file, completely or not at all.

    Raises UserError if this fails, or if the file has another suffix than those of `FORMATS`.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise UserError(f"--out must end with {', '.join(FORMATS)}, got {path}.")
    content = io.BytesIO()
    with missing_characters() as missing:
        figure.savefig(content, format=kind)
    missing.note(path.name)
    try:
        write_file(path, content.getvalue())
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Give another --out."
        ) from error
