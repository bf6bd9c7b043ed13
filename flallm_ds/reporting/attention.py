"""Attention over time: which moments of a clip each word of its hypothesis came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flallm_ds import dist
from flallm_ds.batch import Batch
from flallm_ds.data.loader import Loader
from flallm_ds.data.mixture import open_indexes
from flallm_ds.data.plan import EpochPlan
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.data.text.languages import word_rule
from flallm_ds.errors import UserError
from flallm_ds.inference.evaluate import split_loader
from flallm_ds.inference.translator import Translator
from flallm_ds.models.attention import visual_attention
from flallm_ds.models.pretrained import first_line
from flallm_ds.reporting.clips import shards_of
from flallm_ds.reporting.runs import Run

# Columns of a heat map; more would be narrower than a pixel of a small screen.
MAX_COLUMNS = 96
LEVELS = 255


@dataclass(frozen=True)
class HeatMap:
    """The attention of one hypothesis.

    words: of the hypothesis. levels: for each word and part of the time, from 0 to
    `LEVELS`, which is the highest of the word. on_video: share of each word's attention
    that went to the video, from 0 to 1; the rest went to text.
    """

    words: Sequence[str]
    levels: Sequence[Sequence[int]]
    on_video: Sequence[float]


def heat_maps(
    run: Run, split: str, keys: Sequence[str], hub_code: bool = False
) -> dict[str, HeatMap | str]:
    """Return {key: heat map, or why there is none} of clips that a run was evaluated on."""
    evaluation = run.evaluations.get(split)
    if evaluation is None or not keys:
        return {}
    hypothesis_of = {clip.key: clip.hypothesis for clip in evaluation.hypotheses}
    found: dict[str, HeatMap | str] = {}
    try:
        translator = Translator.from_pretrained(run.folder, hub_code=hub_code)
        loader = _loader(translator, run, split, keys)
        for batch in loader:
            (key,) = batch.keys
            if key in hypothesis_of:
                found[key] = _heat_map(translator, batch, hypothesis_of[key])
    except UserError as error:
        return dict.fromkeys(keys, f"The attention cannot be shown: {error}")
    # Remote code and unusual architectures may raise anything.
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {first_line(error)}"
        return dict.fromkeys(
            keys, f"This language model does not give its attention: {reason}"
        )
    return found


def _loader(translator: Translator, run: Run, split: str, keys: Sequence[str]) -> Loader:
    """Return a loader with one clip in each batch, which reads as the evaluation did."""
    world = dist.World(rank=0, size=1, local_rank=0, local_size=1)
    cache = CacheOptions.of_run(run.config.data)
    index = open_indexes(shards_of(run, split), split, cache)
    reader = split_loader(translator, index, str(run.folder), world, threads=1).reader
    names, wanted = index.strings("key"), set(keys)
    rows = [row for row in range(len(index)) if names[row] in wanted]
    plan = EpochPlan(
        order=np.array(rows, np.int64),
        passes=np.zeros(len(rows), np.int64),
        ends=np.arange(1, len(rows) + 1),
        num_kept=reader.num_places(),
        num_micro_batches=1,
    )
    return Loader(reader, plan)


def _heat_map(translator: Translator, batch: Batch, hypothesis: str) -> HeatMap | str:
    codec = translator.export.codec
    features_ND, _ = translator.features(batch)
    (wording,) = translator.wordings(batch)
    ids = codec.encode(hypothesis)
    attention_LS = visual_attention(translator.export.translator, features_ND, wording, ids)
    if attention_LS is None:
        return "This language model has no attention from words to frames."
    characters = word_rule(codec.language or batch.languages[0]) != "13a"
    # The last token is the end of the sentence.
    words, tokens_of_word = words_of(codec.decode, ids[:-1], characters)
    return heat_map(words, tokens_of_word, attention_LS.cpu().numpy())


def words_of(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], characters: bool
) -> tuple[list[str], list[list[int]]]:
    """Return the words of a sentence, and the positions of the tokens of each.

    decode: from token ids to text. characters: each character is a word, or several
    where a token has several.
    """
    separator = "" if characters else " "

    def split(text: str) -> list[str]:
        return list("".join(text.split())) if characters else text.split()

    whole = split(decode(ids))
    words: list[str] = []
    tokens_of_word: list[list[int]] = []
    before_first: list[int] = []  # tokens that are no text yet
    num_done = 0
    for position in range(len(ids)):
        # A token that adds no word belongs to the last one.
        num = min(len(split(decode(ids[: position + 1]))), len(whole))
        if num > num_done:
            words.append(separator.join(whole[num_done:num]))
            tokens_of_word.append([*before_first, position])
            before_first, num_done = [], num
        elif words:
            tokens_of_word[-1].append(position)
        else:
            before_first.append(position)
    return words, tokens_of_word


def heat_map(
    words: Sequence[str], tokens_of_word: Sequence[Sequence[int]], attention_LS: np.ndarray
) -> HeatMap:
    """Return the heat map of a sentence: the mean over the tokens of a word, and over the
    visual tokens of a column."""
    num_tokens = attention_LS.shape[1]
    num_columns = min(MAX_COLUMNS, num_tokens)
    bounds = np.arange(num_columns + 1) * num_tokens // num_columns
    levels, on_video = [], []
    for tokens in tokens_of_word:
        row_S = attention_LS[list(tokens)].mean(0)
        means = np.add.reduceat(row_S, bounds[:-1]) / np.diff(bounds)
        scaled = means / max(float(means.max()), 1e-12) * LEVELS
        levels.append(scaled.round().astype(int).tolist())
        on_video.append(round(float(row_S.sum()), 3))
    return HeatMap(list(words), levels, on_video)
