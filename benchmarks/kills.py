"""Kill a run again and again, and compare its losses with those of an undisturbed run.

python -m benchmarks.kills --kills=20

Two gloo ranks under the `deepspeed` launcher train both stages on a small signsim corpus, in
fp32 and with dropout, with a checkpoint after every step. Half of the kills wait for a
checkpoint that is being written. After each kill the same command is started again. Losses,
gradient norms, learning rates, dev scores and hypotheses must be equal bit for bit.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loss_compare import COMPARED, OPTIONS, STAGES, environment_of, make_corpus
from benchmarks.measure import ROOT
from flallm_ds.command import main
from flallm_ds.dist import free_port
from flallm_ds.errors import UserError, require

RANKS = 2
VICTIMS = ("one rank", "all ranks", "launcher", "node agent")
MOMENTS = ("start", "step", "write", "write")
# Of a start, on a machine that does other work as well.
DEADLINE_S = 1800.0
MAX_RUNS = 12  # of a stage
# The longest random delay after a moment: the imports and the models, a step, a write.
DELAYS_S = {"start": 12.0, "step": 1.0, "write": 0.1}
MORE = {
    "data.keep_every": "8",
    "data.frame_size": "32",
    "data.crop_size": "28",
    "data.batch_clips": "6",
    "data.micro_batches": "2",
    "train.epochs": "8",
    "train.save_every_steps": "1",
    "eval.every_epochs": "4",
    "train.log_every_s": "0.001",
}
RESUMED = re.compile(r"resumed at epoch \d+, step \d+ from .*/step-(\d+)")


@dataclass(frozen=True)
class Plan:
    """When and what to kill. steps: of this start, before the moment."""

    victim: str
    moment: str
    steps: int
    delay_s: float


@dataclass
class Kill:
    """A row of the table. step: the last step before the kill. resumed: from which step."""

    stage: str
    victim: str
    moment: str
    step: int
    write: str
    resumed: str = ""
    same: bool = False

    def row(self) -> str:
        same = "yes" if self.same else "**no**"
        cells = self.stage, self.victim, self.moment, str(self.step), self.write
        return f"| {' | '.join(cells)} | {self.resumed} | {same} |"


def kills(*, kills: int = 20, seed: int = 0, work: Path | None = None) -> None:
    """Print a table of kills. Exit with code 2 if a number differs or a process stays.

    Options:
        kills: their number over both stages
        seed: of the victims and moments
        work: folder that keeps the corpus and the runs; default: a temporary folder
    """
    require(kills >= 2, f"--kills must be at least 2, got {kills}.")
    begin = time.monotonic()
    draw = random.Random(seed)
    plans = plans_of(kills, draw)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).resolve()
        make_corpus(folder)
        print(
            "| stage | killed | moment | step | write in progress | resumed from | same |"
        )
        print("|---|---|---|--:|---|--:|---|", flush=True)
        rows: list[Kill] = []
        for number, stage in enumerate(STAGES):
            undisturbed = Run(folder, stage, "undisturbed")
            undisturbed.train_to_the_end()
            of_stage = plans[number :: len(STAGES)]
            rows += disturb(folder, stage, of_stage, records(undisturbed))
    print("\n| stage | killed | moment | step | write in progress | resumed from | same |")
    print("|---|---|---|--:|---|--:|---|")
    for row in rows:
        print(row.row())
    print(
        f"\n{len(rows)} kills, {(time.monotonic() - begin) / 60:.1f} minutes, seed {seed}"
    )
    if not all(row.same for row in rows):
        raise UserError("Cannot resume to the same numbers: see the last column.")


def plans_of(kills: int, draw: random.Random) -> list[Plan]:
    """Return a plan for each kill: every victim equally often, in random order."""
    victims, moments = [], []
    for number in range(kills):
        victims.append(VICTIMS[number % len(VICTIMS)])
        moments.append(MOMENTS[number % len(MOMENTS)])
    draw.shuffle(victims)
    draw.shuffle(moments)
    plans = []
    for victim, moment in zip(victims, moments, strict=True):
        delay_s = draw.uniform(0, DELAYS_S[moment])
        plans.append(Plan(victim, moment, draw.randrange(1, 4), delay_s))
    return plans


class Run:
    """A run of a stage: its folder and its command."""

    def __init__(self, folder: Path, stage: str, name: str) -> None:
        self.stage = stage
        self.folder = folder / f"{name}_{stage}"
        self.options = OPTIONS | MORE
        self.options["run"] = str(self.folder)
        self.options["data.shards"] = str(folder / "shards")
        self.options["llm.name"] = str(folder / "llm")
        if stage == "llm":
            self.options["visual_run"] = str(folder / "undisturbed_visual")
        self.starts = 0

    def start(self) -> "Start":
        self.starts += 1
        return Start(self, self.folder.with_name(f"{self.folder.name}.{self.starts}.log"))

    def train_to_the_end(self) -> "Start":
        """Start the run and wait for its end. Raises UserError if it fails."""
        with self.start() as start:
            if start.launcher.wait(DEADLINE_S):
                raise start.failed("must end with code 0")
        return start


class Start:
    """One start of a run under the launcher: `with run.start() as start`."""

    def __init__(self, run: Run, log: Path) -> None:
        self.run, self.log = run, log
        command = [
            str(Path(sys.executable).parent / "deepspeed"),
            f"--num_gpus={RANKS}",
            f"--master_port={free_port()}",
            "launch/train.py",
            f"--stage={run.stage}",
        ]
        command += [f"--{name}={value}" for name, value in run.options.items()]
        with log.open("wb") as file:
            self.launcher = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment_of(ROOT),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.ranks: list[psutil.Process] = []

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *error: object) -> None:
        """End what is left of the start, after an error."""
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def resumed(self) -> int:
        """Return the step of the checkpoint that this start resumed from, or 0."""
        found = RESUMED.search(self.output())
        return int(found[1]) if found else 0

    def has_made_a_step(self) -> bool:
        return f"\n{self.run.stage}  epoch " in self.output()

    def failed(self, what: str) -> UserError:
        return UserError(f"The run {self.run.folder} {what}.\n{self.output()[-3000:]}")

    def wait_until(self, reached: Callable[[], bool], every_s: float = 0.01) -> bool:
        """Return whether this was reached before the run ended. Raises UserError."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if reached():
                return True
            if self.launcher.poll() is not None:
                if self.launcher.returncode:
                    raise self.failed("must not end before it is killed")
                return False
            time.sleep(every_s)
        raise self.failed(f"must make progress within {DEADLINE_S:.0f} s")

    def wait_for(self, plan: Plan) -> bool:
        """Wait for the moment of a plan. Return False if the run ended before."""
        if not self.wait_until(self._find_ranks):
            return False
        if plan.moment != "start":
            # Metrics behind the checkpoint are cut off before the first step.
            if not self.wait_until(self.has_made_a_step):
                return False
            target = self.resumed() + plan.steps
            if not self.wait_until(lambda: steps_of(self.run) >= target):
                return False
        if plan.moment == "write":
            before = partials(self.run)
            if not self.wait_until(lambda: bool(partials(self.run) - before), 0.001):
                return False
        time.sleep(plan.delay_s)
        return self.launcher.poll() is None

    def _find_ranks(self) -> bool:
        ranks: dict[str, psutil.Process] = {}
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.launcher.pid).children(recursive=True):
                for argument in process.cmdline():
                    if argument.startswith("--local_rank="):
                        ranks[argument] = process
        self.ranks = [ranks[name] for name in sorted(ranks)]
        return len(ranks) == RANKS

    def kill(self, plan: Plan) -> Kill:
        """Kill, and wait until no process of this start is left. Raises UserError."""
        agent = self.ranks[0].parent()
        assert agent is not None, "its parent is running"
        launcher = psutil.Process(self.launcher.pid)
        victims = {
            "one rank": [self.ranks[plan.steps % RANKS]],
            "all ranks": self.ranks,
            "launcher": [launcher],
            "node agent": [agent],
        }
        for process in victims[plan.victim]:
            process.kill()
        # Before the first step, a partial checkpoint is that of the start before.
        step, write = steps_of(self.run), "no"
        if plan.moment != "start":
            write = state_of_write(self.run)
        self.launcher.wait(DEADLINE_S)
        _, alive = psutil.wait_procs([agent, *self.ranks], timeout=DEADLINE_S)
        if alive:
            raise self.failed(f"must end after the kill of {plan.victim}")
        return Kill(self.run.stage, plan.victim, plan.moment, step, write)


def disturb(folder: Path, stage: str, plans: list[Plan], expected: list[Any]) -> list[Kill]:
    """Kill runs as planned, and start each again after a kill until it ends."""
    rows: list[Kill] = []
    number = 0
    # A run may end before a moment is reached; another run then continues the plans.
    while plans:
        number += 1
        require(
            number <= MAX_RUNS,
            f"Runs of stage {stage} must last until they are killed, got {MAX_RUNS} that "
            "ended before. Use a machine that does nothing else.",
        )
        rows += disturb_run(Run(folder, stage, f"killed_{number}"), plans, expected)
    return rows


def disturb_run(run: Run, plans: list[Plan], expected: list[Any]) -> list[Kill]:
    """Carry out plans, which are removed from the list, until the run ends."""
    rows: list[Kill] = []
    while plans:
        with run.start() as start:
            row = start.kill(plans[0]) if start.wait_for(plans[0]) else None
        conclude(rows, start, expected)
        if row is None:
            break  # the run has ended
        rows.append(row)
        plans.pop(0)
    else:
        conclude(rows, run.train_to_the_end(), expected)
    if rows:
        rows[-1].same = rows[-1].same and records(run) == expected
    return rows


def conclude(rows: list[Kill], start: Start, expected: list[Any]) -> None:
    """Complete and print the row of the last kill by what the start after it did."""
    if rows:
        rows[-1].resumed = str(start.resumed() or "the beginning")
        if not start.has_made_a_step():
            rows[-1].resumed = "(killed again before)"
        found = records(start.run)
        rows[-1].same = found == expected[: len(found)]
        print(rows[-1].row(), flush=True)


def records(run: Run) -> list[Any]:
    """Return the compared numbers of each complete line of metrics, and the hypotheses."""
    found: list[Any] = []
    for line in lines_of(run.folder / "metrics.jsonl"):
        found.append([line[name] for name in ("global_step", *COMPARED[line["kind"]])])
        if line["kind"] == "dev":
            step = line["global_step"]
            texts = lines_of(run.folder / "hypotheses.jsonl")
            found.append([text for text in texts if text["global_step"] == step])
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file of JSON objects, which may not exist."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def steps_of(run: Run) -> int:
    """Return the last step in the metrics of a run."""
    lines = lines_of(run.folder / "metrics.jsonl")
    return int(lines[-1]["global_step"]) if lines else 0


def partials(run: Run) -> set[str]:
    """Return the names of the checkpoints that are not committed."""
    return {path.name for path in (run.folder / "checkpoints").glob(".partial-step-*")}


def state_of_write(run: Run) -> str:
    """Describe the checkpoint that is being written."""
    checkpoints = run.folder / "checkpoints"
    names = partials(run)
    if not names:
        return "no"
    committed = sorted(checkpoints.glob("step-*"))
    num_complete = 0
    for path in (checkpoints / max(names)).glob("rank-*"):
        # The files of all checkpoints of a run have the same size, to a few bytes.
        sizes = [(folder / path.name).stat().st_size for folder in committed[-1:]]
        num_complete += not sizes or path.stat().st_size > 0.99 * sizes[0]
    if num_complete == RANKS:
        return "written, not committed"
    return f"yes, {num_complete} of {RANKS} files complete"


if __name__ == "__main__":
    main(kills)
