"""The tokenizer of the stand-in LLM, trained on the spot."""

import math
from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import MBartTokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from flallm_ds.data.text.normalizer import nmt_nfkc, normalizer_by

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in every mBART


def train_tokenizer(
    sentences: Sequence[str], vocab_size: int, language: str
) -> MBartTokenizer:
    """Train a Unigram tokenizer in mBART's order: <s> <pad> </s> <unk>, pieces, 25 codes, <mask>.

    It normalises by `nmt_nfkc`, as mBART's SentencePiece model does. Pieces come from
    byte-pair merges inside words, scores from counts. The Unigram trainer of `tokenizers`
    is of no use here: it draws pieces from the list of distinct words, so that a frequent
    word is no piece unless other words contain it, and its result varies from run to run.
    """
    charsmap = nmt_nfkc()
    sentences = normalizer_by(charsmap).normalize(list(sentences))
    budget = vocab_size - len(SPECIALS) - len(FAIRSEQ_LANGUAGE_CODES) - 1

    # The most frequent letters; rare ones will be <unk>.
    letters = Counter("".join(sentences).replace(" ", ""))
    frequent = sorted(letters, key=lambda letter: (-letters[letter], letter))[: budget // 2]
    rare = dict.fromkeys(map(ord, letters.keys() - set(frequent)), " ")
    words: Counter[str] = Counter()
    for sentence in sentences:
        words.update(sentence.translate(rare).split())

    # Byte-pair merges of all words, a word as often as it occurs, are the pieces.
    merges = Tokenizer(models.BPE())
    merges.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=budget,
        initial_alphabet=["▁", *frequent],
        max_token_length=16,
        show_progress=False,
    )
    merges.train_from_iterator(words.elements(), trainer)
    pieces = sorted(merges.get_vocab())

    # Scores: which pieces win depends on them, and they on which pieces win, so count
    # again twice.
    counts = _piece_counts(merges, words)
    for _ in range(2):
        counts = _piece_counts(_unigram(_log_shares(pieces, counts)), words)

    ranked = sorted(_log_shares(pieces, counts), key=lambda entry: (-entry[1], entry[0]))
    specials = [(token, 0.0) for token in SPECIALS]
    languages = [(token, 0.0) for token in (*FAIRSEQ_LANGUAGE_CODES, "<mask>")]
    tokenizer = MBartTokenizer(
        vocab=[*specials, *ranked, *languages], model_max_length=1024
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.Precompiled(charsmap)
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    marked = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marked])


def _unigram(entries: list[tuple[str, float]]) -> Tokenizer:
    model = models.Unigram([("<unk>", 0.0), *entries], unk_id=0, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _words()
    return tokenizer


def _piece_counts(tokenizer: Tokenizer, words: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for encoded, times in zip(
        tokenizer.encode_batch(list(words)), words.values(), strict=True
    ):
        for piece in encoded.tokens:
            counts[piece] += times
    return counts


def _log_shares(pieces: list[str], counts: Counter[str]) -> list[tuple[str, float]]:
    """(piece, logarithm of its share), each count raised by 0.1."""
    total = sum(counts[piece] for piece in pieces) + 0.1 * len(pieces)
    shares = []
    for piece in pieces:
        share = (counts[piece] + 0.1) / total
        shares.append((piece, round(math.log(share), 6)))
    return shares
