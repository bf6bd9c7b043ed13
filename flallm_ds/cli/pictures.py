"""`flallm strip`, `curves` and `probe`: pictures of runs."""

from pathlib import Path


def strip(*, run: Path, out: Path, split: str = "test", clips: int = 2) -> None:
    """Draw frames of clips with their hypotheses and references, and mark differing words.

    Example: flallm strip --run=runs/mine_llm --out=strip.png

    Options:
        run: a run folder whose split `flallm evaluate` has scored
        out: the picture to write: .png, .pdf or .svg
        split: the split that the clips are from
        clips: number of clips
    """
    # matplotlib and torch take seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.inference.pictures import strip_of_run

    strip_of_run(run, out, split, clips)


def curves(*, runs: tuple[Path, ...], out: Path) -> None:
    """Plot loss and BLEU-4 of runs over their epochs, and mark the best score.

    Example: flallm curves --runs=runs/mine_visual,runs/mine_llm --out=curves.png

    Options:
        runs: run folders, separated by commas
        out: the picture to write: .png, .pdf or .svg
    """
    from flallm_ds.inference.pictures import draw_curves

    draw_curves(out, list(runs))


def probe(*, runs: tuple[Path, ...], out: Path) -> None:
    """Plot the gradient norms of the last visual and the last language layer.

    Example: flallm probe --runs=runs/mine_llm --out=probe.png

    Options:
        runs: folders of runs that were trained with --train.probe_every
        out: the picture to write: .png, .pdf or .svg
    """
    from flallm_ds.inference.pictures import draw_probe

    draw_probe(out, list(runs))
