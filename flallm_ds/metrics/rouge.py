"""ROUGE-L as sign language translation reports it: an F score that weighs recall, mean
over sentences.

Source: Lin (2004), ROUGE; F with beta 1.2 as in the captioning evaluation that signjoey
and its heirs use.
"""

from collections.abc import Hashable, Sequence

BETA = 1.2


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence.

    The rows of the dynamic programme are kept as the bits of one integer: a 0 bit where
    the row grows by one (Hyyrö 2004, after Allison and Dix 1986). Twenty times faster
    than cell by cell at 30 x 30 tokens.
    """
    # positions[token]: bit i is set where a[i] is this token
    positions: dict[Hashable, int] = {}
    for position, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << position

    full = (1 << len(a)) - 1
    row = full
    for token in b:
        matches = row & positions.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def sentence_rouge_l(
    hypothesis: Sequence[Hashable], reference: Sequence[Hashable], beta: float = BETA
) -> float:
    """F of one pair of token sequences, 0 to 1; 0 where nothing is shared, as when one is
    empty."""
    common = lcs_length(hypothesis, reference)
    if common == 0:
        return 0.0
    precision, recall = common / len(hypothesis), common / len(reference)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def rouge_l(
    hypotheses: Sequence[Sequence[Hashable]],
    references: Sequence[Sequence[Hashable]],
    beta: float = BETA,
) -> float:
    """Mean of the sentences' F in percent; each sentence is a sequence of tokens."""
    assert len(hypotheses) == len(references) > 0
    pairs = zip(hypotheses, references, strict=True)
    total = sum(sentence_rouge_l(h, r, beta) for h, r in pairs)
    return 100 * total / len(hypotheses)
