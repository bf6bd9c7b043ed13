"""A picture of the dominance probe: is the visual encoder's gradient larger, or the language model's?"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flallm_ds.errors import UserError
from flallm_ds.inference.report import save_figure

LINES = {"language": "last language layer", "visual": "last visual layer"}
SMOOTHED_OVER = 15  # looks; the median of as many


def read_probe(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """{"language" and "visual", where they were trained: (steps, gradient norms)} of a run folder.

    Raises UserError where the run has none.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = [entry for entry in map(json.loads, lines) if entry["kind"] == "probe"]
    if not entries:
        raise UserError(
            f"a run must have looked at its gradients before they are drawn, but {run} has none. "
            "Train it with --train.probe_every=10."
        )
    series = {name: [entry for entry in entries if name in entry] for name in LINES}
    return {
        name: ([e["global_step"] for e in those], [e[name] for e in those])
        for name, those in series.items()
        if those
    }


def draw_probe(path: Path, runs: Sequence[Path]) -> None:
    """A PNG with an axis for each run: gradient norms of its last layers over its steps, smoothed."""
    found = [read_probe(run) for run in runs]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(runs), figsize=(4.6 * len(runs), 3.4), sharey=True, squeeze=False)
    for axis, run, series in zip(axes[0], runs, found, strict=True):
        for name, (steps, norms) in series.items():
            axis.plot(steps, _smoothed(norms), label=LINES[name])
        axis.set_title(run.name, parse_math=False)
        axis.set(xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("gradient norm")
    save_figure(figure, path)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running medians: single batches are a hundred times apart."""
    half = SMOOTHED_OVER // 2
    return [float(np.median(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
