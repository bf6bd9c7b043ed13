"""Encode and decode a clip as an mp4 with H.264, the member `<key>.mp4` of a shard.

This format is for corpora of about 1,000 hours. It is several times smaller than JPEGs and
slower to decode, because a frame depends on all earlier frames of its group of pictures
(GOP). Groups are therefore short, have one length, and do not depend on each other.
"""

import io
from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.codec.context import Flags
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)
from av.video.reformatter import Interpolation as Scaling

_MAX_DENOMINATOR = 1001  # of the frame rate: NTSC video has 30000/1001 frames a second
# BITEXACT gives the same pixels with any vector instructions. ACCURATE_RND is used for
# encoding only: in decoding it takes 8 times as long and is further from the source.
_FROM_YUV = Scaling.BILINEAR | Scaling.BITEXACT
_TO_YUV = _FROM_YUV | Scaling.ACCURATE_RND


def encode_h264(frames: Iterable[np.ndarray], fps: float, gop: int, crf: int) -> bytes:
    """Return the bytes of an mp4 file with these frames.

    frames: uint8 RGB of shape (height, width, 3), all of one size. fps: frames per second.
    gop: frames in a group; the first one of a group depends on no other frame. crf: x264's
    constant rate factor from 0 (lossless) to 51; higher values give smaller files and
    worse pictures.

    The same frames give the same bytes on all machines with the same version of PyAV.
    H.264 supports even sizes only: the last row or column of an odd size is stored twice,
    and `decode_frames` removes the copy. Raises ValueError if there are no frames, if they
    have another type or several sizes, or if a value is out of range.
    """
    if not 0 < fps < 10_000:
        raise ValueError(f"fps must be above 0 and below 10,000, got {fps}")
    if gop < 1 or not 0 <= crf <= 51:
        raise ValueError(
            f"gop must be at least 1 and crf from 0 to 51, got {gop} and {crf}"
        )
    rate = Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
    rate = max(rate, Fraction(1, _MAX_DENOMINATOR))
    out = io.BytesIO()
    # Without bitexact the muxer writes its version into the file.
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = 1 / rate
        codec.thread_count = 1  # with more threads, the bytes depend on the number of cores
        codec.flags |= Flags.bitexact
        codec.gop_size, codec.max_b_frames = gop, 0
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        # Groups of exactly `gop` frames: no extra keyframes at scene cuts, no B-frames.
        codec.options = {
            "crf": str(crf),
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0:"
            "cpu-independent=1",
        }
        # The stream gets its size from the first frame.
        num_frames = 0
        for num_frames, frame in enumerate(_yuv(frames), 1):
            if num_frames == 1:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base = num_frames - 1, 1 / rate
            container.mux(stream.encode(frame))
        if num_frames:
            container.mux(stream.encode())
    if not num_frames:
        raise ValueError("a clip must have at least one frame, got none")
    return out.getvalue()


def _yuv(frames: Iterable[np.ndarray]) -> "Iterator[av.VideoFrame]":
    """Yield the frames in the encoder's format: even size, BT.709, limited range."""
    reformatter = VideoReformatter()
    shape: tuple[int, ...] | None = None
    for frame in frames:
        shape = shape or frame.shape
        if (
            frame.dtype != np.uint8
            or frame.ndim != 3
            or frame.shape != (*shape[:2], 3)
            or 0 in frame.shape
        ):
            raise ValueError(
                "frames must be uint8 of one shape (height, width, 3), got "
                f"{frame.dtype} of {frame.shape} after {shape}"
            )
        # yuv420p has one colour for 2 x 2 pixels, so both sides must be even.
        even = np.pad(frame, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), "edge")
        yield reformatter.reformat(
            av.VideoFrame.from_ndarray(even, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_TO_YUV,
            threads=1,
        )


def decode_frames(
    member: bytes | memoryview,
    picks: np.ndarray,
    num_frames: int,
    out_THWC: np.ndarray,
    hw: tuple[int, int],
) -> None:
    """Decode picked frames of an mp4; see `decode.decode_frames`.

    Each group with a picked frame is decoded up to its last picked frame. The mp4 must have
    the format that `encode_h264` writes: H.264, yuv420p, no B-frames.
    """
    height, width = hw
    even = (height + height % 2, width + width % 2)
    # A frame that is picked several times is decoded once.
    places: dict[int, list[int]] = {}  # frame -> its places in the output
    for place, number in enumerate(picks.tolist()):
        places.setdefault(number, []).append(place)
    reformatter = VideoReformatter()
    # The canvas around the frames is black.
    out_THWC[:, height:] = 0
    out_THWC[:, :height, width:] = 0
    try:
        with av.open(
            io.BytesIO(member), format="mp4", metadata_errors="replace"
        ) as container:
            for number, frame in _decode(container, places, num_frames):
                if (frame.height, frame.width) != even:
                    raise ValueError(
                        f"frames must be {even[1]}x{even[0]}, got "
                        f"{frame.width}x{frame.height}"
                    )
                rgb = reformatter.reformat(
                    frame, format="rgb24", interpolation=_FROM_YUV, threads=1
                )
                picture = rgb.to_ndarray()[:height, :width]
                out_THWC[places.pop(number), :height, :width] = picture
    except av.FFmpegError as error:
        raise ValueError(
            f"the mp4 must decode without errors, got {error.strerror or error}"
        ) from error
    if places:
        raise ValueError(
            f"the mp4 must decode to its end, got {len(places)} picked frames too few"
        )


def _decode(
    container: "av.container.InputContainer", picks: Collection[int], num_frames: int
) -> "Iterator[tuple[int, av.VideoFrame]]":
    """Yield (index, frame) of the picked frames, in order.

    Raises ValueError if the mp4 does not have the format that `encode_h264` writes.
    """
    if len(container.streams) != 1 or not container.streams.video:
        raise ValueError(
            "the mp4 must have one video stream and no other stream, got "
            f"{len(container.streams.video)} video streams of {len(container.streams)}"
        )
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None or codec.name != "h264" or codec.pix_fmt != "yuv420p":
        found = f"{codec.name} in {codec.pix_fmt}" if codec else "an unknown codec"
        raise ValueError(f"the mp4 must have H.264 in yuv420p, got {found}")
    # PyAV yields an empty packet at the end.
    packets = [packet for packet in container.demux(stream) if packet.size]
    if len(packets) != num_frames:
        raise ValueError(f"the clip must have {num_frames} frames, got {len(packets)}")
    # Without B-frames, frames are stored in presentation order: packet i is frame i.
    times = [packet.pts for packet in packets]
    if None in times or times != sorted(set(times)) or not packets[0].is_keyframe:
        raise ValueError(
            "the mp4 must begin with a keyframe and have no B-frames, got another order"
        )
    codec.thread_count = 1  # data-loading threads decode several clips in parallel
    codec.options = {"err_detect": "explode"}
    numbers = {times[number]: number for number in picks}
    for packet in [*_needed(packets, picks), None]:  # None flushes the decoder
        for frame in codec.decode(packet):
            if frame.is_corrupt or frame.format.name != "yuv420p":
                raise ValueError("the mp4 must decode without damage, got a damaged frame")
            if frame.pts in numbers:
                yield numbers.pop(frame.pts), frame


def _needed(packets: "list[av.Packet]", picks: Collection[int]) -> "list[av.Packet]":
    """Return the packets of each group from its keyframe to its last picked frame."""
    needed: list[av.Packet] = []
    group: list[av.Packet] = []  # packets that only a later pick of this group needs
    for number, packet in enumerate(packets):
        if packet.is_keyframe:
            group = []
        group.append(packet)
        if number in picks:
            needed += group
            group = []
    return needed
