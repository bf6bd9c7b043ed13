"""Read OpenASL: American sign language from the web; the user downloads the videos.

Clips are cut from the raw videos by the times in the table, and cropped by the boxes of
the corpus. Ready-made clips are used if they cover more rows of a split than the raw
videos. The script of the corpus has already cropped them, so they are not cropped again.
"""

import json
from pathlib import Path
from typing import Any

from flallm_ds.data.codecs.sizes import Box
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    check_text,
    find_file,
    parse_seconds,
    parse_split,
    read_table,
)
from flallm_ds.sharding.corpora.videos import Videos

_COLUMNS = ("vid", "yid", "start", "end", "raw-text", "split")


def read(source: Path, splits: tuple[str, ...]) -> Corpus:
    """OpenASL. --source: the folder with openasl-v1.0.tsv, bbox-v1.0.json and the videos."""
    table = find_file(source, "data/openasl-v1.0.tsv", "openasl-v*.tsv")
    if table is None:
        raise UserError(
            "--source must be the OpenASL folder with data/openasl-v1.0.tsv in it, got "
            f"{source}. Check the path."
        )
    # One table lists all splits: sort its lines by split.
    lines: dict[str, list[tuple[int, dict[str, str]]]] = {split: [] for split in splits}
    for line, fields in read_table(table, "\t", _COLUMNS, quoted=False):
        split = parse_split(fields["split"], f"{table}, line {line}:")
        if split in lines:
            lines[split].append((line, fields))
    videos = Videos(source)
    boxes = read_boxes(find_file(source, "data/bbox-v1.0.json", "bbox-v*.json"))
    rows, notes = {}, []
    for split in splits:
        rows[split], split_notes = read_rows(lines[split], table, videos, boxes, source)
        notes += [f"{split}: {note}" for note in split_notes]
    return Corpus("openasl", "en", rows, notes)


def read_rows(
    lines: list[tuple[int, dict[str, str]]],
    table: Path,
    videos: Videos,
    boxes: dict[str, Box],
    source: Path,
) -> tuple[list[Row], list[str]]:
    """Read the rows of one split. Returns (rows, notes for the user)."""
    paths, raw, notes = _choose_videos(lines, videos)
    rows, num_uncropped = [], 0
    for line, fields in lines:
        what = f"{table}, line {line}:"
        vid, yid = fields["vid"], fields["yid"]
        name = yid if raw else vid
        text = fields["raw-text"].strip()
        check_text(text, f"{what} raw-text")
        start_s = parse_seconds(fields["start"], f"{what} start", required=raw)
        end_s = parse_seconds(fields["end"], f"{what} end", required=raw)
        # Ready-made clips are already cropped.
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
    """Choose raw videos, or ready-made clips if more rows have one.

    Returns (path by video name, whether they are raw videos, notes for the user).
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
        kind, num_found = "cut from the raw videos by the times in the table", num_raw
        paths, notes = videos.choose(raw_names, "raw-video")
    else:
        kind, num_found = "ready-made, already cut and cropped", num_ready
        paths, notes = videos.choose(ready_names, "video-clip")
    note = f"clips {kind} ({num_found:,} of {len(lines):,} rows have a video)"
    return paths, raw, [note, *notes]


def read_boxes(path: Path | None) -> dict[str, Box]:
    """Read the boxes by clip, clipped to the frame. Empty boxes are dropped.

    Returns {} without a file.
    """
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read boxes {path}: {error}. Download the file again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} must be a JSON object with a box for each clip, got {content!r:.50}. "
            "Download the file again."
        )
    # Some boxes extend beyond the frame.
    boxes = {}
    for vid, corners in content.items():
        try:
            x0, y0, x1, y1 = map(_within_frame, corners)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: the box of {vid} must be [x0, y0, x1, y1], got {corners!r:.80}. "
                "Download the file again."
            ) from error
        if x0 < x1 and y0 < y1:
            boxes[vid] = (x0, y0, x1, y1)
    return boxes


def _within_frame(value: Any) -> float:
    return min(max(float(value), 0.0), 1.0)


def _file_names(vid: str) -> tuple[str, ...]:
    """Return the possible file names of a ready-made clip: some disks refuse the colon."""
    letters = (":", "_", "-", "%")  # the script of the corpus writes %
    return tuple(vid.replace(":", letter) for letter in letters)
