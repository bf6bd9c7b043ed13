"""Compare joint training, stage 1 and both stages on signsim (Tables 4 and 5 of FLa-LLM).

    python -m benchmarks.factorised --out runs/factorised
    python -m benchmarks.factorised --out runs/weak --visual.weights=FOLDER --visual.frozen_stages=0

Every run is a command of launch/ in one process; `jobs` runs are active at a time. Run the
same command again to resume. The corpus, the stand-in backbone and the stand-in LLM are
those of the quickstart (data/signsim). Joint training has as many epochs as both stages
together, so that all systems see the same number of clips. A table and a plot of gradient
norms are written to the folder at the end.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flallm_ds.command import main
from flallm_ds.errors import UserError
from flallm_ds.quickstart import prepare

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = {"joint": "joint training", "visual": "stage 1 alone", "llm": "both stages"}
PROBE_EVERY = 5


def factorised(
    *,
    out: Path = Path("runs/factorised"),
    seeds: tuple[int, ...] = (0, 1, 2),
    visual_epochs: int = 6,
    llm_epochs: int = 6,
    jobs: int = 2,
    **overrides: str,
) -> None:
    """Train and score three systems for each seed, then write table.md and probe.png.

    visual_epochs, llm_epochs: epochs of the two stages; joint training has their sum. Other
    options are passed to every run.
    """
    out = out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    # Once, because runs that start at the same time would do it twice.
    prepare()
    options = [f"--{name}={value}" for name, value in overrides.items()]
    lines = [
        line for s in seeds for line in _lines(out, s, visual_epochs, llm_epochs, options)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(_run_line, line) for line in lines]:
            future.result()
    table = _table(out, seeds)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    first = [str(out / f"{system}_{seeds[0]}") for system in SYSTEMS]
    _python(
        "-m",
        "flallm_ds",
        "probe",
        f"--runs={','.join(first)}",
        f"--out={out / 'probe.png'}",
        log=None,
    )
    print(f"{table}\n\n{out / 'table.md'}  {out / 'probe.png'}")


def _lines(
    out: Path, seed: int, visual_epochs: int, llm_epochs: int, overrides: list[str]
) -> list[list[list[str]]]:
    """Return lists of commands. Lists may run in parallel, commands of a list may not."""
    runs = {system: out / f"{system}_{seed}" for system in SYSTEMS}
    common = [f"--train.seed={seed}", f"--train.probe_every={PROBE_EVERY}"]
    common += [
        *overrides,
        # With one process there is nothing to shard or to offload.
        "--train.deepspeed=ds_configs/zero2.json",
    ]
    options = {"joint": [], "visual": [], "llm": [f"--visual_run={runs['visual']}"]}
    epochs = {
        "joint": visual_epochs + llm_epochs,
        "visual": visual_epochs,
        "llm": llm_epochs,
    }
    for system, count in epochs.items():
        # Number of evaluations on dev. The best export is scored on test.
        num_evaluations = 3 if system == "joint" else 2
        options[system] += [
            f"--train.epochs={count}",
            f"--eval.every_epochs={max(1, count // num_evaluations)}",
        ]
    commands = {
        system: [
            [
                "launch/train.py",
                f"--stage={system}",
                f"--run={run}",
                *common,
                *options[system],
            ],
            ["launch/evaluate.py", f"--run={run}", "--split=test"],
        ]
        for system, run in runs.items()
    }
    return [commands["joint"], commands["visual"] + commands["llm"]]


_printing = threading.Lock()


def _run_line(commands: list[list[str]]) -> None:
    for command in commands:
        run = next(
            Path(word.removeprefix("--run="))
            for word in command
            if word.startswith("--run=")
        )
        if (
            command[0] == "launch/evaluate.py"
            and (run / "evaluation" / "test.json").is_file()
        ):
            continue
        with _printing:
            print(f"== {' '.join(command)}", flush=True)
        _python(*command, log=run.parent / "logs" / f"{run.name}.log")


def _python(*words: str, log: Path | None) -> None:
    """Run a Python command with one thread. Raises UserError if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    output = log.open("a", encoding="utf-8") if log else None
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"Cannot run {' '.join(words)}: it ended with code {done.returncode}. See {log}."
        )


def _table(out: Path, seeds: tuple[int, ...]) -> str:
    from flallm_ds.inference.hypothesis_file import read_hypotheses
    from flallm_ds.metrics.significance import paired_bootstrap

    hypotheses = {
        system: [
            read_hypotheses(
                out / f"{system}_{seed}" / "evaluation" / "test.hypotheses.jsonl"
            )
            for seed in seeds
        ]
        for system in SYSTEMS
    }
    references = [h.reference for h in hypotheses["joint"][0]]
    texts = {
        system: [[h.hypothesis for h in run] for run in runs]
        for system, runs in hypotheses.items()
    }
    found = paired_bootstrap(texts, references)
    lines = [
        "| test BLEU-4 | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean, 95 % interval |"
    ]
    lines.append("|---|" + "--:|" * (len(seeds) + 1))
    for system, name in SYSTEMS.items():
        alone = [
            paired_bootstrap({"": [run]}, references, resamples=2).score("").value
            for run in texts[system]
        ]
        lines.append(
            f"| {name} | {' | '.join(f'{v:.1f}' for v in alone)} | {found.score(system)} |"
        )
    lines.append("")
    for better, worse in (("visual", "joint"), ("llm", "visual"), ("llm", "joint")):
        gap, chance = found.difference(better, worse)
        lines.append(f"{SYSTEMS[better]} - {SYSTEMS[worse]}: {gap}, p = {chance:.3f}  ")
    return "\n".join(lines)


if __name__ == "__main__":
    main(factorised)
