"""Run folders of models that were not trained, with metrics and an evaluation."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flallm_ds.batch import Hypothesis
from flallm_ds.config import RunConfig
from flallm_ds.dist import World
from flallm_ds.inference.evaluate import Search, evaluate_run
from flallm_ds.inference.hypothesis_file import read_hypotheses, write_hypotheses
from tests.helpers.exports import write_export

STEPS_AN_EPOCH = 20
# The hypotheses of the first clips of `spoil`: from none of the words to all of them.
HOSTILE = '<script>document.title = "pwned"</script><img src=x onerror="alert(1)">'


def write_run(kind: str, corpus: Path, run: Path, epochs: int = 10) -> Path:
    """Write a run folder with an export of `write_export` that is evaluated on test.

    kind: of `write_export`. corpus: the tiny one.
    """
    write_export(kind, corpus, run)
    config = RunConfig.load(run / "config.json")
    config = config.with_overrides({"data.shards": str(corpus / "shards")})
    (run / "config.json").write_text(config.to_json(), encoding="utf-8")
    (run / "versions.json").write_text(json.dumps(first_start(run)), encoding="utf-8")
    write_lines(run / "metrics.jsonl", metrics(epochs))
    write_lines(run / "hypotheses.jsonl", dev_hypotheses(epochs))
    evaluate_run(str(run), "test", World(0, 1, 0, 1), Search(beams=3, nbest=3), threads=1)
    return run


def write_lines(path: Path, records: Sequence[dict[str, object]]) -> None:
    """Write records as JSON lines."""
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def first_start(run: Path) -> dict[str, object]:
    """The content of versions.json of a run that was started once."""
    return {
        "started": "2026-11-26 12:00:00 +0000",
        "command": ["launch/train.py", "--stage=llm", f"--run={run}"],
        "commit": "0123456789abcdef",
        "dirty": True,
        "flallm_ds": "0.1.0",
        "python": "3.11.2",
        "torch": "2.11.0",
        "devices": {"NVIDIA H100": 4},
    }


def metrics(epochs: int) -> list[dict[str, object]]:
    """Records of a training whose dev score is best before the last epoch."""
    records: list[dict[str, object]] = []
    for step in range(1, epochs * STEPS_AN_EPOCH + 1):
        epoch = (step - 1) // STEPS_AN_EPOCH
        records.append(
            {
                "kind": "train", "global_step": step, "epoch": epoch, "loss": 5 / math.sqrt(step), "lr": 1e-3,
                "grad_norm": 10 ** math.sin(step), "frames": 100 + step % 7, "seconds": 0.5, "waiting_s": 0.05,
                "skipped_steps": 0, "broken_clips": 0, "gpu_memory_gb": 11.5,
            }
        )  # fmt: skip
        if step % STEPS_AN_EPOCH == 0:
            done = epoch + 1
            scores = {"bleu4": 20 - abs(done - epochs + 2), "chrf": 30 + done}
            records.append({"kind": "dev", "global_step": step, "epoch": done, **scores})
    return records


def dev_hypotheses(epochs: int) -> list[dict[str, object]]:
    """Records of hypotheses.jsonl: one clip at each epoch."""
    record = {"kind": "dev", "global_step": 1, "key": "a", "reference": "im norden regen"}
    hypotheses = [
        {**record, "epoch": n, "hypothesis": f"epoch {n}"} for n in range(1, epochs + 1)
    ]
    return hypotheses


def spoil(run: Path) -> list[Hypothesis]:
    """Change the hypotheses of the test split: the first one is HTML with scripts, the
    second one equals its reference; the reference of the third one ends the data of a page."""
    path = run / "evaluation" / "test.hypotheses.jsonl"
    clips = read_hypotheses(path)
    clips[0] = replace(clips[0], hypothesis=HOSTILE)
    clips[1] = replace(clips[1], hypothesis=clips[1].reference)
    clips[2] = replace(clips[2], reference=f"</script><b>{clips[2].reference}</b>")
    write_hypotheses(path, clips)
    return clips
