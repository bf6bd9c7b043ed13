"""The files of `flallm translate`: JSON lines, subtitles of one video, subtitles of several.

Each has the same methods, which `Output` describes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from flallm_ds import terminal
from flallm_ds.data.codecs.video import video_name
from flallm_ds.errors import UserError
from flallm_ds.files import new_lines, partial_of, write_file
from flallm_ds.inference.journal import (
    Journal,
    Record,
    absolute,
    json_line,
    open_journal,
    size_of,
)
from flallm_ds.inference.subtitles import Format, SubtitleWriter
from flallm_ds.inference.translator import Translation

# The journal of a folder of subtitles. It stays, so that a later call skips these videos.
JOURNAL = "translated.jsonl"
Add = Callable[[Translation], None]


class Output(Protocol):
    """Where the translations of the videos of a call are written."""

    @property
    def todo(self) -> Sequence[Path]:
        """The videos that are not translated yet."""

    def video(self, video: Path) -> AbstractContextManager[Add]:
        """Return a context for one video, in which its translations are added in order.

        The video is finished at the end of the block, but not after an exception.
        """

    def fail(self, video: Path, error: str) -> None:
        """Record that a video cannot be translated."""

    def kept(self) -> str:
        """Return what remains if the call is interrupted now, in a sentence."""


@contextmanager
def open_output(
    videos: Sequence[Path],
    out: Path | None,
    subtitles: Format | None,
    made_with: Mapping[str, Any],
) -> Iterator[Output]:
    """Yield the output of a call, and complete it at the end.

    out: .jsonl, .vtt or .srt (of one video); with `subtitles`, a folder; None: no file.
    made_with: as of `open_journal`, whose errors are raised. Raises OSError with a filename.
    """
    if out is None:
        yield _NoFile(videos)
    elif subtitles is not None:
        with open_journal(out / JOURNAL, made_with) as journal:
            yield _SubtitleFolder(videos, out, subtitles, journal)
    elif out.suffix.lower() == ".jsonl":
        with open_journal(partial_of(out), made_with) as journal:
            lines = _JsonLines(videos, out, journal)
            yield lines
            lines.complete()
    else:
        with new_lines(out) as file:
            writer = SubtitleWriter(file, cast(Format, out.suffix.lower()[1:]))
            yield _SubtitleFile(videos, out, writer)


class _NoFile:
    def __init__(self, videos: Sequence[Path]) -> None:
        self.todo = videos

    @contextmanager
    def video(self, video: Path) -> Iterator[Add]:
        yield lambda translation: None

    def fail(self, video: Path, error: str) -> None:
        pass

    def kept(self) -> str:
        return ""


class _SubtitleFile(_NoFile):
    """The subtitles of the only video."""

    def __init__(self, videos: Sequence[Path], out: Path, writer: SubtitleWriter) -> None:
        super().__init__(videos)
        self._out, self._writer = out, writer

    @contextmanager
    def video(self, video: Path) -> Iterator[Add]:
        yield lambda translation: _add_cue(self._writer, translation)

    def kept(self) -> str:
        return f"The finished sentences are in {partial_of(self._out)}."


class _JsonLines:
    """A line for each sentence of all videos, in a journal until all are finished."""

    def __init__(self, videos: Sequence[Path], out: Path, journal: Journal) -> None:
        self._videos, self._out, self._journal = videos, out, journal
        self._check_videos()
        self.todo = _todo(videos, journal)

    def _check_videos(self) -> None:
        """Raise UserError if a translated video would be missing in the file."""
        given = set(map(absolute, self._videos))
        for path, entry in self._journal.finished.items():
            if path not in given and not entry.error:
                raise UserError(
                    f"{self._journal.path} belongs to a call with other videos: it has "
                    f"{self._journal.num_translated()}, among them {path}, which is not "
                    "given. Give the same videos to resume, use another --out, or move this "
                    "file away."
                )

    @contextmanager
    def video(self, video: Path) -> Iterator[Add]:
        num_bytes = size_of(video)
        yield lambda translation: self._journal.add(_record(video, translation))
        self._journal.finish(video, num_bytes)

    def fail(self, video: Path, error: str) -> None:
        self._journal.add({"path": str(video), "error": error})
        self._journal.finish(video, size_of(video), error=error)

    def kept(self) -> str:
        if len(self._videos) == 1:
            return f"The finished sentences are in {self._journal.path}."
        return _resumes(self._journal, self._videos)

    def complete(self) -> None:
        """Write the file, with the videos in the order of this call."""
        lines = []
        for video in self._videos:
            entry = self._journal.of(video)
            assert entry is not None, "each video is finished"
            for record in entry.results:
                # An interrupted call may have named the same video by another path.
                lines.append(json_line(record | {"path": str(video)}))
        try:
            write_file(self._out, "".join(lines).encode())
        except OSError as error:
            error.filename = str(self._out)
            raise
        self._journal.path.unlink()


class _SubtitleFolder:
    """A subtitle file of each video, and a journal that says which are finished."""

    def __init__(
        self, videos: Sequence[Path], folder: Path, format: Format, journal: Journal
    ) -> None:
        self._videos, self._journal = videos, journal
        self._folder, self._format = folder, format
        self._check_files()
        written = {path for path in videos if self._path(path).exists()}
        self.todo = _todo(videos, journal, written)

    def _path(self, video: Path) -> Path:
        return self._folder / f"{video_name(video)}.{self._format}"

    def _check_files(self) -> None:
        """Raise UserError if a file exists that was not made from its video."""
        owners = {}
        for source, entry in self._journal.finished.items():
            if entry.file:
                owners[entry.file] = source
        for video in self._videos:
            path = self._path(video)
            if path.exists() and owners.get(path.name) != absolute(video):
                raise UserError(
                    f"{path} already exists, and was not made from {video} by this command "
                    f"({self._journal.path} lists what was). Move it away, or use another "
                    "--out."
                )

    @contextmanager
    def video(self, video: Path) -> Iterator[Add]:
        num_bytes = size_of(video)
        path = self._path(video)
        with new_lines(path) as lines:
            writer = SubtitleWriter(lines, self._format)
            yield lambda translation: _add_cue(writer, translation)
            # Before the file gets its name: after a kill in between, the video is translated
            # again. In the other order, its file would seem to be made by someone else.
            self._journal.finish(video, num_bytes, path.name)

    def fail(self, video: Path, error: str) -> None:
        self._journal.finish(video, size_of(video), error=error)

    def kept(self) -> str:
        return _resumes(self._journal, self._videos)


def _todo(
    videos: Sequence[Path], journal: Journal, written: Set[Path] | None = None
) -> list[Path]:
    """Return the videos to translate, and say how many are translated already.

    written: those whose files exist; None: all results are in the journal.
    """
    todo = []
    num_changed = num_broken = 0
    for video in videos:
        is_written = written is None or video in written
        if is_written and journal.is_translated(video):
            continue
        todo.append(video)
        entry = journal.of(video)
        num_broken += entry is not None and bool(entry.error)
        num_changed += entry is not None and not entry.error and is_written
    if len(todo) < len(videos) or num_changed:
        num = len(videos) - len(todo)
        said = f"{num} of {len(videos)} videos are translated already."
        if num_changed or num_broken:
            said += f" Again: {num_changed} changed since then, {num_broken} with an error."
        terminal.note(said)
    return todo


def _resumes(journal: Journal, videos: Sequence[Path]) -> str:
    num = sum(map(journal.is_translated, videos))
    return f"{num} of {len(videos)} videos are translated. Run the same command again to resume."


def _record(video: Path, translation: Translation) -> Record:
    """Return a line of the JSON file; `nbest` only for several hypotheses."""
    record: Record = {
        "path": str(video),
        "start_s": round(translation.start_s, 3),
        "end_s": round(translation.end_s, 3),
        "sentence": translation.sentence,
    }
    if len(translation.nbest) > 1:
        record["nbest"] = translation.nbest
    record["num_frames"] = translation.num_frames
    return record


def _add_cue(writer: SubtitleWriter, translation: Translation) -> None:
    writer.add(translation.start_s, translation.end_s, translation.sentence)
