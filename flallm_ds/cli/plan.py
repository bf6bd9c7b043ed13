"""`flallm plan`: whether an LLM fits on a cluster, with which DeepSpeed JSON, how fast."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flallm_ds.config import RunConfig
from flallm_ds.errors import UserError, require
from flallm_ds.recipes import resolve, train_clips

if TYPE_CHECKING:
    from flallm_ds.planning.plan import Planner


def plan(
    *,
    llm: str,
    nodes: int = 1,
    gpus: int = 8,
    gpu_gb: float = 80.0,
    host_gb: float = 512.0,
    nvme_gb: float = 0.0,
    tune: Literal["full", "lora", "dora", "frozen"] | None = None,
    recipe: str = "phoenix14t",
    clips: int | None = None,
    frames: int = 30,
    longest: int = 120,
    tokens: int = 30,
    vocab_size: int | None = None,
    efficiency: float = 0.35,
    tflops: float | None = None,
    link_gbs: float | None = None,
    network_gbs: float = 25.0,
    disk_gbs: float = 2.0,
    json: bool = False,
    measure: bool = False,
    ranks: int = 2,
    **overrides: str,
) -> None:
    """Compute memory and speed of stage llm for each file of ds_configs, and recommend one.

    Nothing is loaded but the config of the LLM. Options of a run, such as
    --llm.checkpointing=true, change the plan; --train.deepspeed=FILE adds your own JSON.

    Example: flallm plan --llm=7B --nodes=2 --gpus=8 --gpu_gb=80 --tune=lora

    Options:
        llm: hub id, folder with a config.json, or a size: 0.6B (mBART-large), 0.5B, 1B,
            1.7B, 3B, 7B, 8B, 13B, 32B, 70B
        nodes: machines
        gpus: GPUs of each
        gpu_gb: memory of a GPU
        host_gb: memory of a machine
        nvme_gb: free local disk of a machine, for zero3_nvme.json; 0 for none
        tune: instead of --llm.tune
        recipe: whose stage llm is planned
        clips: training clips of an epoch; by default those of the recipe's corpus
        frames: kept frames of a clip, on average
        longest: kept frames of a long clip, for the memory
        tokens: target tokens of a clip
        vocab_size: vocabulary entries after trimming; by default all are counted
        efficiency: share of a GPU's peak that is reached
        tflops: peak of a GPU in bf16; by default that of a usual GPU with this memory
        link_gbs: GB/s between the GPUs of a machine; by default as for tflops
        network_gbs: GB/s between machines, for each machine
        disk_gbs: GB/s to write a checkpoint, over all machines
        json: print JSON
        measure: train three steps on this machine and compare with the plan for it
        ranks: processes of --measure on a machine without GPUs
    """
    at_least_one = {"nodes": nodes, "gpus": gpus, "frames": frames, "longest": longest}
    _check_at_least_one(at_least_one | {"tokens": tokens, "ranks": ranks})
    above_zero = {"gpu_gb": gpu_gb, "host_gb": host_gb, "network_gbs": network_gbs}
    _check_above_zero(above_zero | {"disk_gbs": disk_gbs, "efficiency": efficiency})
    config = _config(recipe, tune, overrides)
    # torch and transformers take seconds to import: only after the options are checked.
    from flallm_ds.planning import speed
    from flallm_ds.planning.plan import Cluster, Corpus, Llm, Planner

    peak, link = speed.default_rates(gpu_gb)
    planner = Planner(
        Llm(llm, config, vocab_size),
        Cluster(nodes, gpus, gpu_gb, host_gb, nvme_gb),
        Corpus(frames, longest, tokens, clips or train_clips(recipe)),
        speed.Rates(
            flops=1e12 * (tflops or peak),
            efficiency=efficiency,
            link=1e9 * (link_gbs or link),
            network=1e9 * network_gbs,
            pcie=20e9,
            dram=150e9,
            disk=1e9 * disk_gbs,
            nvme=5e9,
        ),
        _files(config),
    )
    if measure:
        _print_measured(planner, ranks, json)
    else:
        _print_plan(planner, json)


def _print_measured(planner: "Planner", ranks: int, json: bool) -> None:
    """Train three steps on this machine, and print them next to the plan for it."""
    from flallm_ds.planning import compare

    found = compare.compare(planner, ranks)
    print(compare.json_of(found) if json else compare.text_of(found), flush=True)


def _print_plan(planner: "Planner", json: bool) -> None:
    """Print the plan. Raises UserError if the LLM fits with none of the files."""
    from flallm_ds.planning import table

    print(table.json_of(planner) if json else table.text_of(planner), flush=True)
    if planner.best() is None:
        raise UserError(
            f"--llm must fit on the cluster ({planner.cluster}), got {planner.llm.name}, "
            "which does not. Use one of the changes above, or a smaller LLM."
        )


def _check_at_least_one(numbers: Mapping[str, int]) -> None:
    """Raise UserError for an option below 1."""
    for name, number in numbers.items():
        require(number >= 1, f"--{name} must be at least 1, got {number}.")


def _check_above_zero(sizes: Mapping[str, float]) -> None:
    """Raise UserError for an option that is not above 0."""
    for name, value in sizes.items():
        require(value > 0, f"--{name} must be above 0, got {value:g}.")


def _config(recipe: str, tune: str | None, overrides: Mapping[str, str]) -> RunConfig:
    """Return the config of stage llm. Raises UserError if its encoder is not frozen."""
    given = dict(overrides)
    if tune is not None:
        given["llm.tune"] = tune
    config = resolve("llm", recipe, given)
    require(
        not config.trains_visual,
        "visual.frozen must be all for flallm plan, which covers an LLM with a frozen "
        f"encoder, got {config.visual.frozen}. Leave --visual.frozen out.",
    )
    return config


def _files(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the DeepSpeed JSONs to compare: those of ds_configs, and the run's own."""
    # torch takes seconds to import: only after the options are checked.
    from flallm_ds.planning.plan import shipped_files
    from flallm_ds.training.deepspeed_json import read_json

    files = shipped_files()
    if config.train.deepspeed:
        path = Path(config.train.deepspeed)
        if path.parent != Path("ds_configs"):
            files[path.name] = read_json(path, zero_keys=None)
    return files
