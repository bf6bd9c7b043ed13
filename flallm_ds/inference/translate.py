"""`flallm translate`: translate videos one after another, print and write the sentences."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import isinf
from pathlib import Path
from typing import TextIO

from flallm_ds import terminal
from flallm_ds.data.codecs.video import BrokenVideo
from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import new_lines, partial_of
from flallm_ds.inference.subtitles import clock, srt_cue, vtt_cue
from flallm_ds.inference.translator import Translation, Translator


@dataclass(frozen=True)
class Job:
    """What to translate, and how.

    out: .jsonl, .vtt or .srt; None: print only. windows, spans, idle_s: as of
    `Translator.translations`.
    """

    videos: Sequence[Path]
    out: Path | None = None
    language: str = ""
    windows: bool | None = None
    spans: Sequence[tuple[float, float]] = ()
    idle_s: float | None = None


def translate_videos(translator: Translator, job: Job) -> None:
    """Translate all videos of a job; print the sentences, and write them to `job.out`.

    A video that cannot be decoded does not end the others. Raises UserError at the end if
    there was one, or at once if it is the only video.
    """
    translator.language(job.language)  # before the first video is decoded
    failed: list[str] = []
    with ExitStack() as stack:
        lines = stack.enter_context(new_lines(job.out)) if job.out else None
        results = _Results(job, lines)
        bar: terminal.Progress | None = None
        if results.shows_progress:
            bar = stack.enter_context(terminal.progress(len(job.videos), "translate"))
        try:
            for video in job.videos:
                error = _translate(translator, job, video, results)
                if error is not None:
                    failed.append(error)
                    results.add_error(video, error)
                if bar is not None:
                    bar.update(1)
        except KeyboardInterrupt:
            if job.out is not None:
                _note(f"The finished sentences are in {partial_of(job.out)}.")
            raise
    if failed:
        raise UserError(
            f"Cannot translate {len(failed)} of {len(job.videos)} videos: the first error is: "
            f"{failed[0]}"
        )


def _translate(
    translator: Translator, job: Job, video: Path, results: "_Results"
) -> str | None:
    """Translate one video; return the error of one that cannot be decoded, if any."""
    num_done = 0
    try:
        for translation, took_s in _timed(_translations(translator, job, video)):
            if num_done == 0 and translation.is_part and job.windows is None:
                _note_windows(translator, job, video)
            _warn_if_thinned(translation, video)
            results.add(video, translation, took_s)
            num_done += 1
    except (UserError, OSError) as error:
        sentence = str(error) if isinstance(error, UserError) else file_problem(error)
        if job.idle_s is not None and num_done and isinstance(error, BrokenVideo):
            # The end of a recording that was interrupted may be damaged.
            _note(f"warning: the recording ends here: {sentence}")
        elif len(job.videos) == 1:
            raise
        else:
            _note(f"error: {sentence}")
            return sentence
    if num_done == 0:
        _note(f"warning: {video} has no sentence, because nothing moves in it.")
    return None


def _translations(translator: Translator, job: Job, video: Path) -> Iterator[Translation]:
    found = translator.translations(
        video, job.language, windows=job.windows, spans=job.spans, idle_s=job.idle_s
    )
    # Ctrl-C is how a user ends a recording.
    with suppress(*([KeyboardInterrupt] if job.idle_s is not None else [])):
        yield from found


def _timed(found: Iterator[Translation]) -> Iterator[tuple[Translation, float]]:
    """Yield (translation, seconds since the previous one)."""
    begin = time.perf_counter()
    for translation in found:
        now = time.perf_counter()
        yield translation, now - begin
        begin = now


class _Results:
    """Prints translations, and writes them to the file of the job if there is one."""

    def __init__(self, job: Job, lines: TextIO | None) -> None:
        self._suffix = job.out.suffix.lower() if job.out else ""
        self._lines = lines
        self._is_single = len(job.videos) == 1
        # Sentences of one video are printed as they come. For several videos the file has
        # them, and the terminal shows the progress.
        self._prints = self._is_single or job.out is None
        self.shows_progress = not self._prints or (
            not self._is_single and not sys.stdout.isatty()
        )
        self._num_cues = 0
        if self._lines is not None and self._suffix == ".vtt":
            self._lines.write("WEBVTT\n\n")

    def add(self, video: Path, translation: Translation, took_s: float) -> None:
        """Print and write the sentences of a video or of a part of it."""
        if self._prints:
            self._print(video, translation)
        if self._lines is None:
            return
        if self._suffix == ".jsonl":
            self._lines.write(_json_line(_record(video, translation, took_s)))
        elif translation.sentence:
            self._num_cues += 1
            cue = vtt_cue if self._suffix == ".vtt" else srt_cue
            times = translation.start_s, translation.end_s
            self._lines.write(cue(self._num_cues, *times, translation.sentence))

    def add_error(self, video: Path, error: str) -> None:
        """Write that a video cannot be translated."""
        if self._lines is not None:
            self._lines.write(_json_line({"path": str(video), "error": error}))

    def _print(self, video: Path, translation: Translation) -> None:
        """Print a line for each hypothesis, with what is needed of path, times and score."""
        before = [] if self._is_single else [str(video)]
        if translation.is_part:
            before.append(f"{clock(translation.start_s)} - {clock(translation.end_s)}")
        for sentence, score in translation.nbest:
            cells = [*before, *([] if score is None else [f"{score:.4f}"]), sentence]
            print("\t".join(map(terminal.one_line, cells)), flush=True)


def _record(video: Path, translation: Translation, took_s: float) -> dict[str, object]:
    """Return a line of the JSON file; `nbest` only for several hypotheses."""
    record: dict[str, object] = {
        "path": str(video),
        "start_s": round(translation.start_s, 3),
        "end_s": round(translation.end_s, 3),
        "sentence": translation.sentence,
    }
    if len(translation.nbest) > 1:
        record["nbest"] = translation.nbest
    record["num_frames"] = translation.num_frames
    record["took_s"] = round(took_s, 3)
    return record


def _json_line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _note_windows(translator: Translator, job: Job, video: Path) -> None:
    """Say that a video is cut into windows although this was not asked for."""
    if job.spans or job.idle_s is not None:
        return
    longest_s = translator.reader.longest_s
    recorded = "" if isinf(longest_s) else f" ({longest_s:.1f} s)"
    _note(
        f"{video} is longer than the longest clip of the training{recorded}: it is cut at "
        "pauses. (--long=false translates it as one sentence.)"
    )


def _warn_if_thinned(translation: Translation, video: Path) -> None:
    num, num_sampled = translation.num_frames, translation.num_sampled
    if num < num_sampled:
        _note(
            f"warning: {video}: the model reads {num} of {num_sampled} frames, its limit "
            "(data.max_frames), so movements are skipped. Use --long, or shorter --spans."
        )


def _note(sentence: str) -> None:
    print(terminal.printable(sentence), file=sys.stderr, flush=True)
