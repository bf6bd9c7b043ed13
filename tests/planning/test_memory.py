"""The formulas of `flallm plan`, against values computed by hand."""

import json
from typing import Any

import pytest

from flallm_ds.planning.memory import (
    FIRST_STEP_BYTES,
    PROCESS_BYTES,
    Part,
    Place,
    Work,
    Zero,
    buffers,
    deepspeed_estimate,
    loss_bytes,
    need_of,
    pinned_bytes,
    power_of_two,
    states,
)
from flallm_ds.planning.sizes import ModelSize
from tests.helpers.paths import ROOT

# 1,000 parameters, of which 800 are trained.
SIZE = ModelSize(
    trained=800,
    frozen=200,
    largest=300,
    largest_trained=250,
    head=250,
    linear=160,
    width=10,
    vocab_size=25,
    layers=2,
    decoder_only=True,
)
NO_WORK = Work(0.0, 0.0)


def shipped(name: str, device: str = "cuda") -> Zero:
    return Zero.of(json.loads((ROOT / "ds_configs" / name).read_text()), device)


def at(parts: list[Part], place: Place) -> dict[str, float]:
    return {part.name: part.bytes for part in parts if part.place is place}


def test_zero_1_keeps_all_weights_and_fp32_gradients_on_each_gpu() -> None:
    parts = at(states(SIZE, shipped("zero1.json"), 4), Place.DEVICE)
    assert parts == {
        "weights": 2 * 1000,
        "gradients": 4 * 800,
        "master weights": 4 * 200,
        "optimizer states": 8 * 200,
    }


def test_zero_2_in_autocast_has_fp32_weights_and_splits_the_rest() -> None:
    parts = at(states(SIZE, shipped("zero2.json"), 4), Place.DEVICE)
    assert parts["weights"] == 4 * 1000
    assert sum(parts.values()) == 4 * 1000 + (4 + 4 + 4 + 8) * 200


def test_zero_2_in_bf16_keeps_all_weights_and_splits_the_rest() -> None:
    parts = at(states(SIZE, shipped("zero2_bf16.json"), 4), Place.DEVICE)
    assert parts["weights"] == 2 * 1000
    assert sum(parts.values()) == 2 * 1000 + (4 + 4 + 4 + 8) * 200


def test_zero_2_with_offload_moves_the_states_to_the_host() -> None:
    parts = states(SIZE, shipped("zero2_offload.json"), 4)
    assert at(parts, Place.DEVICE) == {"weights": 2 * 1000}
    assert sum(at(parts, Place.HOST).values()) == (4 + 4 + 2 + 4 + 8) * 200


def test_zero_3_splits_everything() -> None:
    parts = states(SIZE, shipped("zero3.json"), 4)
    assert at(parts, Place.HOST) == {}
    # Weights, accumulated gradients, gradients of the step, master weights, both moments.
    assert sum(at(parts, Place.DEVICE).values()) == 2 * 250 + (4 + 4 + 4 + 8) * 200


def test_zero_3_with_offload_has_22_bytes_a_trained_and_2_a_frozen_parameter() -> None:
    parts = states(SIZE, shipped("zero3_offload.json"), 4)
    assert at(parts, Place.DEVICE) == {}
    assert sum(at(parts, Place.HOST).values()) == (22 * 800 + 2 * 200) / 4


def test_states_in_bf16_need_10_bytes_a_trained_parameter() -> None:
    parts = states(SIZE, shipped("zero3_bf16_states.json"), 4)
    assert sum(at(parts, Place.HOST).values()) == (12 * 800 + 2 * 200) / 4


def test_on_a_cpu_everything_is_fp32() -> None:
    zero = shipped("zero3_offload.json", "cpu")
    assert (zero.weight, zero.pinned, zero.overlap) == (4, False, False)
    parts = states(SIZE, zero, 2)
    assert sum(part.bytes for part in parts) == (24 * 800 + 4 * 200) / 2
    need = need_of(SIZE, zero, 2, NO_WORK, "cpu")
    assert need.at(Place.DEVICE) == 0
    assert need.named(Place.HOST)["process"] == PROCESS_BYTES + FIRST_STEP_BYTES


def test_nvme_holds_the_weights_and_the_states() -> None:
    parts = at(states(SIZE, shipped("zero3_nvme.json"), 4), Place.NVME)
    assert sum(parts.values()) == (12 * 800 + 2 * 1000) / 4


def test_weights_of_4_bits_need_9_sixteenths_of_a_byte() -> None:
    parts = at(states(SIZE, shipped("zero1.json"), 1, bits=4), Place.DEVICE)
    # Embeddings and norms keep 2 bytes.
    assert parts["weights"] == 2 * 800 + 0.5625 * 160 + 2 * 40


def test_zero_3_gathers_at_most_the_whole_model() -> None:
    zero = shipped("zero3.json")
    parts = at(buffers(SIZE, zero, 4, "cuda"), Place.DEVICE)
    assert parts["gathered weights"] == 2 * 1000
    # The whole model is less than the prefetch bucket.
    assert parts["flat tensors of collectives"] == max(2 * 1300, 2 * 250 * 1.25)
    assert parts["gradient bucket"] == 2 * 50_000_000
    # gloo copies what it receives; a bucket on a CPU has only used pages.
    on_cpu = at(buffers(SIZE, shipped("zero3.json", "cpu"), 4, "cpu"), Place.DEVICE)
    assert on_cpu["gradient bucket"] == 4 * 800
    assert on_cpu["flat tensors of collectives"] == 2 * 4 * 1000


def test_zero_1_copies_the_gradients_that_it_reduces() -> None:
    parts = at(buffers(SIZE, shipped("zero1.json"), 4, "cuda"), Place.DEVICE)
    assert parts["flat tensors of collectives"] == (4 + 2) * 800


def test_a_large_model_is_not_gathered_at_once() -> None:
    large = ModelSize(7 * 10**9, 0, 10**8, 10**8, 0, 0, 4096, 32_000, 32, True)
    parts = at(buffers(large, shipped("zero3.json"), 8, "cuda"), Place.DEVICE)
    # Half of the reuse distance of 1e9, and the layer that computes.
    assert parts["gathered weights"] == 2 * (5 * 10**8 + 10**8)


@pytest.mark.parametrize(("size", "rounded"), [(0, 0), (1, 1), (1024, 1024), (1025, 2048)])
def test_pinned_memory_is_a_power_of_two(size: float, rounded: float) -> None:
    assert power_of_two(size) == rounded


def test_gradients_of_the_step_are_pinned_for_each_sub_group() -> None:
    zero = shipped("zero3_offload.json")  # sub-groups of 1e8 parameters in 4 bytes
    assert pinned_bytes("gradients of the step", 10e8, zero) == 2 * 2**29 + 2**28
    assert pinned_bytes("optimizer states", 10e8, zero) == 10e8


def test_logits_of_a_large_vocabulary_are_computed_in_chunks() -> None:
    # 40 tokens x 25 entries in fp32 are 4,000 bytes.
    assert loss_bytes(SIZE, 40, "logits", 4, 1000, 0) == 12_000
    assert loss_bytes(SIZE, 40, "logits", 2, 1000, 0) == 12_000 + 2_000
    assert loss_bytes(SIZE, 40, "auto", 4, 1000, 4_000) == 12_000
    # A chunk, the gradients of 40 hidden states of width 10, and of the head.
    assert loss_bytes(SIZE, 40, "auto", 4, 1000, 3_999) == 3_000 + 1_600 + 4 * 250


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "zero2.json",
        "zero2_offload.json",
        "zero3.json",
        "zero3_offload.json",
        "zero3_offload_optimizer.json",
    ],
)
def test_the_estimators_are_those_of_deepspeed(name: str, nodes: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import (
        estimate_zero2_model_states_mem_needs as zero2,
    )

    zero = shipped(name)
    offloads = zero.optimizer_at is not Place.DEVICE
    common: dict[str, Any] = {"num_gpus_per_node": 8, "num_nodes": nodes}
    if zero.stage == 2:
        host, gpu = zero2(1000, cpu_offload=offloads, **common)
    else:
        params = zero.weights_at is not Place.DEVICE
        host, gpu, _ = zero3(
            1000, 300, cpu_offload=offloads, cpu_offload_params=params, **common
        )
    ours = deepspeed_estimate(SIZE, zero, 8, nodes)
    assert ours == pytest.approx((gpu, host), abs=1.0)  # DeepSpeed rounds to whole bytes
