"""Show clips of a shard folder: python shards/preview.py FOLDER --out=PREFIX.

Writes PREFIX.png, a contact sheet, and PREFIX.html, a page that plays the clips next to
their texts. The page needs no network and no scripts.
"""

import base64
import html
import os
import textwrap
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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
from flallm_ds.data.text.languages import tag_of
from flallm_ds.errors import UserError
from flallm_ds.files import open_regular, write_file

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

# H.264 settings for clips on the page: a clip of 5 s takes about 100 kB.
_GOP, _CRF = 25, 26
# The contact sheet: frames of a clip and their height, lines of a text, sizes in pixels.
_FRAMES = 8
_FRAME_PX = 112
_MAX_LINES = 3
_FONT_PX, _LINE_PX, _MARGIN_PX = 13, 18, 10
_MIN_WIDTH_PX = 900
# The page has all clips in one file, which a browser must load at once.
_MAX_CLIPS = 500
# DejaVu comes with matplotlib. The other fonts, where installed, have scripts that DejaVu
# lacks.
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
)

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
    if missing:
        cause = "the installed fonts lack some characters of the texts"
        print(f"note: {cause}; the PNG shows boxes instead")
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


def contact_sheet(title: str, clips: Sequence[Clip]) -> tuple[bytes, bool]:
    """Draw the facts, the text and evenly spaced frames of each clip.

    Returns (PNG, whether the fonts lack a character).
    """
    # The sheet is as wide as the widest strip of frames. Texts are wrapped to that width.
    strips = [_strip(clip) for clip in clips]
    widest = max(strip.shape[1] for strip in strips)
    width = max(_MIN_WIDTH_PX, widest) + 2 * _MARGIN_PX
    # The width of a letter is about 0.56 of the font size.
    num_columns = (width - 2 * _MARGIN_PX) * 100 // (_FONT_PX * 56)
    labels = []
    for clip in clips:
        facts = shorten(clip.facts, num_columns)
        labels.append([facts, *wrap(clip.row["text"], num_columns)])

    # The label of a clip is above the strip of frames.
    heights = []
    for label, strip in zip(labels, strips, strict=True):
        heights.append(len(label) * _LINE_PX + strip.shape[0] + 2 * _MARGIN_PX)
    height = 2 * _LINE_PX + sum(heights)
    # matplotlib takes seconds to import: only when there is something to draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dpi = 72  # so that a point is a pixel
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    fonts = _installed_fonts()

    def write(y: int, text: str, **style: Any) -> None:
        place = {"x": _MARGIN_PX / width, "y": 1 - y / height, "va": "top"}
        figure.text(
            s=text, **place, family=fonts, fontsize=_FONT_PX, parse_math=False, **style
        )

    write(_MARGIN_PX // 2, title, weight="bold")
    top = 2 * _LINE_PX
    for label, strip, tall in zip(labels, strips, heights, strict=True):
        # The first line has the facts in grey. The text follows.
        for number, line in enumerate(label):
            color = "#777777" if number == 0 else "black"
            write(top + number * _LINE_PX, line, color=color)
        # matplotlib counts pixels from the bottom.
        bottom = height - top - len(label) * _LINE_PX - strip.shape[0]
        figure.figimage(strip, _MARGIN_PX, bottom, origin="upper")
        top += tall
    return _render(canvas)


def _installed_fonts() -> list[str]:
    """Return the names in `_FONTS` that are installed."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


def _render(canvas: "FigureCanvasAgg") -> tuple[bytes, bool]:
    """Return (PNG of the figure, whether the fonts lack a character)."""
    # matplotlib warns about characters that no font has. Catch all warnings, also repeated
    # ones, which Python hides by default.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        canvas.draw()
    lacks = any("missing from" in str(warning.message) for warning in caught)
    rgb = np.asarray(canvas.buffer_rgba())[..., :3]
    # OpenCV expects BGR.
    encoded, png = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
    assert encoded
    return png.tobytes(), lacks


def _strip(clip: Clip) -> np.ndarray:
    """Draw evenly spaced frames next to each other, with the first and the last.

    Returns (height, width, 3) uint8. The strip of a broken clip is a light red bar.
    """
    if clip.frames_THWC is None:
        return np.full((_FRAME_PX // 4, _MIN_WIDTH_PX, 3), (255, 200, 200), np.uint8)
    num_frames, height, width = clip.frames_THWC.shape[:3]
    size = (max(1, round(_FRAME_PX * width / height)), _FRAME_PX)
    picks = np.linspace(0, num_frames - 1, min(_FRAMES, num_frames)).round().astype(int)
    framed = []
    for pick in picks:
        shrunk = cv2.resize(clip.frames_THWC[pick], size, interpolation=cv2.INTER_AREA)
        # Two white columns between frames.
        framed.append(np.pad(shrunk, ((0, 0), (0, 2), (0, 0)), constant_values=255))
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


def shorten(text: str, num_columns: int) -> str:
    """Cut a text that is longer than `num_columns`."""
    return text if len(text) <= num_columns else f"{text[: num_columns - 1]}…"


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
    language = html.escape(tag_of(clip.row["language"]))
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
