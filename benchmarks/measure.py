"""How every benchmark measures and reports: CPU time of all processes, sides interleaved,
a Markdown page.

CPU time and not the clock: it holds on a machine that others use as well. Ratios of one
run and not absolute figures: they hold on another machine as well.
"""

import os
import platform
import re
import resource
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "numpy",
    "simplejpeg",
    "opencv-python-headless",
    "pillow",
    "av",
    "webdataset",
)


@dataclass(frozen=True)
class Amount:
    """What one pass of a way of loading gave: real frames (no padding) and the clips they
    are of."""

    frames: int
    clips: int


@dataclass(frozen=True)
class Way:
    """One side of a comparison. `run` makes one pass over the clips and drops what it loaded."""

    label: str
    run: Callable[[], Amount]


@dataclass(frozen=True)
class Rates:
    """One way over the rounds, an entry each."""

    frames_per_cpu_s: list[float]
    cpu_ms_per_clip: list[float]


def cpu_seconds() -> float:
    """User and system time of this process, of those it has waited for, and of those
    still running."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile, and was waited for
    return total


def interleave(ways: dict[str, Way], *, rounds: int, seconds: float) -> dict[str, Rates]:
    """Run A B C A B C ...; with as many passes of each way as make `seconds` of CPU.

    A round that does not count goes first and tells how many.
    """
    passes = {}
    for key, way in ways.items():
        spent_s = _cpu_of(way)
        # again: the first time held what is done once, such as starting workers
        if spent_s < seconds:
            spent_s = _cpu_of(way)
        passes[key] = max(1, round(seconds / max(spent_s, 1e-3)))
    rates: dict[str, Rates] = {key: Rates([], []) for key in ways}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for key, way in ways.items():
            begin = cpu_seconds()
            amounts = [way.run() for _ in range(passes[key])]
            spent_s = max(cpu_seconds() - begin, 1e-9)
            rates[key].frames_per_cpu_s.append(sum(a.frames for a in amounts) / spent_s)
            rates[key].cpu_ms_per_clip.append(
                1000 * spent_s / sum(a.clips for a in amounts)
            )
    return rates


def _cpu_of(way: Way) -> float:
    begin = cpu_seconds()
    way.run()
    return cpu_seconds() - begin


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round down cancels."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Median, lowest and highest."""
    middle, low, high = (
        f"{v:,.{digits}f}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"{middle}{unit} ({low} to {high})"


@dataclass(frozen=True)
class Target:
    """What a figure should be. `values`: the figure in each round; its median is held
    against the target."""

    what: str
    target: float
    values: Sequence[float]
    at_least: bool = True
    digits: int = 2
    unit: str = ""

    HEADER = ("figure", "target", "measured", "")

    @property
    def met(self) -> bool:
        middle = statistics.median(self.values)
        return middle >= self.target if self.at_least else middle <= self.target

    def row(self) -> tuple[str, str, str, str]:
        sign = "at least" if self.at_least else "at most"
        return (
            self.what,
            f"{sign} {self.target:g}{self.unit}",
            spread(self.values, self.digits, self.unit),
            "met" if self.met else "missed",
        )


class Report:
    """A page in Markdown, headed by how it was made."""

    def __init__(
        self, script: str, title: str, versions: dict[str, str] | None = None
    ) -> None:
        self.name = Path(script).stem
        command = shlex.join(["python", "-m", f"benchmarks.{self.name}", *sys.argv[1:]])
        found = {"python": platform.python_version()} | {
            name: _version(name) for name in PACKAGES
        }
        found = {
            name: version for name, version in (found | (versions or {})).items() if version
        }
        self.parts = [
            f"# {title}\n",
            f"    {command}\n",
            f"{date.today().isoformat()}; {cpu_model()}, {num_cores()} cores; "
            + ", ".join(f"{name} {version}" for name, version in found.items())
            + ".\n",
        ]

    def text(self, *paragraphs: str) -> None:
        self.parts += [f"{paragraph}\n" for paragraph in paragraphs]

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        self.parts.append(
            "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
        )

    def targets(self, targets: Iterable[Target]) -> None:
        self.table(Target.HEADER, [target.row() for target in targets])

    def finish(self, out: Path | None, hardware: str | None) -> str:
        """Print the page, and write it to `out`/NAME_HARDWARE_YYYYMM.md."""
        page = "\n".join(self.parts)
        print(page)
        if out is not None:
            self.path(out, hardware, ".md").write_text(page, encoding="utf-8")
        return page

    def path(self, out: Path, hardware: str | None, suffix: str) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        model = re.sub(r"\(r\)|\(tm\)|cpu|processor|@.*", "", cpu_model().lower())
        slug = (
            hardware
            or re.sub(r"[^a-z0-9]+", "-", model).strip("-") + f"-{num_cores()}cores"
        )
        return out / f"{self.name}_{slug}_{date.today():%Y%m}{suffix}"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
