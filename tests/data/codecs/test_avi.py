import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import simplejpeg

from flallm_ds.data.codecs.avi import frame_spans, pack_frames


def picture(number: int, height: int = 26, width: int = 21) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [x * 9 % 256, y * 9 % 256, np.full_like(x, number * 20 % 256)], axis=2
    ).astype(np.uint8)


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    return [
        simplejpeg.encode_jpeg(picture(number), quality=90 - number) for number in range(7)
    ]


def test_spans_are_the_frames(jpegs):
    member = pack_frames(jpegs, 25.0, 21, 26)
    spans = frame_spans(member)
    assert spans.dtype == np.int64 and spans.shape == (7, 2)
    assert [member[offset : offset + size] for offset, size in spans] == jpegs
    assert (frame_spans(memoryview(member)) == spans).all()


def test_frames_of_odd_and_even_lengths_are_found():
    jpegs = [b"\xff\xd8" + bytes(length) for length in (2, 3, 9, 10, 1001)]
    member = pack_frames(jpegs, 25.0, 8, 8)
    assert [member[offset : offset + size] for offset, size in frame_spans(member)] == jpegs


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (25.0, Fraction(25)),
        (30000 / 1001, Fraction(30000, 1001)),
        (29.97, Fraction(2997, 100)),
    ],
)
def test_a_player_opens_the_clip_and_sees_the_same_frames(jpegs, fps, rate):
    with av.open(io.BytesIO(pack_frames(jpegs, fps, 21, 26))) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.frames, stream.width, stream.height) == (
            rate,
            7,
            21,
            26,
        )
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
        container.seek(0)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert packets == jpegs
    for frame, jpeg in zip(frames, jpegs, strict=True):
        ours = simplejpeg.decode_jpeg(jpeg).astype(int)
        assert np.abs(frame - ours).mean() < 12  # the two upscale chroma differently


def test_the_same_frames_give_the_same_bytes(jpegs):
    assert pack_frames(jpegs, 25.0, 21, 26) == pack_frames(list(jpegs), 25.0, 21, 26)


def test_a_foreign_avi_written_by_ffmpeg_is_read(jpegs):
    out = io.BytesIO()
    with av.open(out, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 21, 26, "yuvj420p"
        for number, jpeg in enumerate(jpegs):
            packet = av.Packet(jpeg)
            packet.stream, packet.pts, packet.dts, packet.time_base = (
                stream,
                number,
                number,
                Fraction(1, 25),
            )
            container.mux(packet)
    member = out.getvalue()
    assert [member[offset : offset + size] for offset, size in frame_spans(member)] == jpegs


def test_damaged_bytes_raise_a_value_error_and_spans_stay_inside(jpegs):
    member = pack_frames(jpegs, 25.0, 21, 26)
    random = np.random.default_rng(0)
    for end in random.integers(0, len(member), 300):
        with pytest.raises(ValueError, match=r"must .*, got "):
            frame_spans(member[:end])
    num_refused = 0
    for _ in range(3000):
        broken = bytearray(member)
        at = (
            random.integers(0, len(member))
            if random.random() < 0.3
            else random.choice([*range(250), -90, -40, -9])
        )
        broken[at] = random.integers(0, 256)
        try:
            spans = frame_spans(bytes(broken))
        except ValueError:
            num_refused += 1
        else:
            assert (spans >= 0).all() and (spans.sum(axis=1) <= len(broken)).all()
    assert num_refused > 300


def test_wrong_lengths_in_the_index_are_refused(jpegs):
    member = pack_frames(jpegs, 25.0, 21, 26)
    entry = member.index(b"idx1") + 8
    for place, value in (
        (entry + 8, 2**32 - 1),
        (entry + 12, 2**32 - 1),
        (entry + 12, 0),
        (entry - 4, 2**31),
    ):
        broken = bytearray(member)
        struct.pack_into("<I", broken, place, value)
        with pytest.raises(ValueError):
            frame_spans(bytes(broken))


@pytest.mark.parametrize("frames", [[], [b"\x89PNG"], [b""]])
def test_no_frames_and_frames_that_are_not_jpegs_are_refused(frames):
    with pytest.raises(ValueError):
        pack_frames(frames, 25.0, 8, 8)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_rate_is_not_packed(jpegs, fps):
    with pytest.raises(ValueError, match="fps"):
        pack_frames(jpegs, fps, 21, 26)
