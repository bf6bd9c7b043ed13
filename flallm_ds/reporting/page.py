"""From the contents of a report to its HTML page, which needs no other file."""

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from flallm_ds import __version__
from flallm_ds.inference.heat_map import HeatMap, as_json, page_file
from flallm_ds.metrics.counts import RESAMPLES
from flallm_ds.reporting.clips import Clip
from flallm_ds.reporting.curves import Chart, charts_of
from flallm_ds.reporting.facts import fact_rows, option_rows, shards_of
from flallm_ds.reporting.runs import Run
from flallm_ds.reporting.samples import Sample, by_epoch
from flallm_ds.reporting.scores import compare_runs, score_table
from flallm_ds.reporting.svg import axes_of, draw

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Contents:
    """What a page shows of its runs. split: of the samples; empty if none was evaluated.

    clips, heat_maps: by the key of a sample; a text says why there is none. The heat maps
    of a sample are those of the runs, in their order.
    """

    runs: Sequence[Run]
    split: str
    samples: Sequence[Sample]
    clips: Mapping[str, Clip | str]
    heat_maps: Mapping[str, Sequence[HeatMap | str | None]]


def page(contents: Contents) -> str:
    """Return the HTML page. Every text of a run is escaped."""
    runs, split = contents.runs, contents.split
    charts = charts_of(runs)
    scores = score_table(runs)
    tests, test_problem = compare_runs(runs, split) if split else ([], "")
    differing, options = option_rows(runs)
    intervals = [interval for row in scores.rows for _, interval in row.cells]
    style, script = map(_with_heat_maps, ("css", "js"))
    return _template().render(
        title="Report: " + ", ".join(run.name for run in runs),
        version=__version__,
        date=time.strftime("%Y-%m-%d"),
        names=[run.name for run in runs],
        scores=scores,
        has_intervals=any(intervals),
        missing=_missing(runs),
        tests=tests,
        test_problem=test_problem,
        resamples=RESAMPLES,
        split=split,
        num_samples=len(contents.samples),
        clips_note=_clips_note(contents),
        charts=[(chart, draw(chart)) for chart in charts],
        by_epoch=_by_epoch(runs),
        facts=fact_rows(runs),
        shards={run.name: shards_of(run) for run in runs},
        differing=differing,
        options=options,
        data=_data(contents, charts),
        style=style,
        script=script,
        # The only script that the browser may run, whatever texts the page contains.
        script_hash=_sha256(script),
    )


def _with_heat_maps(kind: str) -> Markup:
    """Return the file of heat maps and that of the page, as one text. kind: "js" or "css"."""
    own = (_FOLDER / f"page.{kind}").read_text(encoding="utf-8")
    return Markup(page_file(kind) + own)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` escapes <, > and &, so that no text can end the element of the data.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    return environment.get_template("page.html")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _missing(runs: Sequence[Run]) -> list[str]:
    """Return a sentence, with the command, for each run without an evaluation."""
    found = []
    for run in runs:
        if not run.evaluations:
            command = f"deepspeed launch/evaluate.py --run={run.folder} --split=test"
            found.append(f"{run.name} has no evaluation. Score it with: {command}")
    return found


def _clips_note(contents: Contents) -> str:
    """Say which samples have a video, or why none has."""
    if not contents.clips:
        return "No clip has a video."
    shown = [clip for clip in contents.clips.values() if isinstance(clip, Clip)]
    if shown:
        return f"{len(shown)} clips have a video, evenly chosen from the worst to the best."
    reason = next(iter(contents.clips.values()))
    return f"No clip has a video. {reason}"


def _by_epoch(runs: Sequence[Run]) -> dict[str, dict[str, list[tuple[int, str]]]]:
    """Return {run: {reference: [(epoch, hypothesis)]}} of runs with dev hypotheses."""
    found = {}
    for run in runs:
        if run.dev_hypotheses:
            found[run.name] = by_epoch(run.dev_hypotheses)
    return found


def _data(contents: Contents, charts: Sequence[Chart]) -> dict[str, Any]:
    """Return the values that the script of the page reads."""
    clips = {}
    for key, clip in contents.clips.items():
        clips[key] = asdict(clip) if isinstance(clip, Clip) else {"problem": clip}
    attention: dict[str, list[Any]] = {}
    for key, maps in contents.heat_maps.items():
        attention[key] = [None if one is None else as_json(one) for one in maps]
    samples = [_sample(sample) for sample in contents.samples]
    return {
        "runs": [run.name for run in contents.runs],
        "charts": [_chart(chart) for chart in charts],
        "samples": samples,
        "clips": clips,
        "attention": attention,
    }


def _sample(sample: Sample) -> dict[str, Any]:
    translations: list[dict[str, Any] | None] = []
    for one in sample.translations:
        if one is None:
            translations.append(None)
            continue
        values = asdict(one)
        for name in ("bleu", "chrf"):
            values[name] = round(values[name], 2)
        translations.append(values)
    return {
        "key": sample.key,
        "corpus": sample.corpus,
        "language": sample.language,
        "translations": translations,
    }


def _chart(chart: Chart) -> dict[str, Any]:
    """Return what the script needs to show the values of a chart at a step."""
    x_axis, _ = axes_of(chart)
    lines = []
    for line in chart.lines:
        y = [float(f"{value:.6g}") for value in line.y]
        lines.append({"label": line.label, "x": list(line.x), "y": y})
    return {"unit": chart.unit, "x": asdict(x_axis), "lines": lines}
