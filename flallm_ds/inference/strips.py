"""Lay out strips: frames of clips, and below them hypothesis and reference.

Both sentences begin at the same place and are wrapped to the width of the picture. Words
that differ are underlined, in the colours of the report. All sizes are in pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from flallm_ds.batch import Hypothesis
from flallm_ds.data.text.languages import word_rule
from flallm_ds.fonts import installed_fonts, missing_characters
from flallm_ds.metrics.differences import differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# At 72 dots per inch a point, the unit of fonts and lines, is a pixel.
DPI = 72
_WIDTH, _MARGIN = 1100, 12
_FONT, _LINE, _ASCENT = 17, 25, 18
_LABEL = 110  # width of the column with "hypothesis" and "reference"
_GAP = 2  # between two frames
_BETWEEN_CLIPS = 22
_QUIET = "#59636e"
# Colour and line of words that the other sentence does not have (reporting/page.css).
_MARKS = {"hypothesis": ("#b3261e", "-"), "reference": ("#8a5a00", (0, (3, 2)))}
_LEGEND = "solid red line: not in the reference. Dashed brown line: not in the hypothesis."


@dataclass(frozen=True)
class Word:
    """A word in a wrapped sentence. x: left end; line: from 0; differs: from the other
    sentence."""

    text: str
    differs: bool
    x: float
    width: float
    line: int


def wrapped(
    parts: Sequence[str],
    characters: bool,
    width: float,
    measure: Callable[[str], float],
) -> list[Word]:
    """Place the words of a sentence on lines of at most `width`.

    parts: of `differences`. characters: each character is a word, and no spaces are
    between. measure: returns the width of a text. A word that is wider than a line is
    broken.
    """
    space = 0.0 if characters else measure("a a") - measure("aa")
    words: list[Word] = []
    x, line = 0.0, 0
    for number, part in enumerate(parts):
        for text in list("".join(part.split())) if characters else part.split():
            for fitting in _broken(text, width, measure):
                size = measure(fitting)
                if x > 0 and x + size > width:
                    x, line = 0.0, line + 1
                words.append(Word(fitting, number % 2 == 1, x, size, line))
                x += size + space
    return words


def _broken(text: str, width: float, measure: Callable[[str], float]) -> Iterator[str]:
    """Yield a word in parts that are not wider than a line."""
    while measure(text) > width and len(text) > 1:
        length = max(1, int(len(text) * width / measure(text)))
        while length > 1 and measure(text[:length]) > width:
            length -= 1
        yield text[:length]
        text = text[length:]
    yield text


def strip_figure(
    clips: Sequence[tuple[Sequence[np.ndarray], Hypothesis]],
    frames_a_clip: int,
    notes: Sequence[str] = (),
) -> "Figure":
    """Return a figure with a row of frames and two sentences for each clip.

    clips: pairs of frames, each uint8 (H, W, 3), evenly spaced, and a hypothesis. notes:
    lines below all clips.
    """
    # matplotlib takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    figure = Figure(dpi=DPI, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    font = FontProperties(family=installed_fonts(), size=_FONT)

    def measure(text: str) -> float:
        width, *_ = renderer.get_text_width_height_descent(text, font, ismath=False)
        return float(width)

    rows = []
    height = _MARGIN
    # Measuring warns about missing characters, and so does the drawing of the figure later.
    with missing_characters():
        for frames, clip in clips:
            row = _Row(height, _image(frames, frames_a_clip), _sentences(clip, measure))
            rows.append(row)
            height = row.bottom + _BETWEEN_CLIPS
    if any(row.differs for row in rows):
        notes = (_LEGEND, *notes)
    first_note = height - _MARGIN // 2
    height += len(notes) * _LINE
    figure.set_size_inches(_WIDTH / DPI, height / DPI)
    pen = _Pen(figure, height, font)
    for row in rows:
        row.draw(pen)
    for number, note in enumerate(notes):
        pen.write(_MARGIN, first_note + number * _LINE, note, _QUIET)
    return figure


def _sentences(
    clip: Hypothesis, measure: Callable[[str], float]
) -> list[tuple[str, list[Word]]]:
    """Return (label, placed words) of the hypothesis and of the reference."""
    characters = word_rule(clip.language) != "13a"
    both = differences(clip.hypothesis, clip.reference, characters)
    width = _WIDTH - 2 * _MARGIN - _LABEL
    found = []
    for label, parts in zip(_MARKS, both, strict=True):
        found.append((label, wrapped(parts, characters, width, measure)))
    return found


def _image(frames: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return frames next to each other, as wide as the picture without margins."""
    width = (_WIDTH - 2 * _MARGIN - (count - 1) * _GAP) // count
    height = max(1, round(width * frames[0].shape[0] / frames[0].shape[1]))
    row = []
    for frame in frames:
        scaled = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
        row.append(np.pad(scaled, ((0, 0), (0, _GAP), (0, 0)), constant_values=255))
    return np.hstack(row)[:, :-_GAP]


@dataclass(frozen=True)
class _Pen:
    """Draws on a figure of this height, in pixels from the top left corner."""

    figure: "Figure"
    height: int
    font: object

    def write(self, x: float, top: float, text: str, color: str = "black") -> None:
        y = 1 - (top + _ASCENT) / self.height
        # A dollar sign in a sentence does not start a formula.
        self.figure.text(
            x / _WIDTH,
            y,
            text,
            color=color,
            font=self.font,
            va="baseline",
            parse_math=False,
        )

    def underline(self, word: Word, top: float, color: str, style: object) -> None:
        from matplotlib.lines import Line2D

        left = _MARGIN + _LABEL + word.x
        y = 1 - (top + _ASCENT + 4) / self.height
        ends = [left / _WIDTH, (left + word.width) / _WIDTH]
        self.figure.add_artist(Line2D(ends, [y, y], color=color, lw=2, ls=style))


@dataclass(frozen=True)
class _Row:
    """A clip in the picture. top: of its frames."""

    top: int
    image: np.ndarray
    sentences: list[tuple[str, list[Word]]]

    @property
    def bottom(self) -> int:
        num_lines = sum(_num_lines(words) for _, words in self.sentences)
        return self.top + len(self.image) + 6 + num_lines * _LINE

    @property
    def differs(self) -> bool:
        return any(word.differs for _, words in self.sentences for word in words)

    def draw(self, pen: _Pen) -> None:
        # matplotlib counts the pixels of images from the bottom.
        top = self.top + self.image.shape[0]
        pen.figure.figimage(self.image, _MARGIN, pen.height - top, origin="upper")
        top += 6
        for label, words in self.sentences:
            pen.write(_MARGIN, top, label, _QUIET)
            color, style = _MARKS[label]
            for word in words:
                y = top + word.line * _LINE
                ink = color if word.differs else "black"
                pen.write(_MARGIN + _LABEL + word.x, y, word.text, ink)
                if word.differs:
                    pen.underline(word, y, color, style)
            top += _num_lines(words) * _LINE


def _num_lines(words: Sequence[Word]) -> int:
    return words[-1].line + 1 if words else 1
