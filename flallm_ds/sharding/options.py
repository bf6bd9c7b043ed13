"""What a user may ask of any corpus's build."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from flallm_ds.errors import UserError
from flallm_ds.sharding.corpora import SPLITS

# 128 clips are 100 to 350 MB: few files, yet many shards to shuffle, fetch and give to
# workers.
CLIPS_PER_SHARD = 128
# Two groups a second at 25 frames a second: to read one frame decodes 12 at most. CRF 23
# is the default of x264.
GOP, CRF = 12, 23
# These change how a build runs, but no byte of a shard: index.json does not name them, and
# a build may continue with others.
_NOT_IN_THE_BYTES = ("workers", "restart")
# Smallest and largest value of each number.
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
    --short_side: pixels of a stored frame's shorter side; smaller frames are not enlarged.
    --quality: of the JPEG frames, 1 to 100.
    --fps: frames a second, taken by time; without it each video's own.
    --crop=x0,y0,x1,y1: the part of every picture to keep, each 0 to 1 of its width or height.
    --margin=top,right,bottom,left: pixels of the source's picture to cut off.
    --clip_format: mjpeg (each frame a JPEG) or h264 (smaller, slower to read; --gop frames a group,
        12, and --crf, 0 to 51, 23: higher is smaller).
    --clips_per_shard: at most, 128; shards of a split differ by one clip.
    --mb_per_shard: at most so many megabytes instead.
    --splits: which to build, of train, dev, test.
    --limit: the first N rows of each split only, to try things out.
    --max_skipped: how many rows may lack a video, a text, or decodable frames. They are left out,
        counted and listed; one more ends the build. 0 by default, so nothing goes missing unsaid.
    --workers: processes, 0 for one a core.
    --restart=true: throws away what an unfinished build of the same --out has made.
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

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(
                    f"--{name} must be from {low:,} to {high:,}, but is {value}."
                )
        # At least one split, each of the three at most once.
        splits = set(self.splits)
        if not splits or splits - set(SPLITS) or len(splits) < len(self.splits):
            raise UserError(
                f"--splits must name some of {', '.join(SPLITS)}, but is "
                f"{','.join(self.splits)!r}."
            )
        self._check_picture()
        self._fill_in()

    def _check_picture(self) -> None:
        """Raise UserError for a crop or a margin that cannot be."""
        if self.crop is not None:
            # Any other number of values becomes an empty box, which is refused below.
            x0, y0, x1, y1 = self.crop if len(self.crop) == 4 else (0.0, 0.0, 0.0, 0.0)
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                given = ",".join(f"{part:g}" for part in self.crop)
                raise UserError(
                    "--crop must be x0,y0,x1,y1 from 0 to 1, left before right and top "
                    f"before bottom, but is {given}."
                )
        if self.margin is not None and (len(self.margin) != 4 or min(self.margin) < 0):
            raise UserError(
                "--margin must be top,right,bottom,left in pixels from 0 up, but is "
                f"{','.join(map(str, self.margin))}."
            )

    def _fill_in(self) -> None:
        """Set the defaults that depend on other options.

        Raises UserError for options that do not go together.
        """
        if self.clip_format not in ("mjpeg", "h264"):
            raise UserError(
                f"--clip_format must be mjpeg or h264, but is {self.clip_format!r}."
            )
        # The dataclass is frozen, so the defaults are set through `object`.
        if self.clip_format == "h264":
            object.__setattr__(self, "gop", GOP if self.gop is None else self.gop)
            object.__setattr__(self, "crf", CRF if self.crf is None else self.crf)
        elif self.gop is not None or self.crf is not None:
            wanted = "--gop and --crf must go with --clip_format=h264"
            raise UserError(f"{wanted}, but that is mjpeg. Leave them out.")
        # A shard has one limit: a number of clips or a number of megabytes.
        if self.mb_per_shard is None:
            count = (
                CLIPS_PER_SHARD if self.clips_per_shard is None else self.clips_per_shard
            )
            object.__setattr__(self, "clips_per_shard", count)
        elif self.clips_per_shard is not None:
            wanted = "one of --clips_per_shard and --mb_per_shard must be given"
            raise UserError(f"{wanted}, but both are. Leave one out.")

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Self:
        """Create the options from `given`, and remove from it every entry that was used.

        What remains are the options of one importer.
        """
        common = {}
        for option in fields(cls):
            if option.name in given:
                common[option.name] = given.pop(option.name)
        return cls(**common)

    def recorded(self) -> dict[str, Any]:
        """Return the options that index.json names: those that decide what is built."""
        options = asdict(self)
        for name in _NOT_IN_THE_BYTES:
            del options[name]
        return options
