"""Read How2Sign: American sign language, instructional speech, front camera.

Clips are cut from the raw videos by the re-aligned times. The ready-made sentence clips
were cut by the original times, which are misaligned. They are used if they cover more rows
of a split than the raw videos; a note reports it.
"""

import re
from pathlib import Path

from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    check_text,
    find_file,
    first_line,
    parse_seconds,
    read_table,
)
from flallm_ds.sharding.corpora.videos import Videos

_COLUMNS = (
    "VIDEO_ID",
    "VIDEO_NAME",
    "SENTENCE_NAME",
    "START_REALIGNED",
    "END_REALIGNED",
    "SENTENCE",
)
# Names of the splits in the folders and files of the corpus.
_OWN_SPLITS = {"train": "train", "dev": "val", "test": "test"}


def read(source: Path, splits: tuple[str, ...], *, repair_mojibake: bool = False) -> Corpus:
    """How2Sign. --source: the folder with sentence_level (and video_level for raw videos).

    --repair_mojibake=true fixes texts such as "horseâ€™s" (163 sentences of train, 23 of
        test).
    """
    if not source.is_dir():
        raise UserError(
            f"--source must be the How2Sign folder, got {source}, which is not a folder. "
            "Check the path."
        )
    videos = Videos(source)
    rows, notes = {}, []
    for split in splits:
        own_split = _OWN_SPLITS[split]
        rows[split], split_notes = read_rows(source, own_split, videos, repair_mojibake)
        notes += [f"{split}: {note}" for note in split_notes]
    return Corpus("how2sign", "en", rows, notes)


def read_rows(
    source: Path,
    split: str,
    videos: Videos,
    repair: bool,
) -> tuple[list[Row], list[str]]:
    """Read the rows of the re-aligned table of a split, separated by TABs or commas.

    Returns (rows, notes for the user).
    """
    table = _find_table(source, split)
    delimiter = "\t" if "\t" in first_line(table) else ","
    lines = list(read_table(table, delimiter, _COLUMNS))
    paths, raw, notes = _choose_videos(lines, split, videos)
    rows, num_garbled = [], 0
    for line, fields in lines:
        what = f"{table}, line {line}:"
        text = fields["SENTENCE"]
        fixed = fix_mojibake(text)
        # Check the fixed text: the bytes of a garbled letter may be control characters.
        check_text(fixed.strip(), f"{what} SENTENCE")
        num_garbled += fixed != text
        # Ready-made clips are not cut again, but a wrong time is still an error.
        start_s = parse_seconds(
            fields["START_REALIGNED"], f"{what} START_REALIGNED", required=raw
        )
        end_s = parse_seconds(
            fields["END_REALIGNED"], f"{what} END_REALIGNED", required=raw
        )
        name = fields["VIDEO_NAME"] if raw else fields["SENTENCE_NAME"]
        signer = re.search(r"-([0-9]+)-rgb_", fields["VIDEO_NAME"])
        rows.append(
            Row(
                id=fields["SENTENCE_NAME"],
                path=paths.get(name, source / f"{name}.mp4"),
                text=(fixed if repair else text).strip(),
                language="en",
                signer=signer[1] if signer else "",
                video=fields["VIDEO_ID"],
                start_s=start_s if raw else None,
                end_s=end_s if raw else None,
            )
        )
    if num_garbled:
        done = "kept as they are (--repair_mojibake=true fixes them)"
        if repair:
            done = "repaired"
        notes.append(f"{num_garbled:,} texts with garbled characters, {done}")
    return rows, notes


def _choose_videos(
    lines: list[tuple[int, dict[str, str]]], split: str, videos: Videos
) -> tuple[dict[str, Path], bool, list[str]]:
    """Choose raw videos, or ready-made clips if more rows have one.

    Returns (path by video name, whether they are raw videos, notes for the user).
    """
    raw_names: dict[str, tuple[str]] = {}
    ready_names: dict[str, tuple[str]] = {}
    num_raw = num_ready = 0
    for _, fields in lines:
        video, sentence = fields["VIDEO_NAME"], fields["SENTENCE_NAME"]
        raw_names[video], ready_names[sentence] = (video,), (sentence,)
        num_raw += videos.have(raw_names[video])
        num_ready += videos.have(ready_names[sentence])
    raw = num_raw > 0 and num_raw >= num_ready
    if raw:
        names, level, num_found = raw_names, "video_level", num_raw
        kind = "cut from the raw videos by the re-aligned times"
    else:
        names, level, num_found = ready_names, "sentence_level", num_ready
        kind = "ready-made, cut by the original times"
    paths, notes = videos.choose(names, f"{level}/{split}/rgb_front/raw_videos")
    note = f"clips {kind} ({num_found:,} of {len(lines):,} rows have a video)"
    return paths, raw, [note, *notes]


# The first byte of a letter in UTF-8, decoded as Latin-1, and up to three bytes after it.
_GARBLED = re.compile(r"[\u00c2-\u00f4][^\x00-\x7f]{1,3}")


def fix_mojibake(text: str) -> str:
    """Correct UTF-8 that was read as Windows-1252 or Latin-1 ("horseâ€™s").

    Any other text is returned unchanged.
    """

    def fix(match: re.Match[str]) -> str:
        # Decode the longest prefix that is UTF-8: the last letters may be correct already.
        for length in range(len(match[0]), 1, -1):
            garbled, rest = match[0][:length], match[0][length:]
            try:
                return b"".join(map(_byte, garbled)).decode("utf-8") + rest
            except (UnicodeError, ValueError):
                continue
        return match[0]

    return _GARBLED.sub(fix, text)


def _byte(character: str) -> bytes:
    """Return the byte that was decoded as this character.

    Windows-1252 leaves five bytes undefined; these are decoded as Latin-1.
    """
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return bytes([ord(character)])  # ValueError above 255


def _find_table(source: Path, split: str) -> Path:
    name = f"how2sign_realigned_{split}.csv"
    found = find_file(
        source, f"sentence_level/{split}/text/en/raw_text/re_aligned/{name}", name
    )
    if found is None:
        raise UserError(
            f"Cannot find {name} below {source}: each split needs its re-aligned table. "
            "Download it, or set --splits to the splits that you have."
        )
    return found
