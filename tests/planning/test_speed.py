"""The times of `flallm plan`, against values computed by hand."""

import pytest

from flallm_ds.planning.speed import (
    Rates,
    Step,
    bandwidth,
    checkpoint_bytes,
    compute_s,
    default_rates,
    host_s,
    network_bytes,
    write_s,
)
from tests.planning.test_memory import SIZE, shipped

RATES = Rates(
    flops=1000.0,
    efficiency=0.5,
    link=300.0,
    network=25.0,
    pcie=10.0,
    dram=100.0,
    disk=50.0,
    nvme=5.0,
)


def test_a_token_takes_6_operations_a_trained_and_4_a_frozen_parameter() -> None:
    per_token = 6 * 800 + 4 * 200
    assert compute_s(SIZE, 10, 0, False, RATES) == 10 * per_token / 500
    # Checkpointing repeats the forward pass.
    assert compute_s(SIZE, 10, 0, True, RATES) == 10 * (per_token + 2 * 1000) / 500
    assert compute_s(SIZE, 0, 2, False, RATES) == pytest.approx(2 * 3.6e9 / 500)


def test_zero_3_sends_all_weights_twice_and_the_gradients_in_each_micro_batch() -> None:
    sent = network_bytes(SIZE, shipped("zero3.json"), 3, 4)
    assert sent == 3 * 2 * (3 * 800 + 2 * 200) * 3 / 4


def test_zero_1_sends_once_a_step_whatever_the_accumulation() -> None:
    zero = shipped("zero1.json")
    sent = network_bytes(SIZE, zero, 1, 4)
    assert sent == (2 * 2 * 800 + 2 * 800) * 3 / 4
    assert network_bytes(SIZE, zero, 8, 4) == sent
    assert network_bytes(SIZE, shipped("zero2.json"), 8, 4) == (9 * 4 * 800) * 3 / 4


def test_one_rank_sends_nothing() -> None:
    assert network_bytes(SIZE, shipped("zero3.json"), 3, 1) == 0


def test_the_slowest_link_limits_a_ring() -> None:
    assert bandwidth(1, 8, RATES) == 300
    assert bandwidth(2, 8, RATES) == 25
    assert bandwidth(1, 1, RATES) == float("inf")


def test_offload_takes_time_for_adam_and_for_pcie() -> None:
    assert host_s(SIZE, shipped("zero3.json"), 2, 1, 4, RATES) == 0
    adam = 28 * 800 / 100
    gradients, updated = 4 * 3 * 200 / 10, 2 * 200 / 10
    weights = 2 * 2 * 2 * 250 / 10  # two passes of two micro-batches
    seconds = host_s(SIZE, shipped("zero3_offload.json"), 2, 1, 4, RATES)
    assert seconds == pytest.approx(adam + gradients + updated + weights)


def test_communication_is_hidden_only_if_the_json_overlaps_it() -> None:
    assert Step(compute=2.0, network=3.0, other=1.0, overlap=True).total == 4.0
    assert Step(compute=2.0, network=3.0, other=1.0, overlap=False).total == 6.0


def test_a_checkpoint_has_12_bytes_a_trained_parameter() -> None:
    assert checkpoint_bytes(SIZE) == 12 * 800
    assert write_s(SIZE, RATES) == 12 * 800 / 50


@pytest.mark.parametrize(("memory", "peak"), [(24, 71.0), (80, 312.0), (141, 989.0)])
def test_usual_gpus_have_these_peaks(memory: float, peak: float) -> None:
    assert default_rates(memory)[0] == peak
