"""Every stage and every ablation on two ranks; both stages in one command, killed and
started again."""

import gc
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flallm_ds import dist, export
from flallm_ds.command import read_words
from flallm_ds.config import DataConfig, RunConfig
from flallm_ds.data.index import iter_rows, load_index, write_table
from flallm_ds.errors import UserError
from flallm_ds.files import locked
from flallm_ds.inference.pictures import draw_probe, read_probe
from flallm_ds.inference.translator import Translator
from flallm_ds.recipes import RECIPES, config_of, resolve
from flallm_ds.training.build.data import check_jpegs
from flallm_ds.training.fragment_files import FragmentFile, FragmentReader
from flallm_ds.training.stages import next_commands, run_stage
from flallm_ds.training.stop import StopRequest
from tests.helpers.launching import (
    command,
    environment,
    flags,
    launch,
    losses,
    run_scenarios,
    tiny_options,
)
from tests.helpers.llms import make_tiny_llm
from tests.helpers.paths import ROOT

WHOLE = (
    "joint",
    "imagenet_llm",
    "unfrozen_llm",
    "temporal_llm",
    "frames_llm",
    "light_t_llm",
)
# One of each kind: these differ in a number alone.
NUMBERS = (
    "keep1_visual",
    "keep1_llm",
    "keep2_visual",
    "keep2_llm",
    "tiny_visual",
    "tiny_llm",
    "large_visual",
)
NUMBERS += ("large_llm", "small_llm", "mt5_random_llm")
# of no interest here
OTHER_RUNS = ("run", "visual_run", "train.epochs", "llm.name", "llm.language")


def ablations() -> Iterator[tuple[str, RunConfig, dict[str, object]]]:
    """(name, config, what it changes) of each recipe for an ablation on PHOENIX14T."""
    base = {"visual": config_of("phoenix14t_visual"), "llm": config_of("phoenix14t_llm")}
    base["joint"] = base["llm"]
    for name in (n for n in RECIPES if n.startswith("phoenix14t_")):
        config = config_of(name)
        if name.removeprefix("phoenix14t_") in NUMBERS:
            continue
        before, now = base[config.stage].options(), config.options()
        changed = {
            o: v
            for o, v in now.items()
            if v != before[o] and o not in (*OTHER_RUNS, "stage")
        }
        yield name.removeprefix("phoenix14t_"), config, changed


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run of each ablation on two ranks, and in one/ some of them on one."""
    folder = tmp_path_factory.mktemp("ablations")
    texts = (tiny_corpus / "text.txt").read_text(encoding="utf-8").splitlines()
    mt5 = make_tiny_llm("mt5", folder / "mt5_hub", texts)

    def scenario(
        out: Path, name: str, config: RunConfig, changed: dict[str, object]
    ) -> dict[str, object]:
        given: dict[str, object] = {
            "train.epochs": 1,
            "eval.every_epochs": 1,
            "train.probe_every": 2,
        }
        given["light_t.size"] = "tiny"
        if name not in (*WHOLE, "visual"):
            given["train.max_steps"] = 2
        if config.llm.name != config_of("phoenix14t_llm").llm.name:
            given["llm.name"] = mt5
        if config.stage == "llm":
            given["visual_run"] = "none" if config.visual_run == "none" else out / "visual"
        options = tiny_options(tiny_corpus, config.stage, out / name, **given | changed)
        return {"stage": config.stage, "options": options}

    two = [scenario(folder, *of) for of in ablations()]
    run_scenarios(two, folder / "two.json", 2)
    alone = [
        scenario(folder / "one", *of)
        for of in ablations()
        if of[0] in ("visual", "joint", "unfrozen_llm")
    ]
    (folder / "one").mkdir()
    run_scenarios(alone, folder / "one.json", 1)
    return folder


@pytest.mark.parametrize("name", [name for name, _, _ in ablations()])
def test_every_ablation_trains(runs: Path, name: str) -> None:
    found = losses(runs / name)
    assert len(found) == (5 if name in (*WHOLE, "visual") else 2)
    assert np.isfinite(found).all() and found[0] != found[1]


def test_an_ablation_is_not_its_neighbour(runs: Path) -> None:
    """Each option reaches the model: no two runs of stage llm have the same second loss."""
    names = ["llm", "frames_llm", "light_t_llm", "random_llm", "keep8_llm", "imagenet_llm"]
    seconds = [losses(runs / name)[1] for name in names]
    assert len(set(seconds)) == len(seconds)


@pytest.mark.parametrize("name", ["joint", "unfrozen_llm"])
def test_an_encoder_inside_the_engine_gives_the_losses_of_a_single_process(
    runs: Path, name: str
) -> None:
    np.testing.assert_allclose(losses(runs / name), losses(runs / "one" / name), atol=1e-4)


def changed_parts(before: Path, after: Path) -> set[str]:
    old, new = (export.read_visual(run / "best").state_dict() for run in (before, after))
    return {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("frames_llm", set()),
        ("light_t_llm", set()),
        ("temporal_llm", {"temporal"}),
        ("unfrozen_llm", {"backbone", "temporal"}),
    ],
)
def test_stage_llm_changes_what_is_not_frozen(
    runs: Path, name: str, parts: set[str]
) -> None:
    """Weights and BatchNorm statistics alike. test_parity does it for the usual stage llm."""
    assert changed_parts(runs / "visual", runs / name) == parts


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("visual", {"visual", "language"}),
        ("joint", {"visual", "language"}),
        ("temporal_llm", {"visual", "language"}),
        ("llm", {"language"}),
        ("imagenet_llm", {"language"}),
    ],
)
def test_the_probe_looks_at_what_is_trained(
    runs: Path, name: str, layers: set[str]
) -> None:
    found = read_probe(runs / name)
    assert found.keys() == layers
    for steps, norms in found.values():
        assert steps == ([1, 3, 5] if name in (*WHOLE, "visual") else [1])
        assert all(norm > 0 for norm in norms)
    assert list((runs / name / "tensorboard").iterdir())


def test_the_probe_is_drawn(runs: Path, tmp_path: Path) -> None:
    draw_probe(tmp_path / "probe.png", [runs / "joint", runs / "llm"])
    assert (tmp_path / "probe.png").stat().st_size > 5000


@pytest.mark.parametrize("name", WHOLE)
def test_an_export_needs_no_stage_1(runs: Path, tmp_path: Path, name: str) -> None:
    alone = shutil.copytree(runs / name / "best", tmp_path / "export")
    translator = Translator.from_pretrained(alone)
    kind = {"frames_llm": "frames", "imagenet_llm": "frames", "light_t_llm": "light_t"}.get(
        name, "signs"
    )
    extractor = translator.export.visual
    assert extractor.kind == kind
    if name in ("frames_llm", "light_t_llm"):
        assert (
            extractor.fingerprint()
            == export.read_features(runs / "visual" / "best", kind).fingerprint()
        )
    pixels_NCHW, num_frames_B = torch.randn(5, 3, 28, 28), torch.tensor([2, 3])
    features_ND = extractor(pixels_NCHW, num_frames_B)
    assert features_ND.shape == (5, extractor.feature_width)
    assert translator.export.translator.adapter[0].in_features == extractor.feature_width


# --- both stages in one command


def both(corpus: Path, run: Path, **more: object) -> list[str]:
    options = tiny_options(corpus, "visual", run, **more)
    return flags("both", options)


@pytest.fixture(scope="module")
def whole(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(RUN of a `--stage both` on two ranks, what it printed)."""
    run = tmp_path_factory.mktemp("both") / "whole"
    more = {"stage1.light_t.size": "tiny", "stage2.optim.llm_lr": "3e-4"}
    done = launch("launch/train.py", *both(tiny_corpus, run, **more))
    assert done.returncode == 0, done.stdout[-6000:]
    return run, done.stdout


def folder_of(run: Path, stage: str) -> Path:
    return run.with_name(f"{run.name}_{stage}")


def test_both_stages_are_trained_and_scored(whole: tuple[Path, str]) -> None:
    run, said = whole
    for stage in ("visual", "llm"):
        assert len(losses(folder_of(run, stage))) == 10
        scores = json.loads(
            (folder_of(run, stage) / "evaluation" / "test.json").read_text()
        )
        assert scores["scores"]["num_sentences"] == 9
        assert scores["ceiling"] == {"bleu4": pytest.approx(100), "changes": []}
        assert "ceiling" not in said and "perfect model" not in said
        assert f"== stage {stage}: {folder_of(run, stage)}" in said
    llm = RunConfig.load(folder_of(run, "llm") / "config.json")
    visual = RunConfig.load(folder_of(run, "visual") / "config.json")
    assert llm.visual_run == visual.run == str(folder_of(run, "visual"))
    assert (visual.light_t.size, llm.optim.llm_lr, visual.optim.llm_lr) == (
        "tiny",
        3e-4,
        1e-5,
    )


def test_the_end_of_a_run_says_how_good_it_is_and_what_comes_next(
    whole: tuple[Path, str],
) -> None:
    run, said = whole
    for stage in ("visual", "llm"):
        folder = folder_of(run, stage)
        scores = export.read_settings(folder / "best")["scores"]
        best = f"best dev BLEU-4 {scores['dev']['bleu4']:.2f}, after epoch {scores['epoch']}: {folder / 'best'}"
        assert said.count(f"stage {stage} is finished: {folder}\n{best}\n") == 1
    assert (
        said.count(f"next: flallm translate VIDEO --model {folder_of(run, 'llm')}\n") == 1
    )


def test_the_next_command_is_one_that_can_be_typed(tmp_path: Path) -> None:
    """Stage llm on what stage visual has left, with the options that were given for it."""

    given = {
        "run": f"{tmp_path}/a b_visual",
        "data.shards": "x y,z",
        "data.augment": "false",
    }
    config = resolve("visual", "phoenix14t", given)
    (line,) = next_commands((config,), "phoenix14t_visual", given)
    words, options = read_words(shlex.split(line)[2:])
    assert shlex.split(line)[:2] == ["deepspeed", "launch/train.py"] and not words
    llm = resolve(options.pop("stage"), options.pop("recipe"), options)
    assert (llm.visual_run, llm.run) == (config.run, f"{tmp_path}/a b_llm")
    assert llm.data.shards == ("x y", "z") and not llm.data.augment
    (line,) = next_commands((resolve("visual", None, {}),), None, {})
    assert (
        line == "deepspeed launch/train.py --stage llm --visual_run=runs/quickstart_visual"
    )
    scores, translate = next_commands((llm,), "phoenix14t", options)
    assert scores == f"deepspeed launch/evaluate.py --run '{llm.run}' --split test"
    assert translate == f"flallm translate VIDEO --model '{llm.run}'"


def test_killed_in_either_stage_it_goes_on_to_the_same_end(
    whole: tuple[Path, str], tiny_corpus: Path, tmp_path: Path
) -> None:
    """One process, where the run it is compared with had two ranks."""
    run = tmp_path / "killed"
    given = both(
        tiny_corpus,
        run,
        **{
            "stage1.light_t.size": "tiny",
            "stage2.optim.llm_lr": "3e-4",
            "train.save_every_steps": 2,
        },
    )
    for stage in ("visual", "llm"):
        kill_after(4, folder_of(run, stage), given)
    done = launch("launch/train.py", *given, ranks=1)
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"stage visual is finished: {folder_of(run, 'visual')}" in done.stdout
    for stage in ("visual", "llm"):
        expected = losses(folder_of(whole[0], stage))
        np.testing.assert_allclose(losses(folder_of(run, stage)), expected, atol=1e-4)
        assert (folder_of(run, stage) / "evaluation" / "test.hypotheses.jsonl").is_file()


def kill_after(steps: int, run: Path, given: list[str]) -> None:
    """Start the command and kill it once the run has made so many steps."""
    process = subprocess.Popen(
        command("launch/train.py", *given, ranks=1),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = run / "metrics.jsonl"
    until = time.monotonic() + 300
    try:
        while not (metrics.is_file() and metrics.read_text().count('"train"') >= steps):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_stage_leaves_no_engine_behind(tiny_corpus: Path, tmp_path: Path) -> None:
    """The next stage of the same process needs the memory. Others' tests may have left theirs."""
    kinds = ("SignTranslator", "DeepSpeedEngine", "DeepSpeedZeroOptimizer")

    def held() -> Counter[str]:
        return Counter(
            name for thing in gc.get_objects() if (name := type(thing).__name__) in kinds
        )

    gc.collect()
    before = held()
    given = {"light_t.size": "tiny", "train.epochs": 1, "train.max_steps": 1}
    config = resolve(
        "visual", None, tiny_options(tiny_corpus, "visual", tmp_path / "visual", **given)
    )
    with dist.session() as world:
        assert run_stage(config, world, StopRequest()) is False  # one of five steps
    assert held() <= before


def test_a_start_reads_its_checkpoint_once_and_before_it_builds_anything(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    verify = FragmentReader.verify

    def spy(reader: FragmentReader, file: FragmentFile) -> str | None:
        read.append(reader.folder.name)
        return verify(reader, file)

    monkeypatch.setattr(FragmentReader, "verify", spy)
    given = {"light_t.size": "tiny", "train.epochs": 1}
    limits: list[dict[str, object]] = [
        {"train.max_steps": 1},
        {"train.max_steps": 2},
        {},
        {},
    ]
    with dist.session() as world:
        for limit in limits:
            options = tiny_options(
                tiny_corpus, "visual", tmp_path / "run", **given, **limit
            )
            config = resolve("visual", None, options)
            assert run_stage(config, world, StopRequest()) == (not limit)
        assert read == ["step-00000001", "step-00000002", "step-00000005"]
        for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
            manifest.unlink()
        monkeypatch.setattr(
            "flallm_ds.training.stages.build_task", lambda *_: pytest.fail("was built")
        )
        with pytest.raises(
            UserError, match=r"Cannot resume from .*: no checkpoint is complete\."
        ):
            run_stage(config, world, StopRequest())


def test_a_start_says_which_checkpoint_it_takes_for_a_damaged_one(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"light_t.size": "tiny", "train.epochs": 1}
    checkpoints = tmp_path / "run" / "checkpoints"
    damaged = checkpoints / "step-00000002"
    with dist.session() as world:
        for limit in (1, 2, 3):
            options = tiny_options(
                tiny_corpus,
                "visual",
                tmp_path / "run",
                **given,
                **{"train.max_steps": limit},
            )
            run_stage(resolve("visual", None, options), world, StopRequest())
            if limit == 2:
                file = damaged / "rank-00000.000.safetensors"
                file.write_bytes(file.read_bytes()[:-1])
                capsys.readouterr()
    said = capsys.readouterr().out
    assert (
        f"warning: Cannot read checkpoint {damaged}: rank-00000.000.safetensors was changed. "
        "The run resumes from step-00000001.\nresumed at epoch 0, step 1 from "
        f"{checkpoints / 'step-00000001'}\n"
    ) in said
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["damaged-step-00000002", "step-00000001", "step-00000003"]


def test_each_score_stands_next_to_the_highest_that_the_tokenizer_allows(
    tiny_corpus: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The references of dev and test have a full-width letter, which no tokenizer under
    NFKC can write."""
    manifest = json.loads((tiny_shards / "index.json").read_text(encoding="utf-8"))
    for split in ("dev", "test"):
        rows = list(iter_rows(load_index(tiny_shards, split)))
        rows = [row | {"text": row["text"].replace("morgen", "ｍorgen")} for row in rows]
        entry = manifest["splits"][split]
        entry |= write_table(tiny_shards / entry["table"], rows)
    (tiny_shards / "index.json").write_text(json.dumps(manifest), encoding="utf-8")
    run = tmp_path / "visual"
    given = {
        "light_t.size": "tiny",
        "train.epochs": 1,
        "eval.every_epochs": 1,
        "data.shards": tiny_shards,
    }
    config = resolve("visual", None, tiny_options(tiny_corpus, "visual", run, **given))
    with dist.session() as world:
        assert run_stage(config, world, StopRequest())
    ceiling = "A perfect model would score BLEU-4 {:.2f}, because its tokenizer changes the references: "
    ceiling += "'ｍ' -> 'm' (9)."
    dev = json.loads((run / "best" / "flallm.json").read_text(encoding="utf-8"))["scores"][
        "dev"
    ]
    assert 0 < dev["ceiling_bleu4"] < 99.5
    said = capsys.readouterr().out
    assert (
        f"epoch 1 dev: BLEU-4 {dev['bleu4']:.2f} {ceiling.format(dev['ceiling_bleu4'])}\n"
        in said
    )
    metrics = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert metrics[-1]["ceiling_bleu4"] == dev["ceiling_bleu4"]
    card = (run / "best" / "README.md").read_text(encoding="utf-8")
    assert f"A perfect model would score BLEU-4 {dev['ceiling_bleu4']:.2f} on dev" in card
    from flallm_ds.cli.evaluate import evaluate

    evaluate(run=str(run), split="test", beams=1)
    said = capsys.readouterr().out
    found = json.loads((run / "evaluation" / "test.json").read_text(encoding="utf-8"))
    bleu4 = found["ceiling"]["bleu4"]
    assert found["ceiling"]["changes"] == [["ｍ", "m", 9]] and 0 < bleu4 < 99.5
    assert found["scores"]["ceiling_bleu4"] == found["blind"]["ceiling_bleu4"] == bleu4
    assert ceiling.format(bleu4) in said
    # The first table; tables of parts of the split follow.
    header, *_ = (line for line in said.splitlines() if "BLEU-4 |" in line)
    (row,) = (line for line in said.splitlines() if line.startswith("| model"))
    assert header.endswith("ceiling |") and row.endswith(f"{bleu4:7.2f} |")


def times(folder: Path) -> dict[Path, int]:
    """When each file was changed; the lock comes and goes."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_run_folder_keeps_the_log_and_hypotheses_of_each_scoring(
    whole: tuple[Path, str],
) -> None:
    run, said = whole
    for stage in ("visual", "llm"):
        folder = folder_of(run, stage)
        log = (folder / "log.txt").read_text(encoding="utf-8")
        assert "epoch 2 dev: BLEU-4" in log and "blind control" in log
        kept = [
            json.loads(line)
            for line in (folder / "hypotheses.jsonl").read_text().splitlines()
        ]
        assert len({line["key"] for line in kept}) == len(kept) == 5
        for line in kept:
            assert (
                f"  reference   {line['reference']}\n" in said and line["reference"] in log
            )
        versions = json.loads((folder / "versions.json").read_text())
        assert len(versions["starts"]) == 1 and versions["ranks"] == 2
        assert any(word.startswith("--stage") for word in versions["command"])
        assert not (folder / ".lock").exists()


def test_a_second_job_ends_at_once_on_all_ranks_and_touches_nothing(
    whole: tuple[Path, str], tiny_corpus: Path
) -> None:
    """It would have written into the files of the first."""
    folder = folder_of(whole[0], "visual")
    options = tiny_options(tiny_corpus, "visual", folder, **{"light_t.size": "tiny"})
    with locked(folder / ".lock", "the run", "wait"):
        before = times(folder.parent)
        done = launch("launch/train.py", *flags("visual", options))
        assert times(folder.parent) == before
    assert done.returncode == 2, done.stdout[-6000:]
    sentence = f"error: Run folder {folder} is in use by process {os.getpid()} on {socket.gethostname()} since "
    assert done.stdout.count(sentence) == 1 and "Traceback" not in done.stdout


def test_evaluation_writes_the_same_bytes_on_one_two_and_three_ranks(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    """The run evaluated its test split on two ranks."""
    run = folder_of(whole[0], "visual")
    found = []
    for ranks in (1, 3):
        copy = Path(shutil.copytree(run, tmp_path / str(ranks) / run.name))
        shutil.rmtree(copy / "evaluation")
        done = launch("launch/evaluate.py", f"--run={copy}", "--split=test", ranks=ranks)
        assert done.returncode == 0, done.stdout[-6000:]
        found.append(copy)
    for name in ("test.hypotheses.jsonl", "test.json"):
        expected = (run / "evaluation" / name).read_bytes()
        for copy in found:
            assert (copy / "evaluation" / name).read_bytes() == expected


def test_a_second_evaluation_of_a_split_ends_at_once(
    whole: tuple[Path, str], tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flallm_ds.cli.evaluate import evaluate

    folder = folder_of(whole[0], "visual")
    with locked(folder / "evaluation" / ".dev.lock", "it", "wait"):
        before = times(folder)
        with pytest.raises(
            UserError, match=r"evaluation/dev.json is in use by process .*another --split"
        ):
            evaluate(run=str(folder), split="dev")
        assert times(folder) == before


def test_a_finished_pair_does_nothing(
    whole: tuple[Path, str],
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = whole
    from flallm_ds.cli.train import train

    before = times(run.parent)
    more = {"stage1.light_t.size": "tiny", "stage2.optim.llm_lr": "3e-4"}
    options = tiny_options(tiny_corpus, "visual", run, **more)
    train(stage="both", **options)
    said = capsys.readouterr().out
    assert "stage visual is finished" in said and "stage llm is finished" in said
    assert times(run.parent) == before

    shutil.copytree(run.parent, tmp_path / "copy")
    (tmp_path / "moved").symlink_to(tiny_corpus / "shards")
    copy = tmp_path / "copy" / run.name
    options |= {
        "run": str(copy),
        "data.shards": str(tmp_path / "moved"),
        "data.threads": "1",
    }
    train(stage="both", **options)  # scored where the shards are now, and once
    scores = [
        folder_of(copy, stage) / "evaluation" / "test.json" for stage in ("visual", "llm")
    ]
    assert [json.loads(path.read_text())["shards"] for path in scores] == [
        [str(tmp_path / "moved")]
    ] * 2
    before = times(copy.parent)
    train(stage="both", **options)
    assert times(copy.parent) == before


def test_nvjpeg_is_refused_where_shards_hold_h264(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    """Its every clip would count as broken, and another corpus's take its place."""
    manifest = json.loads((tiny_corpus / "shards" / "index.json").read_text())
    for clip_format in ("mjpeg", "h264"):
        manifest["options"]["clip_format"] = clip_format
        (tmp_path / clip_format).mkdir()
        (tmp_path / clip_format / "index.json").write_text(json.dumps(manifest))
    data = DataConfig(shards=(str(tmp_path / "mjpeg"),), decoder="nvjpeg")
    check_jpegs(data)
    with pytest.raises(
        UserError, match=r"must be cpu where shards contain H.264, got nvjpeg for .*h264"
    ):
        check_jpegs(replace(data, shards=(*data.shards, str(tmp_path / "h264"))))
