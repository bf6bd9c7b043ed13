"""Define the options of a run: one frozen dataclass for each section of `RunConfig`.

Each `__post_init__` raises UserError for a value that is not allowed.

These options set batch sizes, gradient accumulation, gradient clipping, learning rates and
the number of steps. The DeepSpeed JSON named by `train.deepspeed` sets ZeRO, precision,
offload and communication. A value that is set in both is an error.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from flallm_ds.errors import require

Stage = Literal["visual", "llm", "joint"]


def _require_at_least(minimum: int, section: str, config: Any, *names: str) -> None:
    """Raise UserError if one of the named options is below `minimum`."""
    for name in names:
        value = getattr(config, name)
        require(
            value >= minimum, f"{section}.{name} must be at least {minimum}, got {value}."
        )


def _require_above_zero(section: str, config: Any, *names: str) -> None:
    """Raise UserError if one of the named options is set to 0 or less."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or value > 0, f"{section}.{name} must be above 0, got {value}."
        )


def _require_fraction(section: str, config: Any, *names: str) -> None:
    """Raise UserError if one of the named options is not in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}.")


@dataclass(frozen=True)
class DataConfig:
    """Clips, frames of each clip, batches and data loading."""

    # Shard folders of `flallm shards build`, or their addresses.
    shards: tuple[str, ...] = ("data/signsim/shards",)
    # Share of each shard folder in an epoch. Empty: every clip once.
    weights: tuple[float, ...] = ()
    # Instead of weights: shares are sizes ** (1 / temperature). 1: every clip once.
    temperature: float = 1.0
    # Keep one frame of this many, before decoding.
    keep_every: int = 4
    # Instead of keep_every: keep this many frames per second, the same for all corpora.
    target_fps: float | None = None
    # Maximum number of kept frames of a clip.
    max_frames: int = 512
    # Which frames are kept if a clip has more than max_frames.
    cap: Literal["uniform", "random", "segment"] = "uniform"
    # Side in pixels of the square to which frames are resized on the device.
    frame_size: int = 256
    # Side in pixels of the crop that is the input of the backbone.
    crop_size: int = 224
    # Rotate, scale and shift whole clips in training.
    augment: bool = True
    # Number of clips in one optimizer step, over all ranks.
    batch_clips: int = 8
    # Instead of batch_clips: maximum number of kept frames in one optimizer step. 0: none.
    batch_frames: int = 0
    # Parts into which that batch is split, at least one for each rank. A rank accumulates
    # the gradients of its parts.
    micro_batches: int = 2
    # Resample cached features (launch/features.py) to this many per second.
    feature_fps: float | None = None
    # Number of time spans of frozen features that are set to 0 in each clip in training.
    time_masks: int = 0
    # Maximum length of such a time span, in features.
    time_mask_frames: int = 8
    # Number of spans of feature dimensions that are set to 0 in each clip in training.
    feature_masks: int = 0
    # Maximum width of such a span, in feature dimensions.
    feature_mask_width: int = 64
    # Where JPEGs are decoded in training. nvjpeg: on the GPU.
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    # Data-loading threads per rank. 0: the cores of the machine divided among its ranks.
    threads: int = 0
    # Share of broken clips, counted over all ranks, above which the run stops.
    max_broken: float = 0.01
    # Whether training clips may also be in the dev or the test split.
    same_clips: Literal["refuse", "allow"] = "refuse"
    # Read every shard at the start and compare its checksum.
    check_shards: bool = False
    # Cache folder for remote shards. None: $FLALLM_CACHE, or a folder on a disk of this
    # machine: ~/.cache/flallm_ds, or on a cluster one in $SLURM_TMPDIR, $TMPDIR or /tmp.
    cache_dir: str | None = None
    # Maximum size of the cache folder, in GB.
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        _require_at_least(1, "data", self, "keep_every", "max_frames", "micro_batches")
        _require_at_least(1, "data", self, "batch_clips", "crop_size", "frame_size")
        _require_at_least(1, "data", self, "time_mask_frames", "feature_mask_width")
        _require_at_least(0, "data", self, "batch_frames", "threads")
        _require_at_least(0, "data", self, "time_masks", "feature_masks")
        _require_above_zero("data", self, "temperature", "cache_gb")
        _require_above_zero("data", self, "target_fps", "feature_fps")
        _require_fraction("data", self, "max_broken")
        require(
            bool(self.shards),
            "data.shards must name at least one shard folder, got none.",
        )
        require(
            not self.weights
            or (len(self.weights) == len(self.shards) and min(self.weights) > 0),
            f"data.weights must be one number above 0 for each of the {len(self.shards)} "
            f"data.shards, got {','.join(map(str, self.weights))}.",
        )
        require(
            not self.weights or self.temperature == 1,
            f"data.temperature must be 1 if data.weights are set, got {self.temperature}.",
        )
        require(
            self.crop_size <= self.frame_size,
            f"data.crop_size must be at most data.frame_size ({self.frame_size}), got "
            f"{self.crop_size}.",
        )
        require(
            self.batch_clips >= self.micro_batches,
            f"data.batch_clips must be at least data.micro_batches ({self.micro_batches}), "
            f"got {self.batch_clips}.",
        )


@dataclass(frozen=True)
class VisualConfig:
    """The visual encoder: a backbone for each frame and the local temporal module.

    The options that define an encoder (weights, pretrained, width, temporal_kernel) are
    used where it is created: in stage visual or joint, or in stage llm with
    visual_run=none. The options of its training are used in every stage that trains it.
    """

    # Image encoder: hub id or folder of transformers or timm, timm/NAME, timm/NAME@FILE, a
    # ResNet of torchvision as a .pth file, or "none" for a random ResNet-18.
    weights: str = "microsoft/resnet-18"
    # False: use the architecture with random weights.
    pretrained: bool = True
    # Channels of the first stage of a ResNet. ImageNet weights need 64.
    width: int = 64
    # How the backbone is trained.
    tune: Literal["full", "lora", "frozen"] = "full"
    # Rank of the LoRA adapters of visual.tune=lora.
    lora_rank: int = 16
    # Adapter outputs are scaled by lora_alpha / lora_rank.
    lora_alpha: float = 32.0
    # "all-linear" or a regular expression of module names.
    lora_targets: str = "all-linear"
    # Keep the BatchNorm statistics of a pretrained backbone in stage 1.
    freeze_batch_norm: bool = False
    # Number of backbone stages, from the stem, whose weights are frozen in stage 1.
    frozen_stages: int = 0
    # Recompute the activations of the backbone in the backward pass, which saves memory.
    checkpointing: bool = False
    # Number of frames in one forward pass of a frozen encoder, to save memory. 0: all.
    chunk_frames: int = 0
    # Number of frames in the receptive field of the local temporal module.
    temporal_kernel: int = 3
    # Which part of the stage 1 encoder is frozen in stage llm.
    frozen: Literal["all", "backbone", "none"] = "all"

    def __post_init__(self) -> None:
        _require_at_least(1, "visual", self, "width", "lora_rank")
        _require_at_least(0, "visual", self, "frozen_stages", "chunk_frames")
        # Random weights that are frozen would stay random.
        pretrained = self.pretrained and self.weights != "none"
        require(
            self.frozen_stages == 0 or pretrained,
            "visual.frozen_stages must be 0 if visual.weights is none or "
            f"visual.pretrained is false, got {self.frozen_stages}. Frozen random weights "
            "would stay random.",
        )
        require(
            self.tune == "full" or pretrained,
            "visual.tune must be full if visual.weights is none or visual.pretrained is "
            f"false, got {self.tune}. Frozen random weights would stay random.",
        )
        require(
            self.frozen_stages == 0 or self.tune == "full",
            f"visual.frozen_stages must be 0 if visual.tune is {self.tune}, got "
            f"{self.frozen_stages}. visual.tune={self.tune} freezes all stages.",
        )
        # An even kernel would change the number of frames.
        require(
            self.temporal_kernel >= 1 and self.temporal_kernel % 2 == 1,
            f"visual.temporal_kernel must be odd and above 0, got {self.temporal_kernel}.",
        )


@dataclass(frozen=True)
class LightTranslatorConfig:
    """Light-T, the translator of stage 1, which starts with random weights."""

    # Layers and width: 1+1, 256; 2+2, 512; 3+3, 512; 4+4, 1024.
    size: Literal["tiny", "small", "base", "large"] = "base"
    # Dropout rate.
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _require_fraction("light_t", self, "dropout")


@dataclass(frozen=True)
class LlmConfig:
    """The LLM of stage 2, encoder-decoder or decoder-only. Stage 1 uses its tokenizer."""

    # Hub id or folder.
    name: str = "facebook/mbart-large-cc25"
    # Target language of all clips: de, German, zh-Hant or a token (de_DE). Empty: the
    # language of each clip.
    language: str = ""
    # Text with {video}, {language}, {sign_language}. Empty: the default of the LLM family.
    prompt: str = ""
    # CORPUS=NAME, if the sign language is not the usual one of the target language.
    sign_languages: tuple[str, ...] = ()
    # Keep only the tokens of the training text, special tokens and language tokens.
    trim_vocabulary: bool = True
    # False: use random weights.
    pretrained: bool = True
    # Input of the LLM-Adapter: features with (signs) or without (frames) the local temporal
    # module, or the encoder states of Light-T.
    input: Literal["signs", "frames", "light_t"] = "signs"
    # What is trained: all weights, LoRA or DoRA adapters, or nothing.
    tune: Literal["full", "lora", "dora", "frozen"] = "full"
    # A regular expression of parameter names. With tune=full only these are trained, else
    # these are trained in addition.
    layers: str = ""
    # Rank of the adapters of llm.tune=lora and dora.
    lora_rank: int = 16
    # Adapter outputs are scaled by lora_alpha / lora_rank.
    lora_alpha: float = 32.0
    # Dropout rate of the adapters' inputs.
    lora_dropout: float = 0.05
    # "all-linear" or a regular expression of module names.
    lora_targets: str = "all-linear"
    # Bits of a frozen parameter under LoRA. 8 and 4 need bitsandbytes and a GPU.
    bits: Literal[16, 8, 4] = 16
    # Implementation of the attention.
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    # Recompute activations in the backward pass: less memory, a third slower.
    checkpointing: bool = False
    # How the loss is computed. auto: with all logits at once while they are small.
    loss: Literal["auto", "logits", "chunks", "liger"] = "auto"
    # Run code from the hub that belongs to the model.
    hub_code: bool = False
    # Dropout rate.
    dropout: float = 0.3
    # Dropout rate of the attention weights.
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        _require_fraction("llm", self, "dropout", "attention_dropout", "lora_dropout")
        _require_at_least(1, "llm", self, "lora_rank")
        require(
            self.pretrained or self.bits == 16,
            f"llm.bits must be 16 if llm.pretrained is false, got {self.bits}.",
        )
        for entry in self.sign_languages:
            require(
                entry.count("=") == 1,
                f"llm.sign_languages must be CORPUS=NAME,CORPUS=NAME, got {entry!r}.",
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rates."""

    # The optimizer.
    name: Literal["sgd", "adamw"] = "adamw"
    # Learning rate of stage 1, and of the LLM-Adapter in stage 2.
    lr: float = 1e-3
    # Learning rate of the backbone if it is trained. None: lr.
    backbone_lr: float | None = None
    # Learning rate of the LLM. LoRA needs more: 1e-4 to 2e-4.
    llm_lr: float = 1e-5
    # Weight decay of all trained parameters.
    weight_decay: float = 1e-3
    # Momentum of sgd.
    momentum: float = 0.9
    # Decay rates of the moments of adamw.
    betas: tuple[float, ...] = (0.9, 0.998)
    # Share of the run in which learning rates increase from 0. A cosine to 0 follows.
    warmup: float = 0.0
    # Maximum norm of the gradient. 0: no clipping.
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require_at_least(0, "optim", self, "lr", "llm_lr")
        if self.backbone_lr is not None:
            _require_at_least(0, "optim", self, "backbone_lr")
        require(
            len(self.betas) == 2 and min(self.betas) >= 0 and max(self.betas) < 1,
            "optim.betas must be two numbers in [0, 1), got "
            f"{','.join(map(str, self.betas))}.",
        )
        _require_at_least(0, "optim", self, "weight_decay", "momentum", "clip")
        _require_fraction("optim", self, "warmup")


@dataclass(frozen=True)
class TrainConfig:
    """Length of the training, DeepSpeed configuration, checkpoints and logging."""

    # Number of passes over the training clips.
    epochs: int = 75
    # End after this many scorings of the dev split in a row without a better score (BLEU-4,
    # then chrF). 0: train all epochs.
    patience: int = 0
    # Save and stop after this many steps. The same command without it resumes the run.
    max_steps: int | None = None
    # Seed of initial weights, order of clips, frame picks and augmentations.
    seed: int = 0
    # Label smoothing of the cross entropy.
    label_smoothing: float = 0.2
    # A DeepSpeed JSON. Empty: zero2 of ds_configs if the visual encoder is trained, else
    # zero3_offload.
    deepspeed: str = ""
    # Number of steps between checkpoints, in addition to one at the end of each epoch.
    save_every_steps: int | None = None
    # Minutes between checkpoints, in addition to those. 0: none by time.
    save_every_minutes: float = 30.0
    # Seconds without progress after which the ranks that hold up a run are named.
    stall_warn_s: float = 60.0
    # Seconds without progress after which the processes end, as after a crash. 0: never.
    stall_limit_s: float = 1800.0
    # Number of checkpoints that are kept.
    keep_checkpoints: int = 2
    # Seconds between two lines of progress.
    log_every_s: float = 10.0
    # Number of steps between measurements of the gradients of the last layers. 0: none.
    probe_every: int = 0
    # Where the numbers of metrics.jsonl are sent, too: wandb, mlflow.
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    # Steps of the run, first-last, that are traced to RUN/profile: 10-14 are five steps.
    profile: str = ""

    def __post_init__(self) -> None:
        _require_at_least(1, "train", self, "epochs", "keep_checkpoints")
        require(
            self.save_every_steps is None or self.save_every_steps >= 1,
            "train.save_every_steps must be none or at least 1, got "
            f"{self.save_every_steps}.",
        )
        _require_at_least(0, "train", self, "probe_every", "seed", "save_every_minutes")
        _require_at_least(0, "train", self, "stall_limit_s", "patience")
        _require_above_zero("train", self, "stall_warn_s")
        known = ("wandb", "mlflow")
        require(
            all(self.trackers.count(name) == 1 and name in known for name in self.trackers),
            f"train.trackers must be wandb, mlflow or both, got {','.join(self.trackers)}.",
        )
        steps_of(self.profile)
        _require_fraction("train", self, "label_smoothing")


def steps_of(profile: str) -> range:
    """Return the steps of train.profile, empty for none. Raises UserError if it is not
    FIRST-LAST."""
    if not profile:
        return range(0)
    found = re.fullmatch(r"(\d+)-(\d+)", profile)
    first, last = map(int, found.groups()) if found else (0, 0)
    require(
        1 <= first <= last,
        "train.profile must be two steps FIRST-LAST from 1, such as 10-14, got "
        f"{profile!r}.",
    )
    return range(first, last + 1)


@dataclass(frozen=True)
class EvalConfig:
    """Scoring during training, and beam search."""

    # Score the dev split every this many epochs.
    every_epochs: int = 1
    # The split that is scored during training.
    split: str = "dev"
    # Beam size of its search. 1: greedy search.
    num_beams: int = 5
    # Above 1 for longer hypotheses, below 1 for shorter ones.
    length_penalty: float = 1.0
    # Maximum number of tokens of a hypothesis.
    max_new_tokens: int = 100
    # auto: with ZeRO-3, gather all weights on each rank for the search if they fit.
    gather: Literal["auto", "never"] = "auto"

    def __post_init__(self) -> None:
        _require_at_least(1, "eval", self, "every_epochs", "num_beams", "max_new_tokens")
