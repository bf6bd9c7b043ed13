"""The quickstart: corpus, shards, both stages and their scores, a translated video.

Everything is written to the current folder, to data/ and runs/. Each step is an ordinary
command, which is printed; a step whose result exists is left out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import locked
from flallm_ds.recipes import config_of

BIN = Path(sys.executable).parent
NUM_CLIPS = 1700
DATA = Path("data/signsim")


def prepare() -> None:
    """Make the corpus, shards, backbone and LLM of the quickstart where they do not exist."""
    parts = [DATA / name for name in ("corpus", "shards", "backbone", "llm")]
    if all(part.exists() for part in parts):
        _make(*parts)  # prints that they exist
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
    make_corpus = [flallm, "signsim", "corpus", f"--out={corpus}"]
    _step(corpus, [*make_corpus, f"--clips={NUM_CLIPS}", "--monolingual=10000"])
    build = [flallm, "shards", "build", "signsim"]
    _step(shards, [*build, f"--source={corpus}", f"--out={shards}", "--short_side=64"])
    _step(backbone, [flallm, "signsim", "backbone", f"--out={backbone}"])
    # Sentences that are drawn apart from those of the clips.
    texts = corpus / "monolingual.txt"
    _step(llm, [flallm, "standin_llm", f"--texts={texts}", f"--out={llm}"])


def quickstart() -> None:
    """Run every step of the method on a synthetic corpus, from making it to translating a video.

    It writes to data/signsim and runs/quickstart_*. Run it again to resume.
    """
    begin = time.perf_counter()
    prepare()
    visual = Path(config_of("quickstart_visual").run)
    llm = Path(config_of("quickstart_llm").run)
    launcher, environment = _launcher()
    train = [*launcher, "--module", "flallm_ds.cli.train", "--stage=both"]
    _step(llm / "evaluation" / "test.json", train, environment)
    _show(visual, llm)
    minutes = (time.perf_counter() - begin) / 60
    print(f"\nThe quickstart took {minutes:.1f} minutes (without installation).")


def _launcher() -> tuple[list[str], dict[str, str]]:
    """Return the deepspeed command and its environment.

    It has as many ranks as there are GPUs, or cores without a GPU; two at most. Its own
    lines are left out: their warnings are about multi-node runs and missing GPUs.
    """
    # They import torch, which takes seconds, and the corpus needs none.
    import torch

    from flallm_ds.dist import free_port

    ranks = min(2, torch.cuda.device_count() or len(os.sched_getaffinity(0)))
    environment = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    launcher = [str(BIN / "deepspeed"), "--quiet", f"--num_gpus={ranks}"]
    return [*launcher, f"--master_port={free_port()}"], environment


def _step(
    result: Path, command: list[str], environment: Mapping[str, str] | None = None
) -> None:
    """Run a command, unless its result exists."""
    if result.exists():
        print(f"\n== {result} exists already", flush=True)
        return
    _run(command, environment)


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Print an ordinary command and run it. Raises UserError where it fails."""
    # Absolute paths are those of the programs in .venv/bin.
    shown = [Path(word).name if word.startswith("/") else word for word in command]
    print(f"\n== {' '.join(shown)}", flush=True)
    # A step has the machine to itself: its threads may spin while they wait for each
    # other.
    own = {"GOMP_SPINCOUNT": "100000", **(environment or {})}
    process = subprocess.Popen(command, env=os.environ | own)
    try:
        code = process.wait()
    except BaseException as stop:
        # The terminal sends Ctrl-C to the step too.
        if not isinstance(stop, KeyboardInterrupt):
            process.terminate()
        process.wait()  # it prints what it has saved
        raise
    if code:
        raise UserError(
            f"Cannot finish the quickstart: the step above ended with code {code}. Fix its "
            "error and run the same command again."
        )


def _show(visual: Path, llm: Path) -> None:
    """Print scores and three sentences, draw a strip of frames, and translate one video."""
    # These import torch too.
    from flallm_ds.inference.hypothesis_file import read_hypotheses
    from flallm_ds.inference.pictures import strip_of_run
    from flallm_ds.metrics.ceiling import Ceiling
    from flallm_ds.metrics.table import table

    results = []
    for run in (visual, llm):
        path = run / "evaluation" / "test.json"
        results.append(json.loads(path.read_text(encoding="utf-8")))
    rows = {"stage 1 alone": results[0]["scores"], "both stages": results[1]["scores"]}
    print("\n" + table({**rows, "blind control": results[1]["blind"]}))
    if ceiling := str(Ceiling(**results[1].get("ceiling", {"bleu4": 100.0}))):
        print(ceiling)
    print(f"signature: {results[1]['scores']['bleu_signature']}\n")
    hypotheses = read_hypotheses(llm / "evaluation" / "test.hypotheses.jsonl")
    for one in hypotheses[:: max(1, len(hypotheses) // 3)][:3]:
        print(f"  hypothesis  {one.hypothesis}\n  reference   {one.reference}\n")
    strip_of_run(llm, llm / "strip.png", "test", num_clips=2)
    print(f"frames with hypothesis and reference: {llm / 'strip.png'}")
    # The first test video, as a user would name it.
    video = next((DATA / "corpus").glob("**/fullFrame-210x260px/test/*"))
    _run([str(BIN / "flallm"), "translate", str(video), f"--model={llm}"])
