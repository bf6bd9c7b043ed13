"""Long videos: several sentences of signsim, with rests between them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flallm_ds.data.codecs.h264 import encode_h264
from flallm_ds.signsim.corpus import plan_clip
from flallm_ds.signsim.render import render_clip
from flallm_ds.signsim.signer import SIGNERS, clip_poses, rest_pose
from flallm_ds.signsim.signs import SIGNS

FPS = 25


def signed_poses(
    num_sentences: int, rests_s: Sequence[float], seed: int = 0
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Return (the poses of a signer, (start, end) of each sentence in seconds).

    A rest is before each sentence, and one second of rest is at the end.
    """
    parts: list[np.ndarray] = []
    spans: list[tuple[float, float]] = []
    num_frames = 0
    for number in range(num_sentences):
        rest_s = rests_s[number % len(rests_s)]
        rest = np.tile(rest_pose(), (round(rest_s * FPS), 1))
        clip, rng = plan_clip(number, 40, seed)
        signs = [SIGNS[gloss] for gloss in clip.sentence.glosses]
        signed = clip_poses(signs, SIGNERS[seed], rng)
        parts += [rest, signed]
        num_frames += len(rest)
        spans.append((num_frames / FPS, (num_frames + len(signed)) / FPS))
        num_frames += len(signed)
    parts.append(np.tile(rest_pose(), (FPS, 1)))
    return np.concatenate(parts), spans


def write_long_video(
    path: Path, num_sentences: int, rests_s: Sequence[float] = (0.7, 1.0, 1.5)
) -> list[tuple[float, float]]:
    """Write an mp4 of 210 x 260 pixels. Returns (start, end) of its sentences."""
    poses_FP, spans = signed_poses(num_sentences, rests_s)
    frames = render_clip(poses_FP, SIGNERS[0], np.random.default_rng(0))
    rgb = (np.ascontiguousarray(frame[:, :, ::-1]) for frame in frames)
    path.write_bytes(encode_h264(rgb, FPS, gop=12, crf=23))
    return spans
