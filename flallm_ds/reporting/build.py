"""`flallm report`: gather what a page shows, and write it."""

from collections.abc import Sequence
from pathlib import Path

from flallm_ds.errors import UserError, require
from flallm_ds.files import write_file
from flallm_ds.inference.heat_map import HeatMap
from flallm_ds.reporting.attention import heat_maps
from flallm_ds.reporting.clips import Clip, clips_of
from flallm_ds.reporting.page import Contents, page
from flallm_ds.reporting.runs import Run, read_runs
from flallm_ds.reporting.samples import evenly_chosen, samples_of


def report(
    folders: Sequence[Path],
    out: Path,
    split: str = "",
    num_clips: int = 24,
    num_attention: int = 0,
    hub_code: bool = False,
) -> None:
    """Write the report of run folders and print a line about it.

    split: of the samples; default: test, or else the first one that a run was evaluated
    on. num_clips: samples with a video. num_attention: those of them with heat maps, for
    which the models are loaded. Raises UserError if a run cannot be read or the page
    cannot be written.
    """
    runs = read_runs(folders)
    split = _split_of(runs, split)
    samples = samples_of(runs, split) if split else []
    shown = evenly_chosen(samples, num_clips)
    # The worst and the best of the shown clips are among those with attention.
    chosen = [sample for sample in samples if sample.key in set(shown)]
    clips = clips_of(runs, split, shown)
    maps = _heat_maps(runs, split, evenly_chosen(chosen, num_attention), hub_code)
    content = page(Contents(runs, split, samples, clips, maps))
    # A lone surrogate in a hypothesis cannot be encoded.
    encoded = content.encode("utf-8", "replace")
    try:
        write_file(out, encoded)
    except OSError as error:
        raise UserError(
            f"Cannot write {out}: {error.strerror}. Give another --out."
        ) from error
    num_videos = sum(isinstance(clip, Clip) for clip in clips.values())
    print(
        f"{out}: {len(runs)} runs, {len(samples)} samples, {num_videos} videos, "
        f"{len(maps)} with attention, {len(encoded) / 1e6:.1f} MB."
    )


def _split_of(runs: Sequence[Run], asked: str) -> str:
    """Return the split of the samples; empty if no run was evaluated.

    Raises UserError if no run was evaluated on the split that the user asked for.
    """
    evaluated: dict[str, None] = {}
    for run in runs:
        evaluated |= dict.fromkeys(run.evaluations)
    # The test split is the first one of each run.
    splits = sorted(evaluated, key=lambda name: name != "test")
    require(
        not asked or asked in splits,
        f"--split must be a split on which a run was evaluated ({', '.join(splits) or 'none'})"
        f", got {asked!r}. Run deepspeed launch/evaluate.py --run={runs[0].folder} "
        f"--split={asked}",
    )
    return asked or (splits[0] if splits else "")


def _heat_maps(
    runs: Sequence[Run], split: str, keys: Sequence[str], hub_code: bool
) -> dict[str, list[HeatMap | str | None]]:
    """Return the heat maps of all runs for each key. None: the run has no hypothesis."""
    of_runs = [heat_maps(run, split, keys, hub_code) for run in runs]
    return {key: [of_run.get(key) for of_run in of_runs] for key in keys}
