"""Train a few real steps and measure memory and time, to compare with a plan.

    deepspeed --num_gpus=2 --module flallm_ds.planning.measure --folder=FOLDER ...

The LLM has the architecture of FOLDER/llm and random weights; clips are random features.
Engine, loss and optimizer are those of a run. Each rank writes FOLDER/rank-RANK.json.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import RunConfig
from flallm_ds.data.text.prompt import Wording
from flallm_ds.dist import World
from flallm_ds.files import write_json
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.checkpointing import checkpoint_llm
from flallm_ds.models.llm.load import LlmOptions, embedding_scale, llm_width, load_llm
from flallm_ds.models.llm.tuning import tune
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.planning.plan import PROMPT_TOKENS
from flallm_ds.planning.sizes import FEATURE_WIDTH
from flallm_ds.training import engine as ds
from flallm_ds.training.build.engine import deepspeed_config, parameter_groups
from flallm_ds.training.build.language import llm_options, llm_tuning

STEPS = 3  # ZeRO-3 records the order of the layers in the first one
CONFIG, LLM = "config.json", "llm"


@dataclass
class Measured:
    """What one rank measured, in bytes and seconds.

    baseline: resident memory after the imports and the start of the process group, before
    the model. peak: the highest resident memory until the last step. resident: after each
    phase, by its name. device_peak: the highest allocated memory of the GPU, without the
    CUDA context; 0 on a CPU. checkpoint: what this rank would write.
    """

    baseline: int
    peak: int = 0
    device_peak: int = 0
    checkpoint: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)


def measure(*, folder: Path, clips: int, frames: int, tokens: int) -> None:
    """Train STEPS steps of one micro-batch a rank.

    Options:
        folder: with config.json of a run and the LLM's config
        clips: of a micro-batch
        frames: visual tokens of a clip
        tokens: target tokens of a clip
    """
    with dist.session() as world:
        ds.prepare()
        measured = Measured(baseline=status("VmRSS"))
        config = RunConfig.load(folder / CONFIG)
        engine, lrs = _engine(config, folder / LLM, world)
        measured.resident["engine"] = status("VmRSS")
        batch = _batch(engine.module, clips, frames, tokens)
        for _ in range(STEPS):
            begin = time.perf_counter()
            loss = engine(*batch, config.train.label_smoothing)
            engine.backward(loss / (clips * tokens))
            engine.micro_step_done(lrs)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            measured.step_s.append(time.perf_counter() - begin)
        measured.resident["steps"] = status("VmRSS")
        measured.peak = status("VmHWM")
        measured.checkpoint = engine.num_fragment_bytes
        if world.device.type == "cuda":
            measured.device_peak = torch.cuda.max_memory_allocated()
        write_json(folder / f"rank-{world.rank}.json", asdict(measured))


def status(name: str) -> int:
    """Return a value of /proc/self/status in bytes: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"Linux writes {name}")


def _engine(config: RunConfig, llm: Path, world: World) -> tuple[ds.Engine, list[float]]:
    """Build the engine as `build_task` does, from the config of an LLM alone."""
    ds_config = deepspeed_config(config, world)
    torch.manual_seed(config.train.seed)
    partitioning = ds.model_loading(ds_config)  # held until the model is loaded
    options = llm_options(config, ds_config)
    model = load_llm(str(llm), LlmOptions(**{**vars(options), "pretrained": False}))
    tune(model, llm_tuning(config), config.train.seed)
    del partitioning
    if config.llm.checkpointing:
        checkpoint_llm(model)
    adapter = Adapter(FEATURE_WIDTH, llm_width(model), embedding_scale(model))
    # The translator reads two ids of the codec.
    codec: Any = SimpleNamespace(pad_id=0, eos_id=1)
    translator = SignTranslator(None, adapter, model, codec, config.llm.loss)
    groups = parameter_groups(translator, config)
    engine = ds.Engine(translator, groups, config.optim, ds_config, world)
    engine.module.train()
    return engine, [group["lr"] for group in groups]


def _batch(
    module: SignTranslator, clips: int, frames: int, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, list[Wording], torch.Tensor]:
    """Return the inputs of the translator for clips of equal length."""
    device = module.language_model.device
    features = torch.randn(clips * frames, FEATURE_WIDTH, device=device)
    wording = Wording(start=(2,))
    if module.decoder_only:
        wording = Wording(before=(2,) * PROMPT_TOKENS)
    targets = torch.randint(3, 100, (clips, tokens), device=device)
    return features, torch.full((clips,), frames), [wording] * clips, targets


if __name__ == "__main__":
    main(measure)
