"""Wrong file names and values are refused before torch, transformers or deepspeed is imported."""

from pathlib import Path

import pytest

from flallm_ds.cli.checks import check_shards
from flallm_ds.errors import UserError
from flallm_ds.recipes import resolve
from tests.helpers.early import flallm


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with files that the command lines below name."""
    (tmp_path / "video.mp4").touch()
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "flallm.json").touch()
    (tmp_path / "of_llm").mkdir()
    config = resolve("llm", "mine", {"run": str(tmp_path / "of_llm")})
    (tmp_path / "of_llm" / "config.json").write_text(config.to_json())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (
            "translate {}/no.mp4 --model={}/run",
            "VIDEO must be an existing path, got {}/no.mp4",
        ),
        ("translate {}/video.mp4 --model={}/no", "Cannot find an export in {}/no:"),
        ("translate {}/video.mp4 --model={}/run", "Cannot open video {}/video.mp4:"),
        (
            "translate {}/video.mp4 --model={}/run --out={}/full",
            "--out must end in .jsonl, .vtt or .srt, got {}/full",
        ),
        (
            "translate {}/video.mp4 --model={}/run --beams=0",
            "--beams must be at least 1 and at most 1000, got 0",
        ),
        (
            "translate {}/video.mp4 --model={}/run --beams=2 --nbest=3",
            "--nbest must be at least 1 and at most --beams (2), got 3",
        ),
        (
            "translate {}/video.mp4 --model={}/run --stream --beams=2",
            "--stream must go with",
        ),
        ("demo --model={}/no", "Cannot find an export in {}/no:"),
        ("demo --model={}/run --port=70000", "--port must be from 0 to 65535, got 70000"),
        ("demo --model={}/run --max_mb=0", "--max_mb must be above 0, got 0"),
        ("demo --model={}/run --host=no.invalid", "--host must be an address of this"),
        ("evaluate --run={}/no", "Cannot find an export in {}/no:"),
        ("evaluate --run={}/run", "--shards must be given where {}/run is an export"),
        ("evaluate --run={}/run --shards={}/no", "A shard folder must contain index.json"),
        (
            "evaluate --run={}/run --shards={}/no --threads=-1",
            "--threads must be at least 0",
        ),
        ("export --run={}/no --out={}/out", "Cannot find an export in {}/no:"),
        ("export --run={}/run --out={}/full", "--out must be a new or an empty folder"),
        ("push --model={}/run --repo=me", "--repo must be USER/NAME, got 'me'"),
        ("standin_llm --texts={}/no.txt --out={}/o", "--texts must be an existing path"),
        (
            "train --stage=visual --recipe=mine --data.shards={}/no",
            "must contain index.json",
        ),
        (
            "train --stage=visual --recipe=mine --llm.name=/no/llm",
            "llm.name must be a hub id",
        ),
        ("train --stage=visual --visual.weights=./no", "visual.weights must be a hub id"),
        ("train --stage=llm --visual_run={}/no", "a result of stage visual in {}/no"),
        ("train --stage=visual --train.deepspeed={}/no.json", "train.deepspeed must be an"),
        (
            "train --recipe=mine --stage=visual --run={}/of_llm",
            "belongs to another stage (stage 'llm', got 'visual')",
        ),
        ("train --stage=visual --optim.lr=fast", "--optim.lr must be a number, got 'fast'"),
        ("train --stage=visual --optim.lrr=1", "did you mean optim.lr"),
        # The command's own options and those of the run are both suggested.
        ("train --stage=visual --recipes=mine", "did you mean recipe?"),
        ("submit --stage=visual --dri_run", "did you mean dry_run or"),
        ("submit --stage=visual --visul_run=a", "did you mean visual_run or"),
        ("submit --stage=both --partitions=a", "did you mean partition or"),
        ("plan --llm=7B --gpus_gb=24", "did you mean gpu_gb or"),
        ("plan --llm=7B --llm.tun=lora", "did you mean llm.tune or"),
        ("features --out={}/o --view=2", "did you mean views"),
        ("features --visual_run={}/no --out={}/o", "a result of stage visual in {}/no"),
        ("features --visual_run={}/run --out={}/o --views=0", "--views must be at least 1"),
        ("signsim backbone --wdth=1", "there is no option --wdth; did you mean width?"),
        (
            "shards build phoenix14t --source={}/no --out={}/o",
            "--source must be an existing file or folder",
        ),
        (
            "shards build phoenix14t --source={} --out={}/o --quality=0",
            "--quality must be from",
        ),
        ("shards verify {}/no", "A shard folder must contain index.json"),
        ("shards stats {}/no", "A shard folder must contain index.json"),
        ("shards preview {}/no --out={}/o", "A shard folder must contain index.json"),
        ("options nothing", "SECTION must be one of run, data, visual,"),
        ("report {}/no --out={}/o.html", "RUN must be a run folder with config.json"),
        ("report {}/run --out={}/o.html --clips=-1", "--clips must be at least 0"),
        (
            "report {}/run --out={}/o.html --clips=2 --attention=3",
            "--attention must be at least 0 and at most --clips (2), got 3",
        ),
        (
            "report {}/config --out={}/no/o.html",
            "--out must be a file in an existing folder",
        ),
        ("trian", "there is no verb 'trian'; did you mean train"),
    ],
)
def test_wrong_input_is_refused_before_slow_imports(
    place: Path, command: str, sentence: str
) -> None:
    words = command.replace("{}", str(place)).split(" ")
    done = flallm(*words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert sentence.replace("{}", str(place)) in done.stderr


def test_other_ranks_leave_the_checks_to_rank_0(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of another machine may be mounted later than those of rank 0."""
    monkeypatch.setenv("RANK", "1")
    check_shards((str(place / "no"),), ("train",))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"must contain index\.json"):
        check_shards((str(place / "no"),), ("train",))


def test_an_address_of_shards_is_not_read_early() -> None:
    check_shards(("http://127.0.0.1:1/shards",), ("train",))
