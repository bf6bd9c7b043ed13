"""Test the checks of the DeepSpeed JSON. Imports DeepSpeed, which takes 10 s."""

import json
from pathlib import Path

import pytest
import torch

from flallm_ds.errors import UserError
from flallm_ds.training.deepspeed_json import OWNED_BY_RUN, complete, for_cpu, zero_stage
from tests.helpers.paths import ROOT

ds = pytest.importorskip("flallm_ds.training.engine")

JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
CPU = torch.device("cpu")


def read(tmp_path: Path, config: dict) -> dict:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    return ds.read_deepspeed_config(path)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_every_shipped_json_is_valid_for_deepspeed(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = ds.read_deepspeed_config(path)
    assert zero_stage(config) == int(path.stem[4])
    on_the_host = any(word in path.stem for word in ("offload", "nvme", "bf16_states"))
    assert on_the_host == ("offload_optimizer" in config["zero_optimization"])
    for device in (CPU, torch.device("cuda")):
        parsed = DeepSpeedConfig(complete(config, device, accumulation=1, clip=1.0))
        assert (
            parsed.zero_optimization_stage == int(path.stem[4])
            and parsed.gradient_clipping == 1.0
        )


def test_every_shipped_json_is_in_the_readme():
    assert {"zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme"} <= {
        path.stem for path in JSONS
    }
    readme = (JSONS[0].parent / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in JSONS if f"| `{path.name}` |" not in readme] == []


def test_on_a_cpu_there_is_no_offload_to_nvme():
    config = for_cpu(json.loads((JSONS[0].parent / "zero3_nvme.json").read_text()))
    assert {
        config["zero_optimization"][part]["device"]
        for part in ("offload_optimizer", "offload_param")
    } == {"cpu"}


def test_an_unknown_key_is_an_error_that_names_the_nearest_key(tmp_path):
    """DeepSpeed would ignore it without a message."""
    with pytest.raises(
        UserError,
        match=r"mine\.json must be .*, got 'zero_optimisation': did you mean zero_opt",
    ):
        read(tmp_path, {"zero_optimisation": {"stage": 2}})


def test_an_unknown_zero_key_is_an_error_that_names_the_nearest_key(tmp_path):
    with pytest.raises(
        UserError, match=r"zero_optimization\.overlap_com: did you mean overlap_comm"
    ):
        read(tmp_path, {"zero_optimization": {"stage": 2, "overlap_com": True}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_hpz_partition_size", 8),
        ("compute_grad_norm", False),
        ("zenflow", {"topk_ratio": 0.1}),
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("zero_quantized_gradients", True),
        ("mics_shard_size", 8),
        ("mics_hierarchical_params_gather", True),
    ],
)
def test_a_key_that_breaks_a_guarantee_is_an_error(tmp_path, key, value):
    with pytest.raises(UserError, match=rf"zero_optimization\.{key} must be .*, got "):
        read(tmp_path, {"zero_optimization": {"stage": 3, key: value}})


def test_the_check_for_gradients_that_are_not_finite_cannot_be_disabled(tmp_path):
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config as BF16Config

    with pytest.raises(
        UserError,
        match=r"bf16\.check_grad_overflow must be true in .*mine\.json, got false",
    ):
        read(tmp_path, {"bf16": {"enabled": True, "check_grad_overflow": False}})
    assert BF16Config(enabled=True).check_grad_overflow, "DeepSpeed's default"


def test_both_names_of_a_zero_key_are_valid(tmp_path):
    keys = {"stage": 3, "stage3_prefetch_bucket_size": 1000, "max_live_parameters": 1000}
    assert read(tmp_path, {"zero_optimization": keys})["zero_optimization"] == keys


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("train_batch_size", "data.batch_clips"),
        ("gradient_accumulation_steps", "data.micro_batches"),
        ("gradient_clipping", "optim.clip"),
        ("optimizer", "optim.name"),
        ("scheduler", "optim.warmup"),
    ],
)
def test_a_key_that_an_option_sets_is_an_error_that_names_the_option(
    tmp_path, name, option
):
    with pytest.raises(
        UserError,
        match=rf"{name} must not be set in .*mine\.json, got 1\. Set --{option} instead",
    ):
        read(tmp_path, {name: 1, "zero_optimization": {"stage": 2}})


def test_the_options_that_set_keys_exist():
    from flallm_ds.config import RunConfig

    options = RunConfig(stage="visual", run="r").options()
    assert [o for o in OWNED_BY_RUN.values() if o.split()[0] not in options] == []


@pytest.mark.parametrize("content", ["{", "[" * 100_000, None])
def test_a_file_that_is_missing_or_not_json_is_an_error(tmp_path, content):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json"):
        ds.read_deepspeed_config(path)


def test_json_that_is_not_an_object_is_an_error(tmp_path):
    for content in ([1], {"zero_optimization": 2}):
        with pytest.raises(UserError, match=r"mine\.json"):
            read(tmp_path, content)


def test_on_a_cpu_the_same_zero_stage_uses_fp32_and_no_compiled_operators():
    config = json.loads((JSONS[0].parent / "zero3_offload.json").read_text())
    before = json.dumps(config)
    on_cpu = for_cpu(config)
    assert json.dumps(config) == before
    assert not {"bf16", "fp16", "torch_autocast", "data_types"} & set(on_cpu)
    zero = on_cpu["zero_optimization"]
    assert zero["stage"] == 3 and zero["overlap_comm"] is False
    assert zero["stage3_param_persistence_threshold"] == 0
    assert (
        zero["offload_param"]
        == zero["offload_optimizer"]
        == {"device": "cpu", "pin_memory": False}
    )
    assert on_cpu["zero_force_ds_cpu_optimizer"] is False


def test_on_a_gpu_the_json_is_not_changed():
    config = ds.read_deepspeed_config(JSONS[0].parent / "zero3.json")
    whole = complete(config, torch.device("cuda"), accumulation=3, clip=0.5)
    assert {name: whole[name] for name in config} == config
    assert (whole["gradient_accumulation_steps"], whole["gradient_clipping"]) == (3, 0.5)


@pytest.mark.parametrize("given", [{}, {"zero_force_ds_cpu_optimizer": True}])
def test_any_optimizer_may_be_offloaded_unless_the_json_forbids_it(given):
    completed = complete(given, torch.device("cuda"), 1, 1.0)
    assert completed["zero_force_ds_cpu_optimizer"] is bool(given)


def test_without_zero_the_stage_is_0():
    assert zero_stage({}) == 0 and ds.model_loading({}) is None


# --- learning rates that low precision rounds away


BF16 = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
FP16 = {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}


def checked(json_config: dict, stage: str = "llm", **options: str) -> None:
    from flallm_ds.config import RunConfig
    from flallm_ds.training.build.engine import check_learning_rates

    config = RunConfig(stage=stage, run="r", visual_run="none" if stage == "llm" else "")
    config = config.with_overrides(
        {name.replace("__", "."): value for name, value in options.items()}
    )
    check_learning_rates(config, json_config, Path("mine.json"))


@pytest.mark.parametrize(
    ("json_config", "options", "name", "least"),
    [
        (BF16, {}, "llm_lr", "0.0001"),  # the default
        (BF16, {"optim__llm_lr": "9.9e-5"}, "llm_lr", "0.0001"),
        (BF16, {"optim__llm_lr": "1e-4", "optim__lr": "5e-5"}, "lr", "0.0001"),
        (BF16, {"llm__tune": "frozen", "llm__layers": "norm"}, "llm_lr", "0.0001"),
        (
            BF16,
            {"visual__frozen": "none", "optim__backbone_lr": "1e-6"},
            "backbone_lr",
            "0.0001",
        ),
        (BF16, {"stage": "visual", "optim__lr": "1e-5"}, "lr", "0.0001"),
        (FP16, {}, "llm_lr", "1.25e-05"),
        (
            json.loads((JSONS[0].parent / "zero3_bf16_states.json").read_text()),
            {},
            "llm_lr",
            "0.0001",
        ),
    ],
)
def test_a_learning_rate_whose_updates_are_rounded_away_is_an_error(
    json_config, options, name, least
):
    sentence = rf"optim\.{name} must be at least {least} where mine\.json sets .*_master_weights_and_grads.*, got"
    with pytest.raises(UserError, match=sentence):
        checked(json_config, **options)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_any_learning_rate_is_valid_for_fp32_master_weights(path):
    if path.stem != "zero3_bf16_states":
        checked(json.loads(path.read_text()))
    checked(json.loads(path.read_text()), optim__llm_lr="1e-4")
    # A frozen LLM has no learning rate.
    checked(json.loads(path.read_text()), llm__tune="frozen")


def test_the_lowest_learning_rate_is_about_the_smallest_change_of_a_bf16_weight():
    """A weight of 0.05 changes by 2e-4, not by 5e-5. Most weights of an LLM do not change
    by 1e-5."""
    weight = torch.tensor(0.05, dtype=torch.bfloat16)
    assert weight + 2e-4 != weight and weight + 5e-5 == weight
    weights = (
        torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 0.05
    ).bfloat16()
    assert (weights + 1e-5 == weights).float().mean() > 0.8
