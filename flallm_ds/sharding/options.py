"""Define the options of a build that all corpora have."""

import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import SPLITS

# 128 clips take 100 to 350 MB: few files, but many shards to shuffle, to fetch and to
# distribute to workers.
CLIPS_PER_SHARD = 128
# GOP: reading one frame decodes at most 12 frames. CRF: the default of x264.
GOP, CRF = 12, 23
# These options do not change the shards: index.json does not store them, and a build may
# continue with other values.
_NOT_IN_THE_BYTES = ("workers", "restart", "part")
# The smallest and the largest value of each numeric option.
_BOUNDS: dict[str, tuple[float, float]] = {
    "short_side": (16, 4096),
    "quality": (1, 100),
    "fps": (0.1, 480),
    "gop": (1, 10**4),
    "crf": (0, 51),
    "clips_per_shard": (1, 10**6),
    "mb_per_shard": (0.1, 10**6),
    "limit": (1, 10**9),
    "max_skipped": (0, 10**9),
    "workers": (0, 4096),
}


@dataclass(frozen=True)
class Options:
    """
    --short_side: shorter side of a stored frame in pixels; smaller frames are not enlarged.
    --quality: JPEG quality of the frames, 1 to 100.
    --fps: frames per second, resampled by time; by default that of each video.
    --crop=x0,y0,x1,y1: part of every frame to keep, as fractions (0 to 1) of its width and height.
    --margin=top,right,bottom,left: pixels to cut off each source frame.
    --clip_format: mjpeg (each frame is a JPEG) or h264 (smaller, slower to read).
    --gop: with h264, frames per group of pictures; 12 by default.
    --crf: with h264, 0 (lossless) to 51 (smallest); 23 by default.
    --clips_per_shard: maximum, 128 by default; the shards of a split differ by at most one clip.
    --mb_per_shard: maximum size of a shard in megabytes, instead of --clips_per_shard.
    --splits: splits to build, from train, dev, test.
    --limit: read only the first N rows of each split, for a quick test.
    --max_skipped: maximum number of rows to skip because they lack a video, a text or decodable
        frames. They are counted and listed. With one more, the build stops.
    --workers: number of processes; 0 for one per core.
    --restart=true: delete the results of an unfinished build of the same --out.
    --part=I/N: build one of N parts, each on a machine of its own; the last one that finishes
        merges them to the shards of a single build.
    """

    short_side: int = 256
    quality: int = 90
    fps: float | None = None
    crop: tuple[float, ...] | None = None
    margin: tuple[int, ...] | None = None
    clip_format: Literal["mjpeg", "h264"] = "mjpeg"
    gop: int | None = None
    crf: int | None = None
    clips_per_shard: int | None = None
    mb_per_shard: float | None = None
    splits: tuple[str, ...] = SPLITS
    limit: int | None = None
    max_skipped: int = 0
    workers: int = 0
    restart: bool = False
    part: str = ""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} must be from {low:,} to {high:,}, got {value}.")
        # At least one split, each of the three at most once.
        splits = set(self.splits)
        if not splits or splits - set(SPLITS) or len(splits) < len(self.splits):
            raise UserError(
                f"--splits must name one or more of {', '.join(SPLITS)}, each once, got "
                f"{','.join(self.splits)!r}."
            )
        self._check_picture()
        self._fill_in()
        self.part_of()

    def part_of(self) -> tuple[int, int] | None:
        """Return the number of the part, from 1, and the number of parts; None for all.

        Raises UserError for any other --part.
        """
        if not self.part:
            return None
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.part)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise UserError(
                f"--part must be I/N with I from 1 to N, such as 2/8, got {self.part!r}."
            )
        return number, count

    def _check_picture(self) -> None:
        """Raise UserError unless the crop and the margin are possible."""
        if self.crop is not None:
            # A crop without four values becomes an empty box, which is refused below.
            x0, y0, x1, y1 = self.crop if len(self.crop) == 4 else (0.0, 0.0, 0.0, 0.0)
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                given = ",".join(f"{part:g}" for part in self.crop)
                raise UserError(
                    "--crop must be x0,y0,x1,y1 from 0 to 1, left before right and top "
                    f"before bottom, got {given}."
                )
        if self.margin is not None and (len(self.margin) != 4 or min(self.margin) < 0):
            raise UserError(
                "--margin must be top,right,bottom,left in pixels, 0 or more, got "
                f"{','.join(map(str, self.margin))}."
            )

    def _fill_in(self) -> None:
        """Set the defaults that depend on other options.

        Raises UserError for options that exclude each other.
        """
        if self.clip_format not in ("mjpeg", "h264"):
            raise UserError(
                f"--clip_format must be mjpeg or h264, got {self.clip_format!r}."
            )
        # The dataclass is frozen, so the defaults are set through `object`.
        if self.clip_format == "h264":
            object.__setattr__(self, "gop", GOP if self.gop is None else self.gop)
            object.__setattr__(self, "crf", CRF if self.crf is None else self.crf)
        elif self.gop is not None or self.crf is not None:
            raise UserError(
                "--gop and --crf must be used with --clip_format=h264, got mjpeg. Leave them "
                "out."
            )
        # A shard has one limit: a number of clips or a number of megabytes.
        if self.mb_per_shard is None:
            count = (
                CLIPS_PER_SHARD if self.clips_per_shard is None else self.clips_per_shard
            )
            object.__setattr__(self, "clips_per_shard", count)
        elif self.clips_per_shard is not None:
            raise UserError(
                "Only one of --clips_per_shard and --mb_per_shard must be given, got both. "
                "Leave one out."
            )

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Self:
        """Create the options from `given`, and remove the entries that were used from it.

        The remaining entries are options of the importer.
        """
        common = {}
        for option in fields(cls):
            if option.name in given:
                common[option.name] = given.pop(option.name)
        return cls(**common)

    def recorded(self) -> dict[str, Any]:
        """Return the options that change the shards, which index.json stores."""
        options = asdict(self)
        for name in _NOT_IN_THE_BYTES:
            del options[name]
        return options
