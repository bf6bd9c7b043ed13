"""Compute TER, WER and CER: edits per token of the references, in percent; lower is better.

TER is sacreBLEU's. WER and CER are edit distances of torchaudio: substitutions, insertions
and deletions of words or of characters.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from sacrebleu.metrics.ter import TER

from flallm_ds.metrics.bleu import sacrebleu_counts
from flallm_ds.metrics.counts import Counts
from flallm_ds.metrics.rouge import rouge_tokens

Tokens = Sequence[Hashable]


def error_counts(
    hypotheses: Sequence[str], references: Sequence[str], characters: bool
) -> list[Counts]:
    """Count edits for TER, WER and CER, in this order.

    characters: the language has no spaces between words, so TER and WER count characters,
    too. CER counts the spaces between words as characters.
    """
    said = [rouge_tokens(text, characters) for text in hypotheses]
    meant = [rouge_tokens(text, characters) for text in references]
    unit = "char" if characters else "word"
    ter = _ter(said, meant, unit)
    wer = _edits("wer", said, meant, f"torchaudio|unit:{unit}")
    if characters:
        cer = _edits("cer", said, meant, "torchaudio|unit:char")
    else:
        said_text = [" ".join(words) for words in said]
        meant_text = [" ".join(words) for words in meant]
        cer = _edits("cer", said_text, meant_text, "torchaudio|unit:char|space:yes")
    return [ter, wer, cer]


def _ter(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]], unit: str
) -> Counts:
    said = [" ".join(tokens) for tokens in hypotheses]
    meant = [" ".join(tokens) for tokens in references]
    counts = sacrebleu_counts("ter", TER(), said, meant)
    signature = f"{counts.signatures['ter_signature']}|unit:{unit}"
    return Counts(
        counts.keys, counts.counts_NC, counts.scores_of, {"ter_signature": signature}
    )


def _edits(
    key: str, hypotheses: Sequence[Tokens], references: Sequence[Tokens], signature: str
) -> Counts:
    """Count edits and reference tokens of each sentence, (N, 2)."""
    # torch takes seconds to import.
    from torchaudio.functional import edit_distance

    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        rows.append((edit_distance(hypothesis, reference), len(reference)))
    return Counts(
        (key,), np.array(rows, float), _error_rate, {f"{key}_signature": signature}
    )


def _error_rate(sums_C: np.ndarray) -> list[float]:
    """Return edits per token in percent; without tokens, 100 if there are edits."""
    edits, num_tokens = sums_C.tolist()
    if num_tokens == 0:
        return [100.0 if edits else 0.0]
    return [100 * edits / num_tokens]
