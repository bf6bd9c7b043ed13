"""Read what a run folder says about a run: options, starts, metrics and evaluations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds import export
from flallm_ds.batch import Hypothesis
from flallm_ds.command import checked
from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError
from flallm_ds.inference.hypothesis_file import read_hypotheses
from flallm_ds.recipes import RECIPES
from flallm_ds.training.provenance import VERSIONS
from flallm_ds.training.records import METRICS, parse_records


@dataclass(frozen=True)
class Evaluation:
    """The results of `flallm evaluate` on one split.

    results: the content of SPLIT.json, whose fields depend on the version that wrote it.
    """

    results: Mapping[str, Any]
    hypotheses: Sequence[Hypothesis]


@dataclass(frozen=True)
class Run:
    """A run folder in memory.

    name: unique among the runs of a report. records: lines of metrics.jsonl.
    dev_hypotheses: lines of hypotheses.jsonl. starts: those of versions.json, the first one
    first; empty if they were not recorded. evaluations: by split.
    """

    folder: Path
    name: str
    config: RunConfig
    records: Sequence[Mapping[str, Any]]
    dev_hypotheses: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Evaluation]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. Raises UserError if one is damaged, or is given twice."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(
            f"RUN must name each run once, got {', '.join(map(str, folders))}. Remove the "
            "repeated one."
        )
    names = [path.name for path in paths]
    runs = []
    for folder, path in zip(folders, paths, strict=True):
        # Runs with the same name of their folders are named by their paths.
        name = path.name if names.count(path.name) == 1 else str(folder)
        runs.append(_read_run(folder, name))
    return runs


def _read_run(folder: Path, name: str) -> Run:
    return Run(
        folder,
        name,
        RunConfig.load(folder / "config.json"),
        _records(folder / METRICS),
        _records(folder / "hypotheses.jsonl"),
        _starts(folder / VERSIONS),
        _evaluations(folder / export.EVALUATION),
    )


def _records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; empty if there is none. Raises UserError if it is damaged."""
    if not path.is_file():
        return []
    try:
        return parse_records(path.read_text(encoding="utf-8").splitlines(keepends=True))
    except ValueError as error:
        raise UserError(
            f"Cannot read {path}: a line is not JSON ({error}). Remove this line."
        ) from error


def _starts(path: Path) -> list[dict[str, Any]]:
    """Read the starts of a run; none if there is no versions.json."""
    if not path.is_file():
        return []
    content = _read_json(path)
    # An older version recorded only the first start.
    starts = content.get("starts", [content])
    return [start for start in starts if isinstance(start, dict)]


def _evaluations(folder: Path) -> dict[str, Evaluation]:
    """Read {split: evaluation}, the test split first."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        file = path.with_suffix(".hypotheses.jsonl")
        if not file.is_file():
            continue
        try:
            hypotheses = read_hypotheses(file)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"Cannot read {file}: {error}. Evaluate the split again."
            ) from error
        found[path.stem] = Evaluation(_read_json(path), hypotheses)
    return dict(sorted(found.items(), key=lambda item: item[0] != "test"))


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {path}: it is not JSON ({error}). Remove it."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must be a JSON object, got {type(content).__name__}. Remove it."
        )
    return content


def recipe_of(run: Run) -> str | None:
    """Return the recipe of a run by the command line of its first start.

    None if the command was not a training with a recipe that exists.
    """
    if not run.starts:
        return None
    program, *arguments = run.starts[0].get("command") or [""]
    # The deepspeed launcher adds its option before those of the user.
    own = [
        word for word in arguments if not word.startswith(("--local_rank", "--local-rank"))
    ]
    try:
        words, options = checked(own)
    except UserError:
        return None
    if "train" not in (Path(program).stem, *words):
        return None
    recipe = options.get("recipe", "quickstart")
    for name in (recipe, f"{recipe}_{run.config.stage}"):
        if name in RECIPES:
            return name
    return None
