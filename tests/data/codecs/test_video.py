import gc
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from flallm_ds.data.codecs.sizes import box_px, fit_short_side
from flallm_ds.data.codecs.video import BrokenVideo, Video, read_frames
from tests.helpers.paths import SHARED

DATA = SHARED / "data"
EDGE = DATA / "edge_videos"
needs_shared = pytest.mark.skipif(
    not EDGE.is_dir(), reason=f"needs the real samples at {SHARED} (FLALLM_SHARED)"
)


def write_video(
    path: Path, num_frames: int = 30, fps: int = 10, codec: str = "libx264", **options: str
) -> Path:
    """Write a video whose frame n is uniformly grey, with the value 8 n."""
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": "10", "crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 8 * number, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in frames]


@needs_shared
@pytest.mark.parametrize(
    ("name", "num_frames", "height", "width", "fps"),
    [
        ("av1_video.mkv", 125, 360, 640, 25),
        ("bt709_full_range.mp4", 30, 720, 1280, 30),
        ("h264_10bits.mp4", 30, 200, 200, 30),
        ("h265_video.mp4", 10, 128, 128, 10),
        ("ns_200-900.mp4", 181, 144, 192, 12),
        ("phone_portrait_540x720_yuvj420p.mp4", 58, 720, 540, 359 / 12),
        ("signbank_metadata_109_decodes_99.mp4", 99, 480, 640, 15),
        ("unordered.mov", 4, 50, 50, 32),
        ("video_270.mov", 3, 568, 320, 30),
        ("video_90.mov", 3, 568, 320, 30),
    ],
)
def test_real_edge_cases_decode_with_their_size_and_rate(
    name, num_frames, height, width, fps
):
    video = Video(EDGE / name)
    shapes = [frame.shape for frame in video.frames()]
    assert shapes == [(height, width, 3)] * num_frames
    assert video.fps == pytest.approx(fps)


@needs_shared
def test_a_file_with_a_damaged_middle_is_refused_with_its_name():
    with pytest.raises(BrokenVideo, match=r"corrupted\.mp4 after 28 frames"):
        list(read_frames(EDGE / "corrupted.mp4"))


@needs_shared
@pytest.mark.parametrize(
    "name", ["av1_video.mkv", "h265_video.mp4", "phone_portrait_540x720_yuvj420p.mp4"]
)
@pytest.mark.parametrize("part", [0.98, 0.5, 0.01])
def test_a_truncated_real_file_is_refused(tmp_path, name, part):
    content = (EDGE / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(BrokenVideo, match=name):
        list(read_frames(path))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_truncated_file_is_refused_wherever_its_index_is(tmp_path, suffix):
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    whole = write_video(
        tmp_path / f"whole{suffix}",
        codec="mpeg4" if suffix == ".avi" else "libx264",
        **options,
    )
    assert sum(1 for _ in read_frames(whole)) == 30
    content = whole.read_bytes()
    for end in range(len(content) // 3, len(content) - 1, len(content) // 7):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[:end])
        with pytest.raises(BrokenVideo):
            list(read_frames(cut))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no video",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0",
    ],
)
def test_other_files_are_refused_and_playlists_are_not_followed(tmp_path, content):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"x\.mp4"):
        list(read_frames(path))


@pytest.mark.parametrize(
    "name", ["pipe:0", "missing.mp4", "http://127.0.0.1/x.mp4", "concat:a|b"]
)
def test_a_name_is_always_taken_as_a_file(name):
    with pytest.raises(BrokenVideo):
        list(read_frames(Path(name)))


def test_a_file_without_a_video_stream_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BrokenVideo, match="no"):
        list(read_frames(path))


def test_a_span_takes_the_frames_shown_in_it(tmp_path):
    path = write_video(tmp_path / "x.mp4")
    assert numbers(read_frames(path, 0.5, 0.9)) == [5, 6, 7, 8]
    assert numbers(read_frames(path, 1.25, 1.75)) == [13, 14, 15, 16, 17]
    assert numbers(read_frames(path, 2.5)) == [25, 26, 27, 28, 29]
    assert numbers(read_frames(path, None, 0.2)) == [0, 1]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mpg", "mpeg2video"),
        ("a.h264", "libx264"),
        ("a.ts", "libx264"),
        ("a.mkv", "libx264"),
        ("a.mts", "libx264"),
        ("a.m2ts", "libx264"),
        ("a.3gp", "libx264"),
    ],
)
def test_a_span_is_the_same_in_every_container(tmp_path, name, codec):
    """In an MPEG program stream a seek loses frames, and a raw stream cannot seek."""
    path = write_video(tmp_path / name, fps=25, codec=codec)
    whole = numbers(read_frames(path))
    assert numbers(read_frames(path, 0.48, 0.88)) == whole[12:22]
    assert numbers(read_frames(path, 0.8)) == whole[20:]


def test_a_span_past_the_end_is_cut_there_and_reported(tmp_path):
    video = Video(write_video(tmp_path / "x.mp4"))
    assert numbers(video.frames(2.5, 4.0)) == [25, 26, 27, 28, 29]
    assert video.past_end_s == pytest.approx(1.0)
    assert len(list(video.frames(2.5, 3.0))) == 5 and video.past_end_s == pytest.approx(0)
    with pytest.raises(BrokenVideo, match="from 7"):
        list(video.frames(7.0, 8.0))


def test_the_rate_is_measured_by_the_timestamps(tmp_path):
    path = tmp_path / "slow.mkv"
    # 30 frames a second by the container, one every 0.5 s by the timestamps
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 8 * number, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = 500 * number, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = Video(path)
    assert numbers(video.frames()) == list(range(6))
    assert video.fps == pytest.approx(2, rel=0.01)


def test_a_folder_of_images_is_read_in_natural_order(tmp_path):
    for number in (10, 9, 2, 1, 11):
        cv2.imwrite(
            str(tmp_path / f"images{number}.png"), np.full((8, 6, 3), 8 * number, np.uint8)
        )
    (tmp_path / "._images3.png").write_bytes(b"a Mac's")
    (tmp_path / "notes.txt").write_text("no image")
    video = Video(tmp_path, image_fps=25.0)
    assert numbers(video.frames()) == [1, 2, 9, 10, 11] and video.fps == 25.0
    assert numbers(video.frames(0.04, 0.12)) == [2, 9]


def test_images_are_rgb(tmp_path):
    # blue, in OpenCV's order BGR
    cv2.imwrite(str(tmp_path / "1.png"), np.full((4, 4, 3), (255, 0, 0), np.uint8))
    assert next(read_frames(tmp_path))[0, 0].tolist() == [0, 0, 255]


def test_a_damaged_image_is_refused_with_its_name(tmp_path):
    encoded = cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes()
    (tmp_path / "1.png").write_bytes(encoded)
    (tmp_path / "2.png").write_bytes(encoded[:-20])
    with pytest.raises(BrokenVideo, match=r"2\.png"):
        list(read_frames(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BrokenVideo, match="frames"):
        list(read_frames(tmp_path))


def test_frames_are_resized_to_the_first_one(tmp_path):
    for number, size in enumerate(((8, 6), (16, 12))):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((*size, 3), np.uint8))
    assert [frame.shape for frame in read_frames(tmp_path)] == [(8, 6, 3)] * 2


@pytest.mark.parametrize(
    ("shape", "fitted"),
    [((720, 1280), (256, 455)), ((640, 480), (341, 256)), ((260, 210), (260, 210))],
)
def test_the_short_side_is_scaled_down_and_never_up(shape, fitted):
    assert fit_short_side(np.zeros((*shape, 3), np.uint8), 256).shape == (*fitted, 3)


def test_scaling_while_reading_gives_nearly_the_pixels_of_scaling_after(tmp_path):
    path = write_video(tmp_path / "x.mp4", 3)
    for read, scaled in zip(
        read_frames(path), Video(path).frames(short_side=16), strict=True
    ):
        assert scaled.shape == (16, 21, 3)
        assert np.abs(fit_short_side(read, 16).astype(int) - scaled).max() <= 2


def test_a_box_is_cut_before_scaling(tmp_path):
    image = np.zeros((100, 200, 3), np.uint8)
    image[20:60, 50:150] = 255
    cv2.imwrite(str(tmp_path / "1.png"), image)
    (frame,) = Video(tmp_path).frames(short_side=20, box=(0.25, 0.2, 0.75, 0.6))
    assert frame.shape == (20, 50, 3) and (frame == 255).all()
    assert box_px((1.0, 1.0, 1.0, 1.0), 100, 200) == (199, 99, 200, 100)


def write_uneven(path: Path, times_ms: list[int]) -> Path:
    """Write a video whose frame n has the grey value 8 n and the time times_ms[n]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "3", "crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 8 * number, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        (10, list(range(30))),
        (5, list(range(0, 30, 2))),
        (4, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]),
        (20, [n // 2 for n in range(60)]),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_are_selected_by_time_at_another_rate(tmp_path, rate, kept, suffix):
    video = Video(write_video(tmp_path / f"x{suffix}"))
    assert numbers(video.frames(fps=rate)) == kept and video.fps == rate


def test_times_that_a_container_rounds_select_the_same_frames(tmp_path):
    path = write_uneven(tmp_path / "x.mkv", [round(1000 * n / 30) for n in range(30)])
    assert numbers(Video(path).frames(fps=15)) == list(range(0, 30, 2))
    assert numbers(Video(path).frames(0.2, 0.6, fps=15)) == [6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_variable_rate_becomes_constant_by_time(tmp_path, suffix):
    path = write_uneven(tmp_path / f"x{suffix}", [0, 40, 80, 1000, 1040, 1500, 2000])
    video = Video(path)
    shown = [0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 6]
    assert numbers(video.frames(fps=10)) == shown and video.fps == 10
    assert numbers(video.frames(0.5, 1.2, fps=10)) == [2, 2, 2, 2, 2, 3, 4]
    assert numbers(video.frames(0.5, 1.2)) == [3, 4]
    assert list(video.frames(1.5, 9.0, fps=1))[-1] is not None and video.past_end_s > 5
    with pytest.raises(BrokenVideo, match=r"from 7\.0 s"):
        list(video.frames(7.0, 8.0, fps=10))


def test_timestamps_that_jump_by_hours_are_refused(tmp_path):
    path = write_uneven(tmp_path / "x.mkv", [0, 40, 80_000_000])
    with pytest.raises(
        BrokenVideo, match=r"x\.mkv: a frame is .* longer than 600 s, until 80000 s"
    ):
        list(Video(path).frames(fps=25))
    assert numbers(Video(path).frames(0, 0.2, fps=25)) == [0, 1, 1, 1, 1]


def test_a_frame_that_is_shown_twice_is_read_once(tmp_path):
    for number in range(2):
        cv2.imwrite(
            str(tmp_path / f"{number}.png"), np.full((4, 4, 3), 8 * number, np.uint8)
        )
    frames = list(Video(tmp_path, image_fps=10).frames(fps=20))
    assert (
        numbers(frames) == [0, 0, 1, 1]
        and frames[0] is frames[1]
        and frames[2] is frames[3]
    )


def test_margins_and_a_box_are_cut_and_the_rest_is_stretched(tmp_path):
    image = np.zeros((100, 200, 3), np.uint8)
    image[20:60, 50:150] = 255
    cv2.imwrite(str(tmp_path / "1.png"), image)
    video = Video(tmp_path)
    (frame,) = video.frames(margin_px=(20, 50, 40, 50))
    assert frame.shape == (40, 100, 3) and (frame == 255).all()
    (frame,) = video.frames(
        margin_px=(20, 0, 40, 0), box=(0.25, 0.0, 0.75, 1.0), stretch_hw=(200, 200)
    )
    assert frame.shape == (80, 100, 3) and (frame == 255).all()
    (frame,) = video.frames(stretch_hw=(200, 200), short_side=50)
    assert (
        frame.shape == (50, 50, 3)
        and frame[10:30, 13:37].min() == 255
        and frame[:9].max() == 0
    )
    with pytest.raises(BrokenVideo, match="leave nothing of 200x100 pixels"):
        list(video.frames(margin_px=(50, 0, 50, 0)))


@pytest.mark.parametrize(
    ("codec", "pixels", "full"),
    [
        ("libx264", "yuv420p", False),
        ("libx264", "yuvj420p", True),
        ("libx265", "yuv420p10le", False),
    ],
)
def test_colours_follow_the_range_and_depth_of_the_file(tmp_path, codec, pixels, full):
    colour = np.array([200, 40, 90])
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=10, options={"crf": "4", "x265-params": "log-level=none"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        for _ in range(3):
            rgb = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), colour, np.uint8), format="rgb24"
            )
            frame = rgb.reformat(
                format=pixels,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=context.color_range,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for frame in read_frames(path):
        assert np.abs(frame.reshape(-1, 3).mean(0) - colour).max() < 5


@needs_shared
@pytest.mark.parametrize("name", ["video_90.mov", "video_270.mov"])
def test_rotated_files_are_read_upright(name):
    """Both files show one scene; only the display matrix says which side is up."""
    with av.open(str(EDGE / name)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    frame = next(read_frames(EDGE / name))
    turned = np.rot90(stored, -1 if name == "video_90.mov" else 1)
    assert np.abs(frame.astype(int) - turned).mean() < 3


def test_frames_do_not_wait_for_the_garbage_collector(tmp_path):
    """Each would hold the memory of a whole picture."""
    path = write_video(tmp_path / "x.mp4")
    gc.collect()
    gc.disable()
    try:
        assert sum(1 for _ in Video(path).frames()) == 30
        alive = [one for one in gc.get_objects() if type(one) is av.VideoFrame]
    finally:
        gc.enable()
    assert len(alive) < 20
