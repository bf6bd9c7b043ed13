"""The inputs and the output of `flallm translate`, found and checked before slow imports."""

import os
from collections.abc import Sequence
from pathlib import Path

from flallm_ds.cli.checks import check_exists
from flallm_ds.data.codecs.growing import check_can_grow
from flallm_ds.data.codecs.video import VIDEO_SUFFIXES, Video, image_paths, video_name
from flallm_ds.errors import UserError, require
from flallm_ds.sharding.corpora import clock_seconds
from flallm_ds.sharding.corpora.captions import read_captions
from flallm_ds.terminal import note

SUBTITLES = (".vtt", ".srt")
OUT_SUFFIXES = (".jsonl", *SUBTITLES)
_SHOWN = 3  # number of folders that a warning names
_MAX_SPAN_S = 1e7  # longer than any video; larger numbers are no seconds


def find_videos(named: Sequence[Path], listed: Path | None) -> list[Path]:
    """Return the videos of a command line: files, and folders of frames.

    named: files, folders of frames and folders of videos. listed: a text file with more of
    them, one on a line. Raises UserError if one does not exist or has no video.
    """
    given = [("VIDEO", path) for path in named]
    if listed is not None:
        given += [("--list", path) for path in _read_list(listed)]
    require(bool(given), "VIDEO must be given, got nothing. Give a file, or --list=FILE.")
    found: list[Path] = []
    for option, path in given:
        check_exists(option, path)
        found += _videos_in(option, path) if path.is_dir() else [path]
    _check_once(found)
    return found


def _check_once(videos: Sequence[Path]) -> None:
    """Raise UserError for a video that is named twice."""
    given: set[str] = set()
    for video in videos:
        path = os.path.abspath(video)  # noqa: PTH100 - two links may be two videos
        require(
            path not in given,
            f"VIDEO must be named once, got {video} twice (in --list and folders as well). "
            "Remove one.",
        )
        given.add(path)


def _read_list(path: Path) -> list[Path]:
    check_exists("--list", path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read --list={path}: it is not a text file in UTF-8. Give a file with the "
            "path of a video on each line."
        ) from error
    found = [Path(line.strip()) for line in lines if line.strip()]
    require(bool(found), f"--list must name at least one video, got the empty file {path}.")
    return found


def _videos_in(option: str, folder: Path) -> list[Path]:
    """Return the folder itself if it has frames, otherwise the videos in it."""
    videos: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if _is_video_file(path) or (path.is_dir() and image_paths(path)):
            videos.append(path)
        elif path.is_dir() and any(map(_is_video_file, path.iterdir())):
            others.append(path)
    images = image_paths(folder)
    require(
        bool(images or videos),
        f"{option} must be a video, a folder of frames or a folder of videos, got the folder "
        f"{folder} without any of them. Check the path.",
    )
    require(
        not (images and videos),
        f"{option} must be a folder of frames or a folder of videos, got {folder} with "
        f"{len(images)} images and {len(videos)} videos. Name the videos, or move the images.",
    )
    if others:
        names = ", ".join(map(str, others[:_SHOWN])) + ", ..." * (len(others) > _SHOWN)
        note(
            f"warning: videos in folders of {folder} are not translated; name them: {names}"
        )
    return videos or [folder]


def _is_video_file(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def check_video(path: Path, follow: bool) -> None:
    """Raise UserError unless the first frame of a video can be decoded.

    follow: whether the file is still being written.
    """
    if follow and path.is_file():
        try:
            check_can_grow(path)
        except ValueError as error:
            raise UserError(
                f"Cannot follow {path}: {error}. Record in one of these formats."
            ) from error
        return
    next(Video(path).frames())


def check_out(out: Path, videos: Sequence[Path], inputs: Sequence[Path | None]) -> None:
    """Raise UserError for a result file that cannot be written.

    inputs: files that it must not replace.
    """
    suffix = out.suffix.lower()
    require(
        suffix in OUT_SUFFIXES,
        f"--out must end in {', '.join(OUT_SUFFIXES[:-1])} or {OUT_SUFFIXES[-1]}, got {out}. "
        "(For subtitles of each video in a folder, add --subtitles=vtt or srt.)",
    )
    require(not out.is_dir(), f"--out must be a file, got the folder {out}.")
    require(
        out.parent.is_dir() and os.access(out.parent, os.W_OK),
        f"--out must be in an existing folder in which you may write, got {out}.",
    )
    require(
        suffix not in SUBTITLES or len(videos) == 1,
        f"--out must end in .jsonl for several videos, got {out} for {len(videos)} videos. For "
        f"subtitles of each, give --subtitles={suffix[1:]} --out=FOLDER.",
    )
    for path in inputs:
        is_input = path is not None and out.exists() and out.samefile(path)
        require(not is_input, f"--out must be another file than the inputs, got {out}.")


def check_out_folder(out: Path, videos: Sequence[Path], subtitles: str) -> None:
    """Raise UserError for a folder of subtitles that cannot be written.

    It may be a new one. subtitles: their suffix without a dot.
    """
    require(
        out.is_dir() or (not out.exists() and out.suffix.lower() not in OUT_SUFFIXES),
        f"--out must be a folder with --subtitles, got {out}. Name a folder, or leave out "
        "--subtitles.",
    )
    parent = out if out.exists() else out.parent
    require(
        parent.is_dir() and os.access(parent, os.W_OK),
        "--out must be a folder in which you may write, or a new one in such a folder, got "
        f"{out}.",
    )
    named: dict[str, Path] = {}
    for video in videos:
        file = f"{video_name(video)}.{subtitles}"
        require(
            file not in named,
            f"VIDEO must have one name each for --subtitles, got {named.get(file)} and {video}, "
            f"which would both be {out / file}. Rename one, or write to several folders.",
        )
        named[file] = video


def read_spans(path: Path) -> list[tuple[float, float]]:
    """Read (start, end) in seconds of a WebVTT, SubRip or CSV file, in order of the start.

    A line of a CSV file is START,END in seconds or H:M:S. Raises UserError for other
    content, and for times that are not in order.
    """
    check_exists("--spans", path)
    try:
        if path.suffix.lower() in SUBTITLES:
            spans = [(cue.start_s, cue.end_s) for cue in read_captions(path).cues]
        else:
            spans = _read_table(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"Cannot read --spans={path}: {reason}. Give WebVTT, SubRip, or lines with "
            "START,END in seconds."
        ) from error
    require(bool(spans), f"--spans must have at least one span, got none in {path}.")
    before_s = 0.0
    for number, (start_s, end_s) in enumerate(spans, 1):
        require(
            before_s <= start_s < end_s <= _MAX_SPAN_S,
            f"--spans must be in order, each with its start before its end, got {start_s:g} "
            f"to {end_s:g} s as span {number} of {path}, after one from {before_s:g} s.",
        )
        before_s = start_s
    return spans


def _read_table(text: str) -> list[tuple[float, float]]:
    """Return the spans of lines with START,END. Raises ValueError for another line."""
    spans = []
    for number, line in enumerate(text.splitlines(), 1):
        start, _, end = line.partition(",")
        if not line.strip() or (number == 1 and start.strip().lower() == "start"):
            continue
        try:
            spans.append((_seconds(start), _seconds(end.partition(",")[0])))
        except ValueError as error:
            raise ValueError(f"line {number} is not START,END but {line!r:.60}") from error
    return spans


def _seconds(text: str) -> float:
    """Return the seconds of `62.5`, `1:02.5` or `0:01:02.5`."""
    return clock_seconds(list(map(float, text.strip().split(":"))))
