"""Show clips of a shard folder: python shards/preview.py FOLDER --out=PREFIX.

Writes PREFIX.png, a contact sheet, and PREFIX.html, a page that plays the clips next to
their texts. The page needs no network and no scripts.
"""

import base64
import html
import os
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from flallm_ds.data.codecs.decode import decode_frames, is_mp4
from flallm_ds.data.codecs.h264 import encode_h264
from flallm_ds.data.index import (
    COLUMNS,
    STRING_COLUMNS,
    Index,
    check_video,
    load_index,
    read_manifest,
)
from flallm_ds.data.text.languages import tag_or_name
from flallm_ds.errors import UserError
from flallm_ds.files import open_regular, write_file
from flallm_ds.fonts import Missing, installed_fonts, missing_characters

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

# H.264 settings for clips on the page: a clip of 5 s takes about 100 kB.
_GOP, _CRF = 25, 26
# The contact sheet: number of columns, and frames of a clip in a column. Sizes in pixels.
_FRAMES_IN_COLUMN = {1: 8, 2: 6, 3: 4}
_FRAME_PX = 112  # highest frame
_MAX_LINES = 3  # of a text
_FONT_PX, _LINE_PX, _MARGIN_PX, _GAP_PX = 13, 18, 10, 2
# At this width, and at most this many times as high, a sheet fits a page of A4 with letters
# of 6 points.
_WIDTH_PX, _PAGE_RATIO = 1240, 1.414
# The page has all clips in one file, which a browser must load at once.
_MAX_CLIPS = 500
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; media-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 1.5em; background: #fafafa; color: #222 }}
main {{ display: grid; gap: 1.2em; align-items: start }}
main {{ grid-template-columns: repeat(auto-fill, minmax(18em, 1fr)) }}
figure {{ margin: 0; background: #fff; border: 1px solid #ddd; border-radius: 4px; \
overflow: hidden }}
video {{ display: block; width: 100%; height: auto; max-height: 24em; background: #222 }}
.broken {{ padding: 1em; background: #fdd }}
figcaption {{ padding: .6em .8em }}
figcaption p {{ margin: 0 0 .4em; font-size: 1.05em; overflow-wrap: anywhere }}
figcaption small {{ color: #666; overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{about}</p>
<main>
{figures}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Clip:
    """Hold a clip to show: the row of the index, and the bytes and frames or the fault."""

    split: str
    row: dict[str, Any]
    member: bytes = b""
    frames_THWC: np.ndarray | None = None
    fault: str = ""

    @property
    def facts(self) -> str:
        """One line with the facts of the index, without the text."""
        row = self.row
        parts = [
            self.split,
            row["id"],
            f"{row['num_frames'] / row['fps']:.1f} s",
            f"{row['num_frames']} frames at {row['fps']:.4g} a second",
            f"{row['width']}x{row['height']}",
        ]
        if row["signer"]:
            parts.append(f"signer {row['signer']}")
        parts.append(f"key {row['key']}")
        return " · ".join(parts)


def preview(
    folder: Path,
    *,
    out: Path,
    clips: int = 24,
    split: str | None = None,
    seed: int = 0,
) -> None:
    """Write OUT.png, a contact sheet, and OUT.html, a page that plays the clips.

    Existing files are replaced.

    --out: folder and name of the two files, without a suffix.
    --clips: number of clips, drawn at random and distributed evenly over the splits.
    --split: draw from this split only.
    --seed: seed of the random draw.
    """
    if not 1 <= clips <= _MAX_CLIPS:
        raise UserError(f"--clips must be from 1 to {_MAX_CLIPS}, got {clips}.")
    if seed < 0:
        raise UserError(f"--seed must be 0 or above, got {seed}.")
    # Also accept the name of one of the two files.
    if out.suffix in (".png", ".html"):
        out = out.with_suffix("")
    if not out.name or out.is_dir() or not out.parent.is_dir():
        raise UserError(
            f"--out must be a file name in an existing folder, got {out}. Write it as "
            "FOLDER/NAME."
        )
    manifest = read_manifest(folder)
    check_video(manifest, folder, "shards/preview.py")
    names = [split] if split is not None else list(manifest["splits"])
    indices = [load_index(folder, name) for name in names]
    sizes = list(map(len, indices))
    shown: list[Clip] = []
    for index, rows in zip(indices, draw(sizes, clips, seed), strict=True):
        for number in rows:
            shown.append(read(folder, index, number))
    title = f"{manifest['corpus']}: {len(shown)} of {sum(sizes):,} clips"
    sheet, missing = contact_sheet(title, shown)
    _write(out.with_name(f"{out.name}.png"), sheet)
    _write(out.with_name(f"{out.name}.html"), page(title, str(folder), shown).encode())
    missing.note("the PNG")
    for clip in shown:
        if clip.fault:
            print(f"warning: {clip.split} {clip.row['key']} {clip.fault}")
    print(f"{len(shown)} clips are in {out}.png and {out}.html")


def draw(sizes: Sequence[int], num_clips: int, seed: int) -> list[list[int]]:
    """Draw clips at random, the same number from each split if all are large enough.

    sizes: number of clips of each split. Returns the drawn rows of each split, sorted.
    """
    # Add one clip at a time to the split with the fewest, if it has clips left.
    counts = [0] * len(sizes)
    for _ in range(min(num_clips, sum(sizes))):
        open_splits = [n for n, size in enumerate(sizes) if counts[n] < size]
        counts[min(open_splits, key=counts.__getitem__)] += 1
    rng = np.random.default_rng(seed)
    rows = []
    for size, count in zip(sizes, counts, strict=True):
        rows.append(sorted(rng.choice(size, count, replace=False).tolist()))
    return rows


def read(folder: Path, index: Index, number: int) -> Clip:
    """Read and decode clip `number` of a split. The result has the frames or the fault."""
    row: dict[str, Any] = {}
    for name in COLUMNS:
        row[name] = index.arrays[name][number].item()
    for name in STRING_COLUMNS:
        row[name] = index.strings(name)[number]
    num_frames, hw = row["num_frames"], (row["height"], row["width"])
    try:
        # Read only the bytes of the clip. A truncated tar may end before them.
        with open_regular(folder / index.tar(number).file) as file:
            if os.fstat(file.fileno()).st_size < row["offset"] + row["size"]:
                raise ValueError("its shard ends before it")
            member = os.pread(file.fileno(), row["size"], row["offset"])
        frames = np.empty((num_frames, *hw, 3), np.uint8)
        decode_frames(member, np.arange(num_frames), num_frames, frames, hw)
    except (OSError, ValueError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return Clip(index.split, row, fault=f"is broken: {reason}")
    return Clip(index.split, row, member, frames)


@dataclass(frozen=True)
class Cell:
    """What the contact sheet shows of a clip: lines of facts, lines of text, and frames."""

    facts: list[str]
    text: list[str]
    strip: np.ndarray

    @property
    def height(self) -> int:
        """In pixels, with the space below the frames."""
        num_lines = len(self.facts) + len(self.text)
        return num_lines * _LINE_PX + len(self.strip) + 2 * _MARGIN_PX


def contact_sheet(title: str, clips: Sequence[Clip]) -> tuple[bytes, Missing]:
    """Draw the facts, the text and evenly spaced frames of each clip.

    The clips are in as few columns as fit a page, at most three. Returns (PNG, whether the
    fonts lack a character).
    """
    for num_columns in _FRAMES_IN_COLUMN:
        cells = _cells(clips, num_columns)
        columns = _columns(cells, num_columns)
        height = 2 * _LINE_PX + max(
            sum(cell.height for cell in column) for column in columns
        )
        if height <= _PAGE_RATIO * _WIDTH_PX:
            break
    # matplotlib takes seconds to import: only when there is something to draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = 72  # so that a point is a pixel
    figure = Figure(figsize=(_WIDTH_PX / dpi, height / dpi), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    fonts = installed_fonts()

    def write(x: int, y: int, text: str, **style: Any) -> None:
        style |= {"va": "top", "family": fonts, "fontsize": _FONT_PX, "parse_math": False}
        figure.text(x / _WIDTH_PX, 1 - y / height, text, **style)

    write(_MARGIN_PX, _MARGIN_PX // 2, title, weight="bold")
    for number, column in enumerate(columns):
        left = _MARGIN_PX + number * _column_px(num_columns)
        top = 2 * _LINE_PX
        for cell in column:
            for line, text in enumerate([*cell.facts, *cell.text]):
                color = "#777777" if line < len(cell.facts) else "black"
                write(left, top + line * _LINE_PX, text, color=color)
            # matplotlib counts pixels from the bottom.
            bottom = height - top - cell.height + 2 * _MARGIN_PX
            figure.figimage(cell.strip, left, bottom, origin="upper")
            top += cell.height
    return _render(canvas)


def _column_px(num_columns: int) -> int:
    """Return the width of a column, with the space next to it."""
    return (_WIDTH_PX - _MARGIN_PX) // num_columns


def _cells(clips: Sequence[Clip], num_columns: int) -> list[Cell]:
    """Return what is shown of each clip in a column of a sheet."""
    width = _column_px(num_columns) - _MARGIN_PX
    # The width of a letter is about 0.56 of the font size.
    num_letters = width * 100 // (_FONT_PX * 56)
    cells = []
    for clip in clips:
        facts = wrap(clip.facts, num_letters)
        text = wrap(clip.row["text"], num_letters)
        cells.append(Cell(facts, text, _strip(clip, width, _FRAMES_IN_COLUMN[num_columns])))
    return cells


def _columns(cells: Sequence[Cell], num_columns: int) -> list[list[Cell]]:
    """Distribute cells over columns, in order: the same number to each, or one fewer to the
    last ones."""
    bounds = -(-np.arange(num_columns + 1) * len(cells) // num_columns)
    columns = []
    for begin, end in pairwise(bounds.tolist()):
        columns.append(list(cells[begin:end]))
    return columns


def _render(canvas: "FigureCanvasAgg") -> tuple[bytes, Missing]:
    """Return (PNG of the figure, whether the fonts lack a character)."""
    with missing_characters() as missing:
        canvas.draw()
    rgb = np.asarray(canvas.buffer_rgba())[..., :3]
    # OpenCV expects BGR.
    encoded, png = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
    assert encoded
    return png.tobytes(), missing


def _strip(clip: Clip, width: int, num: int) -> np.ndarray:
    """Draw evenly spaced frames next to each other, with the first and the last.

    width: of the strip, at most. num: number of frames. Returns (height, width, 3) uint8.
    The strip of a broken clip is a light red bar.
    """
    if clip.frames_THWC is None:
        return np.full((_FRAME_PX // 4, width, 3), (255, 200, 200), np.uint8)
    num_frames, height_px, width_px = clip.frames_THWC.shape[:3]
    scale = min(_FRAME_PX / height_px, (width // num - _GAP_PX) / width_px)
    size = (max(1, int(width_px * scale)), max(1, int(height_px * scale)))
    picks = np.linspace(0, num_frames - 1, min(num, num_frames)).round().astype(int)
    framed = []
    for pick in picks:
        shrunk = cv2.resize(clip.frames_THWC[pick], size, interpolation=cv2.INTER_AREA)
        # White columns between frames.
        right = (0, _GAP_PX)
        framed.append(np.pad(shrunk, ((0, 0), right, (0, 0)), constant_values=255))
    return np.hstack(framed)


def wrap(text: str, num_columns: int) -> list[str]:
    """Wrap a text to at most `_MAX_LINES` lines.

    East Asian characters are twice as wide as others.
    """
    text = " ".join(text.split())
    # textwrap counts characters: shorten the lines according to the fraction of wide (W)
    # and full-width (F) characters.
    widths = Counter(map(unicodedata.east_asian_width, text))
    wide = widths["W"] + widths["F"]
    narrowed = num_columns * len(text) // max(1, len(text) + wide)
    lines = textwrap.wrap(text, max(8, narrowed), max_lines=_MAX_LINES, placeholder=" …")
    return lines or [""]


def page(title: str, about: str, clips: Sequence[Clip]) -> str:
    """Return an HTML page that needs no other file.

    The clips are in it as H.264 in data: URLs, which browsers can play, pause and scrub.
    """
    figures = "\n".join(map(_figure, clips))
    return _PAGE.format(title=html.escape(title), about=html.escape(about), figures=figures)


def _figure(clip: Clip) -> str:
    """Return the HTML of one clip: the video or the fault, and the text."""
    if clip.frames_THWC is None:
        shown = f'<div class="broken">{html.escape(clip.fault)}</div>'
    else:
        row, mp4 = clip.row, clip.member
        # Browsers do not play Motion-JPEG.
        if not is_mp4(mp4):
            mp4 = encode_h264(clip.frames_THWC, row["fps"], _GOP, _CRF)
        data = base64.b64encode(mp4).decode("ascii")
        size = f'width="{row["width"]}" height="{row["height"]}"'
        # Browsers start a video without a click only if it is muted.
        attributes = f"{size} autoplay loop muted playsinline controls"
        shown = f'<video {attributes} src="data:video/mp4;base64,{data}"></video>'
    language = html.escape(tag_or_name(clip.row["language"]))
    text, facts = html.escape(clip.row["text"]), html.escape(clip.facts)
    caption = f'<p lang="{language}" dir="auto">{text}</p><small>{facts}</small>'
    return f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"


def _write(path: Path, content: bytes) -> None:
    """Write a file. Raises UserError if the disk or the permissions do not allow it."""
    try:
        write_file(path, content)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Use an --out that you may write to."
        ) from error
