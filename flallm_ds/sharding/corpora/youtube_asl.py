"""Read YouTube-ASL and YouTube-SL-25: lists of video ids; the user downloads the videos.

A clip is a caption. The corpora have no splits: a hash of the id assigns each video, with
all its clips, to train, dev or test. Videos and captions are found below the source by id:
ID.mp4, ID.en.vtt, ID.en.srt, ID.en.json3, or "Title [ID].en.vtt" as yt-dlp writes it.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from flallm_ds.data.text.languages import WRITTEN_WITH, find_language, language_tag
from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import (
    Corpus,
    Row,
    files_below,
    first_three,
    read_lines,
    same_content,
    split_of,
)
from flallm_ds.sharding.corpora.captions import (
    OTHER_SUFFIXES,
    SUFFIXES,
    Cue,
    header_language,
    read_captions,
    separate,
)
from flallm_ds.sharding.corpora.videos import Videos

# "ID", "ID.en", "Title [ID]" or "Title [ID].en-US".
_ID = r"[A-Za-z0-9_-]{11}"
_STEM = re.compile(rf"(?:.*\[)?({_ID})\]?(?:\.([A-Za-z]{{2,3}}(?:[-_][A-Za-z0-9_-]*)?))?")
_HEADERS = ("id", "video", "video_id")
Numbered = tuple[int, Cue]  # a caption with its number in its file


@dataclass(frozen=True)
class Filter:
    """Decide which captions become clips."""

    max_characters: int
    min_s: float
    max_s: float

    def __post_init__(self) -> None:
        if self.max_characters < 1:
            raise UserError(
                f"--max_characters must be at least 1, got {self.max_characters}."
            )
        if not 0 <= self.min_s < self.max_s:
            raise UserError(
                f"--min_s must be at least 0 and below --max_s ({self.max_s:g}), got "
                f"{self.min_s:g}."
            )

    def apply(self, numbered: list[Numbered]) -> list[Numbered]:
        """Return the captions whose text length and duration are in range."""
        return [(number, cue) for number, cue in numbered if self._fits(cue)]

    def _fits(self, cue: Cue) -> bool:
        has_length = 0 < len(cue.text) <= self.max_characters
        return has_length and self.min_s <= cue.end_s - cue.start_s <= self.max_s


@dataclass
class _Tally:
    """Count captions and list videos by what happened to them, for the notes."""

    captions: Counter[str] = field(default_factory=Counter)
    videos: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def read(
    source: Path,
    splits: tuple[str, ...],
    *,
    ids: str = "",
    language: str = "en",
    max_characters: int = 300,
    min_s: float = 0.2,
    max_s: float = 60.0,
) -> Corpus:
    """YouTube-ASL. --source: the folder of the videos and captions that you downloaded.

    --ids: file with one video id per line; without it, all videos with captions are used.
    --language: language of the captions.
    --max_characters, --min_s, --max_s: longer texts, shorter and longer captions are left
        out and counted.
    """
    wanted = dict.fromkeys(read_ids(ids), language) if ids else None
    keep = Filter(max_characters, min_s, max_s)
    return _read("youtube_asl", source, splits, wanted, language, keep)


def read_sl25(
    source: Path,
    splits: tuple[str, ...],
    *,
    ids: str = "",
    language: str = "",
    max_characters: int = 300,
    min_s: float = 0.2,
    max_s: float = 60.0,
) -> Corpus:
    """YouTube-SL-25. --source: the folder of the videos and captions that you downloaded.

    --ids: file with a video id and a language per line, such as
        youtube-sl-25-metadata.csv; without it, all videos with captions are used. The
        language is a written one (de) or a sign language (gsg), whose written language is
        used. Without a language, a video must have captions in one language only.
    --language: language of the captions of all videos.
    --max_characters, --min_s, --max_s: longer texts, shorter and longer captions are left
        out and counted.
    """
    wanted: dict[str, str] | None = None
    if ids:
        wanted = {}
        for video, code in read_ids(ids).items():
            wanted[video] = language or written_language(code)
    keep = Filter(max_characters, min_s, max_s)
    return _read("youtube_sl25", source, splits, wanted, language, keep)


def _read(
    name: str,
    source: Path,
    splits: tuple[str, ...],
    wanted: dict[str, str] | None,
    language: str,
    keep: Filter,
) -> Corpus:
    """Read a corpus of videos and captions.

    wanted: the caption language by video id ("" for the only language of the video), or
        None for all videos in `language`.
    keep: which captions become clips.
    """
    if not source.is_dir():
        raise UserError(
            "--source must be the folder of the videos and captions, got "
            f"{source}, which is not a folder. Check the path."
        )
    captions = find_captions(source)
    if language:
        language = written_language(language) or language_tag(language, "--language")
    if wanted is None:
        wanted = dict.fromkeys(sorted(captions), language)
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    tally = _Tally()
    # Read the captions first: only videos with captions are needed.
    spoken: dict[str, tuple[str, list[Numbered]]] = {}
    names: dict[str, tuple[str]] = {}
    for video, code in wanted.items():
        if split_of(video) in rows:
            asked = written_language(code) or code
            chosen = _captions_of(video, captions.get(video, {}), asked, keep, tally)
            if chosen:
                spoken[video] = chosen
                names[video] = (video,)
    paths, video_notes = Videos(source, _video_id).choose(names)
    languages: set[str] = set()
    for video, (written, cues) in spoken.items():
        path = paths.get(video, source / f"{video}.mp4")
        for number, cue in cues:
            row = Row(
                id=f"{video}_{number}",
                path=path,
                text=cue.text,
                language=written,
                video=video,
                start_s=cue.start_s,
                end_s=cue.end_s,
            )
            rows[split_of(video)].append(row)
            languages.add(written)
    num_kept = sum(map(len, rows.values()))
    notes = [
        f"split by a hash of the video's id; {num_kept:,} of {tally.captions['read']:,} "
        f"captions kept (1 to {keep.max_characters} characters, {keep.min_s:g} to "
        f"{keep.max_s:g} s)"
    ]
    notes += _notes(tally, find_other_captions(source)) + video_notes
    language = languages.pop() if len(languages) == 1 else "mixed"
    return Corpus(name, language, rows, notes)


def _captions_of(
    video: str, tracks: dict[str, Path], language: str, keep: Filter, tally: _Tally
) -> tuple[str, list[Numbered]] | None:
    """Return (language, numbered captions) of a video, and count them in the tally.

    Returns None for a video without captions. Raises UserError for captions without a
    language.
    """
    # If a file cannot be read, skip the video instead of stopping the build.
    try:
        track = choose_track(tracks, language)
        if track is None:
            tally.videos["without"].append(video)
            return None
        found = read_captions(track[1])
    except (OSError, ValueError, RecursionError):
        tally.videos["unreadable"].append(video)
        return None
    if not track[0]:
        raise UserError(
            f"Captions must have a language, got none in {track[1]}. Set --language, or "
            "write the language after the video id in the file of --ids."
        )
    num_wordless = 0
    for cue in found.cues:
        num_wordless += not cue.text
    tally.captions["read"] += len(found.cues)
    tally.captions["wordless"] += num_wordless
    if found.num_unreadable:
        tally.captions["without times"] += found.num_unreadable
        tally.videos["without times"].append(video)
    if num_wordless == len(found.cues):
        tally.videos["empty"].append(video)
        return None
    if found.scrolls:
        tally.videos["automatic"].append(video)
    # Filter twice: captions that are left out must not cut others, and a caption that was
    # cut or joined may no longer be in range.
    apart, num_cut, num_joined = separate(keep.apply(list(enumerate(found.cues))))
    tally.captions["cut"] += num_cut
    tally.captions["joined"] += num_joined
    return track[0], keep.apply(apart)


_READ = ", ".join(SUFFIXES)
_JOINED = (
    "begin together with another one, or repeat it during its span, and are joined with it"
)
_CAPTION_NOTES = {
    "wordless": "have no words without sounds, note signs and names, and are left out",
    "cut": "overlap the next one and end where it begins",
    "joined": _JOINED,
    "without times": "have times that cannot be read, and are left out",
}
_VIDEO_NOTES = {
    "without": "have no captions, or none in their language, and are left out",
    "other": f"have captions in none of the formats that are read ({_READ}), and are left out",
    "unreadable": "have captions that cannot be read, and are left out",
    "empty": "have caption files without a readable caption, and are left out",
    "automatic": "have automatic captions, which scroll: each line is used once",
}


def _notes(tally: _Tally, others: dict[str, str]) -> list[str]:
    """Return notes on what happened to captions and videos.

    others: the name of a caption file in another format, by video.
    """
    # Numbers of captions, with examples of videos for those that are known.
    notes = []
    for kind, what in _CAPTION_NOTES.items():
        count, videos = tally.captions[kind], tally.videos[kind]
        if count:
            examples = f" ({first_three(videos)})" if videos else ""
            notes.append(f"{count:,} captions {what}{examples}")
    # Of the videos without captions, some have a file in another format.
    examples_of: defaultdict[str, list[str]] = defaultdict(list, tally.videos)
    examples_of["without"] = []
    for video in tally.videos["without"]:
        if video in others:
            examples_of["other"].append(others[video])
        else:
            examples_of["without"].append(video)
    for kind, what in _VIDEO_NOTES.items():
        if files := examples_of.get(kind):
            notes.append(f"{len(files):,} videos {what} ({first_three(files)})")
    return notes


def read_ids(path: str) -> dict[str, str]:
    """Read the language ("" for none or ???) of each video id.

    Id and language are separated by TABs, commas or spaces.
    """
    ids: dict[str, str] = {}
    if not Path(path).is_file():
        raise UserError(
            f"--ids must name a readable text file, got {path}. Check the path."
        )
    for number, line in enumerate(read_lines(Path(path)), 1):
        fields = [field.strip("\"'") for field in re.split(r"[\t, ]+", line.strip())]
        video, code = fields[0], fields[1] if len(fields) > 1 else ""
        is_header = number == 1 and video.lower() in _HEADERS
        if not video or is_header:
            continue
        if not re.fullmatch(_ID, video):
            raise UserError(
                f"{path}, line {number}: a video id must be 11 letters, digits, - or _, "
                f"got {video!r:.40}. Correct the file."
            )
        # ??? means that the language is unknown.
        ids.setdefault(video, "" if "?" in code else code)
    return ids


def written_language(code: str) -> str:
    """Return de for de, de-AT, German and gsg; "" for an unknown language."""
    if code.lower() in WRITTEN_WITH:
        return WRITTEN_WITH[code.lower()]
    # YouTube adds parts to the tag (de-cvfXDfbeED0, en-orig): use the longest prefix that
    # is a language.
    parts = re.split("[-_]", code)
    for number in range(len(parts), 0, -1):
        found = find_language("-".join(parts[:number]))
        if found:
            return found.code
    return ""


def _video_id(path: Path) -> str:
    """Return the video id in the name of a file; "" for another name."""
    match = _STEM.fullmatch(path.stem)
    return match[1] if match and not match[2] else ""


def find_captions(source: Path) -> dict[str, dict[str, Path]]:
    """Find the caption files below a folder by id and language tag ("" for no tag).

    Of several formats, the first in SUFFIXES is used. Raises UserError if two files in this
    format differ.
    """
    found: dict[str, dict[str, Path]] = {}
    for suffix in SUFFIXES:
        for path in files_below(source):
            match = _STEM.fullmatch(path.stem) if path.suffix.lower() == suffix else None
            if match is None or not path.is_file():
                continue
            # A file with an earlier suffix has priority; two with this suffix must agree.
            other = found.setdefault(match[1], {}).setdefault(match[2] or "", path)
            if other.suffix.lower() == suffix and not same_content(other, path):
                raise UserError(
                    "A video must have one caption file per language, got two that differ: "
                    f"{other} and {path}. Move the wrong one out of {source}."
                )
    return found


def find_other_captions(source: Path) -> dict[str, str]:
    """Find the name of a caption file in a format that is not read, by video id."""
    found: dict[str, str] = {}
    for path in files_below(source):
        match = (
            _STEM.fullmatch(path.stem) if path.suffix.lower() in OTHER_SUFFIXES else None
        )
        if match:
            found.setdefault(match[1], path.name)
    return found


def choose_track(tracks: dict[str, Path], language: str) -> tuple[str, Path] | None:
    """Choose the captions of a video in a language, or its only captions for language "".

    Returns (language, file), None without a match. `en` also matches `en-US`, after `en`
    itself. `zh` matches zh-Hant if there is no other Chinese, and `no` matches nn; the
    returned language is then zh-Hant or nn. A file without a language in its name has the
    language in its header, otherwise the requested one, which may be "". Tags of unknown
    languages are ignored. Raises OSError for a file that cannot be read.
    """
    # Take the first file of each written language, in the order of the tags.
    by_language: dict[str, Path] = {}
    known = []
    for tag, path in tracks.items():
        written = written_language(tag)
        if tag and written:
            known.append((written, tag, path))
    for written, _, path in sorted(known):
        by_language.setdefault(written, path)
    # A file without a tag is last.
    if "" in tracks:
        written = written_language(header_language(tracks[""])) or language
        if written or not by_language:
            by_language.setdefault(written, tracks[""])
    if not language:
        return by_language.popitem() if len(by_language) == 1 else None
    # First the language itself, then another script of it, then the other Norwegian.
    if language in by_language:
        return language, by_language[language]
    for written, path in by_language.items():
        if written.split("-")[0] == language:
            return written, path
    if language == "no" and "nn" in by_language:
        return "nn", by_language["nn"]
    return None
