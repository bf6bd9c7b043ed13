"""`flallm translate`: translate videos one after another, print and write the sentences."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import isinf
from pathlib import Path
from typing import Any

from flallm_ds import terminal
from flallm_ds.data.codecs.video import BrokenVideo
from flallm_ds.errors import UserError, file_problem
from flallm_ds.inference.clips import LEAST_LIMIT_S
from flallm_ds.inference.subtitles import Format, clock
from flallm_ds.inference.translation_files import Add, Output, open_output
from flallm_ds.inference.translator import Translation, Translator
from flallm_ds.terminal import note


@dataclass(frozen=True)
class Job:
    """What to translate, and how.

    out: .jsonl, .vtt or .srt; with `subtitles`, the folder for a file of each video; None:
    print only. windows, spans, idle_s: as of `Translator.translations`. made_with: the model
    and the options, as of `open_journal`.
    """

    videos: Sequence[Path]
    out: Path | None = None
    subtitles: Format | None = None
    language: str = ""
    windows: bool | None = None
    spans: Sequence[tuple[float, float]] = ()
    idle_s: float | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prints(self) -> bool:
        """Whether sentences are printed as they come: not those of many videos in a file."""
        return len(self.videos) == 1 or self.out is None


class _Unreadable(Exception):
    """A video cannot be decoded. Its cause is the error."""


def translate_videos(load: Callable[[], Translator], job: Job) -> None:
    """Translate the videos of a job; print the sentences, and write them to `job.out`.

    load: returns the translator; not called if an interrupted call has translated all. A
    video that cannot be decoded does not end the others. Raises UserError at the end if
    there was one, or at once if it is the only video.
    """
    failed: list[str] = []
    with open_output(job.videos, job.out, job.subtitles, job.made_with) as output:
        try:
            if output.todo:
                translator = load()
                translator.language(job.language)  # before the first video is decoded
                failed = _translate_all(translator, job, output)
        except (KeyboardInterrupt, SystemExit):
            if output.kept():
                note(output.kept())
            raise
    if failed:
        raise UserError(
            f"Cannot translate {len(failed)} of {len(job.videos)} videos: the first error is: "
            f"{failed[0]}"
        )


def stream_video(translator: Translator, video: Path, language: str) -> None:
    """Translate a video as one sentence, and print it word by word."""
    named = translator.language(language)  # before the video is decoded
    (clip,) = translator.clips(video, windows=False)
    longest_s = max(translator.reader.longest_s, LEAST_LIMIT_S)
    is_thinned = len(clip.frames_THWC) < clip.num_sampled
    if is_thinned or clip.end_s - clip.start_s > longest_s:
        note(
            f"warning: {video} is longer than the longest clip of the training, and --stream "
            "translates it as one sentence. Leave out --stream to cut it at pauses."
        )
    for text in translator.stream_clip(clip, named, video.name):
        print(text, end="", flush=True)
    print()


def _translate_all(translator: Translator, job: Job, output: Output) -> list[str]:
    """Translate what is to do; return the errors of videos that cannot be decoded."""
    failed: list[str] = []
    shows_progress = not job.prints or (len(job.videos) > 1 and not sys.stdout.isatty())
    with ExitStack() as stack:
        bar: terminal.Progress | None = None
        if shows_progress:
            bar = stack.enter_context(
                terminal.progress(len(output.todo), "translate", "video")
            )
        for video in output.todo:
            try:
                with output.video(video) as add:
                    _translate(translator, job, video, add)
            except _Unreadable as unreadable:
                error = unreadable.__cause__
                if len(job.videos) == 1 and error is not None:
                    raise error from None
                sentence = file_problem(error) if isinstance(error, OSError) else str(error)
                note(f"error: {sentence}")
                failed.append(sentence)
                output.fail(video, sentence)
            if bar is not None:
                bar.update(1)
    return failed


def _translate(translator: Translator, job: Job, video: Path, add: Add) -> None:
    """Translate one video. Raises _Unreadable if it cannot be decoded."""
    num_done = 0
    try:
        for translation in _translations(translator, job, video):
            if num_done == 0 and translation.is_part and job.windows is None:
                _note_windows(translator, job, video)
            _warn_if_thinned(translation, video)
            if job.prints:
                _print(job, video, translation)
            add(translation)
            num_done += 1
    except _Unreadable as unreadable:
        # The end of a recording that was interrupted may be damaged.
        is_end = job.idle_s is not None and num_done > 0
        if not is_end or not isinstance(unreadable.__cause__, BrokenVideo):
            raise
        note(f"warning: the recording ends here: {unreadable.__cause__}")
    if num_done == 0:
        note(f"warning: {video} has no sentence, because nothing moves in it.")


def _translations(translator: Translator, job: Job, video: Path) -> Iterator[Translation]:
    """Yield the translations of a video. Raises _Unreadable if it cannot be decoded."""
    found = translator.translations(
        video, job.language, windows=job.windows, spans=job.spans, idle_s=job.idle_s
    )
    # Ctrl-C is how a user ends a recording.
    with suppress(*([KeyboardInterrupt] if job.idle_s is not None else [])):
        # Only errors of decoding are caught here: one of writing ends the call.
        try:
            yield from found
        except (UserError, OSError) as error:
            raise _Unreadable from error


def _print(job: Job, video: Path, translation: Translation) -> None:
    """Print a line for each hypothesis, with what is needed of path, times and score."""
    before = [] if len(job.videos) == 1 else [str(video)]
    if translation.is_part:
        before.append(f"{clock(translation.start_s)} - {clock(translation.end_s)}")
    for sentence, score in translation.nbest:
        cells = [*before, *([] if score is None else [f"{score:.4f}"]), sentence]
        print("\t".join(map(terminal.one_line, cells)), flush=True)


def _note_windows(translator: Translator, job: Job, video: Path) -> None:
    """Say that a video is cut into windows although this was not asked for."""
    if job.spans or job.idle_s is not None:
        return
    longest_s = translator.reader.longest_s
    recorded = "" if isinf(longest_s) else f" ({longest_s:.1f} s)"
    note(
        f"{video} is longer than the longest clip of the training{recorded}: it is cut at "
        "pauses. (--long=false translates it as one sentence.)"
    )


def _warn_if_thinned(translation: Translation, video: Path) -> None:
    num, num_sampled = translation.num_frames, translation.num_sampled
    if num < num_sampled:
        note(
            f"warning: {video}: the model reads {num} of {num_sampled} frames, its limit "
            "(data.max_frames), so movements are skipped. Use --long, or shorter --spans."
        )
