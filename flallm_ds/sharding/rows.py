"""From a corpus's tables to the rows that become clips.

Whether videos are there, and texts can be stored, is checked here, the same for every
corpus.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds.data.codecs.video import image_paths
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    csl_daily,
    how2sign,
    is_blank,
    manifest,
    openasl,
    phoenix14t,
    signsim,
    youtube_asl,
)
from flallm_ds.sharding.encode import common_box
from flallm_ds.sharding.faults import Fault
from flallm_ds.sharding.options import Options

CORPORA: dict[str, Callable[..., Corpus]] = {
    "phoenix14t": phoenix14t.read,
    "csl_daily": csl_daily.read,
    "how2sign": how2sign.read,
    "openasl": openasl.read,
    "youtube_asl": youtube_asl.read,
    "youtube_sl25": youtube_asl.read_sl25,
    "manifest": manifest.read,
    "signsim": signsim.read,
}
# Seed of the order in which the clips of a training split are put into shards.
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Clip:
    """A usable row. key: its number in its table. stamp: sizes and times of its source files."""

    key: str
    row: Row
    stamp: str


def read_corpus(
    importer: str, source: Path, options: Options, own: Mapping[str, Any]
) -> tuple[Corpus, dict[str, list[Row]]]:
    """Return what an importer reads of a source, and the rows of each split that --limit leaves.

    own: the importer's own options. Raises UserError if there is no source.
    """
    if not source.exists():
        raise UserError(f"--source must exist, but does not: {source}. Check the path.")
    corpus = CORPORA[importer](source, options.splits, **own)
    rows = {split: table[: options.limit] for split, table in corpus.rows.items()}
    return corpus, rows


def check_rows(
    rows: dict[str, list[Row]],
    options: Options,
) -> tuple[dict[str, list[Clip]], list[Fault]]:
    """Return each split's usable rows as clips in stored order, and the faults of the others."""
    # Many rows are cut from one video: look at each file once, which is slow on a network
    # disk.
    stamps: dict[Path, str] = {}
    faults: list[Fault] = []
    clips: dict[str, list[Clip]] = {}
    for split, table in rows.items():
        usable = []
        for number, row in enumerate(table):
            if row.path not in stamps:
                stamps[row.path] = stamp(row.path)
            fault = _fault_of(split, row, stamps[row.path], options)
            if fault is None:
                usable.append(Clip(f"{number:08d}", row, stamps[row.path]))
            else:
                faults.append(fault)
        clips[split] = stored_order(split, usable)
    return clips, faults


def _fault_of(split: str, row: Row, video_stamp: str, options: Options) -> Fault | None:
    """Return why a row cannot become a clip, as far as that is seen without decoding its
    video."""
    if not video_stamp:
        return Fault("without video", f"{split} {row.id} has no frames at {row.path}")
    if is_blank(row.text):
        shown = (
            f"a text without visible characters: {row.text!a}"
            if row.text
            else "an empty text"
        )
        return Fault("without text", f"{split} {row.id} has {shown}")
    # A JSON manifest may hold half of a surrogate pair, which UTF-8 cannot store.
    if not is_unicode(row):
        return Fault(
            "no Unicode", f"{split} {row.id!a} holds half a character: {row.text!a}"
        )
    # Neither a box nor a crop: the whole picture.
    x0, y0, x1, y1 = common_box(row.bbox, options.crop) or (0, 0, 1, 1)
    if x0 >= x1 or y0 >= y1:
        return Fault("outside the crop", f"{split} {row.id} has a box outside --crop")
    return None


def is_unicode(row: Row) -> bool:
    """Whether all of a row's strings can be written: JSON may hold half of a surrogate pair."""
    try:
        "".join((row.id, row.text, row.language, row.signer, row.video, row.gloss)).encode()
    except UnicodeEncodeError:
        return False
    return True


def stored_order(split: str, clips: Sequence[Clip]) -> list[Clip]:
    """Put training clips in a fixed shuffled order, dev and test clips in that of their
    tables."""
    if split != "train":
        return list(clips)

    # Each key is hashed separately: if a row is skipped, all others keep their order.
    def draw(clip: Clip) -> bytes:
        return hashlib.sha256(f"{SHUFFLE_SEED} {clip.key}".encode()).digest()

    # Corpora are sorted by broadcast or video: neighbours would share every batch.
    return sorted(clips, key=draw)


def stamp(path: Path) -> str:
    """Return the sizes and, after a space, the times of a video file or of a folder's images.

    Returns "" if there are none. Whether they decode is not checked.
    """
    try:
        if path.is_file():
            found = path.stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        # A clip of images may have hundreds of files: two digests stand for them.
        sizes, times = [], []
        for image in image_paths(path):
            found = image.stat()
            sizes.append((image.name, found.st_size))
            times.append(found.st_mtime_ns)
    # ValueError: a table may hold a name that no file can have, such as one with a NUL.
    except (OSError, ValueError):
        return ""
    if not sizes:
        return ""
    return f"{digest(sizes)} {digest(times)}"


def digest(parts: Iterable[Any]) -> str:
    """Return sixteen hex digits that depend on plain values and their order."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(json.dumps(part).encode() + b"\n")
    return sha256.hexdigest()[:16]


def read_source(
    shards: Mapping[str, Any],
    source: Path,
) -> tuple[Options, dict[tuple[str, str], Clip]]:
    """Read a corpus as the build of existing shards did.

    shards: their index.json. Returns the options of the build, and the clips by split and
    key; clips that the corpus no longer has are left out. Raises UserError if it is not a
    corpus of that kind.
    """
    if shards.get("importer") not in CORPORA:
        raise UserError(
            "shards must say by which importer they were made, but these do not. Build "
            "them again, or use --repair=drop."
        )
    # JSON has no tuples: a list was a tuple.
    given: dict[str, Any] = {}
    for name, value in shards["options"].items():
        given[name] = tuple(value) if isinstance(value, list) else value
    # Earlier versions could align subtitles with speech.
    if given.pop("align", None) is not None:
        raise UserError(
            "shards that were built with --align cannot be rebuilt, because there is no "
            "--align any more. Use --repair=drop."
        )
    options = Options.taken_from(given)
    _, rows = read_corpus(shards["importer"], source, options, given)
    clips, _ = check_rows(rows, options)
    found = {}
    for split, some in clips.items():
        for clip in some:
            found[split, clip.key] = clip
    return options, found
