"""Train three real steps on this machine, and compare them with the plan for it."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from flallm_ds.dist import free_port
from flallm_ds.errors import UserError
from flallm_ds.planning.measure import CONFIG, LLM, Measured
from flallm_ds.planning.memory import GB, Need, Place, Zero, need_of
from flallm_ds.planning.plan import Cluster, Planner
from flallm_ds.planning.sizes import config_of, trimmed
from flallm_ds.planning.speed import checkpoint_bytes

DEFAULT_FILE = "zero3_offload.json"


@dataclass(frozen=True)
class Comparison:
    """A plan for the ranks of this machine, and what they measured.

    file: the DeepSpeed JSON. clips: of a micro-batch. need: of one rank, computed. ranks:
    what each rank measured.
    """

    file: str
    clips: int
    planner: Planner
    need: Need
    ranks: tuple[Measured, ...]

    @property
    def predicted(self) -> float:
        """The highest resident memory of all ranks together, computed, in bytes."""
        return self.need.at(Place.HOST) * self.planner.cluster.ranks

    @property
    def predicted_model(self) -> float:
        """The same without the processes: what model and training take."""
        named = self.need.named(Place.HOST)
        return (self.need.at(Place.HOST) - named["process"]) * self.planner.cluster.ranks

    @property
    def measured(self) -> float:
        """The sum over ranks of the highest resident memory.

        Shared pages of libraries count in each rank, in the plan as well.
        """
        return float(sum(rank.peak for rank in self.ranks))

    @property
    def measured_model(self) -> float:
        """The same without the memory of each process before it loads the model."""
        return float(sum(rank.peak - rank.baseline for rank in self.ranks))

    @property
    def step_s(self) -> float:
        """The time of the last step, on the slowest rank."""
        return max(rank.step_s[-1] for rank in self.ranks)


def compare(planner: Planner, num_ranks: int) -> Comparison:
    """Measure the micro-batch of the run's options, with random weights.

    num_ranks: without GPUs; with GPUs there is a rank for each. Raises UserError if the
    steps fail.
    """
    found = plan_here(planner, num_ranks)
    name = found.planner.config.train.deepspeed or f"ds_configs/{found.file}"
    return replace(found, ranks=_measure(found.planner, name, found.clips))


def plan_here(planner: Planner, num_ranks: int) -> Comparison:
    """Return the plan for this machine, without a measurement."""
    gpus = torch.cuda.device_count()
    here = _here(planner, gpus or num_ranks, "cuda" if gpus else "cpu")
    file = Path(here.config.train.deepspeed or DEFAULT_FILE).name
    data = here.config.data
    clips = max(1, data.batch_clips // data.micro_batches)
    zero = Zero.of(here.files[file], here.cluster.device)
    # The measured steps read features: there is no visual encoder.
    work = here.work(zero, clips, encoder=False)
    ranks = here.cluster.ranks
    need = need_of(here.llm.size, zero, ranks, work, here.cluster.device)
    return Comparison(file, clips, here, need, ())


def _here(planner: Planner, ranks: int, device: str) -> Planner:
    """Return the plan for this machine: one micro-batch a rank and step."""
    data = planner.config.data
    clips = max(1, data.batch_clips // data.micro_batches)
    options = {
        "data.micro_batches": str(ranks),
        "data.batch_clips": str(ranks * clips),
        "run": "measured",
        "visual_run": "none",
    }
    config = planner.config.with_overrides(options)
    gpu_bytes = 0.0
    if device == "cuda":
        gpu_bytes = float(torch.cuda.get_device_properties(0).total_memory)
    host_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    cluster = Cluster(1, ranks, gpu_bytes / GB, host_bytes / GB, device=device)
    llm = replace(planner.llm, config=config, num_bits=16 if device == "cuda" else 32)
    return replace(planner, llm=llm, cluster=cluster)


def _measure(planner: Planner, deepspeed_json: str, clips: int) -> tuple[Measured, ...]:
    """Run `measure` under the deepspeed launcher and return what each rank wrote."""
    corpus, ranks = planner.corpus, planner.cluster.ranks
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = planner.config.with_overrides(
            {"llm.name": str(folder / LLM), "train.deepspeed": deepspeed_json}
        )
        (folder / CONFIG).write_text(config.to_json(), encoding="utf-8")
        llm = trimmed(config_of(planner.llm.name), planner.llm.vocab_size)
        llm.save_pretrained(folder / LLM)
        command = [
            str(Path(sys.executable).parent / "deepspeed"),
            "--quiet",
            f"--num_gpus={ranks}",
            f"--master_port={free_port()}",
            *("--module", "flallm_ds.planning.measure"),
            f"--folder={folder}",
            f"--clips={clips}",
            f"--frames={corpus.longest}",
            f"--tokens={corpus.tokens}",
        ]
        own = {} if planner.cluster.device == "cuda" else {"DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            command,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(
                f"Cannot measure {planner.llm.name}: the steps ended with code "
                f"{done.returncode}: {_last_line(done.stdout)} Use a smaller LLM, or plan "
                "without --measure."
            )
        found = []
        for rank in range(ranks):
            text = (folder / f"rank-{rank}.json").read_text(encoding="utf-8")
            found.append(Measured(**json.loads(text)))
        return tuple(found)


def _last_line(output: str) -> str:
    """Return the line with the error, or the last one."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output."])[-1].removeprefix("error: ")


# --- output


def text_of(found: Comparison) -> str:
    """Return the comparison as a table."""
    size, corpus = found.planner.llm.size, found.planner.corpus
    rows = [
        ("", "plan", "measured", "deviation"),
        _row("host, all ranks, GB", found.predicted, found.measured),
        _row("  without processes, GB", found.predicted_model, found.measured_model),
    ]
    device = max(rank.device_peak for rank in found.ranks)
    if device:
        named = found.need.named(Place.DEVICE)
        allocated = found.need.at(Place.DEVICE) - named["CUDA context"]
        rows.append(_row("GPU, allocated, GB", allocated, device))
    written = sum(rank.checkpoint for rank in found.ranks)
    rows.append(_row("checkpoint, GB", checkpoint_bytes(size), written))
    width = max(len(row[0]) for row in rows)
    lines = []
    for label, *cells in rows:
        lines.append(f"{label:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    parts = []
    for name, used in found.need.named(Place.HOST).items():
        parts.append(f"{name} {used / GB:.2f}")
    return (
        f"{found.planner.llm.name}: {size.total / 1e6:.1f} M parameters, "
        f"{size.trained / 1e6:.1f} M trained; {found.file}, {len(found.ranks)} ranks, "
        f"{found.clips} clips of {corpus.longest} frames and {corpus.tokens} tokens\n"
        + "\n".join(lines)
        + f"\nlast step: {found.step_s:.2f} s\n"
        + f"plan of a rank, GB on the host: {', '.join(parts)}"
    )


def _row(label: str, plan: float, measured: float) -> tuple[str, str, str, str]:
    deviation = 100 * (plan / measured - 1)
    return label, f"{plan / GB:.2f}", f"{measured / GB:.2f}", f"{deviation:+.1f} %"


def json_of(found: Comparison) -> str:
    """Return the comparison as JSON, in bytes and seconds."""
    content = {
        "file": found.file,
        "clips": found.clips,
        "size": asdict(found.planner.llm.size),
        "host": {"plan": found.predicted, "measured": found.measured},
        "host_without_processes": {
            "plan": found.predicted_model,
            "measured": found.measured_model,
        },
        "parts_of_a_rank": {place.value: found.need.named(place) for place in Place},
        "ranks": [asdict(rank) for rank in found.ranks],
    }
    return json.dumps(content, indent=2)
