"""Read captions: WebVTT, SubRip, json3 by YouTube, and JSON lists of {text, start, duration}.

Tags, sounds, note signs and the names of speakers are removed from the texts.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds.sharding.corpora import clock_seconds

# Of several files of a video, the first in this order is read. A .json file is a list of
# {text, start, duration} or json3.
SUFFIXES = (".vtt", ".json3", ".srt", ".json")
# Other caption formats, which are not read.
OTHER_SUFFIXES = {".ttml", ".dfxp", ".xml", ".sbv", ".ass", ".ssa", ".sub", ".lrc", ".scc"}
OTHER_SUFFIXES |= {".srv1", ".srv2", ".srv3"}  # YouTube's XML

_CLOCK = r"((?:[0-9]+:)?[0-9]+:[0-9]+(?:[.,][0-9]+)?)"  # SubRip's decimals follow a comma
_TIMES = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?")
# The first line of a WebVTT block that is not displayed.
_NO_CUE = re.compile(r"NOTE\b.*|(STYLE|REGION)\s*")
_MAX_S = 1e7
_AT_ONCE_S = 0.1  # two times that differ by less are the same time

_LINE_BREAK = re.compile(r"(?i:<br\s*/?>)|\\N")
# Only what begins like a tag: JSON texts are not escaped and may contain "<3". A tag may
# continue on the next line.
_TAG = re.compile(r"</?(?:[a-z][^<>]*|[0-9]+(?::[0-9]+)+[.,][0-9]+)>|</>", re.IGNORECASE)
_TIME_TAG = re.compile(r"<[0-9]+(?::[0-9]+)+[.,][0-9]+>")
_CODE = re.compile(r"\{\\[^{}]*\}")  # {\an8}
# Control characters except TABs and line ends, zero-width spaces, direction marks.
_INVISIBLE = dict.fromkeys((*range(9), *range(14, 28), 0x7F))
_INVISIBLE |= dict.fromkeys(map(ord, "\u200b\u200e\u200f\u2060\ufeff"))
# Brackets of three kinds, and parentheses; full-width ones are usual in Chinese.
_BRACKETS = re.compile(r"\[[^][]*\]|［[^［］]*］|【[^【】]*】")
_PARENTHESES = re.compile(r"[(（]([^()（）]*)[)）]")
_NOTE_SIGNS = re.compile("[♩♪♫♬🎵🎶🎼]\ufe0f?")
# Words that name a sound: English, Spanish, German, Chinese, Japanese, Korean.
_SOUND = re.compile(
    r"music|musi[qk]|música|instrumental|appla|aplau|clap|cheer|laugh|chuckl|giggl|lach|gelächter|"
    r"\brires?\b|\brisas?\b|sigh|cough|whistl|inaudible|silence|noise|crosstalk|"
    r"音乐|音樂|音楽|掌声|掌聲|拍手|笑|박수|음악",
    re.IGNORECASE,
)
_SOUND_WORDS = 4  # more words are a sentence about music
# ">> NAME:" before the words of another speaker, or a dash with the same meaning.
_ARROWS = re.compile(r"(?<!\S)>{2,}[ \t]*(?:([^\s:：>][^:：>\n]{0,40})(?::(?!\S)|：))?")
_DASH = re.compile(r"[-–—]+\s*(?![\s\d])")
_NEXT_DASH = re.compile(r"(?<=[.!?…]) [-–—]+ ?(?=[^\s\d])")


@dataclass(frozen=True)
class Cue:
    """Hold one caption: its start and end in seconds, and its text on one line."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Track:
    """Hold the captions of one file."""

    cues: list[Cue]  # a text may be empty
    scrolls: bool  # whether lines are displayed again; each is in one cue only
    num_unreadable: int = 0  # captions whose times cannot be read


_Shown = tuple[float, float, list[str]]  # start and end in seconds, displayed lines


def read_captions(path: Path) -> Track:
    """Read a caption file with one of SUFFIXES.

    Raises OSError or ValueError for a file that is not in the format of its suffix.
    """
    text = path.read_text(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    if suffix == ".vtt":
        return Track(*read_vtt(text), _num_unreadable(_without_comments(text)))
    if suffix == ".srt":
        lines = _lines(text)
        return Track(*_unroll(_timed(lines, blank_ends=False)), _num_unreadable(lines))
    content = json.loads(text)
    if isinstance(content, dict):
        return Track(*_read_json3(content))
    return Track(*_unroll(_entries(content)))


def header_language(path: Path) -> str:
    """Return the language in the header of a WebVTT file, "" for none. Raises OSError."""
    if path.suffix.lower() != ".vtt":
        return ""
    with path.open("rb") as file:
        head = file.read(500)  # the header is within the first lines
    match = re.search(
        rb"^Language:[ \t]*([A-Za-z]{2,3}(?:-[A-Za-z0-9]+)*)", head, re.MULTILINE
    )
    return match[1].decode() if match else ""


def read_json(content: Any) -> list[Cue]:
    """Read the captions of a list of {text, start, duration}.

    Raises ValueError for anything else.
    """
    return _unroll(_entries(content))[0]


def read_vtt(text: str) -> tuple[list[Cue], bool]:
    """Return (captions, whether they scroll) of a WebVTT text.

    Raises ValueError for a text in another format.
    """
    if not text.startswith("WEBVTT"):
        raise ValueError(f"a WebVTT file must begin with WEBVTT, got {text[:20]!r}")
    shown = _timed(_without_comments(text), blank_ends=True)
    return _unroll(shown, automatic=_TIME_TAG.search(text) is not None)


def _read_json3(content: dict[str, Any]) -> tuple[list[Cue], bool]:
    """Return (captions, whether they scroll) of a json3 object by YouTube.

    Raises ValueError for another object.
    """
    events = content.get("events")
    if not isinstance(events, list) or not events:
        raise ValueError(f"events must be a list with elements, got {events!r:.50}")
    shown = []
    automatic = False
    for event in events:
        if not isinstance(event, dict):
            raise ValueError(f"an event must be an object, got {event!r:.50}")
        # An event without segments only sets up a window.
        if event.get("segs") is None:
            continue
        text, timed_words = _segments(event["segs"])
        # Automatic captions append to a line, and have a time for each word.
        automatic |= timed_words or "aAppend" in event
        if text:
            start_s = _number(event.get("tStartMs")) / 1000
            span_s = _number(event.get("dDurationMs")) / 1000
            shown.append(_caption(start_s, span_s, text))
    return _unroll(shown, automatic)


def _segments(segments: Any) -> tuple[str, bool]:
    """Return (the text of a json3 event, whether each word has a time)."""
    if not isinstance(segments, list):
        raise ValueError(f"segs must be a list of objects, got {segments!r:.50}")
    texts = []
    timed_words = False
    for segment in segments:
        if not isinstance(segment, dict):
            raise ValueError(f"segs must be a list of objects, got {segment!r:.50} in it")
        text = segment.get("utf8", "")
        if not isinstance(text, str):
            raise ValueError(f"utf8 must be a string, got {text!r:.50}")
        texts.append(text)
        timed_words |= "tOffsetMs" in segment
    return "".join(texts).strip(), timed_words


def _entries(content: Any) -> list[_Shown]:
    """Return the captions of a list of {text, start, duration}."""
    if not isinstance(content, list):
        raise ValueError(f"captions must be a list, got {content!r:.50}")
    shown = []
    for entry in content:
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ValueError(f"a caption must be an object with a text, got {entry!r:.50}")
        start_s, span_s = _number(entry.get("start")), _number(entry.get("duration"))
        shown.append(_caption(start_s, span_s, entry["text"]))
    return shown


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"a time must be a number, got {value!r:.50}")
    return float(value)


def _caption(start_s: float, span_s: float, text: str) -> _Shown:
    if not (0 <= start_s < _MAX_S and 0 <= span_s < _MAX_S):
        raise ValueError(
            f"start and duration must be from 0 to {_MAX_S:g} s, got {start_s} and {span_s}"
        )
    return start_s, start_s + span_s, _clean(text)


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n?|\n", text)


def _without_comments(text: str) -> list[str]:
    """Return the lines of a WebVTT text without the first line, comments and styles."""
    lines = []
    before, hidden = "", False
    for line in _lines(text)[1:]:
        # A hidden block begins after an empty line and ends at the next empty line.
        if not line:
            hidden = False
        elif not before and _NO_CUE.fullmatch(line):
            hidden = True
        before = line
        if not hidden:
            lines.append(line)
    return lines


def _num_unreadable(lines: Sequence[str]) -> int:
    """Count the lines whose times cannot be read."""
    num = 0
    for line in lines:
        if "-->" in line and _span(line) is None:
            num += 1
    return num


def _span(line: str) -> tuple[float, float] | None:
    """Return (start, end) in seconds of a line with times; None if it cannot be read."""
    times = _TIMES.fullmatch(line)
    if times is None:
        return None
    start_s, end_s = _seconds(times[1]), _seconds(times[2])
    return (start_s, end_s) if max(start_s, end_s) < _MAX_S else None


def _seconds(clock: str) -> float:
    parts = clock.replace(",", ".").split(":")
    return clock_seconds(list(map(float, parts)))


def _timed(lines: Sequence[str], blank_ends: bool) -> list[_Shown]:
    """Return the captions: for each line with times, the lines below it.

    blank_ends: whether an empty line ends a caption. Otherwise, the next line with times
    ends it, together with the number above that line.
    """
    # The spans with the lines below each. The last list grows while lines are read.
    found: list[tuple[tuple[float, float], list[str]]] = []
    current: list[str] | None = None
    for line in lines:
        if "-->" in line:
            # SubRip has a number above each line with times.
            if current and current[-1].strip().isdigit():
                current.pop()
            current = []
            if span := _span(line):
                found.append((span, current))
        elif not line and blank_ends:
            current = None
        elif current is not None:
            current.append(line)
    shown = []
    for (start_s, end_s), below in found:
        shown.append((start_s, end_s, _clean("\n".join(below))))
    return shown


def _unroll(shown: list[_Shown], automatic: bool = False) -> tuple[list[Cue], bool]:
    """Return (captions, whether they scroll).

    Automatic captions scroll: each caption displays the previous line again, above a new
    line. Each line is returned once, with the span of the caption in which it was new.
    automatic: whether the captions are known to be automatic, by the times of words.
    """
    # For each caption: how many of the previous caption's lines it repeats, and whether
    # the previous caption is still displayed.
    repeats = [0] * len(shown)
    overlaps = [False] * len(shown)
    for n in range(1, len(shown)):
        began_s, end_s, before = shown[n - 1]
        start_s, _, lines = shown[n]
        if began_s <= start_s < end_s + _AT_ONCE_S:
            repeats[n] = _num_repeated(before, lines)
            overlaps[n] = began_s < start_s < end_s - _AT_ONCE_S
    # Some tools remove the times of words, by which automatic captions are recognised.
    # The repeated lines remain.
    num_repeating = len(repeats) - repeats.count(0)
    mostly = len(repeats) > 3 and num_repeating > len(repeats) / 2
    if not automatic and not mostly:
        # A sentence that is said twice has two captions, one after the other. Only lines
        # of captions that overlap are repetitions.
        for n, overlap in enumerate(overlaps):
            if not overlap:
                repeats[n] = 0
    # Remove the repeated lines. A caption without new lines is dropped. An empty caption
    # is kept, because captions without words are counted.
    cues = []
    for (start_s, end_s, lines), repeated in zip(shown, repeats, strict=True):
        new = lines[repeated:]
        if new or not repeated:
            cues.append(Cue(start_s, end_s, " ".join(new)))
    return cues, automatic or any(repeats)


def _num_repeated(before: list[str], now: list[str]) -> int:
    """Return how many first lines of a caption are the last lines of the previous one."""
    # Try the longest overlap first: two equal lines that are repeated count as two.
    for num in range(min(len(before), len(now)), 0, -1):
        if before[-num:] == now[:num]:
            return num
    return 0


def separate(cues: Sequence[tuple[int, Cue]]) -> tuple[list[tuple[int, Cue]], int, int]:
    """Cut or join captions so that they do not overlap. cues: (number, caption).

    A caption is cut where the next one begins. Two captions are joined if they begin
    together or have the same text. Returns (captions with their numbers, number of
    captions that were cut, number that were joined).
    """
    apart: list[tuple[int, Cue]] = []
    num_cut = num_joined = 0
    for number, cue in sorted(cues, key=lambda numbered: numbered[1].start_s):
        if not apart or cue.start_s >= apart[-1][1].end_s:
            apart.append((number, cue))
            continue
        # They overlap: join the two, or cut the earlier one.
        first, last = apart.pop()
        repeated = last.text == cue.text
        if repeated or cue.start_s - last.start_s < _AT_ONCE_S:
            text = last.text if repeated else f"{last.text} {cue.text}"
            apart.append((first, Cue(last.start_s, max(last.end_s, cue.end_s), text)))
            num_joined += 1
        else:
            apart.append((first, Cue(last.start_s, cue.start_s, last.text)))
            apart.append((number, cue))
            num_cut += 1
    return apart, num_cut, num_joined


def _clean(text: str) -> list[str]:
    """Return the spoken lines, without tags, entities, sounds and names of speakers.

    Returns [] if no word remains.
    """
    text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    # Unescape twice: many transcripts are escaped twice, including their tags.
    text = _TAG.sub("", html.unescape(html.unescape(text)))
    text = _CODE.sub("", text).replace("\\h", " ").translate(_INVISIBLE)
    # Remove sounds: everything in brackets, and names of sounds in parentheses.
    sung = _NOTE_SIGNS.search(text) is not None
    text = _NOTE_SIGNS.sub(" ", _BRACKETS.sub(" ", text))
    text = _PARENTHESES.sub(_without_sound, text)
    text = _ARROWS.sub(_without_name, text)
    # Return no line if nothing is spoken: "(birds singing)", but not a sentence in
    # parentheses; "♪ soft music ♪"; or punctuation without a letter or digit.
    whole = " ".join(text.split()).strip(".,!- ")
    alone = _PARENTHESES.fullmatch(whole)
    if alone and not re.search("[.!?。！？]", alone[1]):
        return []
    if sung and _is_sound(whole):
        return []
    if not any(map(str.isalnum, whole)):
        return []
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return list(_without_dashes(lines))


def _is_sound(words: str) -> bool:
    return len(words.split()) <= _SOUND_WORDS and _SOUND.search(words) is not None


def _without_sound(parentheses: re.Match[str]) -> str:
    """Return a space for the name of a sound in parentheses, otherwise the same text."""
    return " " if _is_sound(parentheses[1]) else parentheses[0]


def _without_name(arrows: re.Match[str]) -> str:
    """Return a space for ">>" or ">> NAME:", otherwise the text after the arrows.

    A NAME has no word that begins with a lower-case letter.
    """
    name = arrows[1] or ""
    if any(word[0].islower() for word in name.split()):
        return f" {arrows[0].lstrip('>')}"
    return " "


def _without_dashes(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines that are not empty, without the dashes that mark a new speaker."""
    spoken = ""
    dialogue = False
    for line in filter(None, lines):
        # After a comma or a word, the dash belongs to the sentence.
        begins = not spoken or dialogue or spoken[-1] in ".!?…\"'”"
        if begins and (match := _DASH.match(line)):
            dialogue = dialogue or not spoken
            line = line[match.end() :]
        line = _NEXT_DASH.sub(" ", line) if dialogue else line
        spoken = line or spoken
        if line:
            yield line
