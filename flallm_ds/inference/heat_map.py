"""Heat maps of attention: from which moments of a clip each word of its sentence came.

`heat_map.js` and `heat_map.css`, next to this file, draw them on the pages of `flallm report`
and `flallm demo`.
S visual tokens of one clip, L tokens of its sentence, D width of the features.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flallm_ds.data.text.languages import word_rule
from flallm_ds.data.text.prompt import Wording
from flallm_ds.export import Export
from flallm_ds.models.attention import visual_attention
from flallm_ds.models.pretrained import first_line

# Columns of a heat map; more would be narrower than a pixel of a small screen.
MAX_COLUMNS = 96
LEVELS = 255


@dataclass(frozen=True)
class HeatMap:
    """The attention of one sentence.

    words: of the sentence. levels: for each word and part of the time, from 0 to `LEVELS`,
    which is the highest of the word; the parts are of equal length. on_video: share of each
    word's attention that went to the video, from 0 to 1; the rest went to text.
    """

    words: Sequence[str]
    levels: Sequence[Sequence[int]]
    on_video: Sequence[float]


def as_json(found: HeatMap | str) -> dict[str, Any]:
    """Return what `heat_map.js` reads: a heat map, or {"problem": why there is none}."""
    return {"problem": found} if isinstance(found, str) else asdict(found)


def page_file(kind: str) -> str:
    """Return the text of heat_map.js or heat_map.css. kind: "js" or "css"."""
    return (Path(__file__).parent / f"heat_map.{kind}").read_text(encoding="utf-8")


def heat_map_of(
    loaded: Export,
    features_SD: torch.Tensor,
    wording: Wording,
    ids: Sequence[int],
    language: str,
) -> HeatMap | str:
    """Return the heat map of a sentence, or a sentence that says why there is none.

    The language model reads the sentence once, without a search. features_SD: of one clip,
    as the language model reads them. wording: the text around them. ids: tokens of the
    sentence, with or without an end of sentence. language: of the sentence; ignored if the
    model has one target language.
    """
    codec = loaded.codec
    try:
        attention_LS = visual_attention(loaded.translator, features_SD, wording, ids)
    except torch.OutOfMemoryError:
        return "The attention cannot be shown: the GPU has not enough memory for it."
    # Remote code and unusual architectures may raise anything.
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {first_line(error)}"
        return f"This language model does not give its attention: {reason}"
    if attention_LS is None:
        return "This language model has no attention from words to frames."
    if not attention_LS.isfinite().all():
        return "The attention cannot be shown: some of its values are not finite."
    characters = word_rule(codec.language or language) != "13a"
    ended = ids[-1] == codec.eos_id
    words, tokens_of_word = words_of(codec.decode, ids[:-1] if ended else ids, characters)
    return heat_map(words, tokens_of_word, attention_LS.cpu().numpy())


def words_of(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], characters: bool
) -> tuple[list[str], list[list[int]]]:
    """Return the words of a sentence, and the positions of the tokens of each.

    decode: from token ids to text. ids: without an end of sentence. characters: each
    character is a word, or several where a token has several.
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
