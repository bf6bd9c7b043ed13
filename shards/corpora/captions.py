"""Caption files: WebVTT, and JSON lists of {text, start, duration} as transcript tools write them."""

import html
import json
import re
from dataclasses import dataclass
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

_TIMES = re.compile(r"\s*((?:\d+:)?\d+:\d+\.\d+)\s+-->\s+((?:\d+:)?\d+:\d+\.\d+)(?:\s.*)?")
# Only what begins like a tag: JSON texts escape nothing and may hold "<3".
_TAG = re.compile(r"</?(?:[a-z][^<>]*|\d+(?::\d+)+\.\d+)>|</>", re.IGNORECASE)
_TIME_TAG = re.compile(r"<\d+(?::\d+)+\.\d+>")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"))
_AT_ONCE_S = 0.1


@dataclass(frozen=True)
class Cue:
    """One caption: its span in seconds and its text on one line."""

    start_s: float
    end_s: float
    text: str


def read_captions(path: Path) -> tuple[list[Cue], bool]:
    """(captions, whether they scroll) of a .vtt or .json file.

    Raises OSError or ValueError for a file that is not what its name says.
    """
    text = path.read_text(encoding="utf-8-sig")
    return read_vtt(text) if path.suffix.lower() == ".vtt" else (read_json(json.loads(text)), False)


def header_language(path: Path) -> str:
    """The language that a WebVTT file's header names, "" for none. Raises OSError."""
    if path.suffix.lower() != ".vtt":
        return ""
    with path.open("rb") as file:
        match = re.search(rb"^Language:[ \t]*([A-Za-z]{2,3})", file.read(500), re.MULTILINE)
    return match[1].decode() if match else ""


def read_json(content: Any) -> list[Cue]:
    """The captions of a list of {text, start, duration}. Raises ValueError for anything else."""
    if not isinstance(content, list):
        raise ValueError("captions must be a list")
    cues = []
    for entry in content:
        try:
            start_s, span_s = float(entry["start"]), float(entry["duration"])
            text = str(entry["text"])
        except (TypeError, LookupError) as error:
            raise ValueError("a caption must have text, start and duration") from error
        if not (0 <= start_s < 1e7 and 0 <= span_s < 1e7):
            raise ValueError(f"a caption must lie within a video, but is at {start_s} s for {span_s} s")
        cues.append(Cue(start_s, start_s + span_s, _clean(text)))
    return cues


def read_vtt(text: str) -> tuple[list[Cue], bool]:
    """(captions, whether they scroll) of a WebVTT text, without tags, entities and settings.

    Automatic captions scroll: each shows the last line again above a new one. Their lines are taken once,
    with the span of the caption in which they were new.
    Raises ValueError if the text is no WebVTT.
    """
    if not text.startswith("WEBVTT"):
        raise ValueError("captions must begin with WEBVTT")
    shown: list[Cue] = []
    lines_of: list[list[str]] = []
    header, *blocks = re.split(r"\n\n+", re.sub(r"\r\n?", "\n", text))
    if "-->" in header:  # a caption may follow the header without an empty line
        blocks.insert(0, "\n".join(dropwhile(lambda line: "-->" not in line, header.split("\n"))))
    for block in blocks:
        lines = block.strip("\n").split("\n")
        number = next((n for n, line in enumerate(lines[:2]) if "-->" in line), 0)  # after a name, if any
        times = None if re.match(r"NOTE\b", block) else _TIMES.fullmatch(lines[number])
        if times:  # else a comment, a style, or a span that is none
            lines_of.append([line for line in map(_clean, lines[number + 1 :]) if line])
            shown.append(Cue(_seconds(times[1]), _seconds(times[2]), " ".join(lines_of[-1])))
    repeats = [0] + [
        _num_repeated(*lines) if now.start_s - before.end_s < _AT_ONCE_S else 0
        for (before, now), lines in zip(pairwise(shown), pairwise(lines_of), strict=True)
    ]
    # Some tools drop the time of each word, by which automatic captions are known; the repeats stay.
    mostly = len(repeats) > 3 and sum(map(bool, repeats)) > len(repeats) / 2
    if not mostly and not _TIME_TAG.search(text):
        return shown, False
    return [
        Cue(cue.start_s, cue.end_s, " ".join(lines[repeated:]))
        for cue, lines, repeated in zip(shown, lines_of, repeats, strict=False)
        if lines[repeated:]
    ], True


def _num_repeated(before: list[str], now: list[str]) -> int:
    """How many of a caption's first lines are the last ones of the caption before."""
    longest = min(len(before), len(now))
    return next((n for n in range(longest, 0, -1) if before[-n:] == now[:n]), 0)


def _seconds(clock: str) -> float:
    return sum(float(part) * 60.0**place for place, part in enumerate(reversed(clock.split(":"))))


def _clean(text: str) -> str:
    """On one line, without tags, entities and invisible characters."""
    return " ".join(html.unescape(_TAG.sub("", text)).translate(_INVISIBLE).split())
