"""Compare formats of stored clips: our Motion-JPEG AVI, a plain pack, FFmpeg and H.264.

python -m benchmarks.clip_format --out=benchmarks/results [--videos=FOLDER]
"""

import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import simplejpeg

from benchmarks import material
from benchmarks.measure import (
    ROOT,
    Amount,
    Rates,
    Report,
    Target,
    Way,
    interleave,
    ratios,
    spread,
)
from flallm_ds import command
from flallm_ds.data.codecs import h264
from flallm_ds.data.codecs.avi import pack_frames
from flallm_ds.data.codecs.decode import FAST, decode_frames, jpegs_of
from flallm_ds.data.codecs.sizes import fit_short_side
from flallm_ds.errors import UserError

REAL_VIDEOS = ROOT.parent / "shared" / "data" / "how2sign"
FPS = 25
COLUMNS = (
    "format",
    "kB a clip",
    "bytes / pack",
    "mean error",
    "write, us a frame",
    "find 1 in 4, us a clip",
    "find and decode all, us a frame",
    "find and decode 1 in 4, us a kept frame",
    "1 in 4: this / pack",
)


@dataclass(frozen=True)
class Clip:
    """A clip as pixels and as JPEGs."""

    frames_THWC: np.ndarray
    jpegs: list[bytes]

    @property
    def hw(self) -> tuple[int, int]:
        return self.frames_THWC.shape[1], self.frames_THWC.shape[2]


@dataclass(frozen=True)
class Format:
    """A format for a clip.

    find: returns the picked frames without decoding; None if the format cannot.
    """

    label: str
    write: Callable[[Clip], bytes]
    find: Callable[[bytes, np.ndarray], Sequence[object]] | None
    decode: Callable[[bytes, np.ndarray, np.ndarray], None]  # member, picks, out_THWC


def decode_jpegs(jpegs: Sequence[object], out_THWC: np.ndarray) -> None:
    for canvas, jpeg in zip(out_THWC, jpegs, strict=True):
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=canvas, **FAST)


def write_pack(clip: Clip) -> bytes:
    """Write the number of frames, the end of each, and the JPEGs, without checks."""
    ends = np.cumsum([len(jpeg) for jpeg in clip.jpegs], dtype="<u4")
    return b"".join([struct.pack("<I", len(clip.jpegs)), ends.tobytes(), *clip.jpegs])


def find_in_pack(member: bytes, picks: np.ndarray) -> list[memoryview]:
    (num_frames,) = struct.unpack_from("<I", member)
    begin = 4 + 4 * num_frames
    bounds = np.zeros(num_frames + 1, np.int64)
    bounds[1:] = np.frombuffer(member, "<u4", num_frames, 4)
    bounds += begin
    view = memoryview(member)
    return [
        view[a:b]
        for a, b in zip(bounds[picks].tolist(), bounds[picks + 1].tolist(), strict=True)
    ]


def ffmpeg_writer(container: str) -> Callable[[Clip], bytes]:
    """Return a function that muxes the JPEGs with FFmpeg, without encoding them again."""

    def write(clip: Clip) -> bytes:
        out = io.BytesIO()
        with av.open(out, "w", format=container) as file:
            stream = file.add_stream("mjpeg", rate=FPS)
            (stream.height, stream.width), stream.pix_fmt = clip.hw, "yuvj420p"
            for number, jpeg in enumerate(clip.jpegs):
                packet = av.Packet(jpeg)
                packet.stream, packet.time_base = stream, Fraction(1, FPS)
                packet.pts = packet.dts = number
                packet.is_keyframe = True
                file.mux(packet)
        return out.getvalue()

    return write


def find_by_ffmpeg(member: bytes, picks: np.ndarray) -> list[av.Packet]:
    wanted = set(picks.tolist())
    with av.open(io.BytesIO(member)) as file:
        packets = (packet for packet in file.demux(video=0) if packet.size)
        return [packet for number, packet in enumerate(packets) if number in wanted]


def decode_by_ffmpeg(member: bytes, picks: np.ndarray, out_THWC: np.ndarray) -> None:
    """Decode only the picked frames with the JPEG decoder of FFmpeg."""
    wanted = set(picks.tolist())
    with av.open(io.BytesIO(member)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = (packet for packet in file.demux(stream) if packet.size)
        kept = (packet for number, packet in enumerate(packets) if number in wanted)
        frames = (frame for packet in kept for frame in packet.decode())
        for canvas, frame in zip(out_THWC, frames, strict=True):
            canvas[:] = frame.to_ndarray(format="rgb24")


def formats(num_frames: int, gop: int, crf: int) -> dict[str, Format]:
    def by_simplejpeg(
        find: Callable[[bytes, np.ndarray], Sequence[object]],
    ) -> Callable[..., None]:
        return lambda member, picks, out: decode_jpegs(find(member, picks), out)

    def ours(member: bytes, picks: np.ndarray, out: np.ndarray) -> None:
        decode_frames(member, picks, num_frames, out, (out.shape[1], out.shape[2]))

    mov, avi = ffmpeg_writer("mov"), ffmpeg_writer("avi")
    pack, packets = by_simplejpeg(find_in_pack), by_simplejpeg(find_by_ffmpeg)
    return {
        "pack": Format("plain pack: JPEGs and their ends", write_pack, find_in_pack, pack),
        "avi": Format(
            "our Motion-JPEG AVI",
            lambda clip: pack_frames(clip.jpegs, FPS, clip.hw[1], clip.hw[0]),
            lambda member, picks: jpegs_of(member, picks, num_frames),
            ours,
        ),
        "ffmpeg avi": Format("AVI by FFmpeg, simplejpeg", avi, find_by_ffmpeg, packets),
        "ffmpeg mov": Format("MOV by FFmpeg, simplejpeg", mov, find_by_ffmpeg, packets),
        "ffmpeg all": Format("MOV by FFmpeg, its own decoder", mov, None, decode_by_ffmpeg),
        "h264": Format(
            f"our H.264 mp4, groups of {gop}, crf {crf}",
            lambda clip: h264.encode_h264(clip.frames_THWC, FPS, gop, crf),
            None,
            ours,
        ),
    }


def make_clips(
    videos: Path | None, num: int, num_frames: int, short_side: int, quality: int
) -> Iterator[Clip]:
    """Yield clips of consecutive frames, all of the same size."""
    stream = material.frames(videos)
    shape: tuple[int, ...] = ()
    for _ in range(num):
        frames = [fit_short_side(frame, short_side) for frame in islice(stream, num_frames)]
        shape = shape or frames[0].shape
        if any(frame.shape != shape for frame in frames):
            raise UserError(
                f"--videos must be a folder with videos of one size, got {videos} with several. "
                "Give another folder."
            )
        yield Clip(
            np.stack(frames), [simplejpeg.encode_jpeg(f, quality=quality) for f in frames]
        )


class Bench:
    """Let each format write, find and decode the same clips."""

    def __init__(self, clips: list[Clip], kinds: dict[str, Format]) -> None:
        self.clips, self.kinds = clips, kinds
        self.members = {
            name: [kind.write(clip) for clip in clips] for name, kind in kinds.items()
        }
        self.picks = {
            "all": np.arange(self.num_frames),
            "4": np.arange(0, self.num_frames, 4),
        }
        self._out = np.zeros_like(clips[0].frames_THWC)

    @property
    def num_frames(self) -> int:
        return len(self.clips[0].jpegs)

    def ways(self) -> dict[str, Way]:
        ways = {}
        for name, kind in self.kinds.items():
            ways[f"write {name}"] = Way(kind.label, lambda kind=kind: self._write(kind))
            if kind.find is not None:
                ways[f"find {name}"] = Way(kind.label, lambda name=name: self._find(name))
            for kept in self.picks:
                ways[f"{kept} {name}"] = Way(
                    kind.label,
                    lambda name=name, kept=kept: self._decode(name, self.picks[kept]),
                )
        return ways

    def kilobytes(self, name: str) -> float:
        return sum(map(len, self.members[name])) / len(self.clips) / 1000

    def mean_error(self, name: str) -> float:
        """Return the mean difference of decoded values (0 to 255) from the stored frame."""
        errors = []
        for clip, member in zip(self.clips, self.members[name], strict=True):
            self.kinds[name].decode(member, self.picks["all"], self._out)
            errors.append(np.abs(self._out.astype(np.int16) - clip.frames_THWC).mean())
        return float(np.mean(errors))

    def _write(self, kind: Format) -> Amount:
        for clip in self.clips:
            kind.write(clip)
        return Amount(self.num_frames * len(self.clips), len(self.clips))

    def _find(self, name: str) -> Amount:
        find = self.kinds[name].find
        assert find is not None
        for member in self.members[name]:
            find(member, self.picks["4"])
        return Amount(len(self.picks["4"]) * len(self.clips), len(self.clips))

    def _decode(self, name: str, picks: np.ndarray) -> Amount:
        out = self._out[: len(picks)]
        for member in self.members[name]:
            self.kinds[name].decode(member, picks, out)
        return Amount(len(picks) * len(self.clips), len(self.clips))


def us_per_frame(rates: Rates) -> list[float]:
    return [1e6 / rate for rate in rates.frames_per_cpu_s]


def row(bench: Bench, rates: dict[str, Rates], name: str) -> tuple[str, ...]:
    found = rates.get(f"find {name}")
    fourth = us_per_frame(rates[f"4 {name}"])
    return (
        bench.kinds[name].label,
        f"{bench.kilobytes(name):,.0f}",
        f"{bench.kilobytes(name) / bench.kilobytes('pack'):.3f}",
        f"{bench.mean_error(name):.2f}",
        spread(us_per_frame(rates[f"write {name}"]), 1),
        spread([1000 * ms for ms in found.cpu_ms_per_clip]) if found else "",
        spread(us_per_frame(rates[f"all {name}"])),
        spread(fourth),
        spread(ratios(fourth, us_per_frame(rates["4 pack"])), 2),
    )


def targets(bench: Bench, rates: dict[str, Rates]) -> list[Target]:
    """Return the targets: our AVI may cost 10 % more, as players can open it."""

    def times(what: str) -> list[float]:
        return ratios(
            us_per_frame(rates[f"{what} avi"]), us_per_frame(rates[f"{what} pack"])
        )

    size = bench.kilobytes("avi") / bench.kilobytes("pack")
    return [
        Target("bytes, our AVI / plain pack", 1.1, [size], at_least=False, digits=3),
        Target(
            "find and decode all, our AVI / plain pack",
            1.1,
            times("all"),
            at_least=False,
            digits=3,
        ),
        Target(
            "find and decode 1 in 4, our AVI / plain pack",
            1.1,
            times("4"),
            at_least=False,
            digits=3,
        ),
    ]


def run(
    *,
    out: Path | None = None,
    hardware: str | None = None,
    videos: Path | None = None,
    clips: int = 4,
    frames: int = 116,
    short_side: int = 256,
    quality: int = 90,
    gop: int = 12,
    crf: int = 23,
    rounds: int = 5,
    seconds: float = 1.0,
) -> str:
    """Store the same clips in several formats and report size and CPU time.

    --out: folder for the report. --hardware: name of the machine in the file name.
    --videos: folder with real videos of one size; default: the How2Sign samples if available, else
    synthetic videos.
    --rounds: number of rounds. Each runs every part once for --seconds of CPU time.
    """
    if min(clips, frames, rounds) < 1:
        raise UserError(
            f"--clips, --frames and --rounds must be at least 1, got {clips}, {frames} and "
            f"{rounds}."
        )
    videos = videos or (REAL_VIDEOS if REAL_VIDEOS.is_dir() else None)
    report = Report(__file__, "Storing a clip")
    bench = Bench(
        list(make_clips(videos, clips, frames, short_side, quality)),
        formats(frames, gop, crf),
    )
    rates = interleave(bench.ways(), rounds=rounds, seconds=seconds)
    height, width = bench.clips[0].hw
    report.text(
        f"{clips} clips of {frames} frames of {width}x{height}, "
        f"{'real' if videos else 'synthetic'}; JPEG quality {quality}. CPU time of one "
        f"thread: median over {rounds} interleaved rounds, lowest and highest. All "
        "formats with JPEGs contain the same JPEGs. The time to write them does not include "
        "their encoding, that of H.264 does. `mean error` is of decoded values from 0 to 255. "
        "All decode to RGB in memory that is allocated before.",
    )
    report.table(COLUMNS, [row(bench, rates, name) for name in bench.kinds])
    report.text("## Targets")
    report.targets(targets(bench, rates))
    return report.finish(out, hardware)


if __name__ == "__main__":
    command.main(run)
