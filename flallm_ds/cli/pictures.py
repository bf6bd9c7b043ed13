"""`flallm strip`, `curves` and `probe`: pictures of runs."""

from pathlib import Path


def strip(*, run: Path, out: Path, split: str = "test", clips: int = 2) -> None:
    """A picture of clips with hypothesis and reference: flallm strip --run RUN --out FILE.png.

    run: a run folder on which launch/evaluate.py has scored the split.
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.inference.pictures import strip_of_run

    strip_of_run(run, out, split, clips)


def curves(*, runs: str, out: Path) -> None:
    """A picture of losses and BLEU-4 over the epochs: flallm curves --runs RUN[,RUN]
    --out FILE.png."""
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.inference.pictures import draw_curves

    draw_curves(out, [Path(run) for run in runs.split(",")])


def probe(*, runs: str, out: Path) -> None:
    """A picture of the last layers' gradients: flallm probe --runs RUN[,RUN] --out FILE.png.

    Of runs that were trained with --train.probe_every.
    """
    # torch takes seconds to import: not for --help, nor for a mistyped option.
    from flallm_ds.inference.pictures import draw_probe

    draw_probe(out, [Path(run) for run in runs.split(",")])
