"""The only place that turns a RunConfig into objects."""

import math
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from flallm_ds import export
from flallm_ds.config import DataConfig, RunConfig
from flallm_ds.data import mixture
from flallm_ds.data.device import check_nvjpeg
from flallm_ds.data.index import Index, read_manifest
from flallm_ds.data.loader import BrokenClips, ClipReader
from flallm_ds.data.plan import Plan, slices_of_rank, temperature_weights
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.data.storage.store import CacheOptions, open_store
from flallm_ds.data.text.codec import Instruction, TextCodec
from flallm_ds.dist import World, cores_of_rank, main_first, on_each_machine
from flallm_ds.errors import RankError, UserError, require
from flallm_ds.features.checks import check_run, check_stage
from flallm_ds.features.sequences import FeatureMasks
from flallm_ds.files import replace_folder
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.backbones.build import build_backbone, check_reachable
from flallm_ds.models.backbones.interface import Backbone
from flallm_ds.models.checkpointing import checkpoint_llm
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.light_translator import build_light_translator
from flallm_ds.models.llm.load import (
    LlmOptions,
    check_llm,
    embedding_scale,
    is_decoder_only,
    llm_config,
    llm_width,
    load_llm,
    longest_input,
    trim_llm,
)
from flallm_ds.models.llm.tuning import Tuning, check_bits, tune
from flallm_ds.models.sign_translator import Beam, SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder, resnet_width
from flallm_ds.training import engine as ds
from flallm_ds.training.batch_statistics import BatchStatistics, KeptStatistics
from flallm_ds.training.task import Split, Task
from flallm_ds.training.weights_record import record_weights

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"  # also in an installed wheel
MOST_UNKNOWN = 0.001  # of the training tokens: a model learns to leave out what it reads as unknown


def build_task(config: RunConfig, folder: Path, world: World) -> Task:
    """Load the index, the texts' codec, the models and the engine of a run whose folder is open."""
    ds.prepare()
    transformers_logging.disable_progress_bar()
    slices_of_rank(config.data.micro_batches, world.rank, world.size)
    if config.data.decoder == "nvjpeg":
        check_nvjpeg(world.device)
        check_jpegs(config.data)
    train_index, dev_index = (open_index(config.data, s, world) for s in ("train", config.eval.split))
    check_stage(config, train_index)
    json_path = deepspeed_json(config)
    accumulation = config.data.micro_batches // world.size
    json_config = ds.read_deepspeed_config(json_path)
    check_precision(config, json_config, json_path)
    check_rates(config, json_config, json_path)
    ds_config = ds.complete(json_config, world.device, accumulation, config.optim.clip)
    require(
        not (config.visual.chunk_frames and config.trains_visual and ds.zero_stage(ds_config) == 3),
        "visual.chunk_frames must be 0 where ZeRO-3 partitions the visual encoder, because ranks with fewer "
        f"chunks would leave the others waiting, but is {config.visual.chunk_frames}.",
    )
    on_each_machine(ds.check_compilation_locks, world)
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    codec = _open_codec(config, folder, train_index, world)
    extractor = feature_extractor(config, world).to(world.device)
    if train_index.features:
        check_run(config, train_index, dev_index, extractor.fingerprint())
    model = (
        visual_model(config, codec, extractor).to(world.device)
        if config.stage == "visual"
        else llm_model(config, codec, folder, extractor, ds_config, world)
    )
    train = make_split(train_index, config, codec, world, train=True)
    dev = make_split(dev_index, config, codec, world, train=False)
    check_clips(config, (train, dev), codec, model, extractor)
    record_weights(config, folder, world)
    groups = parameter_groups(model, config)
    engine = ds.Engine(model, groups, config.optim, ds_config, world)
    task = Task(
        config=config,
        world=world,
        train=train,
        dev=dev,
        codec=codec,
        preprocess=make_preprocess(config.data),
        masks=make_masks(config.data),
        beam=Beam(config.eval.num_beams, config.eval.length_penalty, config.eval.max_new_tokens),
        frozen=None if config.trains_visual else extractor,
        engine=engine,
        rates=tuple(group["lr"] for group in groups),
        statistics=BatchStatistics(engine.module, world),
        kept=KeptStatistics(engine.module.train()),
    )
    task.check_generation()
    return task


def check_clips(
    config: RunConfig,
    splits: Sequence[Split],
    codec: TextCodec,
    model: SignTranslator,
    extractor: FeatureExtractor,
) -> None:
    """Raise UserError for a language that the codec does not know, or a clip longer than what reads it."""
    wording = codec.light_wording if config.stage == "visual" else codec.wording
    languages = set[str]()
    for split in splits:
        languages.update(split.index.strings("language"))
    around = max(len(w.before) + len(w.after) for w in map(wording, sorted(languages)))
    reads = longest_input(model.language_model)
    limits = [reads - around] if reads is not None else []
    if extractor.light_t_encoder is not None:
        limits.append(extractor.light_t_encoder.config.max_position_embeddings)
    longest = max(int(split.plan.num_kept.max()) for split in splits)
    require(
        not limits or longest <= min(limits),
        f"clips must have at most {min(limits, default=0)} frames, which is as much as what reads them can "
        f"tell apart, but one keeps {longest}. Give --data.max_frames={min(limits, default=0)}, or a larger "
        "--data.keep_every (of cached features: a smaller --data.feature_fps).",
    )


def parameter_groups(model: SignTranslator, config: RunConfig) -> list[dict[str, Any]]:
    """The trained parameters by base rate: the backbone, the LLM, and the rest."""
    optim = config.optim
    rates = {
        "visual.visual.backbone.": optim.lr if optim.backbone_lr is None else optim.backbone_lr,
        "language_model.": optim.lr if config.stage == "visual" else optim.llm_lr,
        "": optim.lr,  # all that no other prefix took
    }
    groups: dict[str, list[torch.nn.Parameter]] = {prefix: [] for prefix in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        groups[next(prefix for prefix in rates if name.startswith(prefix))].append(parameter)
    return [{"params": group, "lr": rates[prefix]} for prefix, group in groups.items() if group]


def deepspeed_json(config: RunConfig) -> Path:
    """The DeepSpeed JSON of a run: what train.deepspeed names, else the stage's own.

    Outside a checkout, ds_configs/NAME.json is found in the installed package.
    """
    own = DS_CONFIGS / ("zero2.json" if config.trains_visual else "zero3_offload.json")
    path = Path(config.train.deepspeed) if config.train.deepspeed else own
    packaged = DS_CONFIGS / path.name
    return (
        packaged if path.parent == Path("ds_configs") and not path.exists() and packaged.is_file() else path
    )


def check_precision(config: RunConfig, json_config: dict[str, Any], path: Path) -> None:
    """Raise UserError for BatchNorm in an engine that casts its parameters but not the statistics."""
    for precision in ("bf16", "fp16"):
        require(
            not (config.trains_visual and json_config.get(precision, {}).get("enabled")),
            f"train.deepspeed must compute by torch_autocast where the visual encoder is trained, because "
            f"BatchNorm's statistics stay fp32, but {path} enables {precision}. Take ds_configs/zero2.json "
            "or leave --visual.frozen=all.",
        )


def check_rates(config: RunConfig, json_config: dict[str, Any], path: Path) -> None:
    """Raise UserError for a learning rate whose updates master weights of low precision would round away."""
    lowest = ds.lowest_rate(json_config)
    if lowest is None:
        return
    flag, least = lowest
    optim, llm = config.optim, config.llm
    rates = {"lr": optim.lr}
    if config.trains_visual:
        rates["backbone_lr"] = optim.lr if optim.backbone_lr is None else optim.backbone_lr
    if config.stage != "visual" and (llm.tune != "frozen" or llm.layers):
        rates["llm_lr"] = optim.llm_lr
    for name, rate in rates.items():
        require(
            rate >= least or rate == 0,
            f"optim.{name} must be at least {least:g} where {path} sets {flag}, because smaller updates of "
            f"most weights are rounded away, got {rate:g}. Set --optim.{name}={least:g} or a JSON with fp32 "
            "master weights, such as ds_configs/zero3_offload.json.",
        )


def open_index(data: DataConfig, split: str, world: World) -> Index:
    """The index of one split over all of data.shards; every machine has each shard, whole."""
    index = mixture.open_indexes(data.shards, split, CacheOptions.of_run(data))
    on_each_machine(lambda: index.store.check(index.shards, data.check_shards), world)
    return index


def check_jpegs(data: DataConfig) -> None:
    """Raise UserError where shards hold H.264, of which the GPU's JPEG decoder makes nothing."""
    for folder in data.shards:
        options = read_manifest(open_store(folder, CacheOptions.of_run(data))).get("options", {})
        require(
            options.get("clip_format") != "h264",
            f"data.decoder must be cpu where shards hold H.264, but is {data.decoder} for {folder}.",
        )


def make_sampling(data: DataConfig) -> FrameSampling:
    return FrameSampling(data.keep_every, data.max_frames, data.target_fps, data.cap)


def make_reader(index: Index, config: RunConfig, train: bool) -> ClipReader:
    data = config.data
    return ClipReader(index, make_sampling(data), config.train.seed, train, data.feature_fps)


def make_plan(reader: ClipReader, config: RunConfig) -> Plan:
    data = config.data
    weights = data.weights
    if data.temperature != 1 and len(data.shards) > 1:
        num_clips = np.bincount(reader.index.arrays["corpus"]).tolist()
        weights = temperature_weights(num_clips, data.temperature)
    return reader.plan(data.batch_clips, data.micro_batches, batch_frames=data.batch_frames, weights=weights)


def make_split(index: Index, config: RunConfig, codec: TextCodec, world: World, train: bool) -> Split:
    """Plan one split and say how this rank loads it. train: as in training; else as in evaluation."""
    data = config.data
    reader = make_reader(index, config, train)
    return Split(
        reader,
        make_plan(reader, config),
        codec,
        world,
        threads=data.threads or decode_threads(world),
        broken=BrokenClips(math.ceil(data.max_broken * len(index)) if train else 0),
        encoded=train and data.decoder == "nvjpeg",
    )


def make_preprocess(data: DataConfig) -> Preprocess:
    return Preprocess(data.frame_size, data.crop_size, data.augment)


def make_masks(data: DataConfig) -> FeatureMasks:
    return FeatureMasks(data.time_masks, data.time_mask_frames, data.feature_masks, data.feature_mask_width)


def decode_threads(world: World) -> int:
    """Return as many threads as this rank has cores; more than 8 have no use."""
    return min(8, cores_of_rank(world.local_size, os.environ))


def _open_codec(config: RunConfig, folder: Path, train_index: Index, world: World) -> TextCodec:
    """The codec of this run's training text, made by rank 0 once and read by all."""
    path = folder / "tokenizer"

    def write(out: Path) -> None:
        texts = train_index.strings("text")
        codec = TextCodec.for_training_text(
            config.llm.name,
            _instruction(config, train_index),
            texts,
            config.llm.trim_vocabulary,
            config.llm.hub_code,
        )
        check_unknown(codec, texts, config.llm.name)
        codec.save(out)

    _write_once(path, write, world)
    return TextCodec.load(path, config.llm.hub_code)


def check_unknown(codec: TextCodec, texts: Iterable[str], name: str) -> None:
    """Raise UserError where the tokenizer of the LLM `name` cannot write the training text; print a few."""
    unknown = codec.unknown_tokens(texts)
    require(
        unknown.num_unknown <= MOST_UNKNOWN * unknown.num_tokens,
        f"llm.name must have a tokenizer that can write the training text, at most {100 * MOST_UNKNOWN:g} % "
        f"of the tokens unknown, got {name} with {unknown}. Give another --llm.name (a stand-in LLM: one "
        "with a larger --vocab_size), or replace these characters in the texts.",
    )
    if unknown.num_unknown:
        print(f"unknown to the tokenizer of {name}: {unknown}.", flush=True)


def _write_once(folder: Path, write: Callable[[Path], None], world: World) -> None:
    """Rank 0 writes a folder where it is not there. Raises UserError on every rank where it cannot."""

    def first() -> None:
        if folder.is_dir():
            return
        try:
            replace_folder(folder, write)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder} must be written, but was not ({error}). Free some space and give the same command "
                "again."
            ) from error

    main_first(first, world)


def _instruction(config: RunConfig, train_index: Index) -> Instruction:
    llm = llm_config(config.llm.name, config.llm.hub_code)
    return Instruction(
        decoder_only=is_decoder_only(llm),
        start_token=getattr(llm, "decoder_start_token_id", None),
        rows=getattr(llm.get_text_config(), "vocab_size", None),
        language=config.llm.language,
        languages=tuple(sorted(set(train_index.strings("language")))),
        prompt=config.llm.prompt,
        sign_languages=dict(entry.split("=") for entry in config.llm.sign_languages),
    )


def feature_extractor(config: RunConfig, world: World) -> FeatureExtractor:
    """The visual encoder, from stage 1 or with ImageNet weights, and what of it stays frozen."""
    if config.stage != "llm" or config.visual_run == "none":
        kind = "signs" if config.stage == "visual" else config.llm.input
        extractor = FeatureExtractor(imagenet_encoder(config, world), kind)
    else:
        extractor = export.read_features(stage_1_export(config), config.llm.input)
    if config.stage != "llm" or config.visual.frozen == "none":
        _tune_backbone(extractor.visual.backbone, config)
    extractor.visual.chunk_frames = config.visual.chunk_frames
    if config.visual.checkpointing and config.trains_visual:
        extractor.visual.backbone.checkpoint_activations()
    return extractor.freeze(config.visual.frozen if config.stage == "llm" else "none")


def imagenet_encoder(config: RunConfig, world: World) -> VisualEncoder:
    """With a new temporal module and the backbone of visual.weights."""
    backbone = _load_backbone(config, world)
    return VisualEncoder(temporal_kernel=config.visual.temporal_kernel, backbone=backbone)


def _tune_backbone(backbone: Backbone, config: RunConfig) -> None:
    """What of a backbone that is trained stays as it is, and what is added to it."""
    visual = config.visual
    backbone.freeze_batch_norm = visual.freeze_batch_norm
    backbone.freeze(visual.frozen_stages)
    backbone.tune(
        Tuning(
            visual.tune,
            rank=visual.lora_rank,
            alpha=visual.lora_alpha,
            targets=visual.lora_targets,
            section="visual",
        ),
        config.train.seed,
    )


def visual_model(config: RunConfig, codec: TextCodec, visual: FeatureExtractor) -> SignTranslator:
    light_t = build_light_translator(config.light_t.size, codec, config.light_t.dropout)
    adapter = Adapter(visual.feature_width, llm_width(light_t), embedding_scale(light_t))
    return SignTranslator(visual, adapter, light_t, codec)


def _load_backbone(config: RunConfig, world: World) -> Backbone:
    """That of visual.weights, first on rank 0, which fills the hub's cache. Raises UserError."""
    visual = config.visual
    made = list[Backbone]()

    def load() -> None:
        made.append(build_backbone(visual.weights, visual.width, visual.pretrained, config.data.crop_size))

    def first() -> None:
        if visual.pretrained:
            check_reachable(visual.weights)
        try:
            load()
        except OSError as error:
            raise UserError(
                f"visual.weights must be within reach, but {visual.weights} is not: "
                f"{str(error).splitlines()[0]} Give a folder or file of this machine, or "
                "--visual.weights=none to train from random weights, which costs accuracy."
            ) from error

    main_first(first, world)
    try:
        if not made:
            load()
    except OSError as error:
        raise RankError(
            f"visual.weights must be within reach of every machine, but {visual.weights} is not of "
            f"{socket.gethostname()}: {error}. Give a folder that all machines see."
        ) from error
    return made[0]


def stage_1_export(config: RunConfig) -> Path:
    """The export that stage llm begins with. Raises UserError where there is none or of another width."""
    try:
        folder = export.find(config.visual_run or "")
    except UserError as error:
        raise UserError(
            f"stage llm needs a result of stage visual: {error} Make one with: "
            f"deepspeed launch/train.py --stage visual --run={config.visual_run}"
        ) from error
    width = resnet_width(export.read_settings(folder)["visual"])
    if width not in (None, config.visual.width):
        raise UserError(
            f"visual.width must be {width} as in the stage-1 result {folder}, but is "
            f"{config.visual.width}. Give --visual.width={width} or a --visual_run."
        )
    return folder


def llm_model(
    config: RunConfig,
    codec: TextCodec,
    folder: Path,
    extractor: FeatureExtractor,
    ds_config: dict[str, Any],
    world: World,
) -> SignTranslator:
    name = config.llm.name
    check_bits(config.llm.bits, config.llm.tune, ds.zero_stage(ds_config), world.device)
    if config.llm.trim_vocabulary:
        trimmed = folder / "llm_trimmed"
        _write_once(trimmed, lambda out: trim_llm(config.llm.name, codec, out, config.llm.hub_code), world)
        name = str(trimmed)
    partitioning = ds.model_loading(ds_config)  # held until the model is loaded
    if not config.llm.pretrained:
        torch.manual_seed(config.train.seed)  # a resumed run, which trims nothing, draws the same weights
    try:
        llm = load_llm(name, llm_options(config, ds_config))
    except UserError as error:
        if world.is_main or world.local_rank:
            raise
        raise RankError(f"{error} (On {socket.gethostname()}.)") from error  # rank 0 may not have met it
    tune(llm, llm_tuning(config), config.train.seed)
    del partitioning
    if config.llm.checkpointing:
        checkpoint_llm(llm)
    adapter = Adapter(extractor.feature_width, llm_width(llm), embedding_scale(llm))
    visual = extractor if config.trains_visual else None
    model = SignTranslator(visual, adapter, llm, codec, config.llm.loss)
    return model if ds.zero_stage(ds_config) == 3 else model.to(world.device)


def check_llm_of(config: RunConfig) -> None:
    """Raise UserError for an LLM that cannot be loaded, where this run still has to read it."""
    run, llm = Path(config.run), config.llm
    has_codec, has_llm = (run / "tokenizer").is_dir(), (run / "llm_trimmed").is_dir()
    if has_codec and (has_llm or config.stage == "visual"):
        return
    as_it_is = config.stage != "visual" and not llm.trim_vocabulary
    check_llm(
        llm.name, llm.pretrained and config.stage != "visual", llm.hub_code, llm.bits if as_it_is else 16
    )


def llm_options(config: RunConfig, ds_config: dict[str, Any]) -> LlmOptions:
    llm = config.llm
    bits: Literal[32, 16, 8, 4] = 16 if ds_config.get("bf16", {}).get("enabled") else 32
    return LlmOptions(
        llm.dropout,
        llm.attention_dropout,
        llm.attention,
        llm.pretrained,
        llm.hub_code,
        llm.bits if llm.bits < 16 else bits,
    )


def llm_tuning(config: RunConfig) -> Tuning:
    llm = config.llm
    return Tuning(llm.tune, llm.layers, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, llm.lora_targets)
