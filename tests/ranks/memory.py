"""Started under a launcher by test_memory.py: ways to save memory, each trained for some
steps on two ranks.

Writes losses-RANK.json, {case: [loss of each step]}, and one state, {case}.safetensors, a
case.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import OptimConfig
from flallm_ds.data.text.prompt import Wording
from flallm_ds.models import loss
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.checkpointing import checkpoint_llm
from flallm_ds.models.llm.load import LlmOptions, embedding_scale, llm_width, load_llm
from flallm_ds.models.llm.tuning import Tuning, tune
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.training import engine as ds
from flallm_ds.training.batch_statistics import BatchStatistics
from flallm_ds.training.deepspeed_json import complete

ds.prepare()
VOCABULARY, STEPS, PIXELS = 61, 4, 32
RATE = 1.0  # of gradients clipped to a norm of 1
CODEC: Any = SimpleNamespace(pad_id=1, eos_id=2)
WORDINGS = {"mbart": Wording(start=(5,)), "qwen3": Wording(before=(7, 8), after=(9,))}
# (clips, longest target) of each rank at each step; a rank without a target is one that
# has no clip left.
WORK = [[(4, 9), (1, 1)], [(1, 2), (3, 30)], [(2, 6), (1, 0)], [(1, 0), (1, 1)]]


FULL = Tuning()


@dataclass(frozen=True)
class Case:
    family: str
    how: loss.LossKind = "logits"
    checkpointing: bool = False
    tuning: Tuning = FULL
    visual: bool = False  # a visual encoder is trained inside the engine
    small: int = 0  # tokens of which "auto" computes the logits at once


LORA = Tuning("lora", rank=4)
CASES = {
    "mbart": Case("mbart"),
    "mbart, chunks": Case("mbart", "chunks"),
    "mbart with its visual encoder": Case("mbart", visual=True),
    "mbart with its visual encoder, saving": Case("mbart", "chunks", True, visual=True),
    "qwen3": Case("qwen3"),
    # Some ranks take chunks at some steps, others do not.
    "qwen3, saving": Case("qwen3", "auto", True, small=20),
    "qwen3, LoRA": Case("qwen3", tuning=LORA),
    "qwen3, LoRA, saving": Case("qwen3", "chunks", True, LORA),
}


def write_llm(family: str, folder: Path) -> None:
    sizes = (
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        }
        if family == "mbart"
        else {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, pad_token_id=1, **sizes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(3)
    auto.from_config(config).save_pretrained(folder)


def translator(case: Case, folder: Path, config: dict[str, Any]) -> SignTranslator:
    torch.manual_seed(4)
    visual = VisualEncoder(width=4) if case.visual else None
    partitioning = ds.model_loading(config)
    llm = load_llm(str(folder), LlmOptions(dropout=0.2, attention_dropout=0.1))
    tune(llm, case.tuning)
    del partitioning
    if case.checkpointing:
        checkpoint_llm(llm)
        if visual is not None:
            visual.backbone.checkpoint_activations()
    adapter = Adapter(32, llm_width(llm), embedding_scale(llm))
    return SignTranslator(visual, adapter, llm, CODEC, case.how)


def batch(
    case: Case, step: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, list[Wording], torch.Tensor]:
    clips, longest = WORK[step][rank]
    generator = torch.Generator().manual_seed(10 * step + rank)
    num_frames_B = torch.arange(1, clips + 1)
    frames = int(num_frames_B.sum())
    shape = (frames, 3, PIXELS, PIXELS) if case.visual else (frames, 32)
    targets_BL = torch.randint(3, VOCABULARY, (clips, max(longest, 1)), generator=generator)
    if longest == 0:
        targets_BL.fill_(-100)
    elif clips > 1:
        targets_BL[0, longest // 2 :] = -100
    return (
        torch.randn(shape, generator=generator),
        num_frames_B,
        [WORDINGS[case.family]] * clips,
        targets_BL,
    )


def state_of(engine: ds.Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.state() if tensor is not None}


def train(
    case: Case, folder: Path, world: dist.World
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses of the steps, and the state before and after them (on rank 0)."""
    loss.CHUNK_BYTES = 3 * 4 * VOCABULARY
    loss.SMALL_BYTES = case.small * 4 * VOCABULARY
    config = complete({"zero_optimization": {"stage": 3}}, world.device, 1, clip=1.0)
    model = translator(case, folder / case.family, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Not Adam: its first steps are as long as the learning rate even where a gradient is
    # rounding noise.
    optim = OptimConfig(name="sgd", momentum=0.0)
    engine = ds.Engine(model, [{"params": trained, "lr": RATE}], optim, config, world)
    engine.module.train()
    statistics = BatchStatistics(engine.module, world)
    before = state_of(engine)
    losses = []
    for step in range(STEPS):
        with statistics:
            torch.manual_seed(100 * step + world.rank)
            value = engine(*batch(case, step, world.rank), 0.2)
            losses.append(value.item())
            engine.backward(value)
            engine.micro_step_done([RATE])
    return losses, before, state_of(engine)


def memory_ranks(*, out: Path) -> None:
    """out: where the results are written."""
    world = dist.start()
    for family in ("mbart", "qwen3"):
        dist.main_first(lambda family=family: write_llm(family, out / family), world)
    losses = {}
    for number, (name, case) in enumerate(CASES.items()):
        losses[name], before, after = train(case, out, world)
        if world.is_main:
            save_file(before, out / f"{number}.before.safetensors")
            save_file(after, out / f"{number}.safetensors")
    (out / f"losses-{world.rank}.json").write_text(json.dumps(losses))
    dist.stop()


if __name__ == "__main__":
    main(memory_ranks)
