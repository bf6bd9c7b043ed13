"""What a run on two ranks records of each step, where it sends the numbers, what
`flallm watch` shows of it, and problems that all ranks hear of."""

import json
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flallm_ds.data.index import Index, load_index
from flallm_ds.recipes import resolve
from flallm_ds.training.build.data import make_plan, make_reader
from flallm_ds.training.records import StepRecord, read_records
from flallm_ds.watch.alarms import alarms
from flallm_ds.watch.state import RunReader
from tests.helpers.early import flallm
from tests.helpers.launching import run_scenarios, tiny_options


def first_rows_of_ranks(index: Index, options: dict[str, str]) -> list[list[int]]:
    """The rows of the clips that rank 0 and rank 1 read in the first epoch, in order."""
    config = resolve("visual", None, options)
    plan = make_plan(make_reader(index, config, train=True), config).epoch(0)
    rows: list[list[int]] = [[], []]
    for step in range(plan.num_steps):
        for number, micro_batch in enumerate(plan.micro_batches_of(step)):
            rows[number // 2] += micro_batch.tolist()
    return rows


def break_clip(index: Index, row: int) -> None:
    with (Path(index.root) / index.tar(row).file).open("r+b") as file:
        file.seek(int(index.arrays["offset"][row]))
        file.write(bytes(64))


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on two ranks. llm/: under ZeRO-3, with a profile of step 2 and devices of 1e12
    FLOPS, stopped after step 3. slow/: rank 1 is slow; with trackers and a profile of steps 2 and
    3; stopped after step 4 and resumed. On shards with 3 broken clips, of which rank 0
    reads 2: tolerant/ accepts 8 broken clips, strict/ 2, hasty/ 1. dev/: with a broken clip in
    the dev split."""
    folder = tmp_path_factory.mktemp("runs")
    shards = folder / "shards"
    shutil.copytree(tiny_corpus / "shards", shards)
    more = {"train.epochs": 1, "train.trackers": "wandb,mlflow", "train.profile": "2-3"}
    slow = tiny_options(tiny_corpus, "visual", folder / "slow", **more)
    stopped = {**slow, "train.max_steps": "4"}
    scenarios: list[dict[str, object]] = [
        {"stage": "visual", "options": stopped, "slow_rank": 1},
        {"stage": "visual", "options": slow, "slow_rank": 1},
    ]
    more = {"train.max_steps": 3, "train.profile": "2-2", "visual_run": folder / "slow"}
    llm = tiny_options(tiny_corpus, "llm", folder / "llm", **more)
    scenarios.append({"stage": "llm", "options": llm, "peak": 1e12})
    for name, share in (("tolerant", 0.2), ("strict", 0.05), ("hasty", 0.02)):
        more = {"data.shards": shards, "data.max_broken": share}
        options = tiny_options(tiny_corpus, "visual", folder / name, **more)
        scenario: dict[str, object] = {"stage": "visual", "options": options}
        if name != "tolerant":
            scenario["refused"] = True
        scenarios.append(scenario)
    index = load_index(shards, "train")
    of_rank_0, of_rank_1 = first_rows_of_ranks(index, options)
    for row in (*of_rank_0[:2], of_rank_1[-1]):
        break_clip(index, row)
    shards = shutil.copytree(tiny_corpus / "shards", folder / "broken_dev")
    more = {"data.shards": shards, "train.epochs": 1}
    options = tiny_options(tiny_corpus, "visual", folder / "dev", **more)
    scenarios.append({"stage": "visual", "options": options, "refused": True})
    break_clip(load_index(shards, "dev"), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", str(folder / "mlflow"))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        run_scenarios(scenarios, folder / "two.json", ranks=2)
    return folder


def steps_of(run: Path) -> list[dict]:
    return [record for record in read_records(run) if record["kind"] == "train"]


def test_a_step_is_recorded_with_speed_memory_and_time_left(runs: Path) -> None:
    steps = steps_of(runs / "slow")
    assert len(steps) == 5
    unknown = {"mfu", "device_gb"}  # on a CPU
    names = set(StepRecord.__dataclass_fields__) - unknown | {"kind", "global_step"}
    assert all(set(step) == names for step in steps)
    for step in steps:
        assert step["frames"] > step["tokens"] > 0 and step["num_steps"] == 5
        assert step["frames_per_s"] == pytest.approx(step["frames"] / step["seconds"])
        assert step["tokens_per_s"] == pytest.approx(step["tokens"] / step["seconds"])
        assert 0 < step["host_gb"] < 100
        assert 0 <= step["waiting_s"] <= step["slowest_s"]
        assert 0 < step["mean_s"] <= step["slowest_s"]
    assert steps[0]["left_s"] > steps[-1]["left_s"] == 0


def test_the_slow_rank_is_named_with_its_machine(runs: Path) -> None:
    steps = steps_of(runs / "slow")
    assert sorted(step["slowest_rank"] for step in steps)[2] == 1  # the median
    beat = json.loads((runs / "slow" / "heartbeats" / "rank-00001.json").read_text())
    assert {step["slowest_host"] for step in steps} == {beat["host"]}
    assert beat["own_s"] >= 0.6 and beat["phase"] == "ended"


def test_broken_clips_are_counted_over_all_ranks_and_once(runs: Path) -> None:
    counts = [step["broken_clips"] for step in steps_of(runs / "tolerant")]
    assert counts == sorted(counts) and counts[-1] == 3


@pytest.mark.parametrize(("name", "budget"), [("strict", 2), ("hasty", 1)])
def test_more_broken_clips_than_the_budget_stop_all_ranks_with_one_sentence(
    runs: Path, name: str, budget: int
) -> None:
    """strict: no rank alone has too many. hasty: rank 0 alone has too many."""
    paths = [runs / f"{name}.refused.rank-{rank}" for rank in range(2)]
    first, second = (path.read_text() for path in paths)
    assert first == second
    found = f"The number of broken clips must be at most {budget}, got {budget + 1}; the"
    assert first.startswith(found) and "--data.max_broken" in first


def test_a_broken_dev_clip_stops_all_ranks_with_one_sentence(runs: Path) -> None:
    """One rank alone reads it; the other would wait for the hypotheses."""
    first, second = ((runs / f"dev.refused.rank-{rank}").read_text() for rank in range(2))
    assert first == second and first.startswith("Cannot decode clip ")


# --- trackers, profile, watch


def test_a_tracker_gets_every_number_and_a_resumed_run_continues_there(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(str(runs / "mlflow"))
    experiment = client.get_experiment_by_name("flallm_ds")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "slow" and run.info.status == "FINISHED"
    assert run.data.params["train.trackers"] == "('wandb', 'mlflow')"
    records = read_records(runs / "slow")
    for name in ("loss", "frames_per_s", "slowest_rank"):
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        sent = {metric.step: metric.value for metric in history}
        kept = {r["global_step"]: r[name] for r in records if r["kind"] == "train"}
        assert len(history) == 5 and sent == pytest.approx(kept)
    (scored,) = client.get_metric_history(run.info.run_id, "dev/bleu4")
    assert scored.step == 5
    ids = json.loads((runs / "slow" / "trackers.json").read_text())
    assert ids["mlflow"] == run.info.run_id


def test_wandb_gets_every_number_of_both_jobs_in_one_run(runs: Path) -> None:
    """Offline, each job writes a file of its own; wandb sync adds both to the run."""
    run_id = json.loads((runs / "slow" / "trackers.json").read_text())["wandb"]
    files = sorted((runs / "slow" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2
    found = [loss for file in files for loss in losses_in_wandb_file(file)]
    kept = {step["global_step"]: step["loss"] for step in steps_of(runs / "slow")}
    assert dict(found) == pytest.approx(kept)


def losses_in_wandb_file(file: Path) -> list[tuple[int, float]]:
    """Read (step, loss) of the history in a file of W&B's own format."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for content in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        values = {}
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            values[key] = json.loads(item.value_json)
        if "train/loss" in values:
            found.append((values["_step"], values["train/loss"]))
    return found


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Split a log of LevelDB: blocks of 32 KiB with parts of records, each after 4 bytes of
    checksum, 2 of length and 1 of type (1: whole, 4: the last part). W&B has 7 bytes before
    the first."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if 2**15 - at % 2**15 < 7:  # no room for a header in this block
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_a_profile_has_the_steps_and_their_phases(runs: Path) -> None:
    folder = runs / "slow" / "profile"
    names = {path.name for path in folder.iterdir()}
    assert names == {"steps-2-3.pt.trace.json", "flops.txt", "comms.json"}
    trace = json.loads((folder / "steps-2-3.pt.trace.json").read_text())
    events = [event["name"] for event in trace["traceEvents"] if "name" in event]
    assert {"step 2", "step 3"} <= set(events)
    assert not {"step 1", "step 4"} & set(events)
    # Two micro-batches a step and rank.
    assert events.count("forward") == events.count("backward") == 4
    assert {"data loading", "optimizer"} <= set(events)
    report = (folder / "flops.txt").read_text()
    assert "Profile Summary at step 4" in report and "SignTranslator" in report
    collectives = json.loads((folder / "comms.json").read_text())
    assert collectives
    for sizes in collectives.values():
        assert all(facts["count"] >= 1 for facts in sizes.values())


def test_zero_3_is_profiled_too_and_its_gathers_are_measured(runs: Path) -> None:
    folder = runs / "llm" / "profile"
    assert "Profile Summary at step 3" in (folder / "flops.txt").read_text()
    collectives = json.loads((folder / "comms.json").read_text())
    assert any(name.startswith("all_gather") for name in collectives)
    trace = json.loads((folder / "steps-2-2.pt.trace.json").read_text())
    assert any(event.get("name") == "step 2" for event in trace["traceEvents"])


def test_the_mfu_is_that_of_frames_and_tokens_over_time(runs: Path) -> None:
    """The FLOPs of a frame and of a target token are the same in each step."""
    steps = steps_of(runs / "llm")
    flops = [step["mfu"] * step["seconds"] * 1e12 for step in steps]
    sizes = np.array([[step["frames"], step["tokens"]] for step in steps])
    per_frame, per_token = np.linalg.lstsq(sizes, np.array(flops), rcond=None)[0]
    np.testing.assert_allclose(sizes @ [per_frame, per_token], flops, rtol=1e-6)
    # A frozen ResNet of 28x28 pixels, and the LLM of 0.3 M parameters.
    assert per_frame > 1e6 and 1e5 < per_token < 1e7


def test_watch_shows_a_real_run_that_has_ended(runs: Path) -> None:
    done = flallm("watch", runs / "slow", "--once", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert "state       ended" in done.stdout and "2 ranks on 1 machines" in done.stdout
    assert "epoch 1/1  step 5/5  (5 in all)" in done.stdout
    assert "checkpoint  step-00000005" in done.stdout
    assert "rank silent" not in done.stdout and "no progress" not in done.stdout
    state = RunReader(runs / "slow").read(time.time())
    assert state.has_ended and len(state.steps) == 5


def test_watch_warns_of_the_broken_clips_of_a_real_run(runs: Path) -> None:
    said = alarms(RunReader(runs / "tolerant").read(time.time()))
    assert "3 broken clips; log.txt names them" in said
