"""Write sentences with times as WebVTT and SubRip subtitles."""

import html


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
