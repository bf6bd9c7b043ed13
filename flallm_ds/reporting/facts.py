"""Tables of what was run and on what: one column for each run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flallm_ds.config import RunConfig
from flallm_ds.config.describe import sections, written
from flallm_ds.data.index import read_manifest
from flallm_ds.data.storage.store import CacheOptions, open_store
from flallm_ds.errors import UserError
from flallm_ds.recipes import config_of
from flallm_ds.reporting.runs import Run, recipe_of
from flallm_ds.terminal import clock
from flallm_ds.training.provenance import PACKAGES

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Row:
    """A row of a table: its title and the text of each run. note: explains the title."""

    title: str
    cells: Sequence[str]
    note: str = ""


# --- the run


def fact_rows(runs: Sequence[Run]) -> list[Row]:
    """Return what was run: stage, recipe, progress, command, commit, devices, versions."""
    facts: dict[str, Callable[[Run], str]] = {
        "folder": lambda run: str(run.folder),
        "stage": lambda run: run.config.stage,
        "recipe": lambda run: recipe_of(run) or "none",
        "progress": _progress,
        "best dev score": _best,
        "command": lambda run: " ".join(_first(run).get("command") or [UNKNOWN]),
        "commit": _commit,
        "devices": _devices,
        "started": _started,
        "versions": _versions,
    }
    return [Row(title, [text(run) for run in runs]) for title, text in facts.items()]


def _first(run: Run) -> Mapping[str, Any]:
    return run.starts[0] if run.starts else {}


def _progress(run: Run) -> str:
    """Describe steps, epochs and the time of the steps."""
    steps = [record for record in run.records if "loss" in record]
    if not steps:
        return "no step is finished"
    seconds = sum(record.get("seconds", 0.0) for record in steps)
    # Records with a loss number epochs from 0.
    epoch = steps[-1]["epoch"] + 1
    epochs = f"epoch {epoch} of {run.config.train.epochs}"
    return f"{len(steps):,} steps in {clock(seconds)}, {epochs}"


def _best(run: Run) -> str:
    scored = [record for record in run.records if "bleu4" in record]
    if not scored:
        return "no epoch was scored"
    # As the trainer chooses the export.
    best = max(scored, key=lambda record: (record["bleu4"], record.get("chrf", 0.0)))
    return f"BLEU-4 {best['bleu4']:.2f} on {best['kind']} after epoch {best['epoch']}"


def _commit(run: Run) -> str:
    commits = []
    for start in run.starts:
        if commit := start.get("commit"):
            commits.append(commit[:12] + (" with changes" if start.get("dirty") else ""))
    return ", ".join(dict.fromkeys(commits)) or UNKNOWN


def _devices(run: Run) -> str:
    found = []
    for start in run.starts:
        devices = start.get("devices") or {}
        found.append(", ".join(f"{num} x {name}" for name, num in devices.items()))
    return "; then ".join(dict.fromkeys(filter(None, found))) or UNKNOWN


def _started(run: Run) -> str:
    if not run.starts:
        return UNKNOWN
    first = run.starts[0].get("started", UNKNOWN)
    resumed = len(run.starts) - 1
    return f"{first}, resumed {resumed} times" if resumed else str(first)


def _versions(run: Run) -> str:
    start = _first(run)
    names = ("flallm_ds", "python", *PACKAGES, "cuda", "cudnn", "nccl", "driver")
    found = [f"{name} {start[name]}" for name in names if start.get(name)]
    return ", ".join(found) or UNKNOWN


# --- its data


@dataclass(frozen=True)
class Shards:
    """A shard folder. splits: {split: number of clips}; empty with a problem."""

    place: str
    corpus: str
    splits: Mapping[str, int]
    problem: str = ""


def shards_of(run: Run) -> list[Shards]:
    """Return the shard folders of a run, with a problem where one cannot be read."""
    found = []
    cache = CacheOptions.of_run(run.config.data)
    for place in run.config.data.shards:
        try:
            manifest = read_manifest(open_store(place, cache))
        except UserError as error:
            found.append(Shards(place, "", {}, str(error)))
            continue
        splits = {name: entry["clips"] for name, entry in manifest["splits"].items()}
        found.append(Shards(place, manifest["corpus"], splits))
    return found


# --- its options


def option_rows(runs: Sequence[Run]) -> tuple[list[Row], list[Row]]:
    """Return (options that differ, all options).

    An option differs if a run has another value than its recipe, or than the default where
    the recipe is not known; or if the runs have several values.
    """
    meanings = {}
    for section in sections().values():
        for option in section.options:
            meanings[option.name] = option.meaning
    of_runs = [run.config.options() for run in runs]
    bases = [_base_of(run) for run in runs]
    differing, rows = [], []
    for name in of_runs[0]:
        values = [options[name] for options in of_runs]
        row = Row(name, list(map(written, values)), meanings.get(name, ""))
        rows.append(row)
        changed = [value != base[name] for value, base in zip(values, bases, strict=True)]
        # Each run has a folder of its own, which the first table names.
        if name != "run" and (any(changed) or len(set(values)) > 1):
            differing.append(_with_bases(row, changed, [base[name] for base in bases]))
    return differing, rows


def _base_of(run: Run) -> dict[str, Any]:
    """Return the options of the recipe of a run, or the defaults."""
    recipe = recipe_of(run)
    if recipe is not None:
        return config_of(recipe).options()
    stage = run.config.stage
    return RunConfig(stage, run="", visual_run="none" if stage == "llm" else "").options()


def _with_bases(row: Row, changed: Sequence[bool], bases: Sequence[Any]) -> Row:
    """Return the row with the value of the recipe next to each changed value."""
    cells = []
    for cell, is_changed, base in zip(row.cells, changed, bases, strict=True):
        cells.append(f"{cell} (instead of {written(base)})" if is_changed else cell)
    return Row(row.title, cells, row.note)
