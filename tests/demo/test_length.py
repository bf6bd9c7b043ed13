"""Videos that are too long or too large are found without decoding them."""

from pathlib import Path

import av
import numpy as np
import pytest

from flallm_ds.demo.length import check_video
from flallm_ds.demo.refused import Refused
from tests.helpers.trees import write_video


def test_the_limit_is_the_length_of_the_video(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 20, fps=10)
    check_video(tmp_path / "v.mp4", 2.0)
    with pytest.raises(Refused, match=r"at most 1\.9 s long"):
        check_video(tmp_path / "v.mp4", 1.9)


def test_a_raw_stream_has_the_length_of_its_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 50, fps=10)
    with (
        av.open(str(tmp_path / "v.mp4")) as old,
        av.open(str(tmp_path / "v.h264"), "w") as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    check_video(tmp_path / "v.h264", 5.1)
    with pytest.raises(Refused, match="at most 1 s long"):
        check_video(tmp_path / "v.h264", 1.0)


def test_huge_frames_are_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16384, 4096, "yuvj420p"
        picture = np.zeros((4096 * 3 // 2, 16384), np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="yuvj420p")
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(Refused, match="at most 7680x4320 pixels, got 16384x4096"):
        check_video(tmp_path / "v.mkv", 60)


def test_what_cannot_be_read_is_left_to_the_decoder(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"no video")
    check_video(tmp_path / "v.mp4", 1)
    check_video(tmp_path / "gone.mp4", 1)
