"""Scores of translations, each beside the rule it was computed by.

`score` is the `sacrebleu` rule of docs; another published lineage is another choice of tokenizer, smoothing
and ROUGE tokens made from the same parts (bleu.py, rouge.py).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flallm_ds.data.text.languages import tag_of, word_rule
from flallm_ds.errors import UserError
from flallm_ds.metrics.bleu import corpus_bleu, corpus_chrf
from flallm_ds.metrics.rouge import BETA, rouge_l

__all__ = ["Scores", "rouge_tokens", "score", "score_by_language"]


@dataclass(frozen=True)
class Scores:
    """Scores of one system over one test set, in percent."""

    bleu1: float
    bleu2: float
    bleu3: float
    bleu4: float
    rouge_l: float
    chrf: float
    length_ratio: float
    """Hypothesis tokens over reference tokens, as BLEU counts them: 1 is equal length."""
    num_sentences: int
    bleu_signature: str
    chrf_signature: str
    rouge_signature: str

    def as_dict(self) -> dict[str, float | int | str]:
        """Plain values by name, for a log line or a JSON file."""
        return dataclasses.asdict(self)


def score(hypotheses: Sequence[str], references: Sequence[str], language: str) -> Scores:
    """Scores of hypotheses against one reference each, in the same order.

    language: of the text, by any name that `find_language` knows. Chinese is scored by sacreBLEU's
    rule for it, other languages without spaces between words (Japanese, Thai, ...) by characters.
    Raises UserError where the numbers of sentences differ, or where there are none.
    """
    if len(hypotheses) != len(references):
        raise UserError(
            "hypotheses and references must be equally many, but are "
            f"{len(hypotheses)} and {len(references)}: give one hypothesis for each reference, in its order."
        )
    if not references:
        raise UserError("there must be at least one sentence to score, but there is none.")
    rule = word_rule(language)
    characters = rule != "13a"
    bleu = corpus_bleu(hypotheses, references, tokenize=rule)
    chrf, chrf_signature = corpus_chrf(hypotheses, references)
    return Scores(
        *bleu.orders,
        rouge_l=rouge_l(
            [rouge_tokens(h, characters) for h in hypotheses],
            [rouge_tokens(r, characters) for r in references],
        ),
        chrf=chrf,
        length_ratio=bleu.length_ratio,
        num_sentences=len(references),
        bleu_signature=bleu.signature,
        chrf_signature=chrf_signature,
        rouge_signature=f"F|beta:{BETA}|tok:{'char' if characters else 'whitespace'}|mean:sentences",
    )


def score_by_language(
    hypotheses: Sequence[str], references: Sequence[str], languages: Sequence[str]
) -> Scores:
    """Scores of sentences in several languages: each language alone by its own rule, then their mean.

    languages: of each pair. Every language weighs the same, however many sentences it has; the numbers of
    one language alone are those of `score`.
    """
    rows = defaultdict(list)
    for row, language in enumerate(languages):
        rows[tag_of(language)].append(row)
    found = {
        language: score([hypotheses[r] for r in part], [references[r] for r in part], language)
        for language, part in sorted(rows.items())
    }
    if len(found) <= 1:
        return next(iter(found.values())) if found else score(hypotheses, references, "")
    columns = {f.name: [getattr(s, f.name) for s in found.values()] for f in dataclasses.fields(Scores)}
    mean: dict[str, Any] = {}
    for name, column in columns.items():
        if name.endswith("_signature"):
            parts = (f"{language}: {signature}" for language, signature in zip(found, column, strict=True))
            mean[name] = f"mean over languages ({'; '.join(parts)})"
        else:
            mean[name] = sum(column) if name == "num_sentences" else sum(column) / len(column)
    return Scores(**mean)


def rouge_tokens(sentence: str, characters: bool) -> list[str]:
    """Return whitespace tokens, or for a language without spaces the characters."""
    words = sentence.split()
    return list("".join(words)) if characters else words
