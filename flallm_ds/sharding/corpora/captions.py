"""Caption files: WebVTT, SubRip, YouTube's json3, and JSON lists of {text, start, duration}.

Texts are what is said: tags, sounds, note signs and speakers' names are taken out.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flallm_ds.sharding.corpora import clock_seconds

# The first of a video's files in this order is read; .json is a list of {text, start,
# duration} or json3.
SUFFIXES = (".vtt", ".json3", ".srt", ".json")
# Captions that are not read.
OTHER_SUFFIXES = {".ttml", ".dfxp", ".xml", ".sbv", ".ass", ".ssa", ".sub", ".lrc", ".scc"}
OTHER_SUFFIXES |= {".srv1", ".srv2", ".srv3"}  # YouTube's XML

_CLOCK = r"((?:[0-9]+:)?[0-9]+:[0-9]+(?:[.,][0-9]+)?)"  # SubRip's decimals follow a comma
_TIMES = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?")
# The first line of a WebVTT block that is not shown.
_NO_CUE = re.compile(r"NOTE\b.*|(STYLE|REGION)\s*")
_MAX_S = 1e7
_AT_ONCE_S = 0.1  # captions that begin or end so close together do so at once

_LINE_BREAK = re.compile(r"(?i:<br\s*/?>)|\\N")
# Only what begins like a tag: JSON texts escape nothing and may hold "<3". It may
# continue in the next line.
_TAG = re.compile(r"</?(?:[a-z][^<>]*|[0-9]+(?::[0-9]+)+[.,][0-9]+)>|</>", re.IGNORECASE)
_TIME_TAG = re.compile(r"<[0-9]+(?::[0-9]+)+[.,][0-9]+>")
_CODE = re.compile(r"\{\\[^{}]*\}")  # {\an8}
# Control characters except TABs and line ends, zero-width spaces, marks of direction.
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
# ">> NAME:" before another speaker's words, and the dashes that stand for it.
_ARROWS = re.compile(r"(?<!\S)>{2,}[ \t]*(?:([^\s:：>][^:：>\n]{0,40})(?::(?!\S)|：))?")
_DASH = re.compile(r"[-–—]+\s*(?![\s\d])")
_NEXT_DASH = re.compile(r"(?<=[.!?…]) [-–—]+ ?(?=[^\s\d])")


@dataclass(frozen=True)
class Cue:
    """One caption: its span in seconds and its text on one line."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Track:
    """The captions of one file."""

    cues: list[Cue]  # one may have an empty text
    scrolls: bool  # lines that are shown again were taken once
    num_unreadable: int = 0  # captions whose times cannot be read


_Shown = tuple[float, float, list[str]]  # start and end in seconds, lines


def read_captions(path: Path) -> Track:
    """Read a file of one of SUFFIXES.

    Raises OSError or ValueError if it is not what its name says.
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
    """Return the language that a WebVTT file's header names, "" for none. Raises OSError."""
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

    Raises ValueError if the text is no WebVTT.
    """
    if not text.startswith("WEBVTT"):
        raise ValueError("captions must begin with WEBVTT")
    shown = _timed(_without_comments(text), blank_ends=True)
    return _unroll(shown, automatic=_TIME_TAG.search(text) is not None)


def _read_json3(content: dict[str, Any]) -> tuple[list[Cue], bool]:
    """Return (captions, whether they scroll) of YouTube's json3.

    Raises ValueError for anything else.
    """
    events = content.get("events")
    if not isinstance(events, list) or not events:
        raise ValueError("captions must have a list of events")
    shown = []
    automatic = False
    for event in events:
        if not isinstance(event, dict):
            raise ValueError("an event must be an object")
        # An event without segments sets up a window.
        if event.get("segs") is None:
            continue
        text, timed_words = _segments(event["segs"])
        # Speech recognition appends to a line, and gives each word its time.
        automatic |= timed_words or "aAppend" in event
        if text:
            start_s = _number(event.get("tStartMs")) / 1000
            span_s = _number(event.get("dDurationMs")) / 1000
            shown.append(_caption(start_s, span_s, text))
    return _unroll(shown, automatic)


def _segments(segments: Any) -> tuple[str, bool]:
    """Return (the text of a json3 event, whether its words have times of their own)."""
    if not isinstance(segments, list):
        raise ValueError("the segments of an event must be a list of objects")
    texts = []
    timed_words = False
    for segment in segments:
        if not isinstance(segment, dict):
            raise ValueError("the segments of an event must be a list of objects")
        text = segment.get("utf8", "")
        if not isinstance(text, str):
            raise ValueError("the text of a segment must be a string")
        texts.append(text)
        timed_words |= "tOffsetMs" in segment
    return "".join(texts).strip(), timed_words


def _entries(content: Any) -> list[_Shown]:
    if not isinstance(content, list):
        raise ValueError("captions must be a list")
    shown = []
    for entry in content:
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ValueError("a caption must have text, start and duration")
        start_s, span_s = _number(entry.get("start")), _number(entry.get("duration"))
        shown.append(_caption(start_s, span_s, entry["text"]))
    return shown


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a caption must have a start and a duration")
    return float(value)


def _caption(start_s: float, span_s: float, text: str) -> _Shown:
    if not (0 <= start_s < _MAX_S and 0 <= span_s < _MAX_S):
        raise ValueError(
            f"a caption must lie within a video, got {start_s} s for {span_s} s"
        )
    return start_s, start_s + span_s, _clean(text)


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n?|\n", text)


def _without_comments(text: str) -> list[str]:
    """Return the lines of a WebVTT text without its first one, its comments and its styles."""
    lines = []
    before, hidden = "", False
    for line in _lines(text)[1:]:
        # A hidden block begins after an empty line and reaches to the next one.
        if not line:
            hidden = False
        elif not before and _NO_CUE.fullmatch(line):
            hidden = True
        before = line
        if not hidden:
            lines.append(line)
    return lines


def _num_unreadable(lines: Sequence[str]) -> int:
    """Count the lines of times that cannot be read."""
    num = 0
    for line in lines:
        if "-->" in line and _span(line) is None:
            num += 1
    return num


def _span(line: str) -> tuple[float, float] | None:
    """Return the start and end in seconds of a line of times; None if it cannot be read."""
    times = _TIMES.fullmatch(line)
    if times is None:
        return None
    start_s, end_s = _seconds(times[1]), _seconds(times[2])
    return (start_s, end_s) if max(start_s, end_s) < _MAX_S else None


def _seconds(clock: str) -> float:
    parts = clock.replace(",", ".").split(":")
    return clock_seconds(list(map(float, parts)))


def _timed(lines: Sequence[str], blank_ends: bool) -> list[_Shown]:
    """Return what is shown and when: each line of times, and the lines below it.

    blank_ends: an empty line ends a caption, else the next line of times does, with the
    number above it.
    """
    # The spans, and the lines below each; the last list grows while lines are read.
    found: list[tuple[tuple[float, float], list[str]]] = []
    current: list[str] | None = None
    for line in lines:
        if "-->" in line:
            # SubRip writes a number above each line of times.
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

    Automatic captions scroll: each shows the last line again above a new one. Their lines
    are taken once, with the span of the caption in which they were new. automatic:
    whether the file says so, by the time of each word.
    """
    # How many lines of each caption are those of the one before, and whether that one is
    # shown too.
    repeats = [0] * len(shown)
    overlaps = [False] * len(shown)
    for n in range(1, len(shown)):
        began_s, end_s, before = shown[n - 1]
        start_s, _, lines = shown[n]
        if began_s <= start_s < end_s + _AT_ONCE_S:
            repeats[n] = _num_repeated(before, lines)
            overlaps[n] = began_s < start_s < end_s - _AT_ONCE_S
    # Some tools drop the time of each word, by which automatic captions are known;
    # repeats stay.
    num_repeating = len(repeats) - repeats.count(0)
    mostly = len(repeats) > 3 and num_repeating > len(repeats) / 2
    if not automatic and not mostly:
        # A line said twice is captioned twice, but not while the first is still shown.
        for n, overlap in enumerate(overlaps):
            if not overlap:
                repeats[n] = 0
    # Each caption without the lines that the one before has shown already. A caption of
    # such lines alone is left out, but an empty one stays and is counted.
    cues = []
    for (start_s, end_s, lines), repeated in zip(shown, repeats, strict=True):
        new = lines[repeated:]
        if new or not repeated:
            cues.append(Cue(start_s, end_s, " ".join(new)))
    return cues, automatic or any(repeats)


def _num_repeated(before: list[str], now: list[str]) -> int:
    """Return how many of a caption's first lines are the last ones of the caption before."""
    # The longest overlap first: two equal lines that are shown again count as two.
    for num in range(min(len(before), len(now)), 0, -1):
        if before[-num:] == now[:num]:
            return num
    return 0


def separate(cues: Sequence[tuple[int, Cue]]) -> tuple[list[tuple[int, Cue]], int, int]:
    """Make captions that do not overlap; each has its number.

    Returns (captions, how many were cut, how many were joined). A caption ends where
    the next begins. Two that begin together, or say the same, become one.
    """
    apart: list[tuple[int, Cue]] = []
    num_cut = num_joined = 0
    for number, cue in sorted(cues, key=lambda numbered: numbered[1].start_s):
        if not apart or cue.start_s >= apart[-1][1].end_s:
            apart.append((number, cue))
            continue
        # The two overlap: join them, or cut the last one.
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
    """Return the lines of what is said, without tags, entities, sounds and speakers.

    Returns [] if no word is left.
    """
    text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    # Twice: transcripts are often escaped twice, tags with them.
    text = _TAG.sub("", html.unescape(html.unescape(text)))
    text = _CODE.sub("", text).replace("\\h", " ").translate(_INVISIBLE)
    # Sounds: all that is in brackets, but only what names a sound in parentheses.
    sung = _NOTE_SIGNS.search(text) is not None
    text = _NOTE_SIGNS.sub(" ", _BRACKETS.sub(" ", text))
    text = _PARENTHESES.sub(_without_sound, text)
    text = _ARROWS.sub(_without_name, text)
    # Nothing is said: "(birds singing)", but not a sentence said aside; "♪ soft music ♪";
    # or signs without a letter or digit.
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
    """Return what stays of "(...)": nothing of a sound, else all."""
    return " " if _is_sound(parentheses[1]) else parentheses[0]


def _without_name(arrows: re.Match[str]) -> str:
    """Return what stays of ">> NAME:" or ">>": a name's words begin with no small letter."""
    name = arrows[1] or ""
    if any(word[0].islower() for word in name.split()):
        return f" {arrows[0].lstrip('>')}"
    return " "


def _without_dashes(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines that are not empty, without the dashes before what each speaker says."""
    spoken = ""
    dialogue = False
    for line in filter(None, lines):
        # After a comma or a word the dash is the sentence's own.
        begins = not spoken or dialogue or spoken[-1] in ".!?…\"'”"
        if begins and (match := _DASH.match(line)):
            dialogue = dialogue or not spoken
            line = line[match.end() :]
        line = _NEXT_DASH.sub(" ", line) if dialogue else line
        spoken = line or spoken
        if line:
            yield line
