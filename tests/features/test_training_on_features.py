"""Test that stage llm has the same losses on cached features as on video.

Two gloo ranks train in fp32, with ZeRO-3 and offload.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flallm_ds.cli.evaluate import evaluate
from flallm_ds.cli.features import features
from flallm_ds.cli.train import train
from flallm_ds.command import bind, main
from flallm_ds.data.index import load_index
from flallm_ds.data.loader import open_loader
from flallm_ds.data.preprocess import Preprocess
from flallm_ds.data.sampling import FrameSampling
from flallm_ds.dist import World
from flallm_ds.errors import UserError
from flallm_ds.inference.pictures import strip_of_run
from flallm_ds.inference.translator import Translator
from flallm_ds.models.encode import encode
from flallm_ds.recipes import resolve
from flallm_ds.training.build.visual import feature_extractor
from tests.helpers.launching import (
    command,
    environment,
    flags,
    launch,
    losses,
    tiny_options,
)
from tests.helpers.paths import RANKS


@pytest.fixture(scope="module")
def runs(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of features and runs that two ranks create (ranks/features.py)."""
    folder = tmp_path_factory.mktemp("features")
    script = RANKS / "features.py"
    done = launch(script, f"--folder={folder}", f"--corpus={tiny_corpus}")
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


def write(corpus: Path, runs: Path, out: Path, **more: object) -> None:
    """Write features as in `runs`, with other options `more`, in this process."""
    options = tiny_options(
        corpus, "llm", runs / "unused", **{"views": 2, "out": out} | more
    )
    features(**bind(features, [], options))


def writing(corpus: Path, runs: Path, out: Path, **more: object) -> list[str]:
    """Return the options that write features as in `runs`, with other options `more`."""
    options = tiny_options(
        corpus, "llm", runs / "unused", **{"views": 2, "out": out} | more
    )
    return [f"--{name}={value}" for name, value in options.items()]


def test_two_epochs_on_features_have_the_losses_of_video(runs: Path) -> None:
    """They are equal to the bit on the machine of this test, but another CPU may add in
    another order."""
    video, cached = losses(runs / "video"), losses(runs / "cached")
    assert len(video) == 10 and len(set(video)) == 10
    np.testing.assert_allclose(cached, video, rtol=0, atol=2e-6)


def test_a_resumed_run_on_features_has_the_same_losses(runs: Path) -> None:
    assert losses(runs / "resumed") == losses(runs / "cached")


def test_a_run_on_video_is_not_resumed_with_another_encoder(runs: Path) -> None:
    """No checkpoint contains the frozen encoder: a stage 1 that was trained further would
    change the losses without an error."""
    for rank in (0, 1):
        sentence = (runs / f"another_encoder_{rank}.txt").read_text()
        assert (
            "was saved with another frozen visual encoder" in sentence
            and "\n" not in sentence
        )


def test_features_of_a_single_split_give_the_hypotheses_of_video(
    runs: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    write(tiny_corpus, runs, tmp_path / "features", splits="test")
    evaluate(
        run=str(runs / "video"), split="test", beams=2, shards=(str(tmp_path / "features"),)
    )
    cached = (runs / "video" / "evaluation" / "test.hypotheses.jsonl").read_text()
    evaluate(run=str(runs / "video"), split="test", beams=2)
    assert cached == (runs / "video" / "evaluation" / "test.hypotheses.jsonl").read_text()


def test_a_strip_of_a_run_on_features_shows_the_video(runs: Path, tmp_path: Path) -> None:
    evaluate(run=str(runs / "cached"), split="dev", beams=2)
    strip_of_run(runs / "cached", tmp_path / "strip.png", "dev", 2)
    assert cv2.imread(str(tmp_path / "strip.png")).std() > 10
    with pytest.raises(UserError, match="--clips must be at least 1, got 0"):
        strip_of_run(runs / "cached", tmp_path / "strip.png", "dev", 0)
    with pytest.raises(UserError, match=r"folder with config\.json, got .*best"):
        strip_of_run(runs / "cached" / "best", tmp_path / "strip.png", "dev", 2)
    path = runs / "cached" / "evaluation" / "dev.hypotheses.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"no hypothesis for 1 clips .*without --shards"):
        strip_of_run(runs / "cached", tmp_path / "strip.png", "dev", 2)


def test_masks_are_the_same_on_video_and_on_features(runs: Path) -> None:
    video, cached = losses(runs / "masked_video"), losses(runs / "masked")
    np.testing.assert_allclose(cached, video, rtol=0, atol=1e-5)
    for rank in (0, 1):
        whole_ND, cached_ND, video_ND = (
            load_file(runs / run / f"first_features_{rank}")["features_ND"]
            for run in ("cached", "masked", "masked_video")
        )
        masked_ND = (cached_ND == 0) & (whole_ND != 0)
        masked_frames_N = (cached_ND == 0).all(1)
        assert not (whole_ND == 0).all(1).any(), "no frame is all zeros before masking"
        assert masked_frames_N.any(), "time masks"
        assert masked_ND[~masked_frames_N].any(), "feature masks"
        assert torch.equal(cached_ND, whole_ND * ~masked_ND), "the rest is unchanged"
        assert torch.equal((video_ND == 0) & (whole_ND != 0), masked_ND)
        torch.testing.assert_close(video_ND, cached_ND, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("signs", "float32", 1e-5), ("light_t", "float32", 1e-5), ("frames", "float16", 2e-3)],
)
def test_features_are_those_that_stage_llm_computes_from_video(
    runs: Path, tiny_corpus: Path, tmp_path: Path, kind: str, dtype: str, tolerance: float
) -> None:
    """Compare each batch of two epochs and of the dev split, for every kind of input."""
    out, world = tmp_path / "features", World(0, 1, 0, 1)
    write(tiny_corpus, runs, out, dtype=dtype, **{"llm.input": kind})
    config = resolve(
        "llm",
        None,
        tiny_options(tiny_corpus, "llm", runs / "unused", **{"llm.input": kind}),
    )
    extractor = feature_extractor(config, world)
    preprocess = Preprocess(
        config.data.frame_size, config.data.crop_size, config.data.augment
    )
    seen = []
    for split, epoch in (("train", 0), ("train", 1), ("dev", 0)):
        training = split == "train"
        video, cached = (
            open_loader(root, split, sampling=FrameSampling(2), train=training, epoch=epoch)
            for root in (tiny_corpus / "shards", out)
        )
        for theirs, ours in zip(video, cached, strict=True):
            expected_ND = encode(
                theirs, extractor, preprocess, train=training, device=world.device
            )
            torch.testing.assert_close(
                ours.features_ND.float(), expected_ND, rtol=tolerance, atol=tolerance
            )
            seen.append(float(expected_ND.std()))
    assert len(seen) == 12 and min(seen) > 0.05


def test_the_number_of_features_follows_feature_fps(runs: Path) -> None:
    def num_features(run: str) -> int:
        num = 0
        for text in (runs / run / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            if line["kind"] == "train" and line["epoch"] == 0:
                num += line["frames"]
        return num

    ratio = num_features("slower") / num_features("cached")
    assert 8 / 12.5 <= ratio < 8 / 12.5 * 1.1  # a clip's last part rounds up
    settings = json.loads((runs / "slower" / "best" / "flallm.json").read_text())
    assert settings["frames"]["feature_fps"] == 8


# --- the results of a run on features


def test_a_run_on_features_writes_the_export_of_a_run_on_video(runs: Path) -> None:
    video, cached = runs / "video" / "best", runs / "cached" / "best"
    names = [p.relative_to(video) for p in video.rglob("*.safetensors")]
    assert len(names) >= 3
    for name in names:
        ours, theirs = load_file(cached / name), load_file(video / name)
        assert ours.keys() == theirs.keys()
        for tensor in ours:
            torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=0, atol=1e-4)
    ours, theirs = (json.loads((p / "flallm.json").read_text()) for p in (cached, video))
    for part in ("visual", "features", "frames", "generation"):
        assert ours[part] == theirs[part]


def test_its_export_gives_the_same_hypotheses_on_video_and_translates_videos(
    runs: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    found = []
    for number, shards in enumerate(((), (str(tiny_corpus / "shards"),))):
        run = Path(shutil.copytree(runs / "cached", tmp_path / str(number)))
        evaluate(run=str(run), split="test", beams=2, shards=shards)
        found.append((run / "evaluation" / "test.hypotheses.jsonl").read_text())
    assert found[0] == found[1] and len(found[0].splitlines()) == 9
    with pytest.raises(
        UserError, match=r"evaluation view, got training views of split train in .*features"
    ):
        evaluate(run=str(runs / "cached"), split="train")
    video = tmp_path / "video"
    video.mkdir()
    for number in range(12):
        frame = np.random.default_rng(number).integers(0, 255, (79, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(video / f"{number:04d}.png"), frame)
    for run in ("cached", "slower"):
        assert isinstance(Translator.from_pretrained(runs / run).translate(video), str)


# --- writing


def test_the_bytes_do_not_depend_on_the_ranks(
    runs: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Two ranks have written `runs`; here it is one."""
    out = tmp_path / "features"
    write(tiny_corpus, runs, out)
    names = sorted(p.name for p in (runs / "features").iterdir() if p.is_file())
    assert (
        names == sorted(p.name for p in out.iterdir() if p.is_file()) and len(names) == 18
    )
    for name in names:
        assert (out / name).read_bytes() == (runs / "features" / name).read_bytes(), name
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    write(tiny_corpus, runs, out)  # again: nothing is left to do
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.tar")} == before


def test_a_writing_that_was_killed_is_resumed(
    runs: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    words = command(
        "launch/features.py", *writing(tiny_corpus, runs, out, views=12), ranks=1
    )
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while (
        len(list(out.glob("*.tar"))) < 5
        and process.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"index\.json"):
        load_index(out, "train")
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert 5 <= len(before) < 64
    write(tiny_corpus, runs, out, views=12)
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    records = sum(after[name] == before[name] for name in before)
    assert len(before) - 1 <= records and len(after) == 5 * 12 + 2 + 2
    load_index(out, "train").check_files(checksums=True)
    for name in ("train-000003.view1.tar", "dev-000001.view0.tar"):
        assert (out / name).read_bytes() == (runs / "features" / name).read_bytes()


def test_a_clip_that_does_not_decode_is_replaced_as_on_video(
    runs: Path,
    tiny_shards: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = load_index(tiny_shards, "train")
    row = 11
    with (tiny_shards / index.tar(row).file).open("r+b") as file:
        file.seek(int(index.arrays["offset"][row]))
        file.write(bytes(64))
    out = tmp_path / "features"
    write(tiny_corpus, runs, out, **{"data.shards": tiny_shards, "data.max_broken": 0.05})
    key = index.strings("key")[row]
    assert f"clip {key} in {index.tar(row).file} is broken" in capsys.readouterr().out
    for epoch in (0, 1, 2):
        video, cached = (
            list(open_loader(root, sampling=FrameSampling(2), epoch=epoch))
            for root in (tiny_shards, out)
        )
        assert [b.keys for b in cached] == [b.keys for b in video]
        assert all(torch.isfinite(b.features_ND).all() for b in cached)
        assert key not in [k for b in cached for k in b.keys]


# --- refusals


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Return a function that runs a command which must fail, and returns its one error.

    The command must leave no file in the folder of the test.
    """

    def run(target: Any, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.setattr("flallm_ds.command.end_process", sys.exit)
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(target)
        assert sorted(tmp_path.rglob("*")) == before
        lines = capsys.readouterr().err.splitlines()
        sentences = [line for line in lines if line.startswith("error: ")]
        assert (
            stop.value.code == 2
            and len(sentences) == 1
            and "Traceback" not in "".join(lines)
        )
        return sentences[0]

    return run


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data.keep_every": 4}, "were made with another data.keep_every (2, got 4)"),
        ({"data.crop_size": 24}, "data.crop_size (28, got 24)"),
        ({"data.augment": False}, "data.augment (True, got False)"),
        ({"train.seed": 1}, "were made with another seed (train.seed 0, got 1)"),
        ({"eval.split": "train"}, "got training views of split train in"),
        ({"llm.input": "frames"}, "were made by another encoder ("),
        (
            {"visual.frozen": "backbone"},
            "must be video where the visual encoder is trained",
        ),
        ({"stage": "visual"}, "must be video where the visual encoder is trained"),
        ({"stage": "joint"}, "must be video where the visual encoder is trained"),
        ({"shards": "both"}, "must be all video or all cached features"),
        (
            {"shards": "video", "data.feature_fps": 8},
            "data.feature_fps must be none where data.shards are video",
        ),
        (
            {"shards": "video", "stage": "visual", "data.time_masks": 1},
            "data.time_masks must be 0 where",
        ),
    ],
)
def test_features_that_do_not_fit_the_run_are_refused(
    runs: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    more: dict[str, object],
    said: str,
) -> None:
    video, cached = tiny_corpus / "shards", runs / "features"
    more = dict(more)
    stage = str(more.pop("stage", "llm"))
    shards = {"both": f"{video},{cached}", "video": video, "cached": cached}[
        str(more.pop("shards", "cached"))
    ]
    options = tiny_options(
        tiny_corpus, stage, tmp_path / "run", **{"data.shards": shards} | more
    )
    if stage == "llm":
        options["visual_run"] = str(runs / "visual")
    assert said in refused(train, *flags(stage, options))


def test_the_error_for_another_encoder_names_both_encoders(
    runs: Path, tiny_corpus: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = Path(shutil.copytree(runs / "visual" / "best", tmp_path / "other"))
    state = load_file(other / "visual_encoder.safetensors")
    state["temporal.conv.bias"][0] += 1e-3
    save_file(state, other / "visual_encoder.safetensors")
    more = {"data.shards": runs / "features", "visual_run": other}
    options = tiny_options(tiny_corpus, "llm", tmp_path / "run", **more)
    options["visual_run"] = str(other)
    sentence = refused(train, *flags("llm", options))
    assert f"made by another encoder ({runs / 'visual'} " in sentence
    assert f", got --visual_run={other} " in sentence
    given = writing(tiny_corpus, runs, runs / "features")
    given = [word for word in given if not word.startswith("--visual_run=")]
    sentence = refused(features, *given, f"--visual_run={other}")
    assert "belongs to other features (the encoder " in sentence


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"views": 0}, "--views must be at least 1"),
        ({"dtype": "int8"}, "--dtype must be one of float32, float16"),
        ({"splits": "train,exam"}, "split must be one of train, dev, test"),
        ({"data.keep_evry": 2}, "did you mean data.keep_every"),
        ({"visual.frozen": "none"}, "visual.frozen must be all where features are written"),
        ({"data.shards": "a,b"}, "--data.shards must name one folder, got 2"),
        ({"shards": "a"}, "--shards must be given without --data.shards, got a and"),
    ],
)
def test_wrong_options_for_writing_features_are_refused(
    runs: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    more: dict[str, object],
    said: str,
) -> None:
    assert said in refused(features, *writing(tiny_corpus, runs, tmp_path / "out", **more))


def test_an_out_folder_that_cannot_be_created_is_an_error(
    runs: Path, tiny_corpus: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").touch()
    words = writing(tiny_corpus, runs, tmp_path / "file" / "out")
    assert "Cannot write to --out=" in refused(features, *words)


def test_features_are_not_written_from_features_nor_over_other_features(
    runs: Path, tiny_corpus: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    def sentence(out: Path, **more: object) -> str:
        return refused(features, *writing(tiny_corpus, runs, out, **more))

    cached = {"data.shards": runs / "features"}
    assert "launch/features.py must be given video shards" in sentence(
        tmp_path / "out", **cached
    )
    assert "(--views 2, got 3)" in sentence(runs / "features", views=3)
    assert "(data.keep_every 2, got 4)" in sentence(
        runs / "features", **{"data.keep_every": 4}
    )
    assert "with other content" in sentence(runs / "visual")
