"""Score words: those with content, and those that the training text rarely has.

BLEU counts frequent words and punctuation most. A model that guesses the usual sentence
gets these right; whether it sees the signs shows in the other words.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from sacrebleu.metrics.bleu import BLEU

from flallm_ds.data.text.languages import tag_or_name, word_rule
from flallm_ds.metrics.function_words import FUNCTION_WORDS

# Upper bounds of the classes of words by their number in the training text.
RARE = (0, 5, 50)


@dataclass(frozen=True)
class WordScores:
    """How many words of a class are found, in percent, and how many there are.

    recall: of the words in references. precision: of the words in hypotheses; None for
    classes by frequency.
    """

    recall: float
    num_reference_words: int
    precision: float | None = None
    f1: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the values for a JSON file."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def words_of(text: str, language: str) -> list[str]:
    """Return the words in lower case as BLEU separates them, without punctuation."""
    found = []
    for token in _tokenizer(word_rule(language))(text.lower()).split():
        if any(map(str.isalnum, token)):
            found.append(token)
    return found


@cache
def _tokenizer(rule: str) -> Any:
    return BLEU(tokenize=rule).tokenizer


def content_words(
    hypotheses: Sequence[str], references: Sequence[str], language: str
) -> WordScores | None:
    """Score the words with content, in any order. None for a language without a list."""
    function_words = FUNCTION_WORDS.get(tag_or_name(language))
    if function_words is None:
        return None
    found = said = meant = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours = Counter(words_of(hypothesis, language))
        theirs = Counter(words_of(reference, language))
        for word in function_words:
            del ours[word], theirs[word]
        found += (ours & theirs).total()
        said += ours.total()
        meant += theirs.total()
    recall = 100 * found / max(meant, 1)
    precision = 100 * found / max(said, 1)
    f1 = 2 * precision * recall / (precision + recall) if found else 0.0
    return WordScores(recall, meant, precision, f1)


def rare_words(
    hypotheses: Sequence[str],
    references: Sequence[str],
    training_texts: Sequence[str],
    language: str,
) -> dict[str, WordScores]:
    """Return the recall of words by their number in the training text: {class: scores}."""
    known: Counter[str] = Counter()
    for text in training_texts:
        known.update(words_of(text, language))
    found: Counter[str] = Counter()
    meant: Counter[str] = Counter()
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        theirs = Counter(words_of(reference, language))
        shared = theirs & Counter(words_of(hypothesis, language))
        for word, count in theirs.items():
            name = _class_of(known[word])
            meant[name] += count
            found[name] += shared[word]
    scores = {}
    for number in (*RARE, RARE[-1] + 1):
        name = _class_of(number)
        if meant[name]:
            scores[name] = WordScores(100 * found[name] / meant[name], meant[name])
    return scores


def _class_of(count: int) -> str:
    """Return the class of a word that the training text has `count` times."""
    low = 0
    for high in RARE:
        if count <= high:
            return f"{low} to {high} times" if low < high else f"{low} times"
        low = high + 1
    return f"{low} times or more"
