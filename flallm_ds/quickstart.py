"""The quickstart: corpus -> shards -> both stages and their scores -> a translated video.

Everything is made in the current folder, below data/ and runs/. Each step is an ordinary
command, printed as it runs, and is left out where its result is there already.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from flallm_ds.dist import free_port
from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import locked
from flallm_ds.recipes import config_of

BIN = Path(sys.executable).parent
NUM_CLIPS = 1700
DATA = Path("data/signsim")


def prepare() -> None:
    """The embedded default's corpus, shards, stand-in backbone and LLM, where they are
    not there yet."""
    parts = [DATA / name for name in ("corpus", "shards", "backbone", "llm")]
    if all(part.exists() for part in parts):
        _make(*parts)  # says so
        return
    try:
        with locked(
            DATA / ".lock",
            f"The corpus {DATA}",
            "use another one with --data.shards=FOLDER",
        ):
            _make(*parts)
    except OSError as error:
        raise UserError(file_problem(error)) from error


def _make(corpus: Path, shards: Path, backbone: Path, llm: Path) -> None:
    flallm = str(BIN / "flallm")
    _step(
        corpus,
        [
            flallm,
            "signsim",
            "corpus",
            f"--out={corpus}",
            f"--clips={NUM_CLIPS}",
            "--monolingual=10000",
        ],
    )
    build = [flallm, "shards", "build", "signsim"]
    _step(shards, [*build, f"--source={corpus}", f"--out={shards}", "--short_side=64"])
    _step(backbone, [flallm, "signsim", "backbone", f"--out={backbone}"])
    texts = corpus / "monolingual.txt"
    _step(llm, [flallm, "standin_llm", f"--texts={texts}", f"--out={llm}"])


def quickstart() -> None:
    """Everything from nothing to scores and a translated video; run again, it goes on
    where it was."""
    begin = time.perf_counter()
    prepare()
    visual, llm = (
        Path(config_of("quickstart_visual").run),
        Path(config_of("quickstart_llm").run),
    )
    _step(
        llm / "evaluation" / "test.json",
        [*_launcher(), "--module", "flallm_ds.cli.train", "--stage=both"],
    )
    _show(visual, llm)
    print(
        f"\nThe whole took {(time.perf_counter() - begin) / 60:.1f} minutes (without "
        "installation)."
    )


def _launcher() -> list[str]:
    """deepspeed with as many ranks as there are GPUs, or cores on a machine without one;
    two at most."""
    # It takes seconds to import, and the corpus needs none.
    import torch

    ranks = min(2, torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    return [str(BIN / "deepspeed"), f"--num_gpus={ranks}", f"--master_port={free_port()}"]


def _step(result: Path, command: list[str]) -> None:
    if result.exists():
        print(f"\n== {result} is there already", flush=True)
        return
    _run(command)


def _run(command: list[str]) -> None:
    """Run an ordinary command and show it. Raises UserError where it fails."""
    print(
        f"\n== {' '.join(Path(c).name if c.startswith('/') else c for c in command)}",
        flush=True,
    )
    # A step has the machine to itself: its threads may spin while they wait for one
    # another.
    process = subprocess.Popen(command, env=os.environ | {"GOMP_SPINCOUNT": "100000"})
    try:
        code = process.wait()
    except BaseException as stop:
        # which the terminal sends to the step, too
        if not isinstance(stop, KeyboardInterrupt):
            process.terminate()
        process.wait()  # it says what it keeps
        raise
    if code:
        raise UserError(
            f"the step above must end well, but ended with code {code}. Mend it and run "
            "again."
        )


def _show(visual: Path, llm: Path) -> None:
    """The table, three sentences, a strip of frames, and one video translated by the
    finished model."""
    # These import torch, too.
    from flallm_ds.inference.pictures import strip_of_run
    from flallm_ds.inference.report import read_hypotheses, table
    from flallm_ds.metrics.ceiling import Ceiling

    results = [
        json.loads((run / "evaluation" / "test.json").read_text(encoding="utf-8"))
        for run in (visual, llm)
    ]
    rows = {"stage 1 alone": results[0]["scores"], "both stages": results[1]["scores"]}
    print("\n" + table({**rows, "blind control": results[1]["blind"]}))
    if ceiling := str(Ceiling(**results[1].get("ceiling", {"bleu4": 100.0}))):
        print(ceiling)
    print(f"signature: {results[1]['scores']['bleu_signature']}\n")
    hypotheses = read_hypotheses(llm / "evaluation" / "test.hypotheses.jsonl")
    for said in hypotheses[:: max(1, len(hypotheses) // 3)][:3]:
        print(f"  hypothesis  {said.hypothesis}\n  reference   {said.reference}\n")
    strip_of_run(llm, llm / "strip.png", "test", num_clips=2)
    print(f"a strip of frames with hypothesis and reference: {llm / 'strip.png'}")
    video = next((DATA / "corpus").glob("**/fullFrame-210x260px/test/*"))
    _run([str(BIN / "flallm"), "translate", str(video), f"--model={llm}"])
