"""Read the rows of a corpus and select those that can become clips.

The checks are the same for every corpus: each row must have a video and a text that can be
stored.
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
    """Hold a row that can become a clip.

    key: the number of the row in its table. stamp: sizes and times of the source files.
    """

    key: str
    row: Row
    stamp: str


def read_corpus(
    importer: str, source: Path, options: Options, importer_options: Mapping[str, Any]
) -> tuple[Corpus, dict[str, list[Row]]]:
    """Read a corpus. Return it, and the first rows of each split up to --limit.

    Raises UserError if the source does not exist.
    """
    if not source.exists():
        raise UserError(
            f"--source must be an existing file or folder, got {source}. Check the path."
        )
    corpus = CORPORA[importer](source, options.splits, **importer_options)
    rows = {split: table[: options.limit] for split, table in corpus.rows.items()}
    return corpus, rows


def check_rows(
    rows: dict[str, list[Row]],
    options: Options,
) -> tuple[dict[str, list[Clip]], list[Fault]]:
    """Return the usable rows of each split as clips in stored order, and all faults."""
    # Many rows are cut from one video. Read the size and time of each file once: this is
    # slow on a network disk.
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
    """Return the reason why a row cannot become a clip, without decoding the video."""
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
    # Without a box and a crop, the clip has the whole frame.
    x0, y0, x1, y1 = common_box(row.bbox, options.crop) or (0, 0, 1, 1)
    if x0 >= x1 or y0 >= y1:
        return Fault("outside the crop", f"{split} {row.id} has a box outside --crop")
    return None


def is_unicode(row: Row) -> bool:
    """Return whether all strings of a row can be encoded as UTF-8."""
    try:
        "".join((row.id, row.text, row.language, row.signer, row.video, row.gloss)).encode()
    except UnicodeEncodeError:
        return False
    return True


def stored_order(split: str, clips: Sequence[Clip]) -> list[Clip]:
    """Return training clips in a fixed shuffled order, other clips in table order."""
    if split != "train":
        return list(clips)

    # Each key is hashed separately: if a row is skipped, all others keep their order.
    def draw(clip: Clip) -> bytes:
        return hashlib.sha256(f"{SHUFFLE_SEED} {clip.key}".encode()).digest()

    # Corpora are sorted by broadcast or video. Unshuffled, a batch would have clips of one
    # video only.
    return sorted(clips, key=draw)


def stamp(path: Path) -> str:
    """Return "SIZES TIMES" of a video file or of the images of a folder.

    Returns "" if there is no file. Does not check whether the files decode.
    """
    try:
        if path.is_file():
            found = path.stat()
            return f"{found.st_size} {found.st_mtime_ns}"
        # A clip of images may have hundreds of files: digests keep the stamp short.
        sizes, times = [], []
        for image in image_paths(path):
            found = image.stat()
            sizes.append((image.name, found.st_size))
            times.append(found.st_mtime_ns)
    # ValueError: a table may contain an impossible file name, such as one with a NUL.
    except (OSError, ValueError):
        return ""
    if not sizes:
        return ""
    return f"{digest(sizes)} {digest(times)}"


def digest(parts: Iterable[Any]) -> str:
    """Return a digest of plain values in their order, 16 hex digits."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(json.dumps(part).encode() + b"\n")
    return sha256.hexdigest()[:16]


def read_source(
    shards: Mapping[str, Any],
    source: Path,
) -> tuple[Options, dict[tuple[str, str], Clip]]:
    """Read a corpus with the options of an earlier build.

    shards: the content of index.json. Returns the options, and the clips by (split, key).
    Clips that are no longer in the corpus are missing. Raises UserError if the source is
    not a corpus of the same kind.
    """
    if shards.get("importer") not in CORPORA:
        raise UserError(
            "Cannot rebuild the shards: index.json does not name a known importer. Build "
            "them again from the start, or use --repair=drop."
        )
    # JSON stores a tuple as a list.
    given: dict[str, Any] = {}
    for name, value in shards["options"].items():
        given[name] = tuple(value) if isinstance(value, list) else value
    # Earlier versions could align subtitles with speech.
    if given.pop("align", None) is not None:
        raise UserError(
            "Cannot rebuild the shards: they were built with --align, and this version has "
            "no such option. Use --repair=drop."
        )
    options = Options.taken_from(given)
    _, rows = read_corpus(shards["importer"], source, options, given)
    clips, _ = check_rows(rows, options)
    found = {}
    for split, some in clips.items():
        for clip in some:
            found[split, clip.key] = clip
    return options, found
