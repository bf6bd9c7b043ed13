"""YouTube-ASL and YouTube-SL-25: video ids; videos and captions are fetched by the user. A clip is a caption.

There are no splits: a video's clips go to train, dev or test by a hash of its id. Videos and captions are
found below the source by id: ID.mp4, ID.en.vtt, ID.en.json, or yt-dlp's "Title [ID].en.vtt".
"""

import re
from dataclasses import dataclass
from pathlib import Path

from flallm_ds.errors import UserError
from shards.corpora import Corpus, Row, files_below, first_of, split_of, videos_below
from shards.corpora.captions import Cue, header_language, read_captions

_ID = r"[A-Za-z0-9_-]{11}"
_STEM = re.compile(rf"(?:.*\[)?({_ID})\]?(?:\.([A-Za-z]{{2,3}}(?:[-_][A-Za-z0-9_-]*)?))?")
_HEADERS = ("id", "video", "video_id")

# Which written languages go with a sign language (ISO 639-3), where a video has captions in several.
_SIGN_LANGUAGES = {
    "ar": "sdl", "bg": "bqn", "cs": "cse", "da": "dsl", "de": "gsg asq sgg", "el": "gss",
    "en": "ase bfi asf nzs isg sfs ins psp", "es": "ssp mfs aed csg csn prl vsl csc", "et": "eso",
    "fi": "fse", "fr": "fsl sfb fcs ssr", "he": "isr", "hr": "csq", "hu": "hsh", "is": "icl",
    "it": "ise slf", "ja": "jsl", "ko": "kvk", "lt": "lls", "lv": "lsl", "nl": "dse vgt", "no": "nsl",
    "pl": "pso", "pt": "bzs psr", "ro": "rms", "ru": "rsl", "sk": "svk", "sv": "swl fss", "th": "tsq",
    "tr": "tsm", "uk": "ukl", "zh": "csl tss hks",
}  # fmt: skip
_WRITTEN = {sign: written for written, signs in _SIGN_LANGUAGES.items() for sign in signs.split()}
_SAME = {"iw": "he", "nb": "no", "nn": "no"}  # YouTube's names and ours


@dataclass(frozen=True)
class Filter:
    """Which captions become clips."""

    max_characters: int
    min_s: float
    max_s: float

    def __post_init__(self) -> None:
        if self.max_characters < 1 or not 0 <= self.min_s < self.max_s:
            raise UserError(
                "--max_characters must be from 1 and --min_s below --max_s, but they are "
                f"{self.max_characters}, {self.min_s:g} and {self.max_s:g}."
            )

    def keeps(self, cue: Cue) -> bool:
        return (
            0 < len(cue.text) <= self.max_characters and self.min_s <= cue.end_s - cue.start_s <= self.max_s
        )


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
    """YouTube-ASL. --source: the folder of the videos and captions that you fetched.

    --ids: the file of video ids, one a line; without it every video with captions is taken.
    --language: of the captions to take.
    --max_characters, --min_s, --max_s: longer texts, shorter and longer captions are left out and counted.
    """
    wanted = dict.fromkeys(read_ids(ids), language) if ids else None
    return _read("youtube_asl", source, splits, wanted, language, Filter(max_characters, min_s, max_s))


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
    """YouTube-SL-25. --source: the folder of the videos and captions that you fetched.

    --ids: the file of video ids and languages, such as youtube-sl-25-metadata.csv; without it every video
    with captions is taken. Captions are taken in the written language on a video's line (de), or in that
    which goes with its sign language (gsg); with neither, a video's only captions.
    --language: of the captions to take, of every video.
    --max_characters, --min_s, --max_s: longer texts, shorter and longer captions are left out and counted.
    """
    wanted = (
        {video: language or written_language(code) for video, code in read_ids(ids).items()} if ids else None
    )
    return _read("youtube_sl25", source, splits, wanted, language, Filter(max_characters, min_s, max_s))


def _read(
    name: str,
    source: Path,
    splits: tuple[str, ...],
    wanted: dict[str, str] | None,
    language: str,
    keep: Filter,
) -> Corpus:
    """wanted: the caption language by video id ("" for its only one), None for all videos in `language`."""
    if not source.is_dir():
        raise UserError(f"--source must be the folder of videos and captions, but is none: {source}.")
    captions = find_captions(source)
    language = written_language(language) or language
    wanted = dict.fromkeys(sorted(captions), language) if wanted is None else wanted
    videos = find_videos(source)
    rows: dict[str, list[Row]] = {split: [] for split in splits}
    without, unreadable, automatic = [], [], []
    num_cues = 0
    for video, code in wanted.items():
        split = split_of(video)
        if split not in rows:
            continue
        try:
            track = choose_track(captions.get(video, {}), written_language(code) or code)
            if track is None:
                without.append(video)
                continue
            cues, rolling = read_captions(track[1])
        except (OSError, ValueError, RecursionError):
            unreadable.append(video)
            continue
        if not track[0]:
            raise UserError(
                f"captions must have a language, but {track[1]} names none. Give --language, or put the "
                "language after the video's id in the file of --ids."
            )
        if rolling:
            automatic.append(video)
        num_cues += len(cues)
        path = videos.get(video, source / f"{video}.mp4")
        rows[split] += [
            Row(f"{video}_{n}", path, cue.text, track[0], "", video, cue.start_s, cue.end_s)
            for n, cue in enumerate(cues)
            if keep.keeps(cue)
        ]
    num_kept = sum(map(len, rows.values()))
    languages = {row.language for table in rows.values() for row in table}
    notes = [
        f"split by a hash of the video's id; {num_kept:,} of {num_cues:,} captions kept (1 to "
        f"{keep.max_characters} characters, {keep.min_s:g} to {keep.max_s:g} s)"
    ]
    for files, what in (
        (without, "videos have no captions, or none in their language, and are left out"),
        (unreadable, "videos have captions that cannot be read, and are left out"),
        (automatic, "videos have automatic captions, which scroll: each of their lines is taken once"),
    ):
        if files:
            notes.append(f"{len(files):,} {what} ({first_of(files)})")
    return Corpus(name, languages.pop() if len(languages) == 1 else "mixed", rows, notes)


def read_ids(path: str) -> dict[str, str]:
    """The language column ("" for none or ???) by video id; TABs, commas or spaces between the two."""
    ids: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids must be a readable text file, but {error}: {path}.") from error
    for number, line in enumerate(lines, 1):
        fields = [field.strip("\"'") for field in re.split(r"[\t, ]+", line.strip())]
        if not fields[0] or (number == 1 and fields[0].lower() in _HEADERS):
            continue
        if not re.fullmatch(_ID, fields[0]):
            raise UserError(
                f"{path}, line {number}: a video id must be 11 letters, digits, - or _, but is "
                f"{fields[0]!r:.40}."
            )
        code = fields[1] if len(fields) > 1 else ""
        ids.setdefault(fields[0], "" if "?" in code else code)
    return ids


def written_language(code: str) -> str:
    """de for de, de-AT and gsg; "" for a sign language that is not known."""
    code = re.split(r"[-_]", code.lower())[0]
    return _SAME.get(code, code) if len(code) == 2 else _WRITTEN.get(code, "")


def find_videos(source: Path) -> dict[str, Path]:
    """The video files below a folder by id."""
    found: dict[str, Path] = {}
    for stem, path in videos_below(source).items():
        match = _STEM.fullmatch(stem)
        if match and not match[2]:
            found.setdefault(match[1], path)
    return found


def find_captions(source: Path) -> dict[str, dict[str, Path]]:
    """The caption files below a folder by id and language tag; "" where the name has none."""
    found: dict[str, dict[str, Path]] = {}
    for path in files_below(source):
        match = _STEM.fullmatch(path.stem) if path.suffix.lower() in (".vtt", ".json") else None
        if match:
            found.setdefault(match[1], {}).setdefault(match[2] or "", path)
    return found


def choose_track(tracks: dict[str, Path], language: str) -> tuple[str, Path] | None:
    """(language, file) of a video's captions in a language; of its only captions where the language is "".

    `en` also takes `en-US`, after `en` itself. A file without a language in its name is taken as the one
    asked for unless its own header says another; the language returned may be "".
    Raises OSError for a file that cannot be read.
    """
    known = sorted((written_language(tag) or tag, tag, path) for tag, path in tracks.items() if tag)
    if "" in tracks:
        written = written_language(header_language(tracks[""])) or language
        known += [(written, "", tracks[""])] if written or not known else []
    fits = [(written, path) for written, _, path in known if written == language]
    if language:
        return fits[0] if fits else None
    return (known[0][0], known[0][2]) if len({written for written, _, _ in known}) == 1 else None
