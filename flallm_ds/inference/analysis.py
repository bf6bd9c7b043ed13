"""Analyse the hypotheses of a split beyond its scores: parts of the split, and words."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flallm_ds.batch import Hypothesis
from flallm_ds.metrics import Scores
from flallm_ds.metrics.columns import COLUMNS, INTERVAL_TITLE
from flallm_ds.metrics.scoring import scores_of
from flallm_ds.metrics.slices import Parts, by_length, by_signer, by_training_text
from flallm_ds.metrics.table import markdown
from flallm_ds.metrics.words import WordScores, content_words, rare_words

# The metrics of the table of parts.
SHOWN = ("bleu4", "chrf")


@dataclass(frozen=True)
class Known:
    """What is known of the clips of a split, apart from their texts.

    signers: maps the keys of clips to names, empty if not known. training_texts,
    training_languages: the text of the training, empty if it cannot be read.
    """

    signers: Mapping[str, str] = field(default_factory=dict)
    training_texts: Sequence[str] = ()
    training_languages: Sequence[str] = ()


@dataclass(frozen=True)
class Analysis:
    """Scores of parts of a split, and of words.

    parts: maps a way to divide the split to the scores of each part. words: maps a
    language and a class of words to its scores.
    """

    parts: Mapping[str, Mapping[str, Scores]]
    words: Mapping[str, Mapping[str, WordScores]]

    def as_dict(self) -> dict[str, Any]:
        """Return all values for a JSON file."""
        slices: dict[str, Any] = {}
        for way, scores in self.parts.items():
            slices[way] = {name: _short(one) for name, one in scores.items()}
        words: dict[str, Any] = {}
        for language, classes in self.words.items():
            words[language] = {name: one.as_dict() for name, one in classes.items()}
        return {"slices": slices, "words": words}

    def __str__(self) -> str:
        return f"{self._table()}\n{self._sentences()}".strip()

    def _table(self) -> str:
        shown = [column for column in COLUMNS if column.key in SHOWN]
        titles = ["part", "clips"]
        for column in shown:
            titles += [column.title, INTERVAL_TITLE]
        cells = [titles]
        for scores in self.parts.values():
            for name, one in scores.items():
                row = [name, str(one.num_sentences)]
                stored = one.as_dict()
                for column in shown:
                    row += [column.text(stored), column.interval_text(stored)]
                cells.append(row)
        return markdown(cells) if len(cells) > 1 else ""

    def _sentences(self) -> str:
        lines = []
        for language, classes in self.words.items():
            parts = []
            for name, one in classes.items():
                value = f"recall {one.recall:.1f}"
                if one.precision is not None:
                    value += f", precision {one.precision:.1f}, F1 {one.f1:.1f}"
                parts.append(f"{name}: {value} ({one.num_reference_words:,} words)")
            title = f"words ({language})" if len(self.words) > 1 else "words"
            lines.append(f"{title}: {'; '.join(parts)}")
        return "\n".join(lines)


def _short(scores: Scores) -> dict[str, Any]:
    """Return scores without signatures, which are those of the whole split."""
    stored = scores.as_dict()
    kept = [column.key for column in COLUMNS] + ["intervals", "num_sentences"]
    return {name: stored[name] for name in kept if name in stored}


def analyse(clips: Sequence[Hypothesis], known: Known, resamples: int) -> Analysis:
    """Score the parts of a split and the words of its texts.

    resamples: number of resampled test sets for intervals.
    """
    ways: dict[str, Parts] = {"length": by_length(clips)}
    ways["signer"] = by_signer(clips, known.signers)
    if known.training_texts:
        ways["training_text"] = by_training_text(
            clips, known.training_texts, known.training_languages
        )
    parts: dict[str, dict[str, Scores]] = {}
    for way, found in ways.items():
        if len(found) < 2:
            continue
        parts[way] = {}
        for name, some in found.items():
            title = f"{name} training sentence" if way == "training_text" else name
            parts[way][title] = scores_of(some, resamples=resamples)
    return Analysis(parts, _words(clips, known))


def _words(clips: Sequence[Hypothesis], known: Known) -> dict[str, dict[str, WordScores]]:
    """Return the scores of words by language and class."""
    by_language: dict[str, list[Hypothesis]] = defaultdict(list)
    for clip in clips:
        by_language[clip.language].append(clip)
    texts: dict[str, list[str]] = defaultdict(list)
    pairs = zip(known.training_texts, known.training_languages, strict=True)
    for text, language in pairs:
        texts[language].append(text)
    words: dict[str, dict[str, WordScores]] = {}
    for language, some in sorted(by_language.items()):
        said = [clip.hypothesis for clip in some]
        meant = [clip.reference for clip in some]
        classes: dict[str, WordScores] = {}
        content = content_words(said, meant, language)
        if content is not None:
            classes["with content"] = content
        if texts[language]:
            rare = rare_words(said, meant, texts[language], language)
            for name, one in rare.items():
                classes[f"{name} in the training text"] = one
        if classes:
            words[language] = classes
    return words
