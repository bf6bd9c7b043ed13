"""A stored clip as an mp4 of H.264 with short groups of pictures, one member `<key>.mp4`
of a tar.

For corpora of 1,000 hours: several times smaller than JPEGs, and dearer to decode,
because a frame needs all those before it back to its group's first. So groups are short,
all of one length, and stand alone.
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

_RATE_LIMIT = 1001  # denominators up to that of 30000/1001 frames a second
# The same pixels whatever the machine's vector instructions are. ACCURATE_RND is not for
# the way back: there it takes 8 times as long and is further from the picture.
_FROM_YUV = Scaling.BILINEAR | Scaling.BITEXACT
_TO_YUV = _FROM_YUV | Scaling.ACCURATE_RND


def encode_h264(frames: Iterable[np.ndarray], fps: float, gop: int, crf: int) -> bytes:
    """The mp4 file that holds `frames` (uint8 RGB of shape (height, width, 3), all of one size).

    gop: frames of a group; the first of each can be decoded by itself. crf: x264's
    constant rate factor, 0 (without loss) to 51; more is smaller and worse. The same
    frames give the same bytes on any machine with the same PyAV. H.264 has even sizes
    only: an odd one is stored with its last row or column twice, which `decode_frames`
    leaves out again. Raises ValueError for no frames, frames of another kind or of
    several sizes, or values out of range.
    """
    if not 0 < fps < 10_000:
        raise ValueError(f"fps must be above 0 and below 10,000, but is {fps}.")
    if gop < 1 or not 0 <= crf <= 51:
        raise ValueError(
            f"gop must be at least 1 and crf from 0 to 51, but they are {gop} and {crf}."
        )
    rate = max(Fraction(fps).limit_denominator(_RATE_LIMIT), Fraction(1, _RATE_LIMIT))
    out = io.BytesIO()
    # Without bitexact the muxer writes its version; it never writes the time.
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = 1 / rate
        codec.thread_count = 1  # several would change the bytes with the number of cores
        codec.flags |= Flags.bitexact
        codec.gop_size, codec.max_b_frames = gop, 0
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        codec.options = {
            "crf": str(crf),
            "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:open-gop=0:"
            "cpu-independent=1",
        }
        num_frames = 0
        for num_frames, frame in enumerate(_yuv(frames), 1):
            if num_frames == 1:
                stream.width, stream.height = frame.width, frame.height
            frame.pts, frame.time_base = num_frames - 1, 1 / rate
            container.mux(stream.encode(frame))
        if num_frames:
            container.mux(stream.encode())
    if not num_frames:
        raise ValueError("a clip must hold at least one frame, but holds none.")
    return out.getvalue()


def _yuv(frames: Iterable[np.ndarray]) -> "Iterator[av.VideoFrame]":
    """The frames as the encoder takes them: of even size, BT.709, limited range."""
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
                "frames must be uint8 of one shape (height, width, 3), but one is "
                f"{frame.dtype} of {frame.shape} after {shape}."
            )
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
    """`decode.decode_frames` for an mp4: decodes each group that has a pick, up to its last one.

    The mp4 must be of the kind that `encode_h264` writes: H.264, yuv420p, no B-frames.
    """
    height, width = hw
    even = (height + height % 2, width + width % 2)
    # A frame may be picked several times, and is decoded once.
    places: dict[int, list[int]] = {}  # of each picked frame in the output
    for place, number in enumerate(picks.tolist()):
        places.setdefault(number, []).append(place)
    reformatter = VideoReformatter()
    out_THWC[:, height:] = 0
    out_THWC[:, :height, width:] = 0
    try:
        with av.open(
            io.BytesIO(member), format="mp4", metadata_errors="replace"
        ) as container:
            for number, frame in _decode(container, places, num_frames):
                if (frame.height, frame.width) != even:
                    raise ValueError(
                        f"frames must be {even[1]}x{even[0]}, but one is "
                        f"{frame.width}x{frame.height}"
                    )
                rgb = reformatter.reformat(
                    frame, format="rgb24", interpolation=_FROM_YUV, threads=1
                )
                picture = rgb.to_ndarray()[:height, :width]
                out_THWC[places.pop(number), :height, :width] = picture
    except av.FFmpegError as error:
        raise ValueError(
            f"must be a whole mp4, but this one breaks ({error.strerror or error})"
        ) from error
    if places:
        raise ValueError(
            f"must decode to its end, but {len(places)} of the picked frames do not"
        )


def _decode(
    container: "av.container.InputContainer", picks: Collection[int], num_frames: int
) -> "Iterator[tuple[int, av.VideoFrame]]":
    """(number, frame) of the picked frames, in order."""
    if len(container.streams) != 1 or not container.streams.video:
        raise ValueError("must hold one stream of video and no other, but does not")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None or codec.name != "h264" or codec.pix_fmt != "yuv420p":
        found = f"{codec.name} in {codec.pix_fmt}" if codec else "what is not known"
        raise ValueError(f"must hold H.264 in yuv420p, but holds {found}")
    # PyAV ends the packets with an empty one.
    packets = [packet for packet in container.demux(stream) if packet.size]
    if len(packets) != num_frames:
        raise ValueError(f"must hold {num_frames} frames, but holds {len(packets)}")
    # Without B-frames, frames are stored in the order in which they are shown, so the
    # number of a packet is that of its frame.
    times = [packet.pts for packet in packets]
    if None in times or times != sorted(set(times)) or not packets[0].is_keyframe:
        raise ValueError("must begin with a keyframe and hold no B-frames, but does not")
    codec.thread_count = 1  # a rank decodes as many clips at once as it has threads
    codec.options = {"err_detect": "explode"}
    numbers = {times[number]: number for number in picks}
    for packet in [*_needed(packets, picks), None]:
        for frame in codec.decode(packet):
            if frame.is_corrupt or frame.format.name != "yuv420p":
                raise ValueError("must decode without damage, but a frame is broken")
            if frame.pts in numbers:
                yield numbers.pop(frame.pts), frame


def _needed(packets: "list[av.Packet]", picks: Collection[int]) -> "list[av.Packet]":
    """The packets of each group from its keyframe to the last picked frame in it."""
    needed: list[av.Packet] = []
    group: list[av.Packet] = []  # since the keyframe, not yet needed
    for number, packet in enumerate(packets):
        if packet.is_keyframe:
            group = []
        group.append(packet)
        if number in picks:
            needed += group
            group = []
    return needed
