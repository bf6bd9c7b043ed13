"""Runs of the real trainer under the real launcher, for tests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flallm_ds.dist import free_port
from tests.helpers.paths import RANKS, ROOT

BIN = Path(sys.executable).parent
# Options of a run of stage llm in which nothing changes: no weight, and no BatchNorm
# statistic, because the encoder is frozen.
CONSTANT: dict[str, object] = {
    "visual_run": "none",
    "llm.input": "frames",
    "optim.lr": 0,
    "optim.llm_lr": 0,
    "train.epochs": 4,
    "eval.every_epochs": 1,
}


def command(script: str | Path, *arguments: str, ranks: int = 2) -> list[str]:
    """`deepspeed SCRIPT …` with that many ranks, or plain `python SCRIPT …` for one."""
    if ranks == 1:
        return [sys.executable, str(script), *arguments]
    launcher = [
        str(BIN / "deepspeed"),
        f"--num_gpus={ranks}",
        f"--master_port={free_port()}",
    ]
    return [*launcher, str(script), *arguments]


def environment() -> dict[str, str]:
    """One thread a rank, and the checkout's own packages and commands first."""
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    return os.environ | own


def launch(
    script: str | Path, *arguments: str, ranks: int = 2, timeout_s: int = 1000
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the output is kept whole for a failing test's message."""
    return subprocess.run(
        command(script, *arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        check=False,
    )


def kill_session(leader: int) -> None:
    """kill -9 for every process of a session, also in process groups of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(process.name)) == leader:
                os.kill(int(process.name), signal.SIGKILL)


def tiny_options(corpus: Path, stage: str, run: Path, **more: object) -> dict[str, str]:
    """Options of a run of 2 epochs of 5 steps, 4 micro-batches each; dropout is on."""
    options: dict[str, object] = {
        "run": run,
        "data.shards": corpus / "shards",
        "data.keep_every": 2,
        "data.frame_size": 32,
        "data.crop_size": 28,
        # numbers that the quickstart's recipe may come to choose otherwise
        "data.augment": True,
        "optim.lr": 1e-3,
        "data.batch_clips": 8,
        "data.micro_batches": 4,
        "visual.weights": "none",
        "visual.freeze_batch_norm": False,
        "visual.frozen_stages": 0,
        "light_t.dropout": 0.1,
        "llm.dropout": 0.3,
        "optim.backbone_lr": None,
        "visual.width": 8,
        "llm.name": corpus / "llm",
        "train.epochs": 2,
        "eval.every_epochs": 2,
        "eval.num_beams": 2,
        "eval.max_new_tokens": 8,
    }
    if stage == "llm":
        options["visual_run"] = run.parent / "visual"
    return {name: str(value) for name, value in (options | more).items()}


def flags(stage: str, options: dict[str, str]) -> list[str]:
    return [f"--stage={stage}", *(f"--{name}={value}" for name, value in options.items())]


def losses(run: Path) -> list[float]:
    """The training loss of each step, in order; fails if a step is there twice or missing."""
    lines = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [s["global_step"] for s in steps] == list(range(1, len(steps) + 1))
    return [s["loss"] for s in steps]


def run_scenarios(scenarios: Sequence[dict[str, object]], file: Path, ranks: int) -> None:
    """Run several trainings one after another in the same processes: start-up is nearly
    all of a tiny run."""
    file.write_text(json.dumps(list(scenarios)), encoding="utf-8")
    done = launch(RANKS / "scenarios.py", f"--file={file}", ranks=ranks)
    assert done.returncode == 0, done.stdout[-6000:]
