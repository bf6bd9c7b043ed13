"""Write an export of a run: while it trains, or from its checkpoints.

Checkpoints are exported by one process without DeepSpeed, from the fragments of any number
of ranks. The memory holds the weights once, and no optimizer state.
"""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.files import replace_folder
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.llm.tuning import merged
from flallm_ds.models.weights import named_state
from flallm_ds.training.averaging import MeanReader
from flallm_ds.training.build.data import open_index
from flallm_ds.training.build.language import llm_model, visual_model
from flallm_ds.training.build.visual import feature_extractor
from flallm_ds.training.checkpoint import Saved, read_manifest
from flallm_ds.training.fragments import BUFFER, MASTER, Key
from flallm_ds.training.frozen import check_digest, frozen_digest
from flallm_ds.training.weights_record import read_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Exportable:
    """The parts of a run that an export consists of. module: a `SignTranslator`."""

    config: RunConfig
    index: Index
    codec: TextCodec
    extractor: FeatureExtractor
    module: Any

    def write(
        self,
        run: Path,
        out: Path,
        scores: dict[str, Any],
        state: Iterable[tuple[str, torch.Tensor | None]],
        averaged_steps: Sequence[int] = (),
    ) -> None:
        """Write an export. state: of the module, as `Engine.state` yields it on rank 0.

        averaged_steps: the steps whose weights were averaged, if they were. The folder
        appears complete or not at all. Raises OSError or SafetensorError.
        """
        frozen = () if self.config.trains_visual else named_state(self.extractor)
        tensors = itertools.chain(
            ((name, tensor) for name, tensor in state if tensor is not None),
            ((f"visual.{name}", tensor) for name, tensor in frozen),
        )
        parts = self.extractor.settings(), self.extractor.encoder.settings()
        settings = export.settings_of(self.config, self.index, scores, *parts)
        settings["weights"] = read_weights(run)
        if averaged_steps:
            settings["training"]["averaged_steps"] = list(averaged_steps)
        base = settings["base"]
        if base and base.startswith(".") and out.resolve().parent != run.resolve():
            settings["base"] = str((run / "best" / base).resolve())
        llm = self.module.language_model
        replace_folder(
            out, lambda folder: export.write(folder, settings, tensors, llm, self.codec)
        )


class _Host(World):
    """A single process that computes on the CPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def export_checkpoints(run: Path, checkpoints: Sequence[Path], out: Path) -> None:
    """Write an export of a checkpoint of a run, or of the mean of several.

    checkpoints: the newest last. The frozen weights are loaded from their source, and the
    shards of the run must exist. Raises UserError if a checkpoint is damaged, or if a source
    has changed.
    """
    saved = list(map(_verified, checkpoints))
    state_of_newest = saved[-1].state
    config = RunConfig.load(run / "config.json")
    # Before this key existed: fp32, the precision of the master weights.
    precision = state_of_newest["engine"].get("precision", "fp32")
    parts = _build(config, run, precision)
    _load(parts, saved)
    base = export.base_of(config)
    state = []
    for name, tensor in named_state(parts.module):
        # With a base model, only what is trained of the LLM.
        in_base = base and name.startswith("language_model.") and not tensor.requires_grad
        if not in_base:
            state.append((name, tensor.detach()))
    whole = merged(iter(state), nn.ModuleDict({"visual": parts.extractor}))
    if len(saved) == 1:
        parts.write(run, out, _scores(run, state_of_newest["position"]["epoch"]), whole)
    else:
        steps = [one.state["position"]["global_step"] for one in saved]
        parts.write(run, out, {}, whole, steps)


def _verified(checkpoint: Path) -> Saved:
    """Return a checkpoint after reading every byte of it. Raises UserError."""
    manifest = read_manifest(checkpoint)
    saved = Saved(checkpoint, manifest.state, manifest.files, {})
    for file in saved.files:
        fault = saved.reader().verify(file)
        if fault is not None:
            raise UserError(
                f"Cannot export {checkpoint}: {file.name} {fault}. Give another checkpoint."
            )
    return saved


def _build(config: RunConfig, run: Path, precision: str) -> Exportable:
    """Build the model of a run on the host, with the weights that it started from."""
    # Quantized weights need a GPU.
    world = (_Host if config.llm.bits >= 16 else World)(0, 1, 0, 1)
    index = open_index(config.data, "train", world)
    # As in `build_task`: the order of the calls decides initial weights.
    torch.manual_seed(config.train.seed)
    codec = TextCodec.load(run / "tokenizer", config.llm.hub_code)
    extractor = feature_extractor(config, world)
    if config.stage == "visual":
        codec = codec.for_light_t()
        module = visual_model(config, codec, extractor)
    else:
        ds_config = {"bf16": {"enabled": precision == "bf16"}}
        module = llm_model(config, codec, run, extractor, ds_config, world)
    if precision in DTYPES:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[precision])
    return Exportable(config, index, codec, extractor, module)


@torch.no_grad()
def _load(parts: Exportable, saved: Sequence[Saved]) -> None:
    """Load the trained weights and the buffers, averaged over checkpoints. Raises UserError
    if the frozen weights are not those of the run."""
    module: nn.Module = parts.module
    digest = frozen_digest(module, lambda _: nullcontext(), World(0, 1, 0, 1))
    encoder = "" if parts.config.trains_visual else parts.extractor.fingerprint()
    for one in saved:
        check_digest(one.path, one.state["engine"]["frozen"], digest)
        if encoder != one.state["frozen_encoder"]:
            raise UserError(
                f"Cannot export {one.path}: its frozen visual encoder has changed. Restore "
                "the original --visual_run of the run."
            )
    reader = MeanReader([one.reader() for one in saved])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            master = torch.zeros(parameter.numel())
            reader.read(Key(MASTER, name, 0, parameter.numel()), master)
            parameter.copy_(master.view_as(parameter))
    persistent = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in persistent:
            reader.read(Key(BUFFER, name, 0, buffer.numel()), buffer.view(-1))


def _scores(run: Path, epoch: int) -> dict[str, Any]:
    """Return the scores of the best export if it is of the same epoch; else none."""
    best = run / "best"
    if (best / export.SETTINGS_FILE).is_file():
        scores: dict[str, Any] = export.read_settings(best)["scores"]
        if scores.get("epoch") == epoch:
            return scores
    return {}
