"""Measure CPU time of interleaved ways and write a Markdown report, for all benchmarks.

CPU time is used instead of wall-clock time, because it does not depend on other users of the
machine. Ratios within one run are used, because they are comparable between machines.
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
    """Result of one pass: numbers of real frames, without padding, and of clips."""

    frames: int
    clips: int


@dataclass(frozen=True)
class Way:
    """One side of a comparison. run: makes one pass over the clips and drops the data."""

    label: str
    run: Callable[[], Amount]


@dataclass(frozen=True)
class Rates:
    """Rates of one way, one value for each round."""

    frames_per_cpu_s: list[float]
    cpu_ms_per_clip: list[float]


def cpu_seconds() -> float:
    """Return user and system time of this process and of its children, also ended ones."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue  # ended meanwhile, so RUSAGE_CHILDREN contains it
    return total


def interleave(ways: dict[str, Way], *, rounds: int, seconds: float) -> dict[str, Rates]:
    """Run A B C A B C ..., each way with as many passes as take `seconds` of CPU time.

    A warm-up round determines the number of passes.
    """
    passes = {}
    for key, way in ways.items():
        spent_s = _cpu_of(way)
        # Again, because the first pass includes work done once, such as starting workers.
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
    """Divide round by round, so that a slow round affects both sides."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], digits: int = 0, unit: str = "") -> str:
    """Format the median, the lowest and the highest value."""
    middle, low, high = (
        f"{v:,.{digits}f}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"{middle}{unit} ({low} to {high})"


@dataclass(frozen=True)
class Target:
    """A target for a figure. values: one for each round; their median is compared."""

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
    """A Markdown page that starts with its command, date, machine and versions."""

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
