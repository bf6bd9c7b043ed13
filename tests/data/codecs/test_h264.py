import contextlib
import hashlib
import io
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from flallm_ds.data.codecs.h264 import decode_frames, encode_h264
from tests.helpers.paths import ROOT

GOP = 6
NUM_FRAMES = 20


def picture(number: int, height: int, width: int) -> np.ndarray:
    """Return a frame of a bright square that moves over a colour gradient."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack(
        [x * 2 % 256, y * 2 % 256, np.full_like(x, 60 + 5 * number)], axis=2
    ).astype(np.uint8)
    frame[10:22, 2 * number : 2 * number + 12] = (250, 220, 180)
    return frame


def clip(num_frames: int = NUM_FRAMES, height: int = 48, width: int = 64) -> np.ndarray:
    return np.stack([picture(number, height, width) for number in range(num_frames)])


@pytest.fixture(scope="module")
def member() -> bytes:
    return encode_h264(clip(), 25.0, GOP, 12)


def decode(
    member: bytes, picks: list[int], num_frames: int = NUM_FRAMES, hw=(48, 64)
) -> np.ndarray:
    out = np.full((len(picks), *hw, 3), 7, np.uint8)
    decode_frames(member, np.array(picks), num_frames, out, hw)
    return out


def foreign(codec: str, pix_fmt: str, audio: bool = False, **options: str) -> bytes:
    """Return an mp4 with another codec, pixel format or stream than `encode_h264` writes."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        sound = container.add_stream("aac", rate=16000) if audio else None
        for number, frame in enumerate(clip()):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), "fltp", "mono"
            )
            silence.sample_rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return out.getvalue()


@pytest.mark.parametrize(("height", "width"), [(48, 64), (79, 65), (48, 65), (79, 64)])
def test_frames_come_back_in_their_size_and_colours(height, width):
    frames = clip(8, height, width)
    decoded = decode(
        encode_h264(iter(frames), 25.0, GOP, 5), list(range(8)), 8, (height, width)
    )
    difference = decoded.astype(int) - frames
    assert np.abs(difference).mean() < 4
    # with another colour matrix, the difference is 5 to 20
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 2.5


@pytest.mark.parametrize(
    "picks", [[0], [19], [5, 6], [3, 3, 17, 0], list(range(0, 20, 4)), [1, 7, 13, 19]]
)
def test_picked_frames_equal_those_of_decoding_all(member, picks):
    assert (decode(member, picks) == decode(member, list(range(NUM_FRAMES)))[picks]).all()


def test_a_larger_canvas_is_black_around_the_frame(member):
    out = np.full((2, 50, 70, 3), 9, np.uint8)
    decode_frames(member, np.array([4, 11]), NUM_FRAMES, out, (48, 64))
    assert (out[:, :48, :64] == decode(member, [4, 11])).all()
    assert not out[:, 48:].any() and not out[:, :, 64:].any()


def test_groups_have_one_length_and_a_player_shows_the_frames(member):
    with av.open(io.BytesIO(member)) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.codec_context.pix_fmt) == (
            25,
            20,
            "yuv420p",
        )
        keys = [
            number
            for number, packet in enumerate(container.demux(stream))
            if packet.is_keyframe
        ]
        assert keys[:4] == [0, 6, 12, 18]
        container.seek(0)
        frames = list(container.decode(stream))
    assert [PictureType(frame.pict_type).name for frame in frames[:7]] == [
        "I",
        *"PPPPP",
        "I",
    ]
    assert (
        np.abs(
            frames[9].to_ndarray(format="rgb24").astype(int) - decode(member, [9])[0]
        ).mean()
        < 2
    )


def test_only_frames_that_a_pick_depends_on_are_decoded(member):
    with av.open(io.BytesIO(member)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    damaged = bytearray(member)
    # the end of the first group, and all of the second
    for number in (4, 5, *range(6, 12)):
        at = packets[number].pos
        damaged[at + 4 : at + packets[number].size] = b"\xff" * (packets[number].size - 4)
    picks = [0, 3, 13]
    assert (decode(bytes(damaged), picks) == decode(member, picks)).all()
    for pick in (4, 6, 11):
        with pytest.raises(ValueError):
            decode(bytes(damaged), [pick])


def test_the_same_frames_give_the_same_bytes_on_one_core_too(member):
    assert encode_h264(list(clip()), 25.0, GOP, 12) == member
    script = (
        "import hashlib, os\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "from tests.data.codecs.test_h264 import GOP, clip\n"
        "from flallm_ds.data.codecs.h264 import encode_h264\n"
        "print(hashlib.sha256(encode_h264(clip(), 25.0, GOP, 12)).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(member).hexdigest()
    assert b"threads=1 " in member  # x264 writes its options into the first frame
    assert b"Lavf" not in member and b"Lavc" not in member  # no version of a muxer


def test_threads_decode_in_parallel(member):
    picks = [[n, n + 4] for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: decode(member, p), picks))
    assert all((a == decode(member, p)).all() for a, p in zip(together, picks, strict=True))


@pytest.mark.parametrize(
    ("rate", "fps"), [(Fraction(30000, 1001), 30000 / 1001), (Fraction(5, 2), 2.5)]
)
def test_the_rate_is_kept(rate, fps):
    with av.open(io.BytesIO(encode_h264(clip(4), fps, GOP, 23))) as container:
        assert container.streams.video[0].average_rate == rate


def test_a_higher_crf_gives_a_smaller_file():
    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    sizes = [len(encode_h264(frames, 25.0, GOP, crf)) for crf in (0, 18, 30)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (("libx265", "yuv420p"), "hevc in yuv420p"),
        (("mpeg4", "yuv420p"), "mpeg4 in yuv420p"),
        (("libx264", "yuv444p"), "h264 in yuv444p"),
        (("libx264", "yuv420p10le"), "h264 in yuv420p10le"),
    ],
)
def test_another_codec_is_refused_with_its_name(other, what):
    with pytest.raises(ValueError, match=f"H.264 in yuv420p, got {what}"):
        decode(foreign(*other), [0])


def test_reordered_frames_and_sound_are_refused():
    with pytest.raises(ValueError, match="no B-frames"):
        decode(foreign("libx264", "yuv420p", bf="3"), [0])
    with pytest.raises(ValueError, match="one video stream"):
        decode(foreign("libx264", "yuv420p", audio=True, bf="0"), [0])


def test_another_number_or_size_of_frames_is_refused(member):
    with pytest.raises(ValueError, match="must have 21 frames, got 20"):
        decode(member, [0], num_frames=21)
    for hw in ((46, 64), (48, 66), (48, 61)):
        with pytest.raises(ValueError, match="got 64x48"):
            decode(member, [0], hw=hw)


def test_damaged_bytes_raise_a_value_error_or_are_harmless(member):
    random = np.random.default_rng(0)
    for end in random.integers(8, len(member), 40):
        with pytest.raises(ValueError):
            decode(member[:end], [0, 19])
    num_refused = 0
    begin = member.index(b"moov")
    for number in range(200):
        broken = bytearray(member)
        at = (
            random.integers(begin, len(member))
            if number % 2
            else random.integers(8, len(member))
        )
        broken[at] ^= 1 << random.integers(8)
        try:
            decode(bytes(broken), [0, 19])
        except ValueError:
            num_refused += 1
    assert num_refused > 40


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [np.zeros((8, 8, 3), np.float32)],
        [np.zeros((8, 8), np.uint8)],
        [np.zeros((8, 8, 4), np.uint8)],
        [np.zeros((0, 8, 3), np.uint8)],
        [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)],
    ],
)
def test_frames_of_another_kind_are_refused(frames):
    with pytest.raises(ValueError, match="frame"):
        encode_h264(frames, 25.0, GOP, 23)


@pytest.mark.parametrize(
    ("fps", "gop", "crf"), [(0.0, 6, 23), (float("nan"), 6, 23), (25, 0, 23), (25, 6, 52)]
)
def test_impossible_values_are_refused(fps, gop, crf):
    with pytest.raises(ValueError, match=r"must be .*, got"):
        encode_h264(clip(2), fps, gop, crf)


@pytest.mark.parametrize(
    ("box", "at", "value"),
    [
        (b"stsz", 12, 10**9),  # frames
        (b"stsz", 8, 1),  # bytes of each frame
        (b"stsc", 16, 10**9),  # frames of a chunk
        (b"stco", 8, 10**9),  # chunks
        (b"stts", 12, 10**9),
    ],
)
def test_wrong_counts_in_a_header_allocate_no_memory(member, box, at, value):
    damaged = bytearray(member)
    begin = damaged.find(box) + at
    damaged[begin : begin + 4] = value.to_bytes(4, "big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError):  # FFmpeg ignores some of the values
        decode(bytes(damaged), [0, 5])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
