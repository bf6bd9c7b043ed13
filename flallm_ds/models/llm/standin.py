"""A small mBART pretrained on the spot, in place of `facebook/mbart-large-cc25` where no hub can be reached.

The folder it writes is read by the same AutoTokenizer and AutoModelForSeq2SeqLM calls as the real model. As
there, neither the language nor the decoder's start is stored: who loads the model must name both.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import MBartConfig, MBartForConditionalGeneration, MBartTokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES
from transformers.utils import logging as transformers_logging

from flallm_ds.command import nearest
from flallm_ds.data.text.languages import word_rule
from flallm_ds.data.text.normalizer import nmt_nfkc, normalizer_by
from flallm_ds.errors import UserError
from flallm_ds.files import new_folder, share_files
from flallm_ds.metrics import score

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in every mBART
PAD, EOS = 1, 2
MAX_PIECES = 128  # longer sentences are left out
BATCH = 32
PEAK_RATE_AT_256 = 1e-3  # falls with the square root of the width
MASK_RATIO, MEAN_SPAN = (
    0.35,
    3.5,
)  # mBART (arXiv 2001.08210): share of words masked, Poisson mean of span lengths

Say = Callable[[str], None]


def standin_llm(
    texts: str,
    out: Path,
    language: str = "de_DE",
    vocab_size: int = 1500,
    d_model: int = 256,
    layers: int = 2,
    steps: int = 300,
    seed: int = 0,
) -> None:
    """Train a tokenizer and pretrain a small mBART on text files by denoising; write a Hugging Face folder.

    texts: files of one sentence per line, separated by commas. language: one of mBART's 25 codes.
    vocab_size: at most this many ids, the 30 special ones included. layers: of encoder and decoder each.
    steps: batches of 32 sentences; 300 take half a minute on two CPU cores at the default size.
    """
    if language not in FAIRSEQ_LANGUAGE_CODES:
        raise UserError(
            f"--language must be a code of mBART, but is {language!r}: {nearest(language, codes())}"
        )
    if d_model < 64 or d_model % 64:
        raise UserError(f"--d_model must be a multiple of 64, but is {d_model}.")
    for name, value, least in (("vocab_size", vocab_size, 100), ("layers", layers, 1), ("steps", steps, 1)):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, but is {value}.")
    _refuse_used(out)
    sentences = read_sentences(texts)
    say: Say = lambda line: print(f"standin_llm: {line}", flush=True)  # noqa: E731

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        unique = list(dict.fromkeys(sentences))
        held = {unique[i] for i in rng.permutation(len(unique))[: min(200, len(unique) // 20)]}
        kept = [sentence for sentence in sentences if sentence not in held]
        tokenizer = train_tokenizer(kept, vocab_size, language)
        model = new_model(len(tokenizer), d_model, layers)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        say(f"{len(kept)} sentences, {len(tokenizer)} ids, {millions:.1f} M parameters.")
        pretrain(model, tokenizer, kept, language, steps, rng, say)
        if held:
            say(restored(model, tokenizer, sorted(held), language, rng))
    _write_whole(model, tokenizer, out)
    say(f"written to {out}.")


def codes() -> list[str]:
    return list(FAIRSEQ_LANGUAGE_CODES)


def read_sentences(texts: str) -> list[str]:
    """Non-empty lines of comma-separated files, spaces normalised; UserError where one cannot be read."""
    sentences = []
    for name in filter(None, (part.strip() for part in texts.split(","))):
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = (
                "is not UTF-8"
                if isinstance(error, UnicodeDecodeError)
                else f"cannot be read ({error.strerror})"
            )
            raise UserError(f"--texts must name text files, but {name} {reason}.") from None
        sentences += [" ".join(line.split()) for line in lines if line.strip()]
    if len(sentences) < 10:
        raise UserError(
            f"--texts must hold at least 10 sentences, one per line, but {texts!r} holds {len(sentences)}."
        )
    return sentences


# --- tokenizer


def train_tokenizer(sentences: Sequence[str], vocab_size: int, language: str) -> MBartTokenizer:
    """A Unigram tokenizer in mBART's order: <s> <pad> </s> <unk>, pieces, 25 language codes, <mask>.

    It normalises by `nmt_nfkc`, as mBART's SentencePiece model does.
    Pieces come from byte-pair merges inside words, scores from counts. The Unigram trainer of `tokenizers`
    is of no use here: it draws pieces from the list of distinct words, so that a frequent word is no piece
    unless other words contain it, and its result varies from run to run.
    """
    charsmap = nmt_nfkc()
    sentences = normalizer_by(charsmap).normalize(list(sentences))
    budget = vocab_size - len(SPECIALS) - len(FAIRSEQ_LANGUAGE_CODES) - 1
    letters = Counter(letter for sentence in sentences for letter in sentence if letter != " ")
    frequent = sorted(letters, key=lambda letter: (-letters[letter], letter))[: budget // 2]
    rare = {ord(letter): " " for letter in letters.keys() - set(frequent)}  # these will be <unk>
    words = Counter(word for sentence in sentences for word in sentence.translate(rare).split())

    merges = Tokenizer(models.BPE())
    merges.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=budget, initial_alphabet=["▁", *frequent], max_token_length=16, show_progress=False
    )
    merges.train_from_iterator((word for word, count in words.items() for _ in range(count)), trainer)
    pieces = sorted(merges.get_vocab())
    counts = _piece_counts(merges, words)
    for _ in range(2):  # which pieces win depends on the scores, and the scores on which pieces win
        counts = _piece_counts(_unigram(_log_shares(pieces, counts)), words)
    ranked = sorted(_log_shares(pieces, counts), key=lambda entry: (-entry[1], entry[0]))
    specials = [(token, 0.0) for token in SPECIALS]
    languages = [(token, 0.0) for token in (*FAIRSEQ_LANGUAGE_CODES, "<mask>")]
    tokenizer = MBartTokenizer(vocab=[*specials, *ranked, *languages], model_max_length=1024)
    tokenizer.backend_tokenizer.normalizer = normalizers.Precompiled(charsmap)
    return tokenizer


def _words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )


def _unigram(entries: list[tuple[str, float]]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *entries], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = _words()
    return tokenizer


def _piece_counts(tokenizer: Tokenizer, words: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for encoded, times in zip(tokenizer.encode_batch(list(words)), words.values(), strict=True):
        for piece in encoded.tokens:
            counts[piece] += times
    return counts


def _log_shares(pieces: list[str], counts: Counter[str]) -> list[tuple[str, float]]:
    total = sum(counts[piece] for piece in pieces) + 0.1 * len(pieces)
    return [(piece, round(math.log((counts[piece] + 0.1) / total), 6)) for piece in pieces]


# --- model and pretraining


def new_model(vocab_size: int, d_model: int, layers: int) -> MBartForConditionalGeneration:
    """mBART's architecture with random weights; head width 64, feed-forward width 4 x d_model."""
    heads, ffn = d_model // 64, 4 * d_model
    config = MBartConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_position_embeddings=1024,
        dropout=0.1,
        scale_embedding=True,
    )
    model = MBartForConditionalGeneration(config)
    # Learned positions begin as sinusoids of the words' size: at 0.02 against 0.3 a short pretraining
    # would not find the order of words, and positions beyond the longest sentence would stay noise.
    for part in (model.model.encoder, model.model.decoder):
        table = part.embed_positions.weight
        with torch.no_grad():
            table.copy_(sinusoids(*table.shape) * config.init_std * math.sqrt(2 * d_model))
    return model


def sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """Sines and cosines of each position, num_positions x width, root mean square 0.71."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(num_positions)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def pretrain(
    model: MBartForConditionalGeneration,
    tokenizer: MBartTokenizer,
    sentences: Sequence[str],
    language: str,
    steps: int,
    rng: np.random.Generator,
    say: Say,
) -> list[float]:
    """Denoise for so many steps; returns the loss of each (mean per target piece)."""
    encoded = encode(tokenizer, sentences, language)
    if not encoded:
        raise UserError(f"--texts must hold sentences of at most {MAX_PIECES} pieces, but all are longer.")
    if len(encoded) < len(sentences):
        say(f"{len(sentences) - len(encoded)} sentences of more than {MAX_PIECES} pieces are left out.")
    code, mask = tokenizer.convert_tokens_to_ids([language, "<mask>"])
    peak = PEAK_RATE_AT_256 * math.sqrt(256 / model.config.d_model)
    # fused: 7 ms a step instead of 23 ms at the default size on two CPU cores.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    model.train()
    losses: list[float] = []
    started = told = time.perf_counter()
    untold = 0
    for step, chosen in zip(range(steps), batches([len(words) for words in encoded], rng), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate_factor(step, steps)
        sources = [flat(infill(encoded[i], mask, rng)) for i in chosen]
        loss = model(**collate(sources, [flat(encoded[i]) for i in chosen], code)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        now = time.perf_counter()
        if now - told > 5 or step + 1 == steps:
            speed = (step + 1) * BATCH / (now - started)
            left = (now - started) / (step + 1) * (steps - step - 1)
            mean = sum(losses[untold:]) / len(losses[untold:])
            say(f"step {step + 1} of {steps}: loss {mean:.3f}, {speed:.0f} sentences/s, {left:.0f} s left.")
            told, untold = now, len(losses)
    return losses


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first twentieth, then a cosine to zero."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def encode(tokenizer: MBartTokenizer, sentences: Sequence[str], language: str) -> list[list[list[int]]]:
    """Each sentence of at most MAX_PIECES pieces as words, each a list of ids."""
    spaceless = word_rule(language) != "13a"  # there a piece is a word
    encoded = []
    for ids in tokenizer(list(sentences), add_special_tokens=False)["input_ids"]:
        if len(ids) > MAX_PIECES:
            continue
        words: list[list[int]] = []
        for number, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            if spaceless or piece.startswith("▁") or not words:
                words.append([number])
            else:
                words[-1].append(number)
        encoded.append(words)
    return encoded


def infill(words: Sequence[list[int]], mask: int, rng: np.random.Generator) -> list[list[int]]:
    """The words with spans replaced by one <mask> each, as mBART's text infilling does.

    A span of length 0 inserts a mask. The number of masked words is rounded at random: its mean is exact.
    """
    num_left = int(len(words) * MASK_RATIO + rng.random())
    spans: list[int] = []
    while num_left > 0:
        spans.append(min(int(rng.poisson(MEAN_SPAN)), num_left))
        num_left -= spans[-1]
    noised = list(words)
    masked = [mask]
    for span in spans:
        # A span never covers an earlier mask, so that no two masks melt into one.
        free = [
            i for i in range(len(noised) - span + 1) if not any(w is masked for w in noised[i : i + span])
        ]
        if free:
            start = free[int(rng.integers(len(free)))]
            noised[start : start + span] = [masked]
    return noised


def flat(words: Sequence[list[int]]) -> list[int]:
    return [number for word in words for number in word]


def batches(lengths: Sequence[int], rng: np.random.Generator) -> Iterator[list[int]]:
    """Endless batches of BATCH indices of sentences of like lengths, every sentence once per pass."""
    pool = 50 * BATCH
    while True:
        order = rng.permutation(len(lengths))
        for begin in range(0, len(order), pool):
            bucket = sorted(order[begin : begin + pool].tolist(), key=lambda i: lengths[i])
            starts = np.arange(0, len(bucket), BATCH)
            for start in rng.permutation(starts):
                yield bucket[start : start + BATCH]


def collate(sources: list[list[int]], targets: list[list[int]], code: int) -> dict[str, torch.Tensor]:
    """Encoder: pieces </s> code; decoder: code pieces; labels: pieces </s>, -100 where padded."""
    input_ids_BS = _pad([[*ids, EOS, code] for ids in sources], PAD)
    return {
        "input_ids": input_ids_BS,
        "attention_mask": input_ids_BS.ne(PAD).long(),
        "decoder_input_ids": _pad([[code, *ids] for ids in targets], PAD),
        "labels": _pad([[*ids, EOS] for ids in targets], -100),
    }


def _pad(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


# --- check and writing


def restored(
    model: MBartForConditionalGeneration,
    tokenizer: MBartTokenizer,
    sentences: Sequence[str],
    language: str,
    rng: np.random.Generator,
) -> str:
    """One line on how well sentences with one masked word each are restored by greedy decoding."""
    code, mask = tokenizer.convert_tokens_to_ids([language, "<mask>"])
    encoded = [words for words in encode(tokenizer, sentences, language) if words]
    model.eval()
    hypotheses: list[str] = []
    references = tokenizer.batch_decode([flat(words) for words in encoded], skip_special_tokens=True)
    longest = max(len(flat(words)) for words in encoded)
    for begin in range(0, len(encoded), 50):
        sources = []
        for words in encoded[begin : begin + 50]:
            hidden = int(rng.integers(len(words)))
            sources.append(flat([*words[:hidden], [mask], *words[hidden + 1 :]]))
        batch = collate(sources, sources, code)
        ids_BT = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_start_token_id=code,
            num_beams=1,
            max_new_tokens=longest + 2,
        )
        hypotheses += tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    same = sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(references)
    bleu = score(hypotheses, references, language).bleu4
    return (
        f"{len(references)} held-out sentences with one word masked, restored greedily: "
        f"BLEU-4 {bleu:.1f}, {same:.0%} exactly."
    )


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out must be a new or an empty folder, but there is something already: {out}.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be made, but {out.parent} cannot ({error.strerror})."
        ) from None


def _write_whole(model: MBartForConditionalGeneration, tokenizer: MBartTokenizer, out: Path) -> None:
    """Write the folder. Raises UserError where the disk refuses."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with new_folder(out) as folder:
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
            share_files(folder)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written, but {out} cannot ({error.strerror})."
        ) from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
