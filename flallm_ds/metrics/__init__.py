"""Scores of translations, each beside the rule it was computed by.

`score` is the `sacrebleu` rule of docs; another published lineage is another choice of
tokenizer, smoothing and ROUGE tokens made from the same parts (bleu.py, rouge.py).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flallm_ds.data.text.languages import tag_of, word_rule
from flallm_ds.errors import UserError
from flallm_ds.metrics.bleu import corpus_bleu, corpus_chrf
from flallm_ds.metrics.columns import COLUMNS
from flallm_ds.metrics.rouge import BETA, rouge_l

__all__ = ["Scores", "rouge_tokens", "score", "score_by_language"]


@dataclass(frozen=True)
class Scores:
    """Scores of one system over one test set."""

    values: Mapping[str, float]
    """{key of each of `COLUMNS`: percent}."""
    length_ratio: float
    """Hypothesis tokens over reference tokens, as BLEU counts them: 1 is equal length."""
    num_sentences: int
    signatures: Mapping[str, str]
    """{key of `SIGNATURES`: the rule by which the values were computed}."""

    @property
    def bleu4(self) -> float:
        """BLEU-4 in percent, by which the best export is chosen."""
        return self.values["bleu4"]

    def as_dict(self) -> dict[str, float | int | str]:
        """Return plain values by name, for a JSON file."""
        values = {column.key: self.values[column.key] for column in COLUMNS}
        return {
            **values,
            "length_ratio": self.length_ratio,
            "num_sentences": self.num_sentences,
            **self.signatures,
        }

    def logged(self) -> dict[str, float]:
        """Return the values that each scoring of training logs, by key."""
        values = {}
        for column in COLUMNS:
            if column.logged:
                values[column.key] = self.values[column.key]
        return values


def score(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Scores:
    """Scores of hypotheses against one reference each, in the same order.

    language: of the text, by any name that `find_language` knows. Chinese is scored by
    sacreBLEU's rule for it, other languages without spaces between words (Japanese, Thai,
    ...) by characters. Raises UserError where the numbers of sentences differ, or where
    there are none.
    """
    if len(hypotheses) != len(references):
        raise UserError(
            f"hypotheses and references must be equally many, but are {len(hypotheses)} "
            f"and {len(references)}: give one hypothesis for each reference, in its order."
        )
    if not references:
        raise UserError("there must be at least one sentence to score, but there is none.")
    rule = word_rule(language)
    bleu = corpus_bleu(hypotheses, references, tokenize=rule)
    chrf, chrf_signature = corpus_chrf(hypotheses, references)

    # ROUGE follows BLEU: characters where the language has no spaces between words.
    characters = rule != "13a"
    hypothesis_tokens = [rouge_tokens(sentence, characters) for sentence in hypotheses]
    reference_tokens = [rouge_tokens(sentence, characters) for sentence in references]

    values: dict[str, float] = {}
    for order, value in enumerate(bleu.orders, start=1):
        values[f"bleu{order}"] = value
    values["rouge_l"] = rouge_l(hypothesis_tokens, reference_tokens)
    values["chrf"] = chrf
    rouge_tokenizer = "char" if characters else "whitespace"
    return Scores(
        values,
        length_ratio=bleu.length_ratio,
        num_sentences=len(references),
        signatures={
            "bleu_signature": bleu.signature,
            "chrf_signature": chrf_signature,
            "rouge_signature": f"F|beta:{BETA}|tok:{rouge_tokenizer}|mean:sentences",
        },
    )


def score_by_language(
    hypotheses: Sequence[str], references: Sequence[str], languages: Sequence[str]
) -> Scores:
    """Scores of sentences in several languages: each language alone by its own rule, then
    their mean.

    languages: of each pair. Every language weighs the same, however many sentences it
    has; the numbers of one language alone are those of `score`.
    """
    # Group by tag: "de" and "German" name one language.
    rows_by_tag = defaultdict(list)
    for row, language in enumerate(languages):
        rows_by_tag[tag_of(language)].append(row)

    scores = {}
    for tag, rows in sorted(rows_by_tag.items()):
        said = [hypotheses[row] for row in rows]
        meant = [references[row] for row in rows]
        scores[tag] = score(said, meant, tag)

    if not scores:
        return score(hypotheses, references, "")  # raises: there is no sentence
    if len(scores) == 1:
        return next(iter(scores.values()))
    return _mean(scores)


def _mean(scores: Mapping[str, Scores]) -> Scores:
    """Average the scores of languages. scores: {language: its scores}, at least two."""
    parts = list(scores.values())
    values = {}
    for key in parts[0].values:
        values[key] = sum(part.values[key] for part in parts) / len(parts)
    signatures = {}
    for key in parts[0].signatures:
        rules = [f"{language}: {part.signatures[key]}" for language, part in scores.items()]
        signatures[key] = f"mean over languages ({'; '.join(rules)})"
    return Scores(
        values,
        length_ratio=sum(part.length_ratio for part in parts) / len(parts),
        num_sentences=sum(part.num_sentences for part in parts),
        signatures=signatures,
    )


def rouge_tokens(sentence: str, characters: bool) -> list[str]:
    """Return whitespace tokens, or for a language without spaces the characters."""
    words = sentence.split()
    return list("".join(words)) if characters else words
