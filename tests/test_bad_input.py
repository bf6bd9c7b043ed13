"""Wrong input ends with one sentence, a non-zero exit code, and no incomplete files."""

import json
import os
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from flallm_ds import command, export
from flallm_ds.cli.build import BUILD
from flallm_ds.cli.evaluate import evaluate
from flallm_ds.cli.pictures import probe
from flallm_ds.cli.train import train
from flallm_ds.cli.translate import translate
from flallm_ds.files import file_sha256
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.sharding.verify import verify
from tests.helpers.exports import ENCODER_DECODER, write_export
from tests.helpers.llms import make_tiny_llm
from tests.helpers.paths import ROOT
from tests.models.llm.test_multimodal import make as make_multimodal
from tests.models.llm.test_quantized import fp8

Run = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that must be refused and return its error; its --run folder must
    not change."""

    def run(target: Any, *arguments: str) -> str:
        words = list(map(str, arguments))
        monkeypatch.setattr(sys, "argv", ["command", *words])
        monkeypatch.setattr("flallm_ds.command.end_process", sys.exit)
        runs = [Path(word[len("--run=") :]) for word in words if word.startswith("--run=")]
        before = list(map(files_of, runs))
        with pytest.raises(SystemExit) as stop:
            command.main(target)
        assert list(map(files_of, runs)) == before
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        sentences = [line for line in lines if line.startswith("error: ")]
        assert stop.value.code not in (0, None)
        assert len(sentences) == 1, captured.err
        assert "Traceback" not in captured.err
        return sentences[0]

    return run


def files_of(folder: Path) -> list[Path] | None:
    return sorted(folder.rglob("*")) if folder.exists() else None


def options(corpus: Path, run: Path, **more: object) -> list[str]:
    """Return the options of a run that would be short if it started."""
    given = {
        "run": run,
        "data.shards": corpus / "shards",
        "llm.name": corpus / "llm",
        "train.epochs": 1,
    }
    given |= {"visual.weights": "none", "visual.frozen_stages": 0}
    return [f"--{name}={value}" for name, value in (given | more).items()]


def test_a_misspelled_option_names_the_nearest(refused: Run, tmp_path: Path) -> None:
    assert "optim.lr" in refused(
        train, "--stage=visual", f"--run={tmp_path / 'run'}", "--optim.lrr=1"
    )
    assert not (tmp_path / "run").exists()


def test_a_misspelled_stage_option(refused: Run) -> None:
    assert "--stge" in refused(train, "--stge", "visual")
    assert "did you mean stage" in refused(train, "--stage=visual", "--stge", "visual")


def test_a_word_too_many(refused: Run) -> None:
    assert "one word too many" in refused(train, "visual")


@pytest.mark.parametrize(
    "typed",
    [
        ["--", "--train.seed=7"],
        ["-"],
        ["-seed=7"],
        ["\u2013seed=7"],
        ["--seed=1", "--seed=2"],
        ["--", "--trace"],
    ],
)
@pytest.mark.parametrize(
    "target",
    [train, BUILD.verbs["manifest"], verify, translate],
    ids=lambda verb: verb.__qualname__,
)
def test_no_typed_argument_is_dropped(refused: Run, target: Any, typed: list[str]) -> None:
    assert "must be" in (said := refused(target, *typed)) or "must begin" in said


@pytest.mark.parametrize(
    "option", ["--recipe", "--recipe=", "--run", "--run=", "--llm.name=", "--train.seed="]
)
def test_an_option_without_its_value_does_not_start_a_run(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """An unset shell variable starts no run of the default recipe, and makes no folder."""
    monkeypatch.chdir(tmp_path)
    assert option.rstrip("=") in refused(train, "--stage=visual", option)
    assert not list(tmp_path.iterdir())


def test_a_value_of_another_type(refused: Run) -> None:
    assert "whole number" in refused(train, "--stage=visual", "--train.epochs=many")


def test_an_unknown_recipe(refused: Run) -> None:
    assert "phoenix14t_visual" in refused(train, "--recipe=phoenix14_visual")


def test_an_unknown_corpus_of_build(refused: Run, tmp_path: Path) -> None:
    sentence = refused(BUILD, "phoenix", f"--source={tmp_path}", f"--out={tmp_path / 'o'}")
    assert "phoenix14t" in sentence


def test_a_missing_source_folder(refused: Run, tmp_path: Path) -> None:
    sentence = refused(
        BUILD, "phoenix14t", f"--source={tmp_path / 'no'}", f"--out={tmp_path / 'o'}"
    )
    assert str(tmp_path / "no") in sentence
    assert list(tmp_path.iterdir()) == []


def test_shards_that_do_not_exist(refused: Run, tmp_path: Path, tiny_corpus: Path) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{"data.shards": tmp_path / "none"})
    assert "index.json" in refused(train, "--stage=visual", *given)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("data.weights", "1,2", "one number above 0 for each of the 1 data.shards"),
        ("data.weights", "0", "above 0"),
        ("data.temperature", "0", "data.temperature must be above 0"),
        ("data.cap", "even", "one of uniform, random, segment"),
        ("data.target_fps", "-1", "data.target_fps must be above 0"),
        ("data.max_broken", "16", "data.max_broken must be in [0, 1)"),
        (
            "data.shards",
            "pipe:cat data/{file}",
            "got a command (pipe:), which is never run. Copy the shards",
        ),
        ("data.shards", "simplecache::http://host/shards", "got simplecache:: before it"),
        ("data.shards", "reference://::http://host/shards", "got one on top of another"),
        ("data.shards", "zip://shards", "got one on top of another"),
        ("data.allow_pipe", "true", "there is no option --data.allow_pipe"),
        ("data.shards", "gopher://host/shards", "gopher"),
        ("data.shards", "http://127.0.0.1:1/shards", "http://127.0.0.1:1/shards"),
    ],
)
def test_wrong_values_of_data_options(
    refused: Run, tmp_path: Path, tiny_corpus: Path, name: str, value: str, said: str
) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{name: value})
    assert said in refused(train, "--stage=visual", *given)
    assert not (tmp_path / "run").exists()


def test_nvjpeg_without_a_gpu(refused: Run, tmp_path: Path, tiny_corpus: Path) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{"data.decoder": "nvjpeg"})
    assert "--data.decoder=cpu" in refused(train, "--stage=visual", *given)
    assert not (tmp_path / "run").exists()


def test_a_shard_whose_bytes_changed_where_checksums_are_asked_for(
    refused: Run, tmp_path: Path, tiny_shards: Path, tiny_corpus: Path
) -> None:
    tar = sorted(tiny_shards.glob("train-*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[-5000] ^= 1
    tar.write_bytes(content)
    given = options(
        tiny_corpus,
        tmp_path / "run",
        **{"data.shards": tiny_shards, "data.check_shards": True},
    )
    assert tar.name in refused(train, "--stage=visual", *given)


def test_a_truncated_shard_is_found_before_the_first_step(
    refused: Run, tmp_path: Path, tiny_shards: Path, tiny_corpus: Path
) -> None:
    tar = sorted(tiny_shards.glob("train-*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-700])
    given = options(tiny_corpus, tmp_path / "run", **{"data.shards": tiny_shards})
    assert tar.name in refused(train, "--stage=visual", *given)
    assert tar.name in refused(verify, str(tiny_shards))


@pytest.mark.parametrize(
    ("split", "column", "value"),
    [("train", "num_frames", 10**9), ("dev", "fps", np.nan), ("dev", "size", 2**62)],
)
def test_a_table_with_impossible_values(
    refused: Run,
    tmp_path: Path,
    tiny_shards: Path,
    tiny_corpus: Path,
    split: str,
    column: str,
    value: float,
) -> None:
    """Before a model is made; scoring reads it by the same way."""
    table = tiny_shards / f"{split}.safetensors"
    arrays = load_arrays(table)
    arrays[column][3] = value
    save_arrays(arrays, table)
    manifest = json.loads((tiny_shards / "index.json").read_text())
    manifest["splits"][split]["table_sha256"] = file_sha256(table)
    (tiny_shards / "index.json").write_text(json.dumps(manifest))
    given = options(tiny_corpus, tmp_path / "run", **{"data.shards": tiny_shards})
    sentence = refused(train, "--stage=visual", *given)
    assert (
        f"Cannot use the table of split {split}, " in sentence
        and f": {column} must be from" in sentence
    )
    assert "in row 3" in sentence and not (tmp_path / "run").exists()


def test_stage_llm_without_stage_1_says_which_command_makes_it(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    given = options(tiny_corpus, tmp_path / "run", visual_run=tmp_path / "visual")
    sentence = refused(train, "--stage=llm", *given)
    assert "launch/train.py --stage visual" in sentence


def test_stage_llm_without_stage_1_prepares_nothing(
    refused: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flallm_ds.training.stages.prepare", lambda: pytest.fail("it took minutes")
    )
    given = (f"--run={tmp_path / 'run'}", f"--visual_run={tmp_path / 'visual'}")
    assert "launch/train.py --stage visual" in refused(train, "--stage=llm", *given)


def settings_of(stage: str, visual: dict[str, object]) -> dict[str, object]:
    """What a reader of flallm.json relies on."""
    frames = dict.fromkeys(
        ("short_side", "keep_every", "max_frames", "frame_size", "crop_size"), 32
    )
    return {
        "format": export.FORMAT,
        "stage": stage,
        "visual": visual,
        "features": {"kind": "signs"},
        "frames": frames,
        "generation": {"num_beams": 2, "length_penalty": 1.0, "max_new_tokens": 8},
        "scores": {},
        "training": {},
    }


def test_a_stage_1_export_of_another_width(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    best = tmp_path / "visual" / "best"
    best.mkdir(parents=True)
    settings = settings_of("visual", {"width": 32, "temporal_kernel": 3})
    (best / "flallm.json").write_text(json.dumps(settings))
    given = options(tiny_corpus, tmp_path / "run", visual_run=tmp_path / "visual")
    sentence = refused(train, "--stage=llm", *given)
    assert "was trained with another width (visual.width 32, got " in sentence


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
        ({"gradient_clipping": 1.0}, "optim.clip"),
        ({"train_batch_size": 8}, "data.batch_clips"),
    ],
)
def test_a_deepspeed_json_with_a_misspelled_or_doubly_owned_key(
    refused: Run, tmp_path: Path, tiny_corpus: Path, content: dict[str, Any], word: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    given = options(tiny_corpus, tmp_path / "run", **{"train.deepspeed": path})
    assert word in refused(train, "--stage=visual", *given)


def test_a_run_folder_with_other_files(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert str(tmp_path) in refused(
        train, "--stage=visual", *options(tiny_corpus, tmp_path)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_out_folder_with_other_files(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    given = ["phoenix14t", f"--source={tmp_path}", f"--out={tmp_path}"]
    assert str(tmp_path) in refused(BUILD, *given)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_llm_that_does_not_exist(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{"llm.name": tmp_path / "none"})
    assert "llm.name" in refused(train, "--stage=visual", *given)


class HangsUp(socketserver.BaseRequestHandler):
    """A hub that closes every connection at once, and remembers what it was asked for."""

    seen: ClassVar[list[str]] = []

    def handle(self) -> None:
        self.seen.append(self.request.recv(10_000).decode().split(" HTTP")[0])


def test_imagenet_weights_that_are_not_available_end_the_run_at_once(
    tmp_path: Path, tiny_corpus: Path
) -> None:
    """No run begins from random weights that its config.json calls pretrained."""
    given = options(
        tiny_corpus, tmp_path / "run", **{"visual.weights": "microsoft/resnet-18"}
    )
    command_line = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "--stage=visual",
        *given,
    ]
    with socketserver.TCPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "hub"),
        }
        environment = {
            name: v for name, v in os.environ.items() if name != "HF_HUB_OFFLINE"
        } | hub
        done = subprocess.run(
            command_line, env=environment, capture_output=True, text=True, timeout=300
        )
        server.shutdown()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        "an available hub id, got microsoft/resnet-18: there is no such file or folder"
        in sentence
    )
    assert "--visual.weights=none to train from random weights" in sentence
    asked = [request for request in HangsUp.seen if "resnet" in request]
    # and not for a minute
    assert asked == ["HEAD /microsoft/resnet-18/resolve/main/config.json"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "weights", ["microsoft/resnet-18", "nosuch/thing", "timm/resnet18.a1_in1k"]
)
def test_backbone_weights_that_are_not_cached_where_there_is_no_hub(
    refused: Run,
    tmp_path: Path,
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    given = options(tiny_corpus, tmp_path / "run", **{"visual.weights": weights})
    said = f"an available hub id, got {weights}: there is no such file or folder"
    assert said in refused(train, "--stage=visual", *given)
    assert not (tmp_path / "run").exists()


def test_backbone_weights_at_a_path_that_does_not_exist(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{"visual.weights": "/nosuch/folder"})
    assert (
        "visual.weights must be a hub id or an existing path, got /nosuch/folder"
        in refused(train, "--stage=visual", *given)
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", ["a/b/c", "nosuch folder"])
def test_backbone_weights_that_are_nothing(
    refused: Run, tmp_path: Path, tiny_corpus: Path, weights: str
) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{"visual.weights": weights})
    assert f"an available hub id, got {weights}: there is no such file" in refused(
        train, "--stage=visual", *given
    )
    assert not (tmp_path / "run").exists()


def test_a_language_that_the_tokenizer_does_not_know(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    given = options(tiny_corpus, tmp_path / "run", **{"llm.language": "de_DF"})
    assert "de_DE" in refused(train, "--stage=visual", *given)


def test_an_llm_that_cannot_write_the_training_text(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    """It would learn to leave out what it reads as unknown, and score what is left."""
    llm = make_tiny_llm("mbart", tmp_path / "llm", ["今天到处阳光明媚。", "regn wind"])
    for stage in ("--stage=visual", "--stage=llm"):
        given = options(
            tiny_corpus, tmp_path / "run", **{"llm.name": llm, "visual_run": "none"}
        )
        sentence = refused(train, stage, *given)
        assert (
            "with at most 0.1 % unknown tokens, got " in sentence
            and f"{llm} with " in sentence
        )
        assert (
            " % of " in sentence
            and "because of 'o' (" in sentence
            and "--llm.name" in sentence
        )
        assert not (tmp_path / "run").exists()


def test_clips_longer_than_the_llm_can_read(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    """Its table of positions would end in the middle of training."""
    llm = Path(shutil.copytree(tiny_corpus / "llm", tmp_path / "llm"))
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 6}))
    state = load_file(llm / "model.safetensors")
    tables = {
        name: tensor[:8] for name, tensor in state.items() if "embed_positions" in name
    }
    assert tables
    save_file(
        state | {n: t.clone() for n, t in tables.items()},
        llm / "model.safetensors",
        {"format": "pt"},
    )
    given = options(
        tiny_corpus, tmp_path / "run", **{"llm.name": llm, "data.max_frames": 7}
    )
    sentence = refused(train, "--stage=llm", "--visual_run=none", *given)
    assert (
        "at most 6 frames" in sentence
        and "got 7" in sentence
        and "--data.max_frames=6" in sentence
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"visual.weights": "https://host/facebook/dinov2-small"},
            "Give facebook/dinov2-small.",
        ),
        ({"visual.weights": "{}/vit.gguf"}, "GGUF files hold quantised weights"),
        ({"visual.weights": "{}/empty"}, "the folder is empty. Check --visual.weights."),
        (
            {"llm.name": "{}/fp8", "llm.bits": 4, "llm.tune": "lora"},
            "which is quantised with fp8, got 4",
        ),
        (
            {"llm.name": "{}/llava", "llm.bits": 8, "llm.tune": "lora"},
            "which is a multimodal model, got 8",
        ),
        (
            {"llm.name": "{}/aya"},
            "a multimodal aya_vision model whose text model cannot",
        ),
    ],
)
def test_weights_of_another_kind(
    refused: Run, tmp_path: Path, tiny_corpus: Path, given: dict[str, Any], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    llama = make_tiny_llm("llama3", tmp_path / "llama", ["regen am abend"])
    fp8(llama, tmp_path / "fp8", None)
    make_multimodal("llava", llama, tmp_path / "llava")
    transformers.AyaVisionConfig().save_pretrained(tmp_path / "aya")
    named = {name: str(value).format(tmp_path) for name, value in given.items()}
    more = {"visual_run": "none", "llm.trim_vocabulary": False, **named}
    assert said in refused(
        train, "--stage=llm", *options(tiny_corpus, tmp_path / "run", **more)
    )
    assert not (tmp_path / "run").exists()


def test_a_video_that_does_not_exist_or_cannot_be_decoded(
    refused: Run, tmp_path: Path, tiny_corpus: Path, shared_data: Path
) -> None:
    export = write_export(ENCODER_DECODER, tiny_corpus, tmp_path / "run")
    for video in (tmp_path / "no.mp4", shared_data / "edge_videos" / "corrupted.mp4"):
        assert str(video) in refused(translate, str(video), f"--model={export}")


def test_evaluating_a_folder_without_an_export(refused: Run, tmp_path: Path) -> None:
    assert "flallm.json" in refused(evaluate, f"--run={tmp_path}")


def test_a_corrupted_video_of_a_corpus_leaves_nothing(
    refused: Run, tmp_path: Path, shared_data: Path
) -> None:
    shutil.copy(shared_data / "edge_videos" / "corrupted.mp4", tmp_path)
    (tmp_path / "m.csv").write_text("video,text,split\ncorrupted.mp4,hello,train\n")
    given = [
        "manifest",
        f"--source={tmp_path / 'm.csv'}",
        f"--out={tmp_path / 'o'}",
        "--language=en",
    ]
    assert "corrupted.mp4" in refused(BUILD, *given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corrupted.mp4", "m.csv"]


# --- stages


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("joint", {"visual_run": "runs/v"}, "visual_run must be empty in stage joint"),
        (
            "joint",
            {"llm.input": "light_t"},
            "llm.input must be signs or frames if no stage 1",
        ),
        (
            "llm",
            {"visual_run": "none", "llm.input": "light_t"},
            "llm.input must be signs or frames",
        ),
        (
            "visual",
            {"visual.frozen": "backbone"},
            "visual.frozen must be all in stage visual",
        ),
        (
            "visual",
            {"train.probe_every": -1},
            "train.probe_every must be at least 0, got -1",
        ),
        (
            "both",
            {"visual_run": "runs/v"},
            "--visual_run must not be given for one stage of --stage both",
        ),
        (
            "both",
            {"stage2.run": "runs/v"},
            "--run=RUN for the folders RUN_visual and RUN_llm",
        ),
        ("both", {"stage1.optim.lrr": 1}, "did you mean optim.lr"),
        (
            "both",
            {"stage1.visual.width": 8, "stage2.visual.width": 16},
            "visual.width must be the same",
        ),
        ("visuall", {}, "--stage must be visual, llm, joint or both"),
    ],
)
def test_options_that_do_not_fit_the_stage(
    refused: Run,
    tmp_path: Path,
    tiny_corpus: Path,
    stage: str,
    given: dict[str, object],
    said: str,
) -> None:
    assert said in refused(
        train, f"--stage={stage}", *options(tiny_corpus, tmp_path / "run", **given)
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{"stage": "visual"}, {"stage": "joint"}])
def test_a_bf16_engine_with_batch_norm_inside(
    refused: Run, tmp_path: Path, tiny_corpus: Path, given: dict[str, str]
) -> None:
    """DeepSpeed would cast the parameters, not the statistics, and fail at the first step
    on a GPU."""
    more = {"train.deepspeed": "ds_configs/zero3.json"}
    words = options(tiny_corpus, tmp_path / "run", **more)
    sentence = refused(train, f"--stage={given['stage']}", *words)
    assert "must use torch_autocast" in sentence and "ds_configs/zero2.json" in sentence
    assert not (tmp_path / "run").exists()


def test_light_t_states_of_an_export_that_has_no_light_t(
    refused: Run, tmp_path: Path, tiny_corpus: Path
) -> None:
    best = tmp_path / "other" / "best"
    best.mkdir(parents=True)
    visual = VisualEncoder(width=8)
    (best / "flallm.json").write_text(json.dumps(settings_of("llm", visual.settings())))
    save_file(visual.state_dict(), best / "visual_encoder.safetensors")
    more = {"visual_run": tmp_path / "other", "visual.width": 8, "llm.input": "light_t"}
    sentence = refused(
        train, "--stage=llm", *options(tiny_corpus, tmp_path / "run", **more)
    )
    assert "--visual_run must be a run of stage visual for llm.input=light_t" in sentence


def test_both_stages_on_shards_without_the_split_that_they_end_with(
    refused: Run, tmp_path: Path, tiny_shards: Path, tiny_corpus: Path
) -> None:
    """Found at the start, not after both stages."""
    manifest = json.loads((tiny_shards / "index.json").read_text())
    del manifest["splits"]["test"]
    (tiny_shards / "index.json").write_text(json.dumps(manifest))
    given = options(tiny_corpus, tmp_path / "run", **{"data.shards": tiny_shards})
    assert "test" in refused(train, "--stage=both", *given)
    assert not list(tmp_path.glob("run*"))


def test_a_probe_plot_of_a_run_without_probe(refused: Run, tmp_path: Path) -> None:
    sentence = refused(probe, f"--runs={tmp_path}", f"--out={tmp_path / 'p.png'}")
    assert "--train.probe_every=10" in sentence
    assert not (tmp_path / "p.png").exists()
