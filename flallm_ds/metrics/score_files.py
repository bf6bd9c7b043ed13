"""Score files of hypotheses and references of any project, and print the scores."""

import json
from pathlib import Path
from typing import Any

from flallm_ds.data.text.languages import language_tag
from flallm_ds.errors import UserError
from flallm_ds.files import replace_file
from flallm_ds.metrics import Metric, Scores, score_by_language
from flallm_ds.metrics.ceiling import Ceiling, ceiling
from flallm_ds.metrics.columns import CEILING, INTERVAL_TITLE, SIGNATURES, shown_columns
from flallm_ds.metrics.presets import DEFAULT, RoundTrip
from flallm_ds.metrics.table import markdown
from flallm_ds.metrics.texts import Pairs, read_pairs


def score_files(
    hypotheses: Path,
    references: Path | None = None,
    language: str = "",
    preset: str = DEFAULT,
    tokenizer: str = "",
    resamples: int = 0,
    bleurt: Path | None = None,
) -> tuple[Scores, Ceiling | None]:
    """Score a file of hypotheses. Return the scores, and the ceiling of a tokenizer.

    references: a file, or None if the hypotheses are a table with both. language: by
    default the column `language` of the references. tokenizer: as in `round_trip_of`.
    bleurt: the folder of a checkpoint, as in `load_bleurt`.
    Raises UserError for files that do not fit each other.
    """
    pairs = read_pairs(hypotheses, references)
    languages = languages_of(pairs, language)
    round_trip: RoundTrip | None = None
    if tokenizer:
        # transformers takes seconds to import.
        from flallm_ds.data.text.round_trip import round_trip_of

        round_trip = round_trip_of(tokenizer)
    trained: Metric | None = None
    if bleurt is not None:
        from flallm_ds.metrics.bleurt import load_bleurt

        trained = load_bleurt(bleurt).counts
    scores = score_by_language(
        pairs.hypotheses,
        pairs.references,
        languages,
        preset,
        round_trip=round_trip,
        resamples=resamples,
        trained=trained,
    )
    highest = None
    if round_trip is not None:
        highest = ceiling(round_trip(pairs.references), pairs.references, languages)
    return scores, highest


def languages_of(pairs: Pairs, language: str) -> list[str]:
    """Return the tag of the language of each pair. Raises UserError if it is unknown."""
    if language:
        return [language_tag(language, "--language")] * len(pairs.references)
    if not any(pairs.languages):
        raise UserError(
            "--language must be the language of the text if the references have no column "
            "language, got nothing. Give a code (de, zh) or an English name (German)."
        )
    return [language_tag(name, "The column language") for name in pairs.languages]


def write_scores(path: Path, scores: Scores, highest: Ceiling | None) -> None:
    """Write scores to a JSON file."""
    content: dict[str, Any] = scores.as_dict()
    if highest is not None:
        content[CEILING.key] = highest.bleu4
    replace_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def describe(scores: Scores, highest: Ceiling | None = None) -> str:
    """Return a table of scores, and how they were computed."""
    stored = scores.as_dict()
    cells = [["", "score", INTERVAL_TITLE]]
    for column in shown_columns([stored]):
        title = f"{column.title} (lower is better)" if column.is_error else column.title
        cells.append([title, column.text(stored), column.interval_text(stored)])
    lines = [
        markdown(cells),
        f"{scores.num_sentences} sentences, length ratio {scores.length_ratio:.3f}",
        *how_computed(stored),
    ]
    if highest is not None:
        lines.append(
            str(highest) or f"The ceiling of the tokenizer is BLEU-4 {highest.bleu4:.2f}."
        )
    return "\n".join(lines)


def how_computed(stored: dict[str, Any]) -> list[str]:
    """Return lines with the rule and the signatures of stored scores."""
    lines = [f"preset {stored['preset']}: {stored['rule']}"]
    for key, metric in SIGNATURES.items():
        if key in stored:
            lines.append(f"{metric} signature: {stored[key]}")
    return lines
