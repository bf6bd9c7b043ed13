"""Compare the DeepSpeed JSONs for an LLM and a cluster, and recommend one."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flallm_ds.config import LlmConfig, RunConfig
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.llm.load import LlmOptions
from flallm_ds.models.llm.tuning import Tuning
from flallm_ds.models.loss import CHUNK_BYTES, SMALL_BYTES
from flallm_ds.planning import memory, speed
from flallm_ds.planning.memory import GB, USABLE, Need, Place, Work, Zero
from flallm_ds.planning.sizes import (
    ModelSize,
    build_on_meta,
    config_of,
    saved_bytes,
    size_of,
)
from flallm_ds.training.deepspeed_json import lowest_lr

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
# Tokens of the default prompt of a decoder-only LLM.
PROMPT_TOKENS = 20
MOST_NODES = 128  # of the advice to use more nodes
_EQUAL = 0.03  # difference of two speeds that a plan cannot tell apart


@dataclass(frozen=True)
class Cluster:
    """Machines. gpus, host_gb, nvme_gb: of each node. device: cuda, or cpu without GPUs."""

    nodes: int
    gpus: int
    gpu_gb: float
    host_gb: float
    nvme_gb: float = 0.0
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"{self.nodes} x {self.gpus} ranks on CPUs, {self.host_gb:g} GB a host"
        gpus = f"{self.nodes} x {self.gpus} GPUs of {self.gpu_gb:g} GB"
        return f"{gpus}, {self.host_gb:g} GB a host"


@dataclass(frozen=True)
class Corpus:
    """Lengths of the clips.

    frames: mean number of kept frames of a clip. longest: of a long clip, for the memory.
    tokens: target tokens. clips: of an epoch.
    """

    frames: int
    longest: int
    tokens: int
    clips: int


@dataclass(frozen=True)
class Llm:
    """An LLM on the meta device as a run tunes it, and the activations of its clips."""

    name: str
    config: RunConfig
    vocab_size: int | None = None
    num_bits: int = 16  # 32 for a run on a CPU

    @property
    def size(self) -> ModelSize:
        return _size(*self._key())

    def activations(self, num_input: int, num_target: int) -> float:
        """Return the activations of one clip, in bytes.

        With llm.checkpointing each layer keeps its input, and one layer is computed again.
        """
        saved = _saved(*self._key(), num_input, num_target)
        if not self.config.llm.checkpointing:
            return float(saved)
        weight = self.num_bits / 8
        size = self.size
        inputs = size.layers * max(num_input, num_target) * size.width * weight
        return inputs + saved / max(1, size.layers)

    def _key(self) -> tuple[str, LlmConfig, int | None, int]:
        """Return what decides parameters and activations, for the caches below."""
        # Checkpointing does not change what is built.
        llm = replace(self.config.llm, checkpointing=False)
        return self.name, llm, self.vocab_size, self.num_bits


@lru_cache(maxsize=8)
def _build(
    name: str, llm: LlmConfig, vocab_size: int | None, num_bits: int
) -> tuple[Any, Adapter]:
    """Build an LLM on the meta device; a large one takes seconds."""
    bits: Any = num_bits
    options = LlmOptions(
        llm.dropout, llm.attention_dropout, hub_code=llm.hub_code, bits=bits
    )
    tuning = Tuning(
        llm.tune, llm.layers, llm.lora_rank, llm.lora_alpha, targets=llm.lora_targets
    )
    return build_on_meta(config_of(name, llm.hub_code), options, tuning, vocab_size)


@lru_cache(maxsize=64)
def _size(name: str, llm: LlmConfig, vocab_size: int | None, num_bits: int) -> ModelSize:
    return size_of(*_build(name, llm, vocab_size, num_bits))


@lru_cache(maxsize=64)
def _saved(
    name: str,
    llm: LlmConfig,
    vocab_size: int | None,
    num_bits: int,
    num_input: int,
    num_target: int,
) -> int:
    return saved_bytes(*_build(name, llm, vocab_size, num_bits), 1, num_input, num_target)


@dataclass(frozen=True)
class Row:
    """One DeepSpeed JSON. clips: of the largest micro-batch that fits; 0 if none fits.

    need: of a rank with `batch` clips in a micro-batch, which is `clips` or less. why: what
    does not fit, or why the run would be refused; empty if it fits.
    """

    file: str
    need: Need
    gpu: float
    host: float
    nvme: float
    clips: int
    batch: int
    accumulation: int
    step: speed.Step
    clips_per_s: float
    hours: float
    deepspeed: tuple[float, float]
    why: str


@dataclass(frozen=True)
class Planner:
    """Compares DeepSpeed JSONs for one LLM, run and cluster.

    files: {name: content of a DeepSpeed JSON}.
    """

    llm: Llm
    cluster: Cluster
    corpus: Corpus
    rates: speed.Rates
    files: Mapping[str, Mapping[str, Any]]

    @property
    def config(self) -> RunConfig:
        return self.llm.config

    @property
    def batch_clips(self) -> int:
        """The clips of an optimizer step: at least one for each rank."""
        return max(self.config.data.batch_clips, self.cluster.ranks)

    def rows(self) -> Iterator[Row]:
        for name, content in self.files.items():
            yield self._row(name, content)

    def best(self) -> Row | None:
        """Return the row with the most clips per second; of nearly equals the first, which
        is the one with the lowest ZeRO stage."""
        fitting = [row for row in self.rows() if not row.why]
        most = max((row.clips_per_s for row in fitting), default=0.0)
        fast = [row for row in fitting if row.clips_per_s >= (1 - _EQUAL) * most]
        return next(iter(fast), None)

    # --- one row

    def _row(self, name: str, content: Mapping[str, Any]) -> Row:
        zero = Zero.of(content, self.cluster.device)
        per_rank = math.ceil(self.batch_clips / self.cluster.ranks)
        clips = self._largest(zero)
        batch = max(1, min(clips, per_rank))
        accumulation = math.ceil(per_rank / batch)
        need = self._need(zero, batch)
        step = self._step(zero, batch, accumulation)
        done = self.cluster.ranks * batch * accumulation  # with dummies of the last one
        per_s = min(self.batch_clips, done) / step.total
        total = self.config.train.epochs * self.corpus.clips
        size, cluster = self.llm.size, self.cluster
        return Row(
            file=name,
            need=need,
            gpu=need.at(Place.DEVICE),
            host=need.at(Place.HOST) * cluster.gpus,
            nvme=need.at(Place.NVME) * cluster.gpus,
            clips=clips,
            batch=batch,
            accumulation=accumulation,
            step=step,
            clips_per_s=per_s,
            hours=total / per_s / 3600,
            deepspeed=memory.deepspeed_estimate(size, zero, cluster.gpus, cluster.nodes),
            why=self._why(zero, content, need),
        )

    def work(self, zero: Zero, clips: int, encoder: bool = True) -> Work:
        """Return what a micro-batch of long clips needs.

        encoder: whether the visual encoder is counted.
        """
        size, config = self.llm.size, self.config
        prompt = PROMPT_TOKENS if size.decoder_only else 0
        one = self.llm.activations(self.corpus.longest + prompt, self.corpus.tokens)
        tokens = clips * self.corpus.tokens
        how = config.llm.loss
        loss = memory.loss_bytes(size, tokens, how, zero.weight, CHUNK_BYTES, SMALL_BYTES)
        frames = clips * self.corpus.longest
        at_once = min(frames, config.visual.chunk_frames or frames)
        frames_bytes = 0.0
        if encoder:
            # On a GPU the encoder computes in bf16.
            weight = 2 if self.cluster.device == "cuda" else 4
            frames_bytes = memory.encoder_bytes(
                at_once, config.data.crop_size, config.visual.width, weight
            )
        # fp32 weights save fp32 activations.
        wider = zero.weight * 8 / self.llm.num_bits
        return Work(clips * one * wider, loss, frames_bytes)

    def _need(self, zero: Zero, clips: int) -> Need:
        return memory.need_of(
            self.llm.size,
            zero,
            self.cluster.ranks,
            self.work(zero, clips),
            self.cluster.device,
            self.config.llm.bits,
        )

    def _fits(self, need: Need) -> bool:
        return not self._missing(need)

    def _missing(self, need: Need) -> str:
        """Return which memory is too small, empty if all fits."""
        cluster = self.cluster
        gpu, host, nvme = (need.at(p) for p in (Place.DEVICE, Place.HOST, Place.NVME))
        if cluster.device == "cuda" and gpu > USABLE * cluster.gpu_gb * GB:
            return "GPU"
        if host * cluster.gpus > USABLE * cluster.host_gb * GB:
            return "host"
        if nvme * cluster.gpus > cluster.nvme_gb * GB:
            return "NVMe"
        return ""

    def _largest(self, zero: Zero) -> int:
        """Return the most clips of a micro-batch that fit, 0 if not even one does."""
        if not self._fits(self._need(zero, 1)):
            return 0
        low, high = 1, 2
        while self._fits(self._need(zero, high)) and high < 4096:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(self._need(zero, middle)):
                low = middle
            else:
                high = middle
        return low

    def _step(self, zero: Zero, batch: int, accumulation: int) -> speed.Step:
        size, cluster, rates = self.llm.size, self.cluster, self.rates
        # In an encoder-decoder each half of the weights sees one of the two sequences.
        tokens = float(self.corpus.frames + self.corpus.tokens)
        tokens = tokens + PROMPT_TOKENS if size.decoder_only else tokens / 2
        once = speed.compute_s(
            size,
            batch * tokens,
            batch * self.corpus.frames,
            self.config.llm.checkpointing,
            rates,
        )
        sent = speed.network_bytes(size, zero, accumulation, cluster.ranks)
        band = speed.bandwidth(cluster.nodes, cluster.gpus, rates)
        other = speed.host_s(size, zero, accumulation, cluster.nodes, cluster.gpus, rates)
        # ZeRO-1 in bf16 reduces the gradients after the backward pass.
        overlap = zero.overlap and zero.stage != 1
        return speed.Step(accumulation * once, sent / band, other, overlap)

    def _why(self, zero: Zero, content: Mapping[str, Any], need: Need) -> str:
        """Return why this JSON cannot be used, empty if it can."""
        llm, optim = self.config.llm, self.config.optim
        if llm.bits < 16 and llm.tune == "full":
            return f"llm.bits={llm.bits} needs LoRA"
        if llm.bits < 16 and zero.stage == 3:
            return f"llm.bits={llm.bits} needs ZeRO 1 or 2"
        missing = self._missing(need)
        if missing:
            return f"too little {missing} memory"
        lowest = lowest_lr(dict(content))
        if lowest is not None:
            rates = [optim.lr, *([optim.llm_lr] if llm.tune != "frozen" else [])]
            if min(rates) < lowest[1]:
                return f"needs llm_lr >= {lowest[1]:g}"
        return ""

    # --- advice

    def remedies(self) -> list[str]:
        """Return changes that would make a JSON fit, each as an option or a sentence."""
        found = []
        for option, changed in self._changes():
            best = changed.best()
            if best is not None:
                found.append(f"{option} ({best.file})")
        return found

    def _changes(self) -> Iterator[tuple[str, "Planner"]]:
        """Yield (what to change, planner with that change), the cheapest first."""
        for options in (
            {"llm.checkpointing": "true"},
            {"llm.tune": "lora"},
            {"llm.tune": "lora", "llm.bits": "4"},
            {"llm.tune": "lora", "llm.bits": "4", "llm.checkpointing": "true"},
        ):
            config = self.config.with_overrides(options)
            if config != self.config:
                words = " ".join(f"--{name}={value}" for name, value in options.items())
                yield words, replace(self, llm=replace(self.llm, config=config))
        cluster = self.cluster
        nodes = cluster.nodes * 2
        while nodes <= MOST_NODES:
            larger = replace(self, cluster=replace(cluster, nodes=nodes))
            if larger.best() is not None:
                yield f"--nodes={nodes}", larger
                break
            nodes *= 2
        for host in (512, 1024, 2048):
            if host > cluster.host_gb:
                yield (
                    f"--host_gb={host}",
                    replace(self, cluster=replace(cluster, host_gb=float(host))),
                )
        if not cluster.nvme_gb:
            yield "--nvme_gb=4000", replace(self, cluster=replace(cluster, nvme_gb=4000.0))


def shipped_files() -> dict[str, dict[str, Any]]:
    """Return the DeepSpeed JSONs of ds_configs, by file name: ZeRO-1 first."""
    found = {}
    for path in sorted(DS_CONFIGS.glob("*.json")):
        found[path.name] = json.loads(path.read_text(encoding="utf-8"))
    return found
