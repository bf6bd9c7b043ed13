"""How2Sign: American sign language, instructional speech, front camera.

The right clips are cut from the raw videos by the re-aligned times. The ready-made
sentence clips were cut with the original, misaligned times: they are used where they
cover more rows of a split, and a note says so.
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
    read_seconds,
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
# The corpus's own names of the splits, in folders and files.
_OWN_SPLITS = {"train": "train", "dev": "val", "test": "test"}


def read(source: Path, splits: tuple[str, ...], *, repair_mojibake: bool = False) -> Corpus:
    """How2Sign. --source: the folder that holds sentence_level (and video_level for raw videos).

    --repair_mojibake=true mends texts such as "horseâ€™s" (163 sentences of train, 23 of test).
    """
    if not source.is_dir():
        wanted = "--source must be the How2Sign folder"
        raise UserError(f"{wanted}, but is no folder: {source}. Check --source.")
    videos = Videos(source)
    rows, notes = {}, []
    for split in splits:
        rows[split], said = read_rows(source, _OWN_SPLITS[split], videos, repair_mojibake)
        notes += [f"{split}: {note}" for note in said]
    return Corpus("how2sign", "en", rows, notes)


def read_rows(
    source: Path,
    split: str,
    videos: Videos,
    repair: bool,
) -> tuple[list[Row], list[str]]:
    """Read the rows of a split's re-aligned table, separated by TABs or commas.

    Returns (the rows, notes on how they were read).
    """
    table = _find_table(source, split)
    delimiter = "\t" if "\t" in first_line(table) else ","
    lines = list(read_table(table, delimiter, _COLUMNS))
    paths, raw, notes = _choose_videos(lines, split, videos)
    rows, num_garbled = [], 0
    for line, fields in lines:
        what = f"{table}, line {line}:"
        text = fields["SENTENCE"]
        mended = mend_mojibake(text)
        # The mended text: the bytes of a garbled letter may be shown as control
        # characters.
        check_text(mended.strip(), f"{what} a sentence")
        num_garbled += mended != text
        # Ready-made clips are not cut again, but a time that is no time is an error.
        start_s = read_seconds(
            fields["START_REALIGNED"], f"{what} START_REALIGNED", required=raw
        )
        end_s = read_seconds(fields["END_REALIGNED"], f"{what} END_REALIGNED", required=raw)
        name = fields["VIDEO_NAME"] if raw else fields["SENTENCE_NAME"]
        signer = re.search(r"-([0-9]+)-rgb_", fields["VIDEO_NAME"])
        rows.append(
            Row(
                id=fields["SENTENCE_NAME"],
                path=paths.get(name, source / f"{name}.mp4"),
                text=(mended if repair else text).strip(),
                language="en",
                signer=signer[1] if signer else "",
                video=fields["VIDEO_ID"],
                start_s=start_s if raw else None,
                end_s=end_s if raw else None,
            )
        )
    if num_garbled:
        done = "kept as they are (--repair_mojibake=true mends them)"
        if repair:
            done = "repaired"
        notes.append(f"{num_garbled:,} texts with garbled characters, {done}")
    return rows, notes


def _choose_videos(
    lines: list[tuple[int, dict[str, str]]], split: str, videos: Videos
) -> tuple[dict[str, Path], bool, list[str]]:
    """Choose raw videos, or ready-made clips where more rows have one.

    Returns (the video by its name, whether it is a raw one, notes).
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
        names, level, num_there = raw_names, "video_level", num_raw
        kind = "cut from the raw videos by the re-aligned times"
    else:
        names, level, num_there = ready_names, "sentence_level", num_ready
        kind = "ready-made, cut by the original times"
    paths, said = videos.choose(names, f"{level}/{split}/rgb_front/raw_videos")
    note = f"clips {kind} ({num_there:,} of {len(lines):,} rows have a video)"
    return paths, raw, [note, *said]


# The first byte of a UTF-8 letter shown as Latin-1, and up to three bytes that follow it.
_GARBLED = re.compile(r"[\u00c2-\u00f4][^\x00-\x7f]{1,3}")


def mend_mojibake(text: str) -> str:
    """Correct UTF-8 that was read as Windows-1252 or Latin-1 ("horseâ€™s").

    Any other text is returned unchanged.
    """

    def mend(match: re.Match[str]) -> str:
        # The longest start of what was found that is UTF-8: the last letters may be right.
        for length in range(len(match[0]), 1, -1):
            garbled, rest = match[0][:length], match[0][length:]
            try:
                return b"".join(map(_byte, garbled)).decode("utf-8") + rest
            except (UnicodeError, ValueError):
                continue
        return match[0]

    return _GARBLED.sub(mend, text)


def _byte(character: str) -> bytes:
    """Return the byte that was shown as this character.

    Windows-1252 has five holes, which Latin-1 fills.
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
            f"the re-aligned table of every split must be there, but {name} is not below "
            f"{source}. Fetch it, or name the splits that you have with --splits."
        )
    return found
