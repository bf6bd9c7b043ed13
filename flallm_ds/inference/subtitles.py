"""Write sentences with times as WebVTT and SubRip subtitles."""

import html
from typing import Literal, TextIO

Format = Literal["vtt", "srt"]


class SubtitleWriter:
    """Writes the subtitles of one video to a text file, sentence by sentence."""

    def __init__(self, file: TextIO, format: Format) -> None:
        self._file, self._format = file, format
        self._num_cues = 0
        if format == "vtt":
            file.write("WEBVTT\n\n")

    def add(self, start_s: float, end_s: float, sentence: str) -> None:
        """Write a cue; nothing for an empty sentence."""
        if not sentence:
            return
        self._num_cues += 1
        cue = vtt_cue if self._format == "vtt" else srt_cue
        self._file.write(cue(self._num_cues, start_s, end_s, sentence))


def clock(seconds: float, decimal: str = ".") -> str:
    """Return a time as hh:mm:ss.mmm."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, milliseconds = divmod(milliseconds, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{decimal}{milliseconds:03}"


def vtt_cue(number: int, start_s: float, end_s: float, sentence: str) -> str:
    """Return a cue of a WebVTT file, which begins with WEBVTT and an empty line."""
    # A ">" could end the times of a cue, a "<" begins a tag.
    text = html.escape(_on_one_line(sentence), quote=False)
    return f"{number}\n{clock(start_s)} --> {clock(end_s)}\n{text}\n\n"


def srt_cue(number: int, start_s: float, end_s: float, sentence: str) -> str:
    """Return a cue of a SubRip file."""
    times = f"{clock(start_s, ',')} --> {clock(end_s, ',')}"
    return f"{number}\n{times}\n{_on_one_line(sentence)}\n\n"


def _on_one_line(sentence: str) -> str:
    # An empty line ends a cue.
    return " ".join(sentence.split())
