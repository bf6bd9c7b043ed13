"""Record which videos a call has translated, so that the same call resumes.

A journal is a text file with a JSON object on each line:

    {"made_with": {...}}                        the model and the options of the call
    {"path": ..., ...}                          a result of a video, where a file has them all
    {"video": PATH, "bytes": N, "file": NAME}   the video is finished; its subtitles are in NAME
    {"video": PATH, "bytes": N, "error": ...}   the video cannot be translated

PATH is absolute. N is the size of the video: one with another size is another video. Results
after the last finished video belong to one that was interrupted, and are removed.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from flallm_ds.data.codecs.video import image_paths
from flallm_ds.errors import UserError, require
from flallm_ds.files import locked, write_file

Record = dict[str, Any]
_MAX_SHOWN = 40  # characters of a value in an error


@dataclass(frozen=True)
class Finished:
    """What a journal says about a video.

    num_bytes: its size. file: name of the file with its subtitles, if it has one. error: why
    it cannot be translated; empty if it is translated.
    """

    num_bytes: int
    file: str = ""
    error: str = ""
    results: Sequence[Record] = field(default_factory=list)


class Journal:
    """The finished videos of a call, in a file. `open_journal` creates it.

    finished: by the absolute path of the video, in the order in which they were finished.
    """

    def __init__(self, path: Path, file: TextIO, finished: dict[str, Finished]) -> None:
        self.path = path
        self.finished = finished
        self._file = file
        self._results: list[Record] = []

    def of(self, video: Path) -> Finished | None:
        """Return what the journal says about a video, if anything."""
        return self.finished.get(absolute(video))

    def is_translated(self, video: Path) -> bool:
        """Return whether a video is translated, and has not changed since."""
        found = self.of(video)
        return found is not None and not found.error and found.num_bytes == size_of(video)

    def num_translated(self) -> int:
        """Return the number of videos that are translated."""
        return sum(not entry.error for entry in self.finished.values())

    @property
    def has_results(self) -> bool:
        """Whether the video that is being translated has results."""
        return bool(self._results)

    def add(self, result: Record) -> None:
        """Write a result of the video that is being translated."""
        self._write(result)
        self._results.append(result)

    def finish(self, video: Path, num_bytes: int, file: str = "", error: str = "") -> None:
        """Write that a video is finished, and wait until this is on the disk.

        num_bytes: `size_of` the video before it was read. file, error: as of `Finished`.
        """
        named: Record = {"file": file} if file else {}
        if error:
            named["error"] = error
        self._write({"video": absolute(video), "bytes": num_bytes, **named})
        os.fsync(self._file.fileno())
        # The latest entry is the last one.
        self.finished.pop(absolute(video), None)
        self.finished[absolute(video)] = Finished(num_bytes, file, error, self._results)
        self._results = []

    def _write(self, record: Record) -> None:
        self._file.write(json_line(record))


@contextmanager
def open_journal(path: Path, made_with: Mapping[str, Any]) -> Iterator[Journal]:
    """Yield the journal of a call: that of an interrupted one, or a new one.

    made_with: the model (`model`: its name, `export`: its digest) and the options that change
    results. The file is removed after an error if no video is finished. Raises UserError if
    it has results of another model or of other options, if it is no journal, or if another
    process uses it. Raises OSError with a filename.
    """
    with locked(path.with_name(f".lock-{path.name}"), f"File {path}", "use another --out"):
        finished: dict[str, Finished] = {}
        if path.exists() and path.stat().st_size:
            found, finished, num_bytes = _read(path)
            _check_same(path, found, made_with, finished)
            os.truncate(path, num_bytes)
        if all(entry.error for entry in finished.values()):
            # Nothing is lost: the options may be other ones.
            finished = {}
            write_file(path, json_line({"made_with": made_with}).encode())
        with path.open("a", encoding="utf-8", buffering=1) as file:
            journal = Journal(path, file, finished)
            try:
                yield journal
            except BaseException as error:
                if isinstance(error, OSError):
                    error.filename = error.filename or str(path)  # ENOSPC has no filename
                # After Ctrl-C, the sentences of an unfinished video may be of use.
                is_stopped = not isinstance(error, Exception)
                if not (finished or (is_stopped and journal.has_results)):
                    path.unlink(missing_ok=True)
                raise


def size_of(video: Path) -> int:
    """Return the bytes of a video file, or of the images of a folder; -1 if unreadable."""
    try:
        if not video.is_dir():
            return video.stat().st_size
        return sum(path.stat().st_size for path in image_paths(video))
    except OSError:
        return -1


def json_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    # A file name that is not UTF-8 has surrogates. Their escapes are those of JSON.
    return line.encode("utf-8", "backslashreplace").decode()


def absolute(video: Path) -> str:
    """Return the path by which a journal names a video; symbolic links are kept."""
    return os.path.abspath(video)  # noqa: PTH100 - Path.resolve follows links


def _read(path: Path) -> tuple[Record, dict[str, Finished], int]:
    """Return (made_with, finished videos, bytes until the end of the last one).

    Raises UserError for a file that is no journal.
    """
    lines = path.read_bytes().split(b"\n")
    made_with = _record(lines[0]).get("made_with")
    if not isinstance(made_with, dict):
        raise UserError(
            f"Cannot resume from {path}: its first line does not name a model. Move this file "
            "away, or use another --out."
        )
    finished: dict[str, Finished] = {}
    results: list[Record] = []
    num_bytes = num_whole = len(lines[0]) + 1
    for line in lines[1:-1]:  # a last line without an end was not written completely
        record = _record(line)
        num_bytes += len(line) + 1
        if "video" in record:
            finished.pop(record["video"], None)
            finished[record["video"]] = Finished(
                record.get("bytes", -1),
                record.get("file", ""),
                record.get("error", ""),
                results,
            )
            results, num_whole = [], num_bytes
        elif "path" in record:
            results.append(record)
        else:
            break  # the disk was full, or the machine lost power
    return made_with, finished, num_whole


def _record(line: bytes) -> Record:
    """Return the object of a line; an empty one for a damaged line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _check_same(
    path: Path,
    found: Mapping[str, Any],
    made_with: Mapping[str, Any],
    finished: Mapping[str, Finished],
) -> None:
    """Raise UserError if finished videos were translated with something else."""
    num_translated = sum(not entry.error for entry in finished.values())
    if not num_translated:
        return
    has = f"has {num_translated} translated video{'s' if num_translated > 1 else ''}"
    remedy = "Use the same to resume, use another --out, or move this file away."
    require(
        found.get("export") == made_with["export"],
        f"{path} {has} and was made with another model ({found.get('model')}, got "
        f"{made_with['model']}, with other weights). {remedy}",
    )
    changed = []
    for name, value in json.loads(json.dumps(made_with)).items():
        if name not in ("model", "export") and found.get(name) != value:
            changed.append(f"--{name} {_shown(found.get(name))}, got {_shown(value)}")
    require(
        not changed,
        f"{path} {has} and was made with other options ({'; '.join(changed)}). {remedy}",
    )


def _shown(value: Any) -> str:
    text = "not given" if value in (None, "", []) else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
