"""OpenASL: American sign language from the web; the user fetches the videos.

Clips are cut from the raw videos by the table's times and cropped by the corpus's boxes.
Ready-made clips are used where they cover more rows of a split; the corpus's own script
has cropped them already, so the boxes are not applied to them again.
"""

import json
from pathlib import Path
from typing import Any

from flallm_ds.data.codecs.video import Box
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    check_text,
    find_file,
    read_seconds,
    read_split,
    read_table,
)
from flallm_ds.sharding.corpora.videos import Videos

_COLUMNS = ("vid", "yid", "start", "end", "raw-text", "split")


def read(source: Path, splits: tuple[str, ...]) -> Corpus:
    """OpenASL. --source: the folder that holds openasl-v1.0.tsv, bbox-v1.0.json and the
    videos."""
    table = find_file(source, "data/openasl-v1.0.tsv", "openasl-v*.tsv")
    if table is None:
        wanted = "--source must hold data/openasl-v1.0.tsv"
        raise UserError(f"{wanted}, but there is none below {source}. Check --source.")
    # One table holds all splits: its lines by split.
    lines: dict[str, list[tuple[int, dict[str, str]]]] = {split: [] for split in splits}
    for line, fields in read_table(table, "\t", _COLUMNS, quoted=False):
        split = read_split(fields["split"], f"{table}, line {line}:")
        if split in lines:
            lines[split].append((line, fields))
    videos = Videos(source)
    boxes = read_boxes(find_file(source, "data/bbox-v1.0.json", "bbox-v*.json"))
    rows, notes = {}, []
    for split in splits:
        rows[split], said = read_rows(lines[split], table, videos, boxes, source)
        notes += [f"{split}: {note}" for note in said]
    return Corpus("openasl", "en", rows, notes)


def read_rows(
    lines: list[tuple[int, dict[str, str]]],
    table: Path,
    videos: Videos,
    boxes: dict[str, Box],
    source: Path,
) -> tuple[list[Row], list[str]]:
    """Read the rows of one split. Returns (the rows, notes on how they were read)."""
    paths, raw, notes = _choose_videos(lines, videos)
    rows, num_uncropped = [], 0
    for line, fields in lines:
        what = f"{table}, line {line}:"
        vid, yid = fields["vid"], fields["yid"]
        name = yid if raw else vid
        text = fields["raw-text"].strip()
        check_text(text, f"{what} raw-text")
        start_s = read_seconds(fields["start"], f"{what} start", required=raw)
        end_s = read_seconds(fields["end"], f"{what} end", required=raw)
        # Ready-made clips are cropped already.
        box = boxes.get(vid) if raw else None
        num_uncropped += box is None
        rows.append(
            Row(
                id=vid,
                path=paths.get(name, source / f"{name}.mp4"),
                text=text,
                language="en",
                video=yid,
                start_s=start_s if raw else None,
                end_s=end_s if raw else None,
                gloss=fields.get("gloss", "").strip(),
                bbox=box,
            )
        )
    if raw and num_uncropped:
        notes.append(
            f"{num_uncropped:,} of {len(rows):,} rows have no box: the whole frame is kept"
        )
    return rows, notes


def _choose_videos(
    lines: list[tuple[int, dict[str, str]]], videos: Videos
) -> tuple[dict[str, Path], bool, list[str]]:
    """Choose raw videos, or ready-made clips where more rows have one.

    Returns (the video by its name, whether it is a raw one, notes).
    """
    raw_names: dict[str, tuple[str, ...]] = {}
    ready_names: dict[str, tuple[str, ...]] = {}
    num_raw = num_ready = 0
    for _, fields in lines:
        vid, yid = fields["vid"], fields["yid"]
        raw_names[yid], ready_names[vid] = (yid,), _file_names(vid)
        num_raw += videos.have(raw_names[yid])
        num_ready += videos.have(ready_names[vid])
    raw = num_raw > 0 and num_raw >= num_ready
    if raw:
        kind, num_there = "cut from the raw videos by the table's times", num_raw
        paths, said = videos.choose(raw_names, "raw-video")
    else:
        kind, num_there = "ready-made, cut and cropped already", num_ready
        paths, said = videos.choose(ready_names, "video-clip")
    note = f"clips {kind} ({num_there:,} of {len(lines):,} rows have a video)"
    return paths, raw, [note, *said]


def read_boxes(path: Path | None) -> dict[str, Box]:
    """Read the boxes by clip, cut to the frame; those that are empty then are left out.

    Returns {} without a file.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = f"{error}: {path}. Fetch them again."
        raise UserError(f"the boxes must be readable JSON, but {why}") from error
    if not isinstance(content, dict):
        why = f"are not: {path}. Fetch them again."
        raise UserError(f"the boxes must be a JSON object by clip, but {why}")
    # Some boxes reach beyond the frame.
    boxes = {}
    for vid, corners in content.items():
        try:
            x0, y0, x1, y1 = map(_within_frame, corners)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"a box must be [x0, y0, x1, y1], but that of {vid} is {corners!r:.80}: "
                f"{path}."
            ) from error
        if x0 < x1 and y0 < y1:
            boxes[vid] = (x0, y0, x1, y1)
    return boxes


def _within_frame(value: Any) -> float:
    return min(max(float(value), 0.0), 1.0)


def _file_names(vid: str) -> tuple[str, ...]:
    """Return the names that a ready-made clip's file may have: some disks refuse its colon."""
    letters = (":", "_", "-", "%")  # the corpus's own script writes %
    return tuple(vid.replace(":", letter) for letter in letters)
