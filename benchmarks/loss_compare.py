"""Train at two commits and compare the losses bit for bit.

python -m benchmarks.loss_compare A B

A change that only moves code must not change any number. Both commits train both stages on
two ranks with the same small signsim corpus, with dropout and augmentation, and each stage
is stopped and resumed once. Loss, gradient norm and learning rate of each step and the dev
scores are compared.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT
from flallm_ds.command import main
from flallm_ds.dist import free_port
from flallm_ds.errors import UserError
from flallm_ds.models.llm.standin import standin_llm
from flallm_ds.sharding.build import Options, build
from flallm_ds.signsim import write_corpus

NUM_CLIPS = 60
STAGES = ("visual", "llm")
# A step in the middle of the first epoch.
STOP_AT = 4
COMPARED = {"train": ("loss", "grad_norm", "lr"), "dev": ("bleu4", "rouge_l", "chrf")}
OPTIONS = {
    "data.keep_every": "2",
    "data.frame_size": "64",
    "data.crop_size": "56",
    "data.augment": "true",
    "data.batch_clips": "8",
    "data.micro_batches": "4",
    "visual.weights": "none",
    "visual.width": "8",
    "visual.frozen_stages": "0",
    "visual.freeze_batch_norm": "false",
    "optim.backbone_lr": "none",
    "light_t.dropout": "0.1",
    "llm.dropout": "0.3",
    "train.epochs": "2",
    "eval.every_epochs": "1",
    "eval.num_beams": "2",
    "eval.max_new_tokens": "8",
}


def loss_compare(a: str, b: str, *, work: Path | None = None) -> None:
    """Compare commits A and B. Exit with code 2 and print the first number that differs.

    work: folder that keeps the corpus and both runs; default: a temporary folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).resolve()
        make_corpus(folder)
        records = {commit: train(commit, folder) for commit in (a, b)}
    compare(records[a], records[b], a, b)
    print(f"{a} and {b}: {len(records[a])} records of both stages are bit-identical")


def make_corpus(folder: Path) -> None:
    """Make shards of signsim and a small LLM with the checkout of this file."""
    if (folder / "llm").exists():
        return
    write_corpus(folder / "corpus", NUM_CLIPS, seed=0, workers=None, num_monolingual=200)
    build(
        "signsim",
        folder / "corpus",
        folder / "shards",
        Options(short_side=64, clips_per_shard=8),
    )
    texts = str(folder / "corpus" / "monolingual.txt")
    standin_llm(texts, folder / "llm", vocab_size=200, d_model=64, layers=1, steps=5)


def train(commit: str, folder: Path) -> list[dict[str, Any]]:
    """Train both stages with the code of a commit and return their records."""
    tree = folder / f"tree-{commit.replace('/', '-')}"
    checkout(commit, tree)
    records = []
    for stage in STAGES:
        run = tree / "runs" / stage
        options = OPTIONS | {
            "run": str(run),
            "data.shards": str(folder / "shards"),
            "llm.name": str(folder / "llm"),
        }
        if stage == "llm":
            options["visual_run"] = str(tree / "runs" / "visual")
        for limit in ({"train.max_steps": str(STOP_AT)}, {}):
            launch(tree, stage, options | limit)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records += [{"stage": stage, **json.loads(line)} for line in lines]
    return records


def checkout(commit: str, tree: Path) -> None:
    """Extract a commit to a new folder. Raises UserError if the commit does not exist."""
    tree.mkdir(parents=True)
    with tempfile.TemporaryFile() as file:
        command = ["git", "archive", "--format=tar", commit]
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"A and B must be commits of this repository, got {commit!r}.")
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            tar.extractall(tree, filter="data")


def launch(tree: Path, stage: str, options: dict[str, str]) -> None:
    """Train a stage on two ranks. Raises UserError with the last output on failure."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [
        launcher,
        "--num_gpus=2",
        f"--master_port={free_port()}",
        "launch/train.py",
        f"--stage={stage}",
    ]
    command += [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        command,
        cwd=tree,
        env=environment_of(tree),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"Cannot train stage {stage} of {tree.name}: it ended with code "
            f"{done.returncode}.\n{done.stdout[-3000:]}"
        )


def environment_of(tree: Path) -> dict[str, str]:
    """Return an environment with one thread per process and modules of a source tree."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}


def compare(
    first: list[dict[str, Any]], second: list[dict[str, Any]], a: str, b: str
) -> None:
    """Raise UserError with the first number that differs."""
    if len(first) != len(second):
        raise UserError(f"{a} wrote {len(first)} records, but {b} wrote {len(second)}.")
    for one, other in zip(first, second, strict=True):
        place = f"stage {one['stage']}, step {one['global_step']}"
        for name in ("stage", "kind", "global_step", *COMPARED[one["kind"]]):
            if one[name] != other.get(name):
                raise UserError(
                    f"{name} at {place} is {one[name]!r} ({a}) and {other.get(name)!r} "
                    f"({b})."
                )


if __name__ == "__main__":
    main(loss_compare)
