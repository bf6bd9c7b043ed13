"""Pretrain a small mBART for machines that cannot download `facebook/mbart-large-cc25`.

The same AutoTokenizer and AutoModelForSeq2SeqLM calls as for the real model read the
folder. As in the real model, neither the language nor the start of the decoder is stored: a
caller must set both.

B sentences of a batch, S tokens of the longest one, T generated tokens.
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

from flallm_ds.data.text.languages import language_tokens, token_of, word_rule
from flallm_ds.errors import UserError
from flallm_ds.files import new_folder, share_files
from flallm_ds.metrics import score
from flallm_ds.models.llm.standin_tokenizer import train_tokenizer

PAD, EOS = 1, 2
# Longer sentences are left out.
MAX_TOKENS = 128
BATCH = 32
# The peak learning rate for a width of 256. It falls with the square root of the width.
PEAK_LR_AT_256 = 1e-3
# mBART (arXiv 2001.08210): the share of masked words, and the Poisson mean of the lengths
# of masked spans.
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
    """Train a tokenizer, pretrain a small mBART by denoising, and write both to a folder.

    texts: files with one sentence per line, separated by commas. language: one of the 25
    languages of mBART, by any name. vocab_size: most vocabulary entries, including 30
    special tokens. layers: of the encoder and of the decoder. steps: number of batches of
    32 sentences; 300 steps take half a minute on two CPU cores at the default size. Raises
    UserError for wrong options, or if a file cannot be read or written.
    """
    places = language_tokens(FAIRSEQ_LANGUAGE_CODES)
    found = token_of(language, places, "language")
    assert found is not None  # mBART has a token for each of its languages
    language, _ = found
    if d_model < 64 or d_model % 64:
        raise UserError(f"--d_model must be a multiple of 64, got {d_model}.")
    limits = (("vocab_size", vocab_size, 100), ("layers", layers, 1), ("steps", steps, 1))
    for name, value, least in limits:
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}.")
    _check_out(out)
    sentences = read_sentences(texts)
    say: Say = lambda line: print(f"standin_llm: {line}", flush=True)  # noqa: E731

    # The generator of the caller must not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        # A few sentences are held out to evaluate the model.
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
    _write(model, tokenizer, out)
    say(f"written to {out}.")


def read_sentences(texts: str) -> list[str]:
    """Return the lines of comma-separated files, with single spaces and no empty lines.

    Raises UserError if a file cannot be read, or if there are fewer than 10 sentences.
    """
    sentences = []
    for name in filter(None, map(str.strip, texts.split(","))):
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8"
            if isinstance(error, OSError):
                reason = str(error.strerror)
            raise UserError(f"Cannot read {name}: {reason}. Check --texts.") from None
        for line in lines:
            words = line.split()
            if words:
                sentences.append(" ".join(words))
    if len(sentences) < 10:
        raise UserError(
            f"--texts must hold at least 10 sentences, one per line, got {len(sentences)} in "
            f"{texts}. Add sentences."
        )
    return sentences


# --- model and pretraining


def new_model(vocab_size: int, d_model: int, layers: int) -> MBartForConditionalGeneration:
    """Build mBART with random weights, heads of width 64 and 4 x d_model feed-forward."""
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
    # Learned positions start as sinusoids of the size of embedded words, 0.3. With the
    # usual 0.02 a short pretraining would not learn the order of words, and positions after
    # the longest sentence would stay noise.
    for part in (model.model.encoder, model.model.decoder):
        table = part.embed_positions.weight
        waves = interleaved_sinusoids(*table.shape)
        with torch.no_grad():
            table.copy_(waves * config.init_std * math.sqrt(2 * d_model))
    return model


def interleaved_sinusoids(num_positions: int, width: int) -> torch.Tensor:
    """Return (num_positions, width): alternating sines and cosines, RMS 0.71."""
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
    """Train the model to denoise sentences; return the loss of each step (mean per token).

    Raises UserError if all sentences are longer than MAX_TOKENS.
    """
    encoded = encode(tokenizer, sentences, language)
    if not encoded:
        raise UserError(
            f"--texts must hold sentences of at most {MAX_TOKENS} tokens, got only longer "
            "ones. Give other texts."
        )
    num_longer = len(sentences) - len(encoded)
    if num_longer:
        say(f"{num_longer} sentences of more than {MAX_TOKENS} tokens are left out.")
    code, mask = tokenizer.convert_tokens_to_ids([language, "<mask>"])
    peak = PEAK_LR_AT_256 * math.sqrt(256 / model.config.d_model)
    # fused: 7 ms a step instead of 23 ms at the default size on two CPU cores.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    model.train()
    losses: list[float] = []
    started = reported = time.perf_counter()
    num_reported = 0
    drawn = batches(list(map(len, encoded)), rng)
    for step, chosen in zip(range(steps), drawn, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine_under_warmup(step, steps)
        # The encoder reads the words with masks, the decoder writes the complete sentence.
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
        # Every five seconds and at the end, report the mean loss since the last report.
        now = time.perf_counter()
        if now - reported > 5 or step + 1 == steps:
            done = step + 1
            pace = f"{done * BATCH / (now - started):.0f} sentences/s"
            left = (now - started) / done * (steps - done)
            mean = sum(losses[num_reported:]) / len(losses[num_reported:])
            say(f"step {done} of {steps}: loss {mean:.3f}, {pace}, {left:.0f} s left.")
            reported, num_reported = now, len(losses)
    return losses


def cosine_under_warmup(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a cosine over all steps, down to zero.

    In the first twentieth of the steps a linear warm-up limits it. (In the schedule of a
    run, training/schedule.py, the cosine starts after the warm-up.)
    """
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def encode(
    tokenizer: MBartTokenizer, sentences: Sequence[str], language: str
) -> list[list[list[int]]]:
    """Return sentences as lists of words, and words as lists of ids.

    Sentences of more than MAX_TOKENS tokens are left out.
    """
    # In languages without spaces each token counts as a word.
    spaceless = word_rule(language) != "13a"
    encoded = []
    for ids in tokenizer(list(sentences), add_special_tokens=False)["input_ids"]:
        if len(ids) > MAX_TOKENS:
            continue
        words: list[list[int]] = []
        tokens = tokenizer.convert_ids_to_tokens(ids)
        for token_id, token in zip(ids, tokens, strict=True):
            # The first token of a word starts with ▁.
            if spaceless or token.startswith("▁") or not words:
                words.append([token_id])
            else:
                words[-1].append(token_id)
        encoded.append(words)
    return encoded


def infill(
    words: Sequence[list[int]], mask: int, rng: np.random.Generator
) -> list[list[int]]:
    """Replace several spans of words by one <mask> each, as mBART's text infilling does.

    A span of length 0 inserts a mask. The number of masked words is rounded at random, so
    that its mean is exact.
    """
    # Draw lengths of spans until they add up to the number of words to mask.
    num_left = int(len(words) * MASK_RATIO + rng.random())
    spans: list[int] = []
    while num_left > 0:
        spans.append(min(int(rng.poisson(MEAN_SPAN)), num_left))
        num_left -= spans[-1]
    noised = list(words)
    masked = [mask]
    for span in spans:
        # A span must not cover an earlier mask, or two masks would become one.
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
    """Yield batches of BATCH sentences of similar lengths, as indices, without end.

    Each pass contains every sentence once.
    """
    pool = 50 * BATCH
    while True:
        order = rng.permutation(len(lengths))
        for begin in range(0, len(order), pool):
            # Sort the sentences of a part of the order by length, and split them into
            # batches.
            bucket = sorted(order[begin : begin + pool].tolist(), key=lambda i: lengths[i])
            starts = np.arange(0, len(bucket), BATCH)
            for start in rng.permutation(starts):
                yield bucket[start : start + BATCH]


def collate(
    sources: list[list[int]], targets: list[list[int]], code: int
) -> dict[str, torch.Tensor]:
    """Return the arguments of the model for a batch, in the format of mBART.

    The encoder reads tokens, </s>, code; the decoder reads code, tokens; the labels are
    tokens, </s>, with -100 as padding.
    """
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
    """Return the rows as one tensor (B, S), padded with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


# --- evaluation and writing


def restored(
    model: MBartForConditionalGeneration,
    tokenizer: MBartTokenizer,
    sentences: Sequence[str],
    language: str,
    rng: np.random.Generator,
) -> str:
    """Mask one word in each sentence, restore it by greedy decoding, and return the result.

    The result is a line of text with BLEU-4 and the share of sentences without an error.
    """
    code, mask = tokenizer.convert_tokens_to_ids([language, "<mask>"])
    encoded = list(filter(None, encode(tokenizer, sentences, language)))
    model.eval()
    hypotheses: list[str] = []
    targets = list(map(flat, encoded))
    references = tokenizer.batch_decode(targets, skip_special_tokens=True)
    longest = max(map(len, targets))
    for begin in range(0, len(encoded), 50):
        # A random word of each of 50 sentences is replaced by <mask>.
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
    bleu = score(hypotheses, references, language, error_rates=False).bleu4
    return (
        f"{len(references)} held-out sentences with one word masked, restored greedily: "
        f"BLEU-4 {bleu:.1f}, {same:.0%} exactly."
    )


def _check_out(out: Path) -> None:
    """Raise UserError unless the folder is new or empty, and its parent can be created."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out must be a new or an empty folder, got {out}, which exists already. Give "
            "another folder."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create the folder {out.parent}: {error.strerror}. Check --out."
        ) from None


def _write(
    model: MBartForConditionalGeneration, tokenizer: MBartTokenizer, out: Path
) -> None:
    """Write the complete folder. Raises UserError if it cannot be written."""
    # transformers would print progress bars for files of a few megabytes.
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with new_folder(out) as folder:
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
            share_files(folder)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error.strerror}. Check --out.") from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
