"""Started under a launcher by test_engine.py: every case of the engine on two ranks, one
JSON a rank."""

import json
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    MBartConfig,
)

from flallm_ds import dist
from flallm_ds.command import main
from flallm_ds.config import OptimConfig
from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import LlmOptions, load_llm
from flallm_ds.models.llm.tuning import Tuning, tune
from flallm_ds.training import checkpoint
from flallm_ds.training import engine as ds
from flallm_ds.training.deepspeed_json import complete

ds.prepare()
FEATURES, STEPS, MICRO_BATCHES = 8, 4, 2
ZEROS: dict[str, dict[str, Any]] = {
    "none": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero3": {"stage": 3},
    "zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


class Plain(nn.Module):
    """Two layers with a bias; `language_model` is a name that the engine looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(FEATURES, 7)
        self.language_model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        self.language_model[0].weight.requires_grad_(False)

    def forward(self, inputs_NF: torch.Tensor) -> torch.Tensor:
        return self.language_model(self.adapter(inputs_NF)).square().sum()


def groups_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    return {
        "adapter": list(model.adapter.parameters()),
        "first": list(model.language_model[0].parameters()),
        "last": list(model.language_model[2].parameters()),
        "all": list(model.parameters()),
    }


def make_engine(model: nn.Module, zero: dict[str, Any], world: dist.World) -> ds.Engine:
    config = complete({"zero_optimization": zero}, world.device, MICRO_BATCHES, clip=1e-3)
    trained = [p for p in model.parameters() if p.requires_grad]
    return ds.Engine(model, [{"params": trained, "lr": 1e-2}], OptimConfig(), config, world)


def batches(world: dist.World, step: int) -> Iterator[torch.Tensor]:
    """This rank's micro-batches of a step, of unequal sizes."""
    for number in range(MICRO_BATCHES):
        place = world.rank * MICRO_BATCHES + number
        generator = torch.Generator().manual_seed(100 * step + place)
        yield torch.randn(3 + place, FEATURES, generator=generator)


def grad_norms(zero: dict[str, Any], world: dist.World) -> list[dict[str, Any]]:
    """The norms of each step next to those of plain PyTorch over the batches of all ranks."""
    torch.manual_seed(0)
    model = Plain()
    engine = make_engine(model, zero, world)
    found = []
    for step in range(2):
        plain = Plain()
        weights = dist.broadcast_object(dict(engine.state()), world)
        plain.load_state_dict(weights)
        for rank in range(world.size):
            for batch in batches(dist.World(rank, world.size, rank, world.size), step):
                (plain(batch) / 10).backward()
        for number, batch in enumerate(batches(world, step)):
            engine.backward(engine(batch) * (world.size / 10))
            if number == MICRO_BATCHES - 1:
                norms = engine.grad_norms(groups_of(model))
            engine.micro_step_done([1e-2])
        expected = {
            name: torch.cat([p.grad.flatten() for p in group if p.grad is not None])
            .norm()
            .item()
            for name, group in groups_of(plain).items()
        }
        found.append(
            {"norms": norms, "expected": expected, "grad_norm": engine.grad_norm()}
        )
    return found


def without_a_finite_gradient(zero: dict[str, Any], world: dist.World) -> dict[str, Any]:
    """A good step, and one of which a single gradient of rank 1 is NaN."""
    torch.manual_seed(0)
    model = Plain()
    engine = make_engine(model, zero, world)
    states, stuck = [], []
    for step in range(2):
        for number, batch in enumerate(batches(world, step)):
            is_bad = step == 1 and world.rank == 1 and number == 0
            loss = engine(batch) * (world.size / 10)
            if is_bad:
                hook = model.adapter.bias.register_hook(
                    lambda gradient: gradient * math.nan
                )
            engine.backward(loss)
            if is_bad:
                hook.remove()
            engine.micro_step_done([1e-2])
        states.append(dist.broadcast_object(dict(engine.state()), world))
        stuck.append(engine.is_stuck)
    before, after = states
    same = all(torch.equal(before[name], after[name]) for name in before)
    finite = [engine.is_finite()]
    with torch.no_grad():
        optimizer = getattr(engine._optimizer, "optimizer", engine._optimizer)
        state = next(iter(optimizer.state.values()))
        state["exp_avg_sq"].fill_(math.inf)
    finite.append(engine.is_finite())
    return {"stuck": stuck, "same": same, "finite": finite}


TUNINGS = {
    "full": Tuning(how="full"),
    "pattern": Tuning(how="full", layers=r"layers\.1\."),
    "lora": Tuning(how="lora", rank=4),
    "dora": Tuning(how="dora", rank=4),
    "frozen": Tuning(how="frozen"),
    "lora_and_pattern": Tuning(how="lora", rank=4, targets="q_proj", layers="norm|q_proj"),
}
WIDTH, VOCABULARY, LENGTH = 16, 40, 5
LLMS = {
    "mbart": MBartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
}


TUNED = [f"mbart/{how}/{zero}" for how in TUNINGS for zero in ("zero2", "zero3")]
TUNED += ["mbart/lora/zero3_offload", "llama/lora/zero2", "llama/lora/zero3"]
RESUMED = [
    "mbart/lora/zero2",
    "mbart/dora/zero3",
    "llama/lora_and_pattern/zero3_offload",
]


class Translator(nn.Module):
    """An adapter and an LLM: features in, words out."""

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.adapter = nn.Linear(FEATURES, WIDTH)
        self.language_model = llm

    def forward(self, features_BSF: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
        memory_BSE = self.adapter(features_BSF)
        if self.language_model.config.is_encoder_decoder:
            output = self.language_model(
                inputs_embeds=memory_BSE, decoder_input_ids=ids_BL[:, :-1], use_cache=False
            )
            logits_BLV = output.logits
        else:
            words_BLE = self.language_model.get_input_embeddings()(ids_BL[:, :-1])
            inputs_BLE = torch.cat([memory_BSE, words_BLE], 1)
            logits_BLV = self.language_model(
                inputs_embeds=inputs_BLE, use_cache=False
            ).logits
            logits_BLV = logits_BLV[:, -LENGTH + 1 :]
        return nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1).float(), ids_BL[:, 1:].flatten()
        )


def save_llm(llm: str, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if LLMS[llm].is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(LLMS[llm]).save_pretrained(folder)


def make_translator(
    folder: Path, tuning: Tuning, config: dict[str, Any], seed: int = 0
) -> Translator:
    partitioning = ds.model_loading(config)
    bits = 16 if config.get("bf16", {}).get("enabled") else 32
    llm = load_llm(str(folder), LlmOptions(dropout=0.1, bits=bits))
    tune(llm, tuning, seed)
    del partitioning
    torch.manual_seed(seed)
    return Translator(llm)


def train(engine: ds.Engine, world: dist.World, steps: range) -> list[float]:
    """The loss of each step over all ranks. The batches are the same in each, so that it
    falls."""
    engine.module.train()
    losses = []
    for step in steps:
        total = 0.0
        for number in range(MICRO_BATCHES):
            place = world.rank * MICRO_BATCHES + number
            generator = torch.Generator().manual_seed(place)
            features_BSF = torch.randn(2, 3, FEATURES, generator=generator)
            ids_BL = torch.randint(4, VOCABULARY, (2, LENGTH), generator=generator)
            torch.manual_seed(1000 * step + place)
            loss = engine(
                features_BSF.to(next(engine.module.adapter.parameters()).dtype), ids_BL
            )
            total += loss.item()
            engine.backward(loss / MICRO_BATCHES)
            engine.micro_step_done([1e-2])
        losses.append(dist.all_reduce_sum([total], world)[0] / MICRO_BATCHES / world.size)
    return losses


def tuned_engine(
    folder: Path, tuning: Tuning, zero: dict[str, Any], world: dist.World
) -> ds.Engine:
    config = complete({"zero_optimization": zero}, world.device, MICRO_BATCHES, clip=1.0)
    model = make_translator(folder, tuning, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return ds.Engine(model, [{"params": trained, "lr": 1e-2}], OptimConfig(), config, world)


def tuned(
    folder: Path, tuning: Tuning, zero: dict[str, Any], world: dist.World
) -> dict[str, Any]:
    engine = tuned_engine(folder, tuning, zero, world)
    before = dict(engine.state())
    losses = train(engine, world, range(STEPS))
    after = dict(engine.state())
    trained = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    return dist.broadcast_object(
        {
            "losses": losses,
            "num_trained": len(trained),
            "num_frozen": len([n for n, _ in engine.module.named_parameters()])
            - len(trained),
            "changed": sorted(
                n for n in before if world.is_main and not torch.equal(before[n], after[n])
            ),
            "trained": sorted(trained),
        },
        world,
    )


def resumed(
    folder: Path, tuning: Tuning, zero: dict[str, Any], out: Path, world: dist.World
) -> dict[str, Any]:
    """A run of STEPS steps, saved after the second, and one that resumes from there."""
    dist.main_first(lambda: out.mkdir(parents=True), world)
    engine = tuned_engine(folder, tuning, zero, world)
    whole = train(engine, world, range(2))
    state = {"engine": engine.checkpoint_state()}
    saving = checkpoint.Save(out, 2, state, engine.fragments(), world, background=False)
    saving.commit(keep=1)
    whole += train(engine, world, range(2, STEPS))
    again = tuned_engine(folder, tuning, zero, world)
    saved = checkpoint.newest(out, world)
    assert saved is not None
    again.load(saved.reader(), saved.state["engine"])
    module = engine.module
    persistent = module.state_dict().keys()
    found = {
        "whole": whole,
        "resumed": train(again, world, range(2, STEPS)),
        "trained": [n for n, p in module.named_parameters() if p.requires_grad],
        "buffers": [n for n, _ in module.named_buffers() if n in persistent],
    }
    other = tuned_engine(folder.with_name(f"{folder.name}_other"), tuning, zero, world)
    try:
        other.load(saved.reader(), saved.state["engine"])
    except UserError as error:
        found["another_base"] = str(error)
    return found


def in_bf16(folder: Path, tuning: Tuning, world: dist.World) -> dict[str, Any]:
    """ZeRO-3 in bf16, which the engine does not choose on a CPU by itself."""
    config = complete(
        {"zero_optimization": ZEROS["zero3"]}, world.device, MICRO_BATCHES, clip=1.0
    )
    config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    model = make_translator(folder, tuning, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = ds.Engine(
        model, [{"params": trained, "lr": 1e-2}], OptimConfig(), config, world
    )
    dtypes = {str(p.dtype) for p in engine.module.parameters()}
    return {"losses": train(engine, world, range(STEPS)), "dtypes": sorted(dtypes)}


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
BF16_STATES = {
    "bf16": {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
    }
}
# The first steps overflow, so that the loss scale falls; then it grows every two steps.
FP16 = {
    "fp16": {
        "enabled": True,
        "initial_scale_power": 18,
        "loss_scale_window": 2,
        "hysteresis": 1,
    }
}
PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16/zero1": ("zero1", BF16),
    "bf16/zero2": ("zero2", BF16),
    "bf16/zero3_offload": ("zero3_offload", BF16),
    "bf16_states/zero2": ("zero2", BF16_STATES),
    "bf16_states/zero3": ("zero3", BF16_STATES),
    "fp16/zero2": ("zero2", FP16),
    "fp16/zero3": ("zero3", FP16),
}


def precise_engine(case: str, world: dist.World) -> ds.Engine:
    """An engine in a precision that ours does not choose on a CPU by itself."""
    zero, precision = PRECISIONS[case]
    # PyTorch computes in fp16 on any CPU; DeepSpeed demands instructions that make it fast.
    get_accelerator().is_fp16_supported = lambda: True
    torch.manual_seed(0)
    config = complete({"zero_optimization": ZEROS[zero]}, world.device, MICRO_BATCHES, 1.0)
    model = Plain()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "lr": 1e-2}]
    return ds.Engine(model, groups, OptimConfig(), config | precision, world)


def steps_of(engine: ds.Engine, world: dist.World, steps: range) -> list[float]:
    """The loss of each step over all ranks."""
    dtype = engine.module.adapter.weight.dtype
    losses = []
    for step in steps:
        total = 0.0
        for batch in batches(world, step):
            loss = engine(batch.to(dtype)).float()
            total += loss.item()
            engine.backward(loss / MICRO_BATCHES)
            engine.micro_step_done([1e-2])
        losses.append(dist.all_reduce_sum([total], world)[0])
    return losses


def resumed_in(case: str, out: Path, world: dist.World) -> dict[str, Any]:
    """A run of ten steps, saved after the sixth, and one that resumes from there."""
    engine = precise_engine(case, world)
    steps_of(engine, world, range(6))
    state = engine.checkpoint_state()
    fragments = list(engine.fragments())
    checkpoint.Save(out, 6, state, fragments, world, background=True).commit(keep=1)
    whole = steps_of(engine, world, range(6, 10))
    again = precise_engine(case, world)
    saved = checkpoint.newest(out, world)
    assert saved is not None
    again.load(saved.reader(), saved.state)
    return {
        "whole": whole,
        "resumed": steps_of(again, world, range(6, 10)),
        "state": state,
        "dtypes": sorted({f"{key.kind} {tensor.dtype}" for key, tensor in fragments}),
        "scales": [one.checkpoint_state()["numbers"] for one in (engine, again)],
    }


def timeouts() -> list[float]:
    """The timeout of each process group of this rank, in minutes."""
    found = []
    for group in torch.distributed.distributed_c10d._world.pg_map:
        backend = group._get_backend(torch.device("cpu"))
        found.append(backend.options._timeout.total_seconds() / 60)
    return found


def engine_ranks(*, out: Path) -> None:
    """out: where rank-0.json and rank-1.json are written."""
    world = dist.start(timeout=timedelta(minutes=20))
    cases: dict[str, Callable[[], Any]] = {}
    for name, zero in ZEROS.items():
        cases[f"grad_norms/{name}"] = lambda zero=zero: grad_norms(zero, world)
        cases[f"not_finite/{name}"] = lambda zero=zero: without_a_finite_gradient(
            zero, world
        )
    for llm in LLMS:
        for seed, name in enumerate((llm, f"{llm}_other")):
            dist.main_first(
                lambda llm=llm, seed=seed, name=name: save_llm(llm, seed, out / name), world
            )
    for case in TUNED:
        llm, how, zero = case.split("/")
        cases[f"tuned/{case}"] = lambda a=(out / llm, TUNINGS[how], ZEROS[zero]): tuned(
            *a, world
        )
    for case in RESUMED:
        llm, how, zero = case.split("/")
        arguments = (out / llm, TUNINGS[how], ZEROS[zero], out / "saved" / case)
        cases[f"resumed/{case}"] = lambda a=arguments: resumed(*a, world)
    for how in ("lora", "frozen"):
        cases[f"bf16/{how}"] = lambda how=how: in_bf16(out / "mbart", TUNINGS[how], world)
    for case in PRECISIONS:
        folder = out / "precise" / case
        cases[f"precise/{case}"] = lambda a=(case, folder): resumed_in(*a, world)
    cases["timeouts"] = timeouts
    results = {name: case() for name, case in cases.items()}
    (out / f"rank-{world.rank}.json").write_text(json.dumps(results))
    dist.stop()


main(engine_ranks)
