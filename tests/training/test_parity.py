"""The same numbers on any number of ranks, under any ZeRO, stopped or not. fp32, CPU, two
gloo ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flallm_ds.cli.checkpoints import export
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.export import read as read_export
from flallm_ds.models.visual_encoder import VisualEncoder
from tests.helpers.launching import CONSTANT, losses, run_scenarios, tiny_options

STOPS = (1, 4, 5, 7)  # 5 is the end of an epoch
# The parts of an elastic run: ranks, the step it stops after, and the ZeRO stage. Three
# ranks share four micro-batches unevenly.
ELASTIC = ((2, 2, None), (4, 4, 2), (4, 5, 3), (3, 7, 3), (1, None, 2))
# The ranks that wrote and that read, for each of these parts but the first.
RESUMED_BY = ((2, 4), (4, 4), (4, 3), (3, 1))


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders two/ and one/ (ranks), each with runs visual and llm; two/ also stopped and
    resumed ones.

    two/frozen and two/frozen_stopped_4 train a part of the backbone of backbone/.
    two/constant changes nothing, and has a train.patience of 1.
    two/visual_elastic and two/llm_elastic are resumed by other numbers of ranks, under
    other ZeRO stages.
    """
    folder = tmp_path_factory.mktemp("runs")
    VisualEncoder(width=8).backbone.model.save_pretrained(folder / "backbone")
    for name, ranks in (("two", 2), ("four", 4), ("three", 3), ("one", 1)):
        if ranks > 2:
            part = elastic_part(tiny_corpus, folder, ranks)
            run_scenarios(part, folder / f"{name}.json", ranks)
            continue
        (folder / name).mkdir()
        scenarios: list[dict[str, object]] = []
        for stage in ("visual", "llm"):
            whole = tiny_options(tiny_corpus, stage, folder / name / stage)
            scenarios.append({"stage": stage, "options": whole})
            for stop in STOPS if ranks == 2 else ():
                stopped = {**whole, "run": str(folder / name / f"{stage}_stopped_{stop}")}
                scenarios.append(
                    {"stage": stage, "options": {**stopped, "train.max_steps": str(stop)}}
                )
                scenarios.append({"stage": stage, "options": stopped})
        if ranks == 2:
            for stage in ("visual", "llm"):
                saved = {"train.save_every_steps": 2}
                options = tiny_options(
                    tiny_corpus, stage, folder / name / f"{stage}_faulty", **saved
                )
                faults: list[dict[str, object]] = [
                    {"nan_at": 4},
                    *([{"full_at": 4}] if stage == "visual" else []),
                    {"options": {**options, "train.max_steps": "4"}},
                    {"damaged": True},
                ]
                scenarios += [
                    {"stage": stage, "options": options, **fault} for fault in faults
                ]
            part = {"visual.weights": folder / "backbone", "visual.frozen_stages": 2}
            for run, stop in (
                ("frozen", None),
                ("frozen_stopped_4", 4),
                ("frozen_stopped_4", None),
            ):
                options = tiny_options(tiny_corpus, "visual", folder / name / run, **part)
                limit = {"train.max_steps": str(stop)} if stop else {}
                scenarios.append({"stage": "visual", "options": options | limit})
            more = {**CONSTANT, "train.patience": 1}
            options = tiny_options(tiny_corpus, "llm", folder / name / "constant", **more)
            scenarios.append({"stage": "llm", "options": options})
        scenarios += elastic_part(tiny_corpus, folder, ranks)
        run_scenarios(scenarios, folder / f"{name}.json", ranks)
    return folder


def elastic_part(corpus: Path, folder: Path, ranks: int) -> list[dict[str, object]]:
    """The scenarios of the parts of the elastic runs with this number of ranks."""
    scenarios: list[dict[str, object]] = []
    for stage in ("visual", "llm"):
        for number, (of_part, stop, zero) in enumerate(ELASTIC):
            if of_part != ranks:
                continue
            run = folder / "two" / f"{stage}_elastic"
            options = tiny_options(corpus, stage, run)
            if stop is not None:
                options["train.max_steps"] = str(stop)
            if zero is not None:
                file = folder / f"zero{zero}.json"
                file.write_text(json.dumps({"zero_optimization": {"stage": zero}}))
                options["train.deepspeed"] = str(file)
            scenario = {"stage": stage, "options": options, "counted": f"part-{number}"}
            scenarios.append(scenario)
    return scenarios


@pytest.mark.parametrize("stage", ["visual", "llm"])
def test_two_ranks_give_the_losses_of_a_single_process(runs: Path, stage: str) -> None:
    """1 rank x 4 micro-batches equals 2 x 2, under ZeRO-2 (visual) and ZeRO-3 with
    offload (llm)."""
    one, two = losses(runs / "one" / stage), losses(runs / "two" / stage)
    assert len(one) == len(two) == 10
    assert one[0] != one[9]
    np.testing.assert_allclose(two, one, atol=1e-4)


@pytest.mark.parametrize("stage", ["visual", "llm"])
@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_and_resumed_run_gives_the_same_losses(
    runs: Path, stage: str, stop: int
) -> None:
    assert losses(runs / "two" / f"{stage}_stopped_{stop}") == losses(runs / "two" / stage)


@pytest.mark.parametrize("stage", ["visual", "llm"])
def test_a_run_resumed_by_other_ranks_and_zero_stages_gives_the_same_losses(
    runs: Path, stage: str
) -> None:
    """2 -> 4 -> 3 -> 1 ranks in the middle of epochs, ZeRO-2 and ZeRO-3, with dropout."""
    elastic, whole = (losses(runs / "two" / f"{stage}{s}") for s in ("_elastic", ""))
    assert elastic[:2] == whole[:2]
    np.testing.assert_allclose(elastic, whole, atol=1e-4)


@pytest.mark.parametrize("part", range(len(RESUMED_BY)))
@pytest.mark.parametrize("stage", ["visual", "llm"])
def test_no_rank_reads_more_than_its_share_of_a_checkpoint(
    runs: Path, stage: str, part: int
) -> None:
    """A rank verifies every n-th file, and then reads what it owns, and the buffers."""
    writers, readers = RESUMED_BY[part]
    ranks = []
    for rank in range(readers):
        file = runs / "two" / f"{stage}_elastic.part-{part + 1}.rank-{rank}"
        ranks.append(json.loads(file.read_text()))
    for read in ranks:
        assert read["restored"] == read["owned"] + read["buffers"]
        assert len(read["files"]) == writers
        assert read["verified"] <= -(-writers // readers) * max(read["files"])
    owned = sum(read["owned"] for read in ranks)
    assert sum(read["verified"] for read in ranks) == owned + ranks[0]["buffers"]
    # ZeRO divides each parameter or group equally, up to its padding.
    assert ranks[0]["owned"] <= 1.1 * owned / readers


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("stage", ["visual", "llm"])
def test_a_resumed_run_ends_with_the_same_export(runs: Path, stage: str, stop: int) -> None:
    for file in (
        "visual_encoder.safetensors",
        "adapter.safetensors",
        "language_model/model.safetensors",
    ):
        whole = load_file(runs / "two" / stage / "best" / file)
        resumed = load_file(runs / "two" / f"{stage}_stopped_{stop}" / "best" / file)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), file


def test_both_ranks_end_a_run_whose_scores_are_no_better(runs: Path) -> None:
    assert len(losses(runs / "two" / "constant")) == 10  # two of four epochs


@pytest.mark.parametrize("run", ["visual", "llm", "frozen"])
def test_the_export_of_the_checkpoint_of_the_best_epoch_is_that_of_the_run(
    runs: Path, run: str, tmp_path: Path
) -> None:
    """One process without DeepSpeed reads the fragments of two ranks."""
    best, out = runs / "two" / run / "best", tmp_path / "out"
    export(runs / "two" / run, out=out)
    files = sorted(path.relative_to(best) for path in best.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    for file in files:
        assert (out / file).read_bytes() == (best / file).read_bytes(), file


def test_an_earlier_checkpoint_is_exported_without_scores(
    runs: Path, tmp_path: Path
) -> None:
    best, out = runs / "two" / "visual" / "best", tmp_path / "out"
    export(runs / "two" / "visual", out=out, step=5)
    exported = read_export(out)
    assert exported.settings["scores"] == {}
    weight = read_export(best).translator.adapter[0].weight
    assert not torch.equal(exported.translator.adapter[0].weight, weight)


def test_a_checkpoint_is_not_exported_with_another_frozen_encoder(
    runs: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs / "two" / "llm", tmp_path / "llm"))
    config = json.loads((run / "config.json").read_text())
    config["visual_run"] = str(runs / "one" / "visual")
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its frozen visual encoder has changed\. Restore"):
        export(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["visual", "llm"])
def test_a_run_ends_before_a_step_whose_gradient_is_not_finite(
    runs: Path, stage: str
) -> None:
    """Only rank 1 has the NaN, and no loss: under ZeRO-2 (visual) and ZeRO-3 with offload
    (llm)."""
    said = [
        (runs / "two" / f"{stage}_faulty.nan_at.rank-{rank}").read_text()
        for rank in range(2)
    ]
    assert said[0] == said[1]
    assert said[0].startswith(
        "The gradient norm must be finite, got inf at step 4, which was not made. "
    )
    assert "The last checkpoint is of step 2." in said[0]


def test_all_ranks_hear_of_metrics_that_rank_0_cannot_write(runs: Path) -> None:
    said = [
        (runs / "two" / f"visual_faulty.full_at.rank-{rank}").read_text()
        for rank in range(2)
    ]
    assert said[0] == said[1]
    path = runs / "two" / "visual_faulty" / "metrics.jsonl"
    assert f"Cannot read or write {path}: File too large. Free some space" in said[0]


@pytest.mark.parametrize("stage", ["visual", "llm"])
def test_after_each_of_these_faults_the_run_resumes_to_the_same_losses(
    runs: Path, stage: str
) -> None:
    """Also after a damaged newest checkpoint, of step 4; the one of step 2 takes its place."""
    run = runs / "two" / f"{stage}_faulty"
    # Not to the last bit: after many runs in one process a kernel may meet memory of
    # another alignment.
    np.testing.assert_allclose(losses(run), losses(runs / "two" / stage), atol=1e-5)
    assert (run / "checkpoints" / "damaged-step-00000004").is_dir()


def test_frozen_stages_keep_their_weights_and_a_resumed_run_its_losses(runs: Path) -> None:
    assert losses(runs / "two" / "frozen_stopped_4") == losses(runs / "two" / "frozen")
    before = load_file(runs / "backbone" / "model.safetensors")
    after = load_file(runs / "two" / "frozen" / "best" / "visual_encoder.safetensors")
    for name, weight in before.items():
        if not name.endswith(("weight", "bias")):
            continue
        frozen = name.startswith(("embedder.", "encoder.stages.0.", "encoder.stages.1."))
        assert torch.equal(weight, after[f"backbone.model.{name}"]) == frozen, name


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_stage_2_leaves_the_visual_encoder_bit_identical(runs: Path, ranks: str) -> None:
    before = load_file(runs / ranks / "visual" / "best" / "visual_encoder.safetensors")
    after = load_file(runs / ranks / "llm" / "best" / "visual_encoder.safetensors")
    assert any(name.endswith("running_var") for name in before)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batch_norm_statistics_do_not_depend_on_the_number_of_ranks(runs: Path) -> None:
    one, two = (
        load_file(runs / r / "visual" / "best" / "visual_encoder.safetensors")
        for r in ("one", "two")
    )
    names = [name for name in one if "running_" in name]
    assert names
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=0.02, atol=2e-3)


def test_the_engine_gives_the_losses_of_a_plain_pytorch_loop(
    runs: Path, tiny_corpus: Path
) -> None:
    """Stage visual against a loop without DeepSpeed: token mean, AdamW, clipping, cosine."""
    from flallm_ds.data.index import load_index
    from flallm_ds.data.loader import Loader
    from flallm_ds.data.text.codec import TextCodec
    from flallm_ds.recipes import resolve
    from flallm_ds.training.build.data import make_plan, make_preprocess, make_reader
    from flallm_ds.training.build.language import visual_model
    from flallm_ds.training.build.visual import feature_extractor
    from flallm_ds.training.schedule import lr_factor
    from flallm_ds.training.task import seed_micro_batch

    run = runs / "one" / "visual"
    config = resolve("visual", None, tiny_options(tiny_corpus, "visual", run))
    torch.manual_seed(config.train.seed)
    codec = TextCodec.load(run / "tokenizer")
    extractor = feature_extractor(config, World(0, 1, 0, 1))
    model = visual_model(config, codec, extractor).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=0.0,
        betas=(0.9, 0.98),
        weight_decay=config.optim.weight_decay,
    )
    index = load_index(tiny_corpus / "shards", "train")
    reader = make_reader(index, config, train=True)
    preprocess = make_preprocess(config.data)
    found = []
    for epoch in range(2):
        loader = Loader(reader, make_plan(reader, config).epoch(epoch), codec)
        for step, batches in enumerate(loader.steps()):
            tokens = sum(b.num_target_tokens for b in batches)
            total = 0.0
            optimizer.zero_grad()
            for number, batch in enumerate(batches):
                seed_micro_batch(config.train.seed, epoch, step, number)
                pixels = preprocess(batch, train=True, device=torch.device("cpu"))
                wordings = [codec.for_light_t().wording("de")] * len(batch.keys)
                loss = model(
                    pixels,
                    batch.num_frames_B,
                    wordings,
                    batch.target_ids_BL,
                    config.train.label_smoothing,
                )
                (loss / tokens).backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
            rate = config.optim.lr * lr_factor(
                (epoch + step / len(loader)) / 2, config.optim.warmup
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            found.append(total / tokens)
    np.testing.assert_allclose(losses(run), found, atol=1e-4)
