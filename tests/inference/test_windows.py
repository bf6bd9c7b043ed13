"""Where a long video is cut: at pauses, in time, and with the memory of a window."""

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flallm_ds.data.codecs.h264 import encode_h264
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.errors import UserError
from flallm_ds.inference.clips import LEAST_LIMIT_S, ClipReader
from flallm_ds.inference.windows import LEAD_S, PAUSE_S, WindowFinder
from tests.helpers.long_video import write_long_video

FPS = 25
TOLERANCE_S = 0.3


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A video of 5 sentences, and their times."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return path, write_long_video(path, 5)


def moving(spans: list[tuple[float, float]], length_s: float) -> Iterator[np.ndarray]:
    """Frames of 96 x 64 pixels with a box that moves in these spans, and noise."""
    rng = np.random.default_rng(0)
    place = 0.0
    for number in range(round(length_s * FPS)):
        if any(start <= number / FPS < end for start, end in spans):
            place += 1.5
        frame = rng.normal(100, 3, (64, 96, 3))
        left = round(40 + 30 * np.sin(place / 3))
        frame[20:40, left : left + 16] += 100
        yield frame.clip(0, 255).astype(np.uint8)


def found_in(
    frames: Iterator[np.ndarray], limit_s: float = 20.0
) -> list[tuple[float, float]]:
    finder = WindowFinder(limit_s)
    found, time_s = [], 0.0
    for number, frame in enumerate(frames):
        time_s = number / FPS
        found += finder.add(time_s, frame)
    found += finder.end(time_s + 1 / FPS)
    return [(window.start_s, window.end_s) for window in found]


def assert_near(found, expected) -> None:
    assert len(found) == len(expected), found
    for window, span in zip(found, expected, strict=True):
        assert window == pytest.approx(span, abs=TOLERANCE_S)


def test_a_window_for_each_movement_between_pauses() -> None:
    spans = [(1.0, 3.0), (3.8, 6.0), (9.0, 10.5)]
    found = found_in(moving(spans, 12.0))
    assert_near(found, spans)
    for (_, end_s), (start_s, _) in pairwise(found):
        assert end_s <= start_s


def test_a_video_may_begin_and_end_with_motion() -> None:
    assert_near(found_in(moving([(0.0, 2.0), (3.0, 5.0)], 5.0)), [(0.0, 2.0), (3.0, 5.0)])


def test_a_short_hold_does_not_end_a_window() -> None:
    hold_s = PAUSE_S / 2
    spans = [(1.0, 3.0), (3.0 + hold_s, 5.0)]
    assert_near(found_in(moving(spans, 7.0)), [(1.0, 5.0)])


def test_a_short_movement_is_a_window_of_a_second() -> None:
    ((start_s, end_s),) = found_in(moving([(2.0, 2.4)], 5.0))
    assert start_s == pytest.approx(2.0 - LEAD_S, abs=0.1)
    assert end_s - start_s == pytest.approx(1.0)


def test_nothing_is_found_where_nothing_moves() -> None:
    assert found_in(moving([], 5.0)) == []


def test_motion_without_a_pause_is_cut_before_the_limit() -> None:
    found = found_in(moving([(0.0, 20.0)], 20.0), limit_s=6.0)
    assert len(found) >= 4 and found[0][0] == 0 and found[-1][1] == pytest.approx(20.0)
    for (start_s, end_s), (next_s, _) in pairwise(found):
        assert end_s == next_s and 4.0 <= end_s - start_s <= 6.0


def test_a_picture_that_is_shown_for_seconds_is_cut_at_its_end() -> None:
    finder = WindowFinder(limit_s=8.0)
    found = []
    for number in range(8):
        frame = np.full((64, 96, 3), 30 * (number % 2), np.uint8)
        found += finder.add(5.0 * number, frame)
    found += finder.end(36.0)
    ends = [window.end_s for window in found]
    assert ends == pytest.approx([10.0, 20.0, 30.0, 35.0 + LEAD_S])


def test_the_windows_of_signed_sentences_have_their_times(long_video) -> None:
    path, spans = long_video
    reader = ClipReader(FrameSampling(keep_every=4), short_side=64)
    assert_near([(clip.start_s, clip.end_s) for clip in reader.windows(path)], spans)


@pytest.mark.parametrize("sampling", [FrameSampling(4), FrameSampling(target_fps=7.0)])
def test_a_window_has_the_frames_of_the_same_span(long_video, sampling) -> None:
    reader = ClipReader(sampling, short_side=64)
    for clip in reader.windows(long_video[0]):
        alone = reader.read(long_video[0], clip.start_s, clip.end_s)
        assert np.array_equal(clip.frames_THWC, alone.frames_THWC)
        assert (clip.num_sampled, clip.rate) == (
            alone.num_sampled,
            pytest.approx(alone.rate),
        )


def test_a_window_is_resampled_as_the_shards_were(long_video) -> None:
    reader = ClipReader(FrameSampling(2), short_side=64, fps=12.5)
    clips = list(reader.windows(long_video[0]))
    assert_near([(clip.start_s, clip.end_s) for clip in clips], long_video[1])
    for clip in clips:
        assert len(clip.frames_THWC) == pytest.approx(
            6.25 * (clip.end_s - clip.start_s), abs=1
        )


def write_moving(path: Path, length_s: float) -> Path:
    """A movement of 3 s every 4 s."""
    spans = [(start, start + 3.0) for start in np.arange(1.0, length_s, 4.0)]
    path.write_bytes(encode_h264(moving(spans, length_s), FPS, gop=12, crf=23))
    return path


def peak_bytes(reader: ClipReader, path: Path) -> int:
    tracemalloc.start()
    num_windows = sum(1 for _ in reader.windows(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_windows > 4
    return peak


def test_the_memory_of_a_video_is_that_of_its_windows(tmp_path: Path) -> None:
    reader = ClipReader(FrameSampling(4), short_side=64)
    short = peak_bytes(reader, write_moving(tmp_path / "short.mp4", 22.0))
    long = peak_bytes(reader, write_moving(tmp_path / "long.mp4", 62.0))
    assert long < 1.2 * short


def test_the_memory_of_a_thinned_video_is_that_of_the_kept_frames(tmp_path: Path) -> None:
    """Its frames are chosen when its length is known, as in the evaluation."""
    path = write_moving(tmp_path / "v.mp4", 20.0)
    sampling = FrameSampling(keep_every=2, max_frames=16)
    tracemalloc.start()
    clip = ClipReader(sampling, short_side=64).read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(clip.frames_THWC), clip.num_sampled) == (16, 250)
    assert peak < 4 * clip.frames_THWC.nbytes
    every = ClipReader(FrameSampling(), short_side=64).read(path).frames_THWC
    assert np.array_equal(clip.frames_THWC, every[sampling.picks(500)])


def test_a_video_is_long_if_it_is_longer_than_the_training_clips(tmp_path: Path) -> None:
    path = write_moving(tmp_path / "v.mp4", 14.0)
    sampling = FrameSampling(keep_every=4)
    assert ClipReader(sampling, 64, longest_s=15.0).read(path, limited=True) is not None
    assert ClipReader(sampling, 64, longest_s=12.0).read(path, limited=True) is None
    assert ClipReader(sampling, 64, longest_s=12.0).read(path) is not None
    # Not recorded: what the model can read. Here, 50 groups of 4 frames are 8 s.
    assert ClipReader(sampling, 64).read(path, limited=True) is not None
    assert ClipReader(FrameSampling(4, 50), 64).read(path, limited=True) is None
    assert ClipReader(FrameSampling(4, 50), 64).limit_s(25.0) == 8.0
    assert ClipReader(sampling, 64, longest_s=2.0).limit_s(25.0) == LEAST_LIMIT_S


def test_a_span_after_the_end_is_refused(long_video) -> None:
    reader = ClipReader(FrameSampling(), short_side=64)
    end_s = long_video[1][-1][1] + 1.0
    assert reader.read(long_video[0], end_s - 1, end_s + 0.4).end_s == pytest.approx(end_s)
    with pytest.raises(UserError, match=r"--spans must be within video .*long\.mp4"):
        reader.read(long_video[0], end_s - 1, end_s + 0.6)
    with pytest.raises(UserError, match="it has no frames from"):
        reader.read(long_video[0], end_s + 1, end_s + 2)
