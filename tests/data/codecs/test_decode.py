import subprocess
import sys

import numpy as np
import pytest
import simplejpeg

from flallm_ds.data.codecs.avi import pack_frames
from flallm_ds.data.codecs.decode import FAST, decode_frames, is_mp4, jpegs_of
from flallm_ds.data.codecs.h264 import encode_h264

NUM_FRAMES = 9
HW = (26, 21)


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, *HW, 3), np.uint8)
    return [simplejpeg.encode_jpeg(frame, quality=90) for frame in frames]


@pytest.fixture(scope="module")
def member(jpegs) -> bytes:
    return pack_frames(jpegs, 25.0, HW[1], HW[0])


@pytest.fixture(scope="module")
def mp4() -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, *HW, 3), np.uint8)
    return encode_h264(frames, 25.0, 4, 20)


def decode(member, picks, canvas=HW, hw=HW, num_frames=NUM_FRAMES) -> np.ndarray:
    out = np.full((len(picks), *canvas, 3), 7, np.uint8)
    decode_frames(member, np.array(picks), num_frames, out, hw)
    return out


@pytest.mark.parametrize("picks", [[0], [8], [0, 4, 8], [5, 5, 2], list(range(9)), []])
def test_the_picked_frames_are_the_jpegs_own_pixels(member, jpegs, picks):
    expected = [simplejpeg.decode_jpeg(jpegs[n], **FAST) for n in picks]
    picks = np.array(picks, np.int64)
    assert (decode(member, picks) == np.reshape(expected, (len(picks), *HW, 3))).all()
    assert (decode(memoryview(member), picks) == decode(member, picks)).all()


@pytest.mark.parametrize("canvas", [(30, 21), (26, 24), (40, 40)])
@pytest.mark.parametrize("kind", ["member", "mp4"])
def test_a_larger_canvas_is_black_around_the_frame(kind, canvas, request):
    clip = request.getfixturevalue(kind)
    out = decode(clip, [1, 6], canvas)
    assert (out[:, : HW[0], : HW[1]] == decode(clip, [1, 6])).all()
    assert not out[:, HW[0] :].any() and not out[:, :, HW[1] :].any()


def test_the_first_bytes_choose_the_decoder(member, mp4):
    assert is_mp4(mp4) and is_mp4(memoryview(mp4)) and not is_mp4(member)
    assert not (decode(mp4, [3]) == decode(member, [3])).all()
    for other in (b"", b"RIFF", b"\xff\xd8" + bytes(100), b"0123ftyp", bytes(10_000)):
        with pytest.raises(ValueError):
            decode(other, [0])


def test_jpegs_are_returned_as_stored(member, mp4, jpegs):
    picked = jpegs_of(member, np.array([7, 0, 3]), NUM_FRAMES)
    assert [bytes(jpeg) for jpeg in picked] == [jpegs[7], jpegs[0], jpegs[3]]
    assert all(jpeg.obj is member for jpeg in picked)  # no copy
    with pytest.raises(ValueError, match="must be a Motion-JPEG AVI, got an mp4"):
        jpegs_of(mp4, np.array([0]), NUM_FRAMES)


def test_another_number_of_frames_is_refused(member, mp4):
    for clip in (member, mp4):
        with pytest.raises(ValueError, match="must have 10 frames, got 9"):
            decode(clip, [0], num_frames=10)


@pytest.mark.parametrize("hw", [(25, 21), (26, 20), (28, 21), (26, 24), (21, 26), (13, 42)])
def test_another_size_of_frames_is_refused(member, hw):
    for canvas in (hw, (60, 60)):
        with pytest.raises(ValueError, match=f"frames must be {hw[1]}x{hw[0]}, got 21x26"):
            decode(member, [0, 5], canvas, hw)


def test_a_huge_size_in_a_frame_header_allocates_no_memory(jpegs):
    liar = bytearray(jpegs[0])
    at = liar.index(b"\xff\xc0") + 5
    liar[at : at + 4] = (65_000).to_bytes(2, "big") * 2  # 12 GB as RGB
    with pytest.raises(ValueError, match="frames must be 21x26, got 65000x65000"):
        decode(pack_frames([bytes(liar)], 25.0, 21, 26), [0], num_frames=1)


def test_a_damaged_jpeg_is_refused_only_if_it_is_picked(member, jpegs):
    at = member.index(jpegs[4]) + len(jpegs[4]) // 2
    damaged = member[:at] + bytes(40) + member[at + 40 :]
    assert (decode(damaged, [3, 5]) == decode(member, [3, 5])).all()
    with pytest.raises(ValueError):
        decode(damaged, [3, 4])


def test_damaged_bytes_raise_a_value_error_or_are_harmless(member):
    random = np.random.default_rng(0)
    num_refused = 0
    for _ in range(1000):
        broken = bytearray(member)
        broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        try:
            decode(bytes(broken), [0, 4, 8])
        except ValueError:
            num_refused += 1
    assert num_refused > 50


def test_jpegs_need_neither_torch_nor_ffmpeg():
    script = (
        "import sys, flallm_ds.data.codecs.decode\nprint(*[name for name in ('torch', "
        "'av', 'cv2', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
