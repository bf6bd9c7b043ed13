"""Train the tokenizer of the stand-in LLM."""

import math
from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import MBartTokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from flallm_ds.data.text.normalizer import nmt_nfkc, normalizer_by

# Ids 0 to 3, as in every mBART.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def train_tokenizer(
    sentences: Sequence[str], vocab_size: int, language: str
) -> MBartTokenizer:
    """Train a Unigram tokenizer with the vocabulary order of mBART.

    The order is <s> <pad> </s> <unk>, tokens, 25 language codes, <mask>. The text is
    normalised by `nmt_nfkc`, as by the SentencePiece model of mBART. The tokens come from
    byte-pair merges inside words, and their scores from counts. The Unigram trainer of
    `tokenizers` is not used: it takes tokens from the list of distinct words, so a frequent
    word becomes a token only if other words contain it, and its result varies between runs.
    """
    charsmap = nmt_nfkc()
    sentences = normalizer_by(charsmap).normalize(list(sentences))
    # The size without the special tokens; the 1 is <mask>.
    budget = vocab_size - len(SPECIALS) - len(FAIRSEQ_LANGUAGE_CODES) - 1

    # Keep the most frequent letters, at most half of the vocabulary. Rare ones become
    # <unk>.
    letters = Counter("".join(sentences).replace(" ", ""))
    frequent = sorted(letters, key=lambda letter: (-letters[letter], letter))[: budget // 2]
    rare = dict.fromkeys(map(ord, letters.keys() - set(frequent)), " ")
    words: Counter[str] = Counter()
    for sentence in sentences:
        words.update(sentence.translate(rare).split())

    # The tokens are byte-pair merges of all words; a word counts as often as it occurs.
    merges = Tokenizer(models.BPE())
    merges.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=budget,
        initial_alphabet=["▁", *frequent],
        max_token_length=16,
        show_progress=False,
    )
    merges.train_from_iterator(words.elements(), trainer)
    tokens = sorted(merges.get_vocab())

    # The segmentation depends on the scores, and the scores on the segmentation. Two more
    # counts bring both into agreement.
    counts = _token_counts(merges, words)
    for _ in range(2):
        counts = _token_counts(_unigram(_log_shares(tokens, counts)), words)

    # Sort by falling score, then by name.
    ranked = sorted(_log_shares(tokens, counts), key=lambda entry: (-entry[1], entry[0]))
    # Special tokens are never found in text, so their scores have no effect.
    specials = [(token, 0.0) for token in SPECIALS]
    languages = [(token, 0.0) for token in (*FAIRSEQ_LANGUAGE_CODES, "<mask>")]
    tokenizer = MBartTokenizer(
        vocab=[*specials, *ranked, *languages], model_max_length=1024
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.Precompiled(charsmap)
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    """Return a pre-tokenizer that splits at spaces and puts ▁ before each word."""
    marked = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marked])


def _unigram(entries: list[tuple[str, float]]) -> Tokenizer:
    """Return a Unigram tokenizer with these tokens and scores."""
    model = models.Unigram([("<unk>", 0.0), *entries], unk_id=0, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _words()
    return tokenizer


def _token_counts(tokenizer: Tokenizer, words: Counter[str]) -> Counter[str]:
    """Return how often each token occurs in words with these counts."""
    counts: Counter[str] = Counter()
    encodings = tokenizer.encode_batch(list(words))
    for encoding, times in zip(encodings, words.values(), strict=True):
        for token in encoding.tokens:
            counts[token] += times
    return counts


def _log_shares(tokens: list[str], counts: Counter[str]) -> list[tuple[str, float]]:
    """Return (token, logarithm of its share); 0.1 is added to each count."""
    total = sum(counts[token] for token in tokens) + 0.1 * len(tokens)
    shares = []
    for token in tokens:
        share = (counts[token] + 0.1) / total
        shares.append((token, round(math.log(share), 6)))
    return shares
