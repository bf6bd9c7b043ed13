"""The clips of a report: small videos, and strips of frames, as data: URLs."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from flallm_ds.data.codecs.h264 import encode_h264
from flallm_ds.data.storage.store import CacheOptions
from flallm_ds.errors import UserError
from flallm_ds.inference.pictures import open_videos, read_frames
from flallm_ds.reporting.runs import Run

# A clip of How2Sign of 4.3 s takes 30 kB: enough to see the signs, small enough for 100
# clips.
_SHORT_SIDE, _MAX_FPS, _CRF = 160, 15.0, 30
_GOP = 15
# A strip of 11 frames has one in the middle, which the table shows.
NUM_STRIP_FRAMES = 11
_STRIP_HEIGHT, _JPEG_QUALITY = 64, 70


@dataclass(frozen=True)
class Clip:
    """A clip to show. video, strip: data: URLs. signer: empty if it is not known."""

    video: str
    strip: str
    seconds: float
    width: int
    height: int
    signer: str


def clips_of(runs: Sequence[Run], split: str, keys: Sequence[str]) -> dict[str, Clip | str]:
    """Return {key: clip, or why it cannot be shown}.

    The clips are read from the shards on which the first run was evaluated.
    """
    evaluated = [run for run in runs if split in run.evaluations]
    found: dict[str, Clip | str] = {}
    if not keys or not evaluated:
        return found
    try:
        reader = open_videos(
            shards_of(evaluated[0], split),
            split,
            CacheOptions.of_run(evaluated[0].config.data),
        )
    except UserError as error:
        return dict.fromkeys(keys, str(error))
    names = reader.index.strings("key")
    row_of = {names[row]: row for row in range(len(reader.index))}
    for key in keys:
        if key not in row_of:
            found[key] = f"The shards in {reader.index.root} have no clip {key}."
            continue
        row = row_of[key]
        fps = float(reader.index.arrays["fps"][row])
        step = max(1, math.ceil(fps / _MAX_FPS))
        try:
            frames_THWC = read_frames(reader, row, step)
        except (OSError, ValueError) as error:
            found[key] = f"The clip is broken: {error}."
            continue
        found[key] = _clip(frames_THWC, fps / step, reader.index.strings("signer")[row])
    return found


def shards_of(run: Run, split: str) -> tuple[str, ...]:
    """Return the shard folders on which a run was evaluated."""
    shards = run.evaluations[split].results.get("shards")
    return tuple(map(str, shards)) if shards else run.config.data.shards


def _clip(frames_THWC: np.ndarray, fps: float, signer: str) -> Clip:
    """Encode a clip. frames_THWC: uint8 RGB."""
    height, width = frames_THWC.shape[1:3]
    scale = min(1.0, _SHORT_SIDE / min(height, width))
    size = (max(2, round(width * scale)), max(2, round(height * scale)))
    small = []
    for frame in frames_THWC:
        small.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
    return Clip(
        video=_url("video/mp4", encode_h264(small, fps, _GOP, _CRF)),
        strip=_url("image/jpeg", _strip(frames_THWC)),
        seconds=round(len(frames_THWC) / fps, 2),
        width=size[0],
        height=size[1],
        signer=signer,
    )


def _strip(frames_THWC: np.ndarray) -> bytes:
    """Return a JPEG of frames next to each other, each from the middle of its part of the
    clip."""
    num_frames, height, width = frames_THWC.shape[:3]
    middles = (np.arange(NUM_STRIP_FRAMES) + 0.5) / NUM_STRIP_FRAMES
    size = (max(1, round(_STRIP_HEIGHT * width / height)), _STRIP_HEIGHT)
    shrunk = []
    for pick in (middles * num_frames).astype(int).tolist():
        shrunk.append(cv2.resize(frames_THWC[pick], size, interpolation=cv2.INTER_AREA))
    # OpenCV expects BGR.
    row = np.hstack(shrunk)[..., ::-1]
    encoded, jpeg = cv2.imencode(".jpg", row, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert encoded
    return jpeg.tobytes()


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
