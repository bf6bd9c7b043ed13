"""`flallm score`: scores of files, also of other projects."""

from pathlib import Path

from flallm_ds.cli.checks import check_exists
from flallm_ds.errors import require
from flallm_ds.metrics.presets import DEFAULT, find_preset
from flallm_ds.metrics.score_files import describe, score_files, write_scores


def score(
    *,
    hypotheses: Path,
    references: Path | None = None,
    language: str = "",
    preset: str = DEFAULT,
    tokenizer: str = "",
    resamples: int = 1000,
    bleurt: Path | None = None,
    out: Path | None = None,
) -> None:
    """Score hypotheses of any project by the rule of any project, with 95 % intervals.

    Files are text with a sentence on each line, JSON lines, or tables with a column id;
    docs/scores.md describes files and presets.

    Example: flallm score --hypotheses=said.txt --references=meant.txt --language=de

    Options:
        hypotheses: a file of sentences, or a table with the references, too
        references: a file of sentences
        language: of the text: de, German; by default the column language of the file
        preset: sacrebleu, or the rule of a project: signjoey, gfslt, slrt, unisign, ssvp,
            spamo
        tokenizer: a folder with a tokenizer, an export or a run, for the ceiling; the
            preset gfslt encodes and decodes the references with it
        resamples: number of resampled test sets for the intervals; 0 for none
        bleurt: the folder of a BLEURT checkpoint in PyTorch, such as BLEURT-20; docs/scores.md
            says what it holds
        out: a JSON file to write the scores to
    """
    check_exists("--hypotheses", hypotheses)
    if references is not None:
        check_exists("--references", references)
    if bleurt is not None:
        check_exists("--bleurt", bleurt)
    find_preset(preset)
    require(resamples >= 0, f"--resamples must be at least 0, got {resamples}.")
    scores, highest = score_files(
        hypotheses, references, language, preset, tokenizer, resamples, bleurt
    )
    if out is not None:
        write_scores(out, scores, highest)
    print(describe(scores, highest))
