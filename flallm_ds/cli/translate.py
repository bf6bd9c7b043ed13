"""`flallm translate`: sentences for videos, on one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from flallm_ds.cli.checks import check_model, check_search
from flallm_ds.cli.videos import (
    SUBTITLES,
    check_out,
    check_video,
    find_videos,
    read_spans,
)
from flallm_ds.errors import require

_MAX_IDLE_S = 86_400


def translate(
    video: tuple[Path, ...] = (),
    *,
    model: str,
    list: Path | None = None,
    out: Path | None = None,
    long: bool | None = None,
    spans: Path | None = None,
    follow: bool = False,
    idle_s: float = 10.0,
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

    Options:
        video: video files, folders of frames, or folders of videos
        model: a run folder (its best export), an export, or USER/NAME on the hub
        list: a text file with more videos, one on a line
        out: the file to write: .jsonl, or .vtt or .srt for the subtitles of one video
        long: cut each video at pauses into sentences (--long=false: never); by default, a
            video that is longer than the longest training clip is cut
        spans: a file with the times of the sentences of one video: .vtt, .srt, or lines
            with START,END in seconds
        follow: translate a video that is still being written, until it stops growing
        idle_s: with --follow, seconds without growth after which the video has ended
        language: target language, where the model has several: de, German
        beams: beam size of the search; that of the model by default
        nbest: number of hypotheses to return, each with its score
        length_penalty: above 0 for longer sentences; that of the model by default
        stream: print word by word, with one beam
        bits: of the LLM's weights; those of its training by default
        hub_code: run code that comes with the LLM on the hub
    """
    check_search(beams, nbest, length_penalty)
    require(
        not stream or (nbest == 1 and (beams or 1) == 1),
        f"--stream must go with one beam and one hypothesis, got --beams={beams} and "
        f"--nbest={nbest}. Leave both out.",
    )
    require(
        0 < idle_s <= _MAX_IDLE_S,
        f"--idle_s must be above 0 and at most {_MAX_IDLE_S}, got {idle_s:g}.",
    )
    videos = find_videos(video, list)
    parts = {"--long": long is not None, "--spans": spans, "--follow": follow}
    _check_parts([name for name, given in parts.items() if given], videos, stream, out)
    check_model(model)
    times = read_spans(spans) if spans else []
    if out is not None:
        check_out(out, videos, (*videos, list, spans))
    if len(videos) == 1:
        check_video(videos[0], follow)
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds.inference.translate import Job, translate_videos
    from flallm_ds.inference.translator import Translator

    translator = Translator.from_pretrained(model, bits=bits, hub_code=hub_code)
    translator = translator.searching(beams, nbest, length_penalty)
    if stream:
        for text in translator.stream(videos[0], language):
            print(text, end="", flush=True)
        print()
        return
    # Subtitles need the times of sentences.
    if out is not None and out.suffix.lower() in SUBTITLES and not times:
        long = True if long is None else long
    job = Job(videos, out, language, long, times, idle_s if follow else None)
    translate_videos(translator, job)


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
