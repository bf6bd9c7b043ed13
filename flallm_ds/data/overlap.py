"""Find clips of a split that are also in another one: scores on known clips mean nothing."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flallm_ds.data.index import Index

NUM_EXAMPLES = 3


class _Clip(NamedTuple):
    """What is compared of a clip."""

    id: str
    text: str
    video: str
    num_frames: int
    size: int


@dataclass(frozen=True)
class Overlap:
    """What the clips of a split share with another one.

    same_clips: ids of the clips that are in both. num_ids, num_videos, num_texts: clips
    whose id, source video or text the other split has.
    """

    num_clips: int
    same_clips: tuple[str, ...]
    num_ids: int
    num_videos: int
    num_texts: int

    @property
    def examples(self) -> str:
        """Return the first ids of the same clips."""
        more = ", ..." if len(self.same_clips) > NUM_EXAMPLES else ""
        return ", ".join(self.same_clips[:NUM_EXAMPLES]) + more


def overlap(first: Index, second: Index) -> Overlap:
    """Compare the clips of `second` with those of `first`.

    A clip is the same if id and text are equal and the source videos do not differ, or if
    source video, text, number of frames and size are equal. Texts are compared without
    case, punctuation and spaces. Equal texts alone are common: weather forecasts repeat.
    """
    clips = list(_clips(second))
    # Only first clips with a text of the second split can be the same.
    texts = {clip.text for clip in clips}
    ids, videos, known_texts = set(), set(), set()
    by_id: dict[tuple[str, str], set[str]] = {}
    whole: set[tuple[str, str, int, int]] = set()
    for clip in _clips(first):
        ids.add(clip.id)
        videos.add(clip.video)
        if clip.text in texts:
            known_texts.add(clip.text)
            by_id.setdefault((clip.id, clip.text), set()).add(clip.video)
            whole.add(clip[1:])
    videos.discard("")
    same = []
    for clip in clips:
        others = by_id.get((clip.id, clip.text), set())
        agrees = bool(others) and (not clip.video or bool({clip.video, ""} & others))
        if agrees or (clip.video and clip[1:] in whole):
            same.append(clip.id)
    return Overlap(
        len(clips),
        tuple(same),
        num_ids=sum(clip.id in ids for clip in clips),
        num_videos=sum(clip.video in videos for clip in clips),
        num_texts=sum(clip.text in known_texts for clip in clips),
    )


def plain_text(text: str) -> str:
    """Return a text without case, punctuation and spaces, to compare sentences."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, normal))


def _clips(index: Index) -> Iterable[_Clip]:
    texts = map(plain_text, index.strings("text"))
    return map(
        _Clip,
        index.strings("id"),
        texts,
        index.strings("video"),
        index.num_frames.tolist(),
        index.arrays["size"].tolist(),
    )
