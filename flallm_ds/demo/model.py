"""The model of the demo: one thread that translates, and the line of requests before it."""

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from flallm_ds.command import coerce, nearest
from flallm_ds.demo.length import check_video
from flallm_ds.demo.refused import Refused
from flallm_ds.demo.upload import Upload
from flallm_ds.errors import UserError

if TYPE_CHECKING:  # importing torch takes seconds: the page answers before
    from flallm_ds.inference.clips import Clip
    from flallm_ds.inference.translator import Translator

# Requests at a time: one is translated, the others wait. Each may hold an upload.
MAX_REQUESTS = 8
_MAX_FRAMES = 16
_FRAME_HEIGHT_PX = 96
_JPEG_QUALITY = 80

Event = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """The options of a request, as those of `flallm translate`.

    long: whether the video is cut at pauses; None: if it is long. frames: number of
    pictures of each sentence. attention: whether each sentence gets a heat map.
    """

    language: str = ""
    nbest: int = 1
    long: bool | None = None
    frames: int = 0
    attention: bool = False

    @classmethod
    def of_fields(cls, fields: Mapping[str, str]) -> "Asked":
        """Read the options from text fields. Raises Refused for a wrong one."""
        types = {
            "language": str, "nbest": int, "long": bool | None, "frames": int, "attention": bool,
        }  # fmt: skip
        values = {}
        for name, text in fields.items():
            if name not in types:
                raise Refused(
                    f"Cannot set {name!r:.40}: there is no such field; {nearest(name, types)}",
                    400,
                )
            try:
                values[name] = coerce(text, types[name], name)
            except UserError as error:
                raise Refused(sentence_of(error), 400) from error
        asked = cls(**values)
        if not 0 <= asked.frames <= _MAX_FRAMES:
            raise Refused(
                f"frames must be at least 0 and at most {_MAX_FRAMES}, got {asked.frames}.",
                400,
            )
        return asked


def sentence_of(error: UserError) -> str:
    """Return the message of an error, in which an option is a field of a request."""
    return str(error).removeprefix("--")


class Model:
    """A translator that is loaded once, and translates one video at a time.

    load: returns the translator; called in the thread of the model. max_s: longest video.
    """

    def __init__(self, load: "Callable[[], Translator]", max_s: float) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._max_s = max_s
        self._num_requests = 0
        self._line: list[asyncio.Event] = []
        self.loading: Future[Translator] = self._thread.submit(load)

    @property
    def translator(self) -> "Translator | None":
        """The translator, None until it is loaded."""
        if not self.loading.done() or self.loading.exception() is not None:
            return None
        return self.loading.result()

    def close(self) -> None:
        """Drop what waits for the model. What is running ends with its clip."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request, from its first byte on. Raises Refused if there are too many."""
        if self._num_requests >= MAX_REQUESTS:
            raise Refused(
                f"Cannot take the video: {MAX_REQUESTS} others are translated before. Try "
                "again in a minute.",
                503,
            )
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def events(self, upload: Upload, asked: Asked) -> AsyncGenerator[Event, None]:
        """Yield what happens to an upload: its states, then parts, then the end.

        States are {"state": "waiting", "before": number of others}, {"state": "loading"}
        and {"state": "translating"}. Then {"part": sentence with times} follows for each
        sentence, and {"done": the whole translation}. Raises Refused for a video that
        cannot be translated, UserError if the model cannot be loaded.
        """
        begin = time.perf_counter()
        moved = asyncio.Event()
        self._line.append(moved)
        try:
            while before := self._line.index(moved):
                yield {"state": "waiting", "before": before}
                await moved.wait()
                moved.clear()
            if self.translator is None:
                yield {"state": "loading"}
            translator = await asyncio.wrap_future(self.loading)
            waited_s = time.perf_counter() - begin
            yield {"state": "translating"}
            parts = []
            async for part in self._parts(translator, upload, asked):
                yield {"part": part}
                parts.append(part)
            yield {"done": _whole(parts, waited_s)}
        finally:
            self._line.remove(moved)
            for other in self._line:
                other.set()

    async def _parts(
        self, translator: "Translator", upload: Upload, asked: Asked
    ) -> AsyncIterator[Event]:
        """Yield the sentences of a video; each is one call in the thread of the model."""
        found = _translate(translator, upload, asked, self._max_s)
        loop = asyncio.get_running_loop()
        while True:
            part = await loop.run_in_executor(self._thread, next, found, None)
            if part is None:
                return
            yield part


def _translate(
    translator: "Translator", upload: Upload, asked: Asked, max_s: float
) -> Iterator[Event]:
    """Yield the sentences of a video. Raises Refused if it cannot be translated."""
    import torch

    beams = translator.beam.num_beams
    if not 1 <= asked.nbest <= beams:
        raise Refused(
            f"nbest must be at least 1 and at most {beams}, the beams of the model, got "
            f"{asked.nbest}.",
            400,
        )
    try:
        language = translator.language(asked.language)
    except UserError as error:
        raise Refused(sentence_of(error), 400) from error
    check_video(upload.path, max_s)
    searching = translator.searching(nbest=asked.nbest)
    begin = time.perf_counter()
    try:
        for clip in translator.clips(upload.path, windows=asked.long):
            read = time.perf_counter()
            yield _part(searching, clip, language, asked, read - begin)
            begin = time.perf_counter()
    except UserError as error:
        # The path is ours and means nothing to the client.
        text = str(error).replace(f"video {upload.path}", "the video")
        raise Refused(text.replace(str(upload.path), "the video"), 422) from error
    except torch.OutOfMemoryError as error:
        raise Refused(
            "Cannot translate the video: the GPU has not enough memory. Send a shorter one.",
            507,
        ) from error


def _part(
    searching: "Translator", clip: "Clip", language: str, asked: Asked, read_s: float
) -> Event:
    """Translate a clip; return its sentence with scores, frames, attention and times.

    read_s: seconds that reading the clip took, with decoding.
    """
    from flallm_ds.inference.heat_map import as_json, heat_map_of

    begin = time.perf_counter()
    encoded = searching.encoded(clip, language)
    translation = searching.translation(encoded)
    searched = time.perf_counter()
    attention = None
    if asked.attention:
        # The same features as for the search: a video is encoded once.
        features_SD, wording = encoded.features_SD, encoded.wording
        attention = as_json(
            heat_map_of(searching.export, features_SD, wording, translation.ids, language)
        )
    end = time.perf_counter()
    return {
        "start_s": round(translation.start_s, 3),
        "end_s": round(translation.end_s, 3),
        "is_part": translation.is_part,
        "sentence": translation.sentence,
        "nbest": translation.nbest,
        "num_frames": translation.num_frames,
        "num_sampled": translation.num_sampled,
        "read_s": round(read_s, 3),
        "model_s": round(searched - begin, 3),
        "attention_s": round(end - searched, 3),
        "frames": _pictures(clip.frames_THWC, asked.frames),
        "attention": attention,
    }


def _whole(parts: list[Event], waited_s: float) -> Event:
    """Return the translation of a video from that of its parts."""
    from flallm_ds.inference.subtitles import vtt_cue

    cues = []
    for number, part in enumerate(filter(lambda part: part["sentence"], parts), 1):
        cues.append(vtt_cue(number, part["start_s"], part["end_s"], part["sentence"]))
    whole = {
        "text": "\n".join(part["sentence"] for part in parts),
        "parts": parts,
        "subtitles": "WEBVTT\n\n" + "".join(cues),
        "waited_s": round(waited_s, 3),
    }
    for name in ("read_s", "model_s", "attention_s"):
        whole[name] = round(sum(part[name] for part in parts), 3)
    return whole


def _pictures(frames_THWC: np.ndarray, count: int) -> list[str]:
    """Return frames as data URLs with JPEGs of 96 pixels height, each from the middle of its
    part of the clip."""
    num_frames, height, width = frames_THWC.shape[:3]
    shown = min(count, num_frames)
    size = max(1, round(width * _FRAME_HEIGHT_PX / height)), _FRAME_HEIGHT_PX
    pictures = []
    middles = (np.arange(shown) + 0.5) / max(1, shown)
    for number in (middles * num_frames).astype(int):
        small = cv2.resize(frames_THWC[number], size, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        _, jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        text = base64.b64encode(jpeg.tobytes()).decode()
        pictures.append(f"data:image/jpeg;base64,{text}")
    return pictures
