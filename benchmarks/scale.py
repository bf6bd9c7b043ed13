"""Simulate training steps of stage llm on 8 to 1,024 GPUs, from the real plan of the data.

python -m benchmarks.scale --out=benchmarks/results

No GPU is needed. What is real: the plan that deals clips to ranks (flallm_ds/data/plan.py),
the parameters and layers of the LLM, and its DeepSpeed JSON. What is assumed: lengths of
the clips, speeds of GPUs and networks, random delays of a rank.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.measure import Report
from flallm_ds import command
from flallm_ds.data.plan import Plan
from flallm_ds.planning import speed
from flallm_ds.planning.memory import Zero
from flallm_ds.planning.plan import (
    PROMPT_TOKENS,
    Cluster,
    Corpus,
    Llm,
    Planner,
    shipped_files,
)
from flallm_ds.planning.sizes import ModelSize
from flallm_ds.recipes import resolve

GPUS_PER_NODE = 8
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
STEPS = 8  # of the simulated epoch, at least
# The LLMs, and the JSON of each: the communication of ZeRO-3 grows with the LLM, that of
# ZeRO-2 does not fit larger ones.
MODELS = {
    "mBART-large, ZeRO-2": ("0.6B", "zero2_offload.json", "full"),
    "mBART-large, ZeRO-3": ("0.6B", "zero3.json", "full"),
    "7 B, ZeRO-3": ("7B", "zero3.json", "full"),
    "7 B, LoRA, ZeRO-1": ("7B", "zero1.json", "lora"),
    "70 B, ZeRO-3": ("70B", "zero3.json", "full"),
}
# Seconds of each hop of a ring collective: the start-up of a message within and between
# hosts. A ring of N ranks has N - 1 hops, whatever it sends.
HOP_S = (2e-6, 5e-6)
# Largest random delay of a rank in a micro-batch (half of a normal distribution): clocks of
# GPUs, decoding, the operating system.
DELAY = 0.03
TARGET_TOKENS = 30


@dataclass(frozen=True)
class Lengths:
    """Kept frames of the clips of a corpus: a log-normal distribution, clipped.

    The mean, the shortest and the longest are those of the corpus; sigma is assumed.
    """

    name: str
    mean: float
    sigma: float
    shortest: int
    longest: int

    def draw(self, num_clips: int, seed: int) -> np.ndarray:
        """Return kept frames, int32 (num_clips,)."""
        rng = np.random.default_rng(seed)
        mu = math.log(self.mean) - self.sigma**2 / 2
        drawn = np.exp(rng.normal(mu, self.sigma, num_clips))
        return np.clip(drawn, self.shortest, self.longest).astype(np.int32)


# 827,354 frames of 7,096 clips, 1 in 4 kept; How2Sign: sentences of 5.5 s at 30 frames a
# second, many short and some very long.
PHOENIX = Lengths("PHOENIX14T", 29.1, 0.4, 4, 119)
HOW2SIGN = Lengths("How2Sign", 41.0, 0.7, 4, 512)


@dataclass(frozen=True)
class Simulated:
    """Shares of the time of a mean step. useful: frames of clips at the mean rate.

    padding: places of shorter clips. waiting: for the rank with the most work or delay.
    network: communication that no arithmetic hides.
    """

    ranks: int
    step_s: float
    useful: float
    padding: float
    waiting: float
    network: float
    clips_per_s: float


def ring_s(volume: float, ranks: int, rates: speed.Rates) -> float:
    """Return the seconds of a ring collective: hops, then bytes over the slowest link."""
    nodes = max(1, ranks // GPUS_PER_NODE)
    hop = HOP_S[0] if nodes == 1 else HOP_S[1]
    band = speed.bandwidth(nodes, min(ranks, GPUS_PER_NODE), rates)
    return (ranks - 1) * hop + volume * (ranks - 1) / ranks / band


@cache
def frames_of_ranks(lengths: Lengths, ranks: int, clips: int) -> np.ndarray:
    """Return (steps, ranks, 3) from the plan, for each micro-batch of an epoch: its frames,
    the frames of its longest clip, and its clips (`clips` or one less)."""
    kept = lengths.draw(max(20_000, STEPS * clips * ranks), seed=0)
    shard = np.arange(len(kept)) // 1000
    plan = Plan("0", kept, shard, 0, batch_clips=clips * ranks, num_micro_batches=ranks)
    epoch = plan.epoch(0)
    steps = []
    for step in range(epoch.num_steps):
        frames = [kept[rows] for rows in epoch.micro_batches_of(step)]
        steps.append([(int(one.sum()), int(one.max()), len(one)) for one in frames])
    return np.array(steps)


def simulate(
    size: ModelSize,
    zero: Zero,
    lengths: Lengths,
    ranks: int,
    clips: int,
    rates: speed.Rates,
) -> Simulated:
    """Simulate an epoch with one micro-batch of `clips` clips a rank and step."""
    around = TARGET_TOKENS + (PROMPT_TOKENS if size.decoder_only else 0)
    rng = np.random.default_rng(1)
    totals = np.zeros(4)  # useful, padding, waiting, network
    steps = frames_of_ranks(lengths, ranks, clips)
    for work_RK in steps:
        frames, longest, num_clips = work_RK.T
        useful = _compute_s(size, frames + num_clips * around, frames, rates)
        # The LLM pads each clip of a micro-batch to the longest one.
        padded = _compute_s(size, num_clips * (longest + around), frames, rates)
        delays = 1 + DELAY * np.abs(rng.normal(size=ranks))
        slowest = float(np.max(padded * delays))
        whole = _with_network(size, zero, slowest, ranks, rates)
        means = float(useful.mean()), float(padded.mean())
        totals += (means[0], means[1] - means[0], slowest - means[1], whole - slowest)
    seconds = float(totals.sum())
    shares = [float(part) for part in totals / seconds]
    per_s = float(steps[:, :, 2].sum()) / seconds
    return Simulated(ranks, seconds / len(steps), *shares, clips_per_s=per_s)


def _compute_s(
    size: ModelSize, tokens: np.ndarray, frames: np.ndarray, rates: speed.Rates
) -> np.ndarray:
    """Return the seconds of each rank."""
    tokens = tokens if size.decoder_only else tokens / 2
    found = []
    for own_tokens, own_frames in zip(tokens, frames, strict=True):
        found.append(
            speed.compute_s(size, float(own_tokens), float(own_frames), False, rates)
        )
    return np.array(found)


def _with_network(
    size: ModelSize, zero: Zero, compute: float, ranks: int, rates: speed.Rates
) -> float:
    """Return the seconds of a step with its collectives.

    ZeRO-3 gathers each layer in both passes and reduces its gradients, while the layer
    before computes: each layer takes the longer of the two. A backward pass takes twice as
    long as a forward pass. ZeRO-2 reduces gradients in the backward pass, in buckets, and
    ZeRO-1 after it; both gather all weights in the end.
    """
    layers = size.layers + 2  # embedding and head
    weight = zero.weight
    if zero.stage < 3:
        gathered = ring_s(weight * size.trained, ranks, rates)
        if zero.stage == 1:
            return compute + gathered + ring_s(2.0 * weight * size.trained, ranks, rates)
        buckets = max(1, math.ceil(size.trained / zero.bucket))
        per_bucket = ring_s(weight * size.trained / buckets, ranks, rates)
        backward = max(2 / 3 * compute, buckets * per_bucket)
        return compute / 3 + backward + gathered
    gather = ring_s(weight * size.total / layers, ranks, rates)
    reduce = ring_s(weight * size.trained / layers, ranks, rates) if size.trained else 0.0
    forward = layers * max(compute / 3 / layers, gather)
    backward = layers * max(2 / 3 * compute / layers, gather + reduce)
    return forward + backward


def rates_of(network_gbs: float) -> speed.Rates:
    """Return the speeds of nodes with 8 GPUs of 80 GB, as `flallm plan` assumes them."""
    peak, link = speed.default_rates(80)
    return speed.Rates(
        flops=1e12 * peak,
        efficiency=0.35,
        link=1e9 * link,
        network=1e9 * network_gbs,
        pcie=20e9,
        dram=150e9,
        disk=2e9,
        nvme=5e9,
    )


def size_and_zero(name: str, file: str, tune: str) -> tuple[ModelSize, Zero]:
    config = resolve("llm", "phoenix14t", {"llm.tune": tune})
    return Llm(name, config).size, Zero.of(shipped_files()[file], "cuda")


def run(
    *,
    out: Path | None = None,
    hardware: str = "simulated",
    clips: int = 8,
    networks: tuple[float, ...] = (12.5, 50.0, 400.0),
) -> str:
    """Simulate all LLMs on all numbers of GPUs, and write a page and a plot.

    --out: folder for page and plot. --hardware: name in the file names. --clips: of a
    micro-batch. --networks: GB/s of a node.
    """
    found: dict[tuple[str, float, str], list[Simulated]] = {}
    for label, choice in MODELS.items():
        size, zero = size_and_zero(*choice)
        for network in networks:
            for lengths in (PHOENIX, HOW2SIGN):
                rows = []
                for ranks in RANKS:
                    rows.append(
                        simulate(size, zero, lengths, ranks, clips, rates_of(network))
                    )
                found[label, network, lengths.name] = rows
    report = Report(__file__, "Steps on 8 to 1,024 GPUs, simulated")
    report.text(_introduction(clips))
    if out is not None:
        picture = report.path(out, hardware, ".png")
        plot(picture, found, networks)
        report.text(f"![efficiency]({picture.name})")
    _tables(report, found, networks, clips)
    report.text("## Which file for which LLM and cluster")
    report.text(
        "From the planner of `flallm plan`, for clips of at most 120 kept frames, "
        f"{clips} clips a GPU and step, and 25 GB/s between nodes. Each cell: the "
        "recommended file, the clips that fit in a micro-batch, and clips per second; "
        "`ckpt`: with `--llm.checkpointing=true`."
    )
    for tune in ("full", "lora"):
        report.text(f"### llm.tune={tune}")
        report.table(("LLM", *CLUSTERS), recommendations(tune, clips))
    return report.finish(out, hardware)


def _introduction(clips: int) -> str:
    return (
        "**No GPU was used.** The plan of the data, the sizes of the LLMs and the files of "
        "ds_configs are the real ones; lengths of clips are drawn from log-normal "
        "distributions with the mean of PHOENIX14T and How2Sign; GPUs reach 35 % of 312 "
        f"TFLOP/s, with 250 GB/s within a node of 8. Each rank computes one micro-batch of "
        f"{clips} clips a step (weak scaling: the batch grows with the GPUs)."
    )


def _tables(
    report: Report,
    found: dict[tuple[str, float, str], list[Simulated]],
    networks: tuple[float, ...],
    clips: int,
) -> None:
    """Write where the time of a step goes, and the efficiency against 8 GPUs."""
    report.text("## Efficiency against 8 GPUs, per GPU")
    rows = []
    for (label, network, corpus), simulated in found.items():
        first = simulated[0].clips_per_s / simulated[0].ranks
        cells = []
        for one in simulated:
            cells.append(f"{100 * one.clips_per_s / one.ranks / first:.0f}")
        rows.append((label, corpus, f"{network:g}", *cells))
    header = ("LLM", "lengths", "GB/s of a node", *map(str, RANKS))
    report.table(header, rows)
    report.text(
        "In percent. 12.5 GB/s is one port of 100 Gbit/s a node, 400 GB/s is eight of 400."
    )
    report.text("## Parts of a step on 256 GPUs, in percent")
    shares = []
    for (label, network, corpus), simulated in found.items():
        one = next(s for s in simulated if s.ranks == 256)
        parts = (one.useful, one.padding, one.waiting, one.network)
        cells = [f"{100 * max(part, 0.0):.0f}" for part in parts]
        shares.append((label, corpus, f"{network:g}", f"{one.step_s:.2f}", *cells))
    head = ("LLM", "lengths", "GB/s of a node", "s/step")
    report.table((*head, "useful", "padding", "waiting", "network"), shares)


def plot(
    path: Path,
    found: dict[tuple[str, float, str], list[Simulated]],
    networks: tuple[float, ...],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(networks), figsize=(4 * len(networks), 4), sharey=True, layout="constrained"
    )
    for axes, network in zip(np.atleast_1d(panels), networks, strict=True):
        for label in MODELS:
            simulated = found[label, network, PHOENIX.name]
            first = simulated[0].clips_per_s / simulated[0].ranks
            values = [100 * one.clips_per_s / one.ranks / first for one in simulated]
            axes.plot(RANKS, values, marker="o", label=label)
        axes.set_title(f"{network:g} GB/s a node")
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, list(map(str, RANKS)))
        axes.set_xlabel("GPUs")
        axes.set_ylim(0, 108)
        axes.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("efficiency against 8 GPUs, %")
    np.atleast_1d(panels)[0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --- which file for which LLM and cluster

CLUSTERS = {
    "4 x 24 GB": Cluster(1, 4, 24.0, 256.0),
    "8 x 80 GB": Cluster(1, 8, 80.0, 1024.0),
    "2 x 8 x 80 GB": Cluster(2, 8, 80.0, 1024.0),
    "8 x 8 x 80 GB": Cluster(8, 8, 80.0, 1024.0),
}
LLMS = {
    "mBART-large 0.6 B": "0.6B",
    "1.7 B": "1.7B",
    "7 B": "7B",
    "13 B": "13B",
    "70 B": "70B",
}


def recommendations(tune: str, clips: int) -> list[tuple[str, ...]]:
    """Return a row for each LLM: what the planner recommends on each cluster."""
    rows = []
    for label, name in LLMS.items():
        llms = []
        for checkpointing in ("false", "true"):
            options = {"llm.tune": tune, "llm.checkpointing": checkpointing}
            llms.append(Llm(name, resolve("llm", "phoenix14t", options)))
        cells = [label]
        for cluster in CLUSTERS.values():
            cells.append(_recommended(llms, cluster, clips))
        rows.append(tuple(cells))
    return rows


def _recommended(llms: list[Llm], cluster: Cluster, clips: int) -> str:
    """Return the recommended file, without checkpointing if that fits."""
    peak, link = speed.default_rates(cluster.gpu_gb)
    rates = replace(rates_of(25.0), flops=1e12 * peak, link=1e9 * link)
    batch = {"data.batch_clips": str(clips * cluster.ranks)}
    for llm, note in zip(llms, ("", ", ckpt"), strict=True):
        whole = replace(llm, config=llm.config.with_overrides(batch))
        corpus = Corpus(30, 120, TARGET_TOKENS, 7096)
        best = Planner(whole, cluster, corpus, rates, shipped_files()).best()
        if best is not None:
            name = best.file.removesuffix(".json")
            return f"`{name}`{note}, {best.clips}, {best.clips_per_s:.0f}"
    return "does not fit"


if __name__ == "__main__":
    command.main(run)
