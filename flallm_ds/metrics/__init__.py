"""Score translations with BLEU, ROUGE-L and chrF, and record how each value was computed.

Published results differ in tokenizer, smoothing and ROUGE tokens. `score` follows the
defaults of sacreBLEU; bleu.py and rouge.py take other choices as arguments.
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
    """Maps the key of each column in `COLUMNS` to a score in percent."""
    length_ratio: float
    """Number of hypothesis tokens divided by number of reference tokens, as in BLEU."""
    num_sentences: int
    signatures: Mapping[str, str]
    """Maps each key of `SIGNATURES` to a description of how the score was computed."""

    @property
    def bleu4(self) -> float:
        """Return BLEU-4 in percent, which selects the best export."""
        return self.values["bleu4"]

    def as_dict(self) -> dict[str, float | int | str]:
        """Return all values by name, for a JSON file."""
        values = {column.key: self.values[column.key] for column in COLUMNS}
        return {
            **values,
            "length_ratio": self.length_ratio,
            "num_sentences": self.num_sentences,
            **self.signatures,
        }

    def logged(self) -> dict[str, float]:
        """Return the scores that training logs, by key."""
        values = {}
        for column in COLUMNS:
            if column.logged:
                values[column.key] = self.values[column.key]
        return values


def score(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Scores:
    """Score hypotheses against one reference each, in the same order.

    language: language of the text, by any name that `find_language` accepts. Chinese is
    tokenized by sacreBLEU's `zh`, other languages without spaces between words (Japanese,
    Thai, ...) by characters. Raises UserError if the numbers of hypotheses and references
    differ or are 0.
    """
    if len(hypotheses) != len(references):
        raise UserError(
            f"The number of hypotheses must equal the number of references "
            f"({len(references)}), got {len(hypotheses)}. Give one hypothesis for each "
            "reference, in the same order."
        )
    if not references:
        raise UserError("The number of sentences to score must be at least 1, got 0.")
    rule = word_rule(language)
    bleu = corpus_bleu(hypotheses, references, tokenize=rule)
    chrf, chrf_signature = corpus_chrf(hypotheses, references)

    # ROUGE uses the same units as BLEU: characters if the language has no spaces.
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
    """Score each language with its own tokenizer and return the mean over languages.

    languages: language of each pair of sentences. All languages have the same weight,
    regardless of their number of sentences. With one language, the result equals `score`.
    """
    # Group by tag, because "de" and "German" are the same language.
    rows_by_tag = defaultdict(list)
    for row, language in enumerate(languages):
        rows_by_tag[tag_of(language)].append(row)

    scores = {}
    for tag, rows in sorted(rows_by_tag.items()):
        hypotheses_of_tag = [hypotheses[row] for row in rows]
        references_of_tag = [references[row] for row in rows]
        scores[tag] = score(hypotheses_of_tag, references_of_tag, tag)

    if not scores:
        return score(hypotheses, references, "")  # raises, because there is no sentence
    if len(scores) == 1:
        return next(iter(scores.values()))
    return _mean(scores)


def _mean(scores: Mapping[str, Scores]) -> Scores:
    """Average scores over languages. scores: maps two or more languages to their scores."""
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
    """Split a sentence at whitespace, or into characters for a language without spaces."""
    words = sentence.split()
    return list("".join(words)) if characters else words
