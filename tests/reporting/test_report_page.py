"""Test the page of `flallm report` as a file: its data, and runs that lack something."""

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from flallm_ds.config import RunConfig
from flallm_ds.data.index import load_index
from flallm_ds.errors import UserError
from flallm_ds.inference.hypothesis_file import read_hypotheses, write_hypotheses
from flallm_ds.reporting.build import report
from flallm_ds.reporting.clips import NUM_STRIP_FRAMES
from tests.helpers.exports import ENCODER_DECODER
from tests.helpers.runs import HOSTILE, spoil, write_run


@pytest.fixture(scope="module")
def evaluated(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run; tests copy it before they change it."""
    run = write_run(ENCODER_DECODER, tiny_corpus, tmp_path_factory.mktemp("runs") / "mine")
    spoil(run)
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "mine"))


def text_of(run: Path, **options: Any) -> str:
    """The page of a run."""
    out = run.parent / "report.html"
    report([run], out, **options)
    return out.read_text(encoding="utf-8")


def data_of(text: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    found: dict[str, Any] = json.loads(data)
    return found


def test_no_text_of_a_run_becomes_html(run: Path) -> None:
    text = text_of(run, num_clips=0)
    assert HOSTILE not in text and "<b>" not in text
    assert text.count("<script") == 2 == text.count("</script>")
    samples = data_of(text)["samples"]
    assert "".join(samples[0]["translations"][0]["hypothesis"]) == HOSTILE
    assert "".join(samples[2]["translations"][0]["reference"]).startswith("</script><b>")


def test_only_the_script_of_the_page_may_run(run: Path) -> None:
    text = text_of(run, num_clips=0)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; img-src data:; media-src data:" in text
    assert f"script-src 'sha256-{digest}'" in text
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text) == []


def test_clips_are_small_videos_with_a_strip_of_frames(run: Path) -> None:
    clips = data_of(text_of(run, num_clips=2))["clips"]
    assert len(clips) == 2
    for clip in clips.values():
        content = base64.b64decode(clip["video"].removeprefix("data:video/mp4;base64,"))
        with av.open(io.BytesIO(content)) as video:
            frames = list(video.decode(video=0))
        assert (frames[0].width, frames[0].height) == (64, 80)  # of 79 rows, even
        assert len(frames) / clip["seconds"] <= 15.01
        strip = clip["strip"].removeprefix("data:image/jpeg;base64,")
        with av.open(io.BytesIO(base64.b64decode(strip))) as picture:
            (frame,) = picture.decode(video=0)
        assert frame.height == 64 and frame.width == NUM_STRIP_FRAMES * round(64 * 64 / 79)


def move_shards(run: Path, shards: Path) -> None:
    """Change the shard folder that a run was trained and evaluated on."""
    config = RunConfig.load(run / "config.json")
    moved = config.with_overrides({"data.shards": str(shards)})
    (run / "config.json").write_text(moved.to_json(), encoding="utf-8")
    path = run / "evaluation" / "test.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**results, "shards": [str(shards)]}), encoding="utf-8")


def test_a_run_whose_shards_are_gone_has_its_texts(run: Path) -> None:
    move_shards(run, run / "gone")
    text = text_of(run, num_clips=3, num_attention=2)
    data = data_of(text)
    assert len(data["samples"]) == 9
    assert all("index.json" in clip["problem"] for clip in data["clips"].values())
    ((problem,), _) = data["attention"].values()
    assert problem["problem"].startswith("The attention cannot be shown: ")
    assert "Not readable now: A shard folder must contain index.json" in text


def problems_of(run: Path, num_attention: int) -> list[str]:
    """Why clips have no attention; empty for a clip that has."""
    attention = data_of(text_of(run, num_attention=num_attention))["attention"]
    return [of_run.get("problem", "") for (of_run,) in attention.values()]


def test_a_damaged_clip_leaves_the_others_their_attention(
    run: Path, tiny_shards: Path
) -> None:
    move_shards(run, tiny_shards)
    index = load_index(tiny_shards, "test")
    row = 4
    with index.shard_path(int(index.arrays["shard"][row])).open("r+b") as file:
        file.seek(int(index.arrays["offset"][row]))
        file.write(bytes(int(index.arrays["size"][row])))
    damaged, *others = sorted(problems_of(run, 9), reverse=True)
    assert damaged.startswith("The attention cannot be shown: Cannot decode clip ")
    assert others == [""] * 8


def test_a_run_without_an_evaluation_says_how_to_make_one(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    text = text_of(run, num_attention=2)
    assert f"Score it with: deepspeed launch/evaluate.py --run={run} --split=test" in text
    assert "There are no samples" in text
    # The curves and the dev hypotheses are there.
    assert "BLEU-4 on dev" in text and "epoch 10</th>" in text


def test_a_run_that_has_just_started_has_a_page(run: Path) -> None:
    for path in list(run.iterdir()):
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = text_of(run)
    assert "No step is finished." in text and "not recorded" in text


def test_a_line_that_is_written_now_does_not_matter(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "global_st')
    assert "Training loss" in text_of(run, num_clips=0)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n{}\n")
    with pytest.raises(
        UserError, match=r"Cannot read .*metrics\.jsonl: a line is not JSON"
    ):
        text_of(run, num_clips=0)


def test_texts_that_cannot_be_encoded_do_not_matter(run: Path) -> None:
    path = run / "evaluation" / "test.hypotheses.jsonl"
    clips = read_hypotheses(path)
    path.write_text("", encoding="utf-8")
    write_hypotheses(path, clips[1:])
    first = json.dumps({**vars(replace(clips[0], hypothesis="a\ud800b")), "nbest": []})
    path.write_text(first + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    samples = data_of(text_of(run, num_clips=0))["samples"]
    assert "".join(samples[0]["translations"][0]["hypothesis"]) == "a?b"


def test_a_page_that_cannot_be_written_is_one_sentence(run: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*Give another --out"):
        report([run], run / "config.json" / "report.html", num_clips=0)


def test_a_split_that_was_not_evaluated_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"--split must be .* \(test\), got 'dev'"):
        report([run], run / "report.html", split="dev")


def test_a_run_that_is_given_twice_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="RUN must name each run once"):
        report([run, run / "." / ".." / run.name], run / "report.html")
