"""A small mBART pretrained on the spot, where no hub with `facebook/mbart-large-cc25` is
reachable.

The folder it writes is read by the same AutoTokenizer and AutoModelForSeq2SeqLM calls as
the real model. As there, neither the language nor the decoder's start is stored: a caller
must name both.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import MBartConfig, MBartForConditionalGeneration, MBartTokenizer
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES
from transformers.utils import logging as transformers_logging

from flallm_ds.command import nearest
from flallm_ds.data.text.languages import word_rule
from flallm_ds.errors import UserError
from flallm_ds.files import new_folder, share_files
from flallm_ds.metrics import score
from flallm_ds.models.llm.standin_tokenizer import train_tokenizer

PAD, EOS = 1, 2
MAX_PIECES = 128  # longer sentences are left out
BATCH = 32
PEAK_RATE_AT_256 = 1e-3  # falls with the square root of the width
# mBART (arXiv 2001.08210): share of words that are masked, Poisson mean of the spans'
# lengths.
MASK_RATIO, MEAN_SPAN = 0.35, 3.5

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
    """Train a tokenizer, pretrain a small mBART by denoising, and write a Hugging Face folder.

    texts: files of one sentence per line, separated by commas. language: one of mBART's
    25 codes. vocab_size: at most this many ids, the 30 special ones included. layers: of
    encoder and decoder each. steps: batches of 32 sentences; 300 take half a minute on
    two CPU cores at the default size.
    """
    if language not in FAIRSEQ_LANGUAGE_CODES:
        raise UserError(
            f"--language must be a code of mBART, but is {language!r}: "
            f"{nearest(language, list(FAIRSEQ_LANGUAGE_CODES))}"
        )
    if d_model < 64 or d_model % 64:
        raise UserError(f"--d_model must be a multiple of 64, but is {d_model}.")
    limits = (("vocab_size", vocab_size, 100), ("layers", layers, 1), ("steps", steps, 1))
    for name, value, least in limits:
        if value < least:
            raise UserError(f"--{name} must be at least {least}, but is {value}.")
    _refuse_used(out)
    sentences = read_sentences(texts)
    say: Say = lambda line: print(f"standin_llm: {line}", flush=True)  # noqa: E731

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        # A few sentences are held out, to show what the model has learned.
        unique = list(dict.fromkeys(sentences))
        num_held = min(200, len(unique) // 20)
        held = {unique[i] for i in rng.permutation(len(unique))[:num_held]}
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


def read_sentences(texts: str) -> list[str]:
    """Non-empty lines of comma-separated files, spaces normalised.

    Raises UserError for a file that cannot be read.
    """
    sentences = []
    for name in filter(None, map(str.strip, texts.split(","))):
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8"
            if isinstance(error, OSError):
                reason = f"cannot be read ({error.strerror})"
            raise UserError(f"--texts must name text files, but {name} {reason}.") from None
        for line in lines:
            words = line.split()
            if words:
                sentences.append(" ".join(words))
    if len(sentences) < 10:
        count = len(sentences)
        raise UserError(
            f"--texts must hold at least 10 sentences, one per line, but {texts!r} holds "
            f"{count}."
        )
    return sentences


# --- tokenizer


# --- model and pretraining


def new_model(vocab_size: int, d_model: int, layers: int) -> MBartForConditionalGeneration:
    """Build mBART with random weights; head width 64, feed-forward width 4 x d_model."""
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
    # Learned positions begin as sinusoids of the words' size: at 0.02 against 0.3 a short
    # pretraining would not find the order of words, and positions beyond the longest
    # sentence would stay noise.
    for part in (model.model.encoder, model.model.decoder):
        table = part.embed_positions.weight
        waves = interleaved_sinusoids(*table.shape)
        with torch.no_grad():
            table.copy_(waves * config.init_std * math.sqrt(2 * d_model))
    return model


def interleaved_sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """(num_positions, width): sines and cosines in turn, root mean square 0.71."""
    # One frequency for each pair of a sine and a cosine.
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(num_positions)[:, None] * frequencies
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
        raise UserError(
            f"--texts must hold sentences of at most {MAX_PIECES} pieces, but all are "
            "longer."
        )
    num_longer = len(sentences) - len(encoded)
    if num_longer:
        say(f"{num_longer} sentences of more than {MAX_PIECES} pieces are left out.")
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
    endless = batches(list(map(len, encoded)), rng)
    for step, chosen in zip(range(steps), endless, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine_under_warmup(step, steps)
        # The model reads the words with masks, and writes them whole.
        sources, targets = [], []
        for i in chosen:
            sources.append(flat(infill(encoded[i], mask, rng)))
            targets.append(flat(encoded[i]))
        loss = model(**collate(sources, targets, code)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        now = time.perf_counter()
        if now - told > 5 or step + 1 == steps:
            done = step + 1
            pace = f"{done * BATCH / (now - started):.0f} sentences/s"
            left = (now - started) / done * (steps - done)
            mean = sum(losses[untold:]) / len(losses[untold:])
            say(f"step {done} of {steps}: loss {mean:.3f}, {pace}, {left:.0f} s left.")
            told, untold = now, len(losses)
    return losses


def cosine_under_warmup(step: int, steps: int) -> float:
    """What the learning rate is multiplied by: a cosine to zero over all steps.

    For the first twentieth of them it is at most a linear warm-up. (A run's own schedule,
    in training/schedule.py, begins its cosine where the warm-up ends.)
    """
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def encode(
    tokenizer: MBartTokenizer, sentences: Sequence[str], language: str
) -> list[list[list[int]]]:
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


def infill(
    words: Sequence[list[int]], mask: int, rng: np.random.Generator
) -> list[list[int]]:
    """The words with spans replaced by one <mask> each, as mBART's text infilling does.

    A span of length 0 inserts a mask. The number of masked words is rounded at random:
    its mean is exact.
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
        free = []
        for start in range(len(noised) - span + 1):
            if not any(word is masked for word in noised[start : start + span]):
                free.append(start)
        if free:
            start = free[int(rng.integers(len(free)))]
            noised[start : start + span] = [masked]
    return noised


def flat(words: Sequence[list[int]]) -> list[int]:
    """Return the ids of all words in one list."""
    return list(chain.from_iterable(words))


def batches(lengths: Sequence[int], rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield batches of BATCH sentences of like lengths, as indices, for ever.

    Every sentence comes once in each pass.
    """
    pool = 50 * BATCH
    while True:
        order = rng.permutation(len(lengths))
        for begin in range(0, len(order), pool):
            # Sentences of a part of the order, sorted by length, are cut into batches.
            bucket = sorted(order[begin : begin + pool].tolist(), key=lambda i: lengths[i])
            starts = np.arange(0, len(bucket), BATCH)
            for start in rng.permutation(starts):
                yield bucket[start : start + BATCH]


def collate(
    sources: list[list[int]], targets: list[list[int]], code: int
) -> dict[str, torch.Tensor]:
    """Encoder: pieces </s> code; decoder: code pieces; labels: pieces </s>, -100 where padded."""
    encoder, decoder, labels = [], [], []
    for ids in sources:
        encoder.append([*ids, EOS, code])
    for ids in targets:
        decoder.append([code, *ids])
        labels.append([*ids, EOS])
    input_ids_BS = _pad(encoder, PAD)
    return {
        "input_ids": input_ids_BS,
        "attention_mask": input_ids_BS.ne(PAD).long(),
        "decoder_input_ids": _pad(decoder, PAD),
        "labels": _pad(labels, -100),
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
    """One line on how well sentences with one masked word each are restored by greedy
    decoding."""
    code, mask = tokenizer.convert_tokens_to_ids([language, "<mask>"])
    encoded = list(filter(None, encode(tokenizer, sentences, language)))
    model.eval()
    hypotheses: list[str] = []
    targets = list(map(flat, encoded))
    references = tokenizer.batch_decode(targets, skip_special_tokens=True)
    longest = max(map(len, targets))
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
    pairs = zip(hypotheses, references, strict=True)
    same = sum(hypothesis == reference for hypothesis, reference in pairs) / len(references)
    bleu = score(hypotheses, references, language).bleu4
    return (
        f"{len(references)} held-out sentences with one word masked, restored greedily: "
        f"BLEU-4 {bleu:.1f}, {same:.0%} exactly."
    )


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            "--out must be a new or an empty folder, but there is something already: "
            f"{out}."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be made, but {out.parent} cannot "
            f"({error.strerror})."
        ) from None


def _write_whole(
    model: MBartForConditionalGeneration, tokenizer: MBartTokenizer, out: Path
) -> None:
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
            f"--out must be a folder that can be written, but {out} cannot "
            f"({error.strerror})."
        ) from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
