"""`flallm translate`: sentences for videos, on one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flallm_ds.cli.checks import check_model, check_search
from flallm_ds.cli.videos import (
    SUBTITLES,
    check_out,
    check_out_folder,
    check_video,
    find_videos,
    read_spans,
)
from flallm_ds.errors import require

if TYPE_CHECKING:
    from flallm_ds.inference.translator import Translator

_IDLE_S = 10.0
_MAX_IDLE_S = 86_400


def translate(
    video: tuple[Path, ...] = (),
    *,
    model: str,
    list: Path | None = None,
    out: Path | None = None,
    subtitles: Literal["vtt", "srt"] | None = None,
    long: bool | None = None,
    spans: Path | None = None,
    follow: bool = False,
    idle_s: float | None = None,
    language: str = "",
    beams: int | None = None,
    nbest: int = 1,
    length_penalty: float | None = None,
    stream: bool = False,
    bits: Literal[32, 16, 8, 4] | None = None,
    hub_code: bool = False,
) -> None:
    """Translate videos, each as one sentence or, if it is long, sentence by sentence.

    Example: flallm translate VIDEO --model=runs/mine_llm
    Example: flallm translate FOLDER --model=runs/mine_llm --out=sentences.jsonl
    Example: flallm translate VIDEO --model=runs/mine_llm --out=VIDEO.vtt
    Example: flallm translate FOLDER --model=runs/mine_llm --subtitles=vtt --out=FOLDER

    The same command resumes an interrupted one, if it writes the sentences or subtitles of
    several videos.

    Options:
        video: video files, folders of frames, or folders of videos
        model: a run folder (its best export), an export, or USER/NAME on the hub
        list: a text file with more videos, one on a line
        out: the file to write: .jsonl, or .vtt or .srt for the subtitles of one video; with
            --subtitles, a folder
        subtitles: write a subtitle file of each video into the folder --out: vtt or srt
        long: cut each video at pauses into sentences (--long=false: never); by default, a
            video that is longer than the longest training clip is cut
        spans: a file with the times of the sentences of one video: .vtt, .srt, or lines
            with START,END in seconds
        follow: translate a video that is still being written, until it stops growing
        idle_s: with --follow, seconds without growth after which the video has ended (10
            by default)
        language: target language, where the model has several: de, German
        beams: beam size of the search; that of the model by default
        nbest: number of hypotheses to return, each with its score
        length_penalty: above 0 for longer sentences; that of the model by default
        stream: print word by word, with one beam
        bits: of the LLM's weights; those of its training by default
        hub_code: run code that comes with the LLM on the hub
    """
    check_search(beams, nbest, length_penalty)
    _check_stream(stream, beams, nbest, length_penalty)
    idle_s = _checked_idle_s(idle_s, follow)
    videos = find_videos(video, list)
    parts = {"--long": long is not None, "--spans": spans, "--follow": follow}
    _check_parts([name for name, given in parts.items() if given], videos, stream, out)
    _check_subtitles(subtitles, out, nbest, spans is not None or follow)
    check_model(model)
    times = read_spans(spans) if spans else []
    if out is not None and subtitles is not None:
        check_out_folder(out, videos, subtitles)
    elif out is not None:
        check_out(out, videos, (*videos, list, spans))
    if len(videos) == 1:
        check_video(videos[0], follow)
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds.export import digest
    from flallm_ds.export.hub import folder_of
    from flallm_ds.inference.translate import Job, stream_video, translate_videos
    from flallm_ds.inference.translator import Translator

    folder = folder_of(model)
    # Subtitles need the times of sentences.
    of_subtitles = subtitles or (out is not None and out.suffix.lower() in SUBTITLES)
    if of_subtitles and not times:
        long = True if long is None else long
    made_with = {
        "model": model,
        "export": digest(folder),
        "subtitles": subtitles,
        "long": long,
        "spans": times,
        "follow": follow,
        "language": language,
        "beams": beams,
        "nbest": nbest,
        "length_penalty": length_penalty,
        "bits": bits,
    }

    def load() -> "Translator":
        translator = Translator.from_pretrained(folder, bits=bits, hub_code=hub_code)
        return translator.searching(beams, nbest, length_penalty)

    if stream:
        stream_video(load(), videos[0], language)
        return
    job = Job(videos, out, subtitles, language, long, times, idle_s, made_with)
    translate_videos(load, job)


def _check_stream(
    stream: bool, beams: int | None, nbest: int, length_penalty: float | None
) -> None:
    """Raise UserError for options of the search that --stream would ignore."""
    require(
        not stream or (nbest == 1 and (beams or 1) == 1),
        f"--stream must go with one beam and one hypothesis, got --beams={beams} and "
        f"--nbest={nbest}. Leave both out.",
    )
    require(
        length_penalty is None or not stream,
        f"--length_penalty must go with several beams, got {length_penalty} and --stream, "
        "which compares no lengths. Leave it out.",
    )


def _checked_idle_s(idle_s: float | None, follow: bool) -> float | None:
    """Return the seconds without growth that end a recording; None without --follow."""
    require(
        idle_s is None or follow,
        f"--idle_s must go with --follow, got --idle_s={idle_s} alone. Leave it out.",
    )
    if not follow:
        return None
    seconds = _IDLE_S if idle_s is None else idle_s
    require(
        0 < seconds <= _MAX_IDLE_S,
        f"--idle_s must be above 0 and at most {_MAX_IDLE_S}, got {seconds:g}.",
    )
    return seconds


def _check_parts(
    given: Sequence[str], videos: Sequence[Path], stream: bool, out: Path | None
) -> None:
    """Raise UserError for options that exclude each other, or that need a single video.

    given: the given ones of --long, --spans and --follow.
    """
    require(
        len(given) < 2,
        f"--long, --spans and --follow must be given one at a time, got {' and '.join(given)}.",
    )
    for name, of_one in (
        ("--spans", "--spans" in given),
        ("--follow", "--follow" in given),
        ("--stream", stream),
    ):
        require(
            not of_one or len(videos) == 1,
            f"{name} must go with one video, got {len(videos)}.",
        )
    require(
        not stream or (not given and out is None),
        f"--stream must go without {' and '.join(given) or '--out'}, got both. Leave one out.",
    )


def _check_subtitles(
    subtitles: str | None, out: Path | None, nbest: int, is_of_one: bool
) -> None:
    """Raise UserError for options that --subtitles would ignore, or that it needs.

    is_of_one: whether the parts of a single video are given, by --spans or --follow.
    """
    if subtitles is None:
        return
    require(
        out is not None,
        f"--subtitles must go with --out=FOLDER, got --subtitles={subtitles} alone. Name the "
        "folder to write.",
    )
    require(
        nbest == 1,
        f"--subtitles must go with one hypothesis, got --nbest={nbest}. Leave out --nbest, or "
        "write --out=FILE.jsonl.",
    )
    require(
        not is_of_one,
        "--subtitles must go without --spans and --follow, which are for one video, got both. "
        f"Write its subtitles to --out=FILE.{subtitles}.",
    )
