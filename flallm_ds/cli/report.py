"""`flallm report`: an HTML page about runs."""

from pathlib import Path

from flallm_ds.errors import require


def report(
    run: tuple[Path, ...],
    *,
    out: Path,
    split: str = "",
    clips: int = 24,
    attention: int = 0,
    hub_code: bool = False,
) -> None:
    """Write one HTML page about a run, or about several runs side by side.

    It has scores, training curves, samples with playing clips, options and versions. The
    page is a single file that needs no network.

    Example: flallm report runs/mine_visual runs/mine_llm --out=report.html

    Options:
        run: run folders
        out: the HTML file to write
        split: the split of the samples; test by default, if it was evaluated
        clips: number of samples with a video, from the worst to the best
        attention: number of those with attention over time; loads the models
        hub_code: run code that comes with the LLM on the hub, for --attention
    """
    require(clips >= 0, f"--clips must be at least 0, got {clips}.")
    require(
        0 <= attention <= clips,
        f"--attention must be at least 0 and at most --clips ({clips}), got {attention}.",
    )
    for folder in run:
        require(
            (folder / "config.json").is_file(),
            f"RUN must be a run folder with config.json, got {folder}. Give the folder of a "
            "training, as in --run of flallm train.",
        )
    require(
        out.parent.is_dir() and not out.is_dir(),
        f"--out must be a file in an existing folder, got {out}. Give another --out.",
    )
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds.reporting.build import report as write

    write(run, out, split, clips, attention, hub_code)
