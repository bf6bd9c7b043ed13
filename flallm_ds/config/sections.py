"""RunConfig: everything that names a run, in frozen dataclasses; unknown or mistyped
options never pass.

Ownership: this file owns batch sizes, accumulation, clipping, rates and steps. The
DeepSpeed JSON named by `train.deepspeed` owns ZeRO, precision, offload and communication.
A number given in both is an error.
"""

from dataclasses import dataclass
from typing import Literal

from flallm_ds.errors import require

Stage = Literal["visual", "llm", "joint"]


def _must_be_fraction(section: str, name: str, value: float) -> None:
    require(0 <= value < 1, f"{section}.{name} must be in [0, 1), but is {value}.")


@dataclass(frozen=True)
class DataConfig:
    """Which clips, which of their frames, and how many at a time."""

    # folders or addresses of shards/build.py's shards
    shards: tuple[str, ...] = ("data/signsim/shards",)
    # each folder's share of an epoch; none: every clip once
    weights: tuple[float, ...] = ()
    # instead of weights: shares are sizes ** (1 / temperature); 1: every clip once
    temperature: float = 1.0
    keep_every: int = 4  # one frame of each group of this many is kept, before decoding
    # kept frames a second, instead of keep_every: one pace for all corpora
    target_fps: float | None = None
    max_frames: int = 512  # kept frames of a clip at most
    # which of them, where there are more
    cap: Literal["uniform", "random", "segment"] = "uniform"
    frame_size: int = 256  # px; frames are squashed to this square on the device
    crop_size: int = 224  # px; side of the crop that the backbone sees
    augment: bool = True  # rotation, scale and shift of whole clips in training
    batch_clips: int = 8  # clips of one optimizer step, over all ranks
    # kept frames of one optimizer step at most, instead of batch_clips
    batch_frames: int = 0
    # micro-batches of that batch; a multiple of the world size; the rest is accumulation
    micro_batches: int = 2
    # cached features (launch/features.py) are resampled to this rate
    feature_fps: float | None = None
    time_masks: int = 0  # spans of frozen features that become zeros in training, a clip
    time_mask_frames: int = 8  # features of such a span at most
    feature_masks: int = 0  # the same across the numbers of a feature
    feature_mask_width: int = 64  # of these at most
    # of the JPEGs in training; nvjpeg: on the GPU
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    # decode threads a rank; 0: the cores of the machine shared among its ranks
    threads: int = 0
    # share of the clips that a rank may fail to decode before the run stops
    max_broken: float = 0.01
    check_shards: bool = False  # read every shard at the start and compare its checksum
    # of remote shards; none: $FLALLM_CACHE or ~/.cache/flallm_ds
    cache_dir: str | None = None
    cache_gb: float = 100.0  # that remote shards may take there

    def __post_init__(self) -> None:
        for name in (
            "keep_every",
            "max_frames",
            "batch_clips",
            "micro_batches",
            "crop_size",
            "frame_size",
        ):
            require(
                getattr(self, name) >= 1,
                f"data.{name} must be at least 1, but is {getattr(self, name)}.",
            )
        require(bool(self.shards), "data.shards must name a shard folder, but is empty.")
        for name in ("temperature", "cache_gb"):
            require(
                getattr(self, name) > 0,
                f"data.{name} must be above 0, but is {getattr(self, name)}.",
            )
        for name in ("target_fps", "feature_fps"):
            rate = getattr(self, name)
            require(
                rate is None or rate > 0, f"data.{name} must be above 0, but is {rate}."
            )
        require(
            self.batch_frames >= 0,
            f"data.batch_frames must not be negative, but is {self.batch_frames}.",
        )
        require(
            self.threads >= 0, f"data.threads must not be negative, but is {self.threads}."
        )
        _must_be_fraction("data", "max_broken", self.max_broken)
        for name in ("time_masks", "feature_masks"):
            require(
                getattr(self, name) >= 0,
                f"data.{name} must not be negative, but is {getattr(self, name)}.",
            )
        for name in ("time_mask_frames", "feature_mask_width"):
            require(
                getattr(self, name) >= 1,
                f"data.{name} must be at least 1, but is {getattr(self, name)}.",
            )
        require(
            not self.weights
            or (len(self.weights) == len(self.shards) and min(self.weights) > 0),
            f"data.weights must be one number above 0 for each of the {len(self.shards)} "
            f"data.shards, but is {','.join(map(str, self.weights))}.",
        )
        require(
            not self.weights or self.temperature == 1,
            "data.temperature must be 1 where data.weights are given, but is "
            f"{self.temperature}.",
        )
        require(
            self.crop_size <= self.frame_size,
            f"data.crop_size must be at most data.frame_size ({self.frame_size}), but is "
            f"{self.crop_size}.",
        )
        require(
            self.batch_clips >= self.micro_batches,
            f"data.batch_clips must be at least data.micro_batches ({self.micro_batches}), "
            f"but is {self.batch_clips}.",
        )


@dataclass(frozen=True)
class VisualConfig:
    """The visual encoder: a per-frame backbone, ResNet-18 by default, and the local
    temporal module.

    What makes an encoder (weights, pretrained, width, temporal_kernel) is of its first
    stage: visual, joint, or llm with visual_run=none. How its backbone is trained counts
    in any stage that trains it.
    """

    # an image encoder: hub id or folder of transformers or timm, timm/NAME, timm/NAME@FILE,
    # torchvision's ResNet as a .pth file, or "none": a random ResNet-18
    weights: str = "microsoft/resnet-18"
    pretrained: bool = True  # false: its architecture with random weights
    width: int = 64  # channels of a ResNet's first stage; ImageNet weights are for 64
    tune: Literal["full", "lora", "frozen"] = "full"  # how the backbone is trained
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: str = "all-linear"  # or a regular expression of modules
    # a pretrained backbone keeps its BatchNorm statistics in stage 1
    freeze_batch_norm: bool = False
    # of the backbone's, from the stem up: they keep their weights in stage 1
    frozen_stages: int = 0
    # compute the backbone's activations again in the backward pass: less memory
    checkpointing: bool = False
    # frames that a frozen encoder sees at a time, in less memory; 0: all
    chunk_frames: int = 0
    temporal_kernel: int = 3  # frames seen by the local temporal module
    # what of stage 1's encoder stage llm keeps as it is
    frozen: Literal["all", "backbone", "none"] = "all"

    def __post_init__(self) -> None:
        require(self.width >= 1, f"visual.width must be at least 1, but is {self.width}.")
        for name in ("frozen_stages", "chunk_frames"):
            require(
                getattr(self, name) >= 0,
                f"visual.{name} must not be negative, but is {getattr(self, name)}.",
            )
        require(
            self.lora_rank >= 1,
            f"visual.lora_rank must be at least 1, but is {self.lora_rank}.",
        )
        pretrained = self.pretrained and self.weights != "none"
        require(
            self.frozen_stages == 0 or pretrained,
            "visual.frozen_stages must be 0 where visual.weights is none or "
            "visual.pretrained is false, or random weights would stay random, but is "
            f"{self.frozen_stages}.",
        )
        require(
            self.tune == "full" or pretrained,
            "visual.tune must be full where visual.weights is none or visual.pretrained "
            f"is false, or random weights would stay random, but is {self.tune}.",
        )
        require(
            self.frozen_stages == 0 or self.tune == "full",
            f"visual.frozen_stages must be 0 where visual.tune is {self.tune}, which "
            f"freezes all stages, but is {self.frozen_stages}.",
        )
        require(
            self.temporal_kernel >= 1 and self.temporal_kernel % 2 == 1,
            "visual.temporal_kernel must be odd and above 0 (so that length is kept), but "
            f"is {self.temporal_kernel}.",
        )


@dataclass(frozen=True)
class LightTranslatorConfig:
    """Light-T, the randomly initialised translator of stage 1."""

    size: Literal["tiny", "small", "base", "large"] = "base"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _must_be_fraction("light_t", "dropout", self.dropout)


@dataclass(frozen=True)
class LlmConfig:
    """The pretrained LLM of stage 2, encoder-decoder or decoder-only; stage 1 uses its
    tokenizer."""

    name: str = "facebook/mbart-large-cc25"  # hub id or folder
    # of all clips: de, German, zh-Hant or a token (de_DE); empty: each clip's own
    language: str = ""
    # text with {video}, {language}, {sign_language}; empty: the usual one of the LLM's
    # kind
    prompt: str = ""
    # CORPUS=NAME, where it is not the usual one of the language
    sign_languages: tuple[str, ...] = ()
    # keep the pieces of the training text, specials and language ids
    trim_vocabulary: bool = True
    pretrained: bool = True  # false: random weights
    # what it reads: with or without the local temporal module, or the states of stage 1's
    # Light-T encoder
    input: Literal["signs", "frames", "light_t"] = "signs"
    tune: Literal["full", "lora", "dora", "frozen"] = "full"
    # a regular expression: with tune=full train only what it matches, else that, too
    layers: str = ""
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_targets: str = "all-linear"  # or a regular expression of modules
    # of frozen weights under LoRA; 8 and 4 need bitsandbytes and a GPU
    bits: Literal[16, 8, 4] = 16
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    checkpointing: bool = False  # compute activations twice: less memory, a third slower
    # auto: logits in one piece while small
    loss: Literal["auto", "logits", "chunks", "liger"] = "auto"
    hub_code: bool = False  # run code that comes with a hub's model
    dropout: float = 0.3
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout", "lora_dropout"):
            _must_be_fraction("llm", name, getattr(self, name))
        require(
            self.lora_rank >= 1,
            f"llm.lora_rank must be at least 1, but is {self.lora_rank}.",
        )
        require(
            self.pretrained or self.bits == 16,
            f"llm.bits must be 16 where llm.pretrained is false, but is {self.bits}.",
        )
        for entry in self.sign_languages:
            require(
                entry.count("=") == 1,
                f"llm.sign_languages must be CORPUS=NAME,CORPUS=NAME, but {entry!r} is "
                "not.",
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and rates."""

    name: Literal["sgd", "adamw"] = "adamw"
    # of all but the two below: the whole of stage 1; the LLM-Adapter in stage 2
    lr: float = 1e-3
    backbone_lr: float | None = None  # of the backbone, where it is trained; none: lr
    # of what is trained of the LLM; low-rank layers want more: 1e-4 to 2e-4
    llm_lr: float = 1e-5
    weight_decay: float = 1e-3
    momentum: float = 0.9  # sgd
    betas: tuple[float, ...] = (0.9, 0.998)  # adamw
    # fraction of the run over which rates rise from 0; then a cosine to 0
    warmup: float = 0.0
    clip: float = 1.0  # gradient norm at most; 0 leaves it alone

    def __post_init__(self) -> None:
        require(
            min(self.lr, self.llm_lr, self.backbone_lr or 0.0) >= 0,
            f"rates must not be negative, but are {self.lr}, {self.llm_lr}, "
            f"{self.backbone_lr}.",
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas must be two numbers from 0 to below 1, but are {self.betas}.",
        )
        for name in ("weight_decay", "momentum", "clip"):
            require(
                getattr(self, name) >= 0,
                f"optim.{name} must not be negative, but is {getattr(self, name)}.",
            )
        _must_be_fraction("optim", "warmup", self.warmup)


@dataclass(frozen=True)
class TrainConfig:
    """How long, on what engine, and what is kept."""

    epochs: int = 75
    # save and stop here; without it, the same command goes on to the last epoch
    max_steps: int | None = None
    seed: int = 0
    label_smoothing: float = 0.2
    # a DeepSpeed JSON; empty: of ds_configs, zero2 where the visual encoder is trained, else
    # zero3_offload
    deepspeed: str = ""
    save_every_steps: int | None = None  # besides the checkpoint at the end of each epoch
    keep_checkpoints: int = 2
    log_every_s: float = 10.0
    # steps between two looks at the gradients of the last layers; 0: none
    probe_every: int = 0

    def __post_init__(self) -> None:
        require(self.epochs >= 1, f"train.epochs must be at least 1, but is {self.epochs}.")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints must be at least 1.")
        require(
            self.save_every_steps is None or self.save_every_steps >= 1,
            "train.save_every_steps must be none or at least 1, but is "
            f"{self.save_every_steps}.",
        )
        require(
            self.probe_every >= 0,
            f"train.probe_every must not be negative, but is {self.probe_every}.",
        )
        require(self.seed >= 0, f"train.seed must not be negative, but is {self.seed}.")
        _must_be_fraction("train", "label_smoothing", self.label_smoothing)


@dataclass(frozen=True)
class EvalConfig:
    """Dev scores during training, and how sentences are generated."""

    every_epochs: int = 1
    split: str = "dev"
    num_beams: int = 5
    length_penalty: float = 1.0
    max_new_tokens: int = 100
    # ZeRO-3: hold all weights on each rank where they fit
    gather: Literal["auto", "never"] = "auto"

    def __post_init__(self) -> None:
        for name in ("every_epochs", "num_beams", "max_new_tokens"):
            require(
                getattr(self, name) >= 1,
                f"eval.{name} must be at least 1, but is {getattr(self, name)}.",
            )
