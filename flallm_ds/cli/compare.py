"""`flallm compare`: significance of differences, and runs of several seeds."""

from pathlib import Path

from flallm_ds.errors import UserError, require
from flallm_ds.metrics.compare import compare as compare_systems
from flallm_ds.metrics.compare import read_system, runs_table
from flallm_ds.metrics.presets import DEFAULT, find_preset


def compare(
    a: str = "",
    b: str = "",
    *,
    runs: str = "",
    split: str = "test",
    references: Path | None = None,
    language: str = "",
    preset: str = DEFAULT,
    resamples: int = 1000,
    trials: int = 10_000,
) -> None:
    """Test whether two systems differ, by paired bootstrap and approximate randomization.

    A and B are run folders that `flallm evaluate` has scored, or files of hypotheses, as
    for `flallm score`. A pattern in quotes names the runs of several seeds, whose mean and
    deviation are printed.

    Examples: flallm compare runs/a_llm runs/b_llm
              flallm compare --runs='runs/mine_seed*'

    Options:
        a: a run folder, a file, or a pattern
        b: another one
        runs: a pattern for the runs of one system, without a comparison
        split: the split of run folders
        references: a file of references, if A and B are files without them
        language: of the text, if the files have no column language
        preset: as for flallm score
        resamples: number of resampled test sets of the bootstrap
        trials: number of trials of the randomization
    """
    find_preset(preset)
    require(
        min(resamples, trials) >= 40,
        f"--resamples and --trials must be at least 40, got {resamples} and {trials}.",
    )
    if bool(runs) == bool(a or b) or bool(a) != bool(b):
        raise UserError(
            f"A and B, or --runs, must be given, got {a!r}, {b!r} and --runs={runs!r}."
        )
    if runs:
        print(runs_table(read_system(runs, split, references, language), preset))
        return
    first = read_system(a, split, references, language)
    second = read_system(b, split, references, language, like=first)
    print(compare_systems(first, second, preset, resamples, trials))
