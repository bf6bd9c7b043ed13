"""Tests of clips that are in two splits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flallm_ds.cli.overlap import overlap as overlap_command
from flallm_ds.config import DataConfig
from flallm_ds.data.index import Index, iter_rows, load_index, write_table
from flallm_ds.data.index import Table as IndexTable
from flallm_ds.data.overlap import overlap
from flallm_ds.errors import UserError
from flallm_ds.training.build.data import check_same_clips

ROW = {"id": "a", "text": "Im Norden regnet es.", "video": "v", "num_frames": 9, "size": 80}


@pytest.fixture
def made(tiny_corpus: Path, tmp_path: Path) -> Any:
    """Return a function that makes an index whose clips differ from ROW as given."""
    base = load_index(tiny_corpus / "shards", "dev")
    row = next(iter_rows(base))

    def make(split: str, *changes: dict[str, object]) -> Index:
        rows = [{**row, **ROW, "key": str(n), **one} for n, one in enumerate(changes)]
        path = tmp_path / f"{split}.safetensors"
        write_table(path, rows)
        return replace(base, split=split, arrays=IndexTable(path))

    return make


SAME = {
    "the same clip": {},
    "other case and punctuation, no video": {"text": "im norden regnet es", "video": ""},
    "renamed": {"id": "b"},
}
OTHER = {
    "another clip of the video with an equal text": {"id": "b", "num_frames": 8},
    "an equal text": {"id": "b", "video": "w"},
    "a corpus with equal ids": {"text": "morgen sonne", "video": "w"},
    "equal id and text in another video": {"video": "w"},
    "neither id nor video": {"id": "b", "video": ""},
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_clip_is_found(made: Any, name: str) -> None:
    found = overlap(made("train", {}, {"id": "x", "text": "x"}), made("test", SAME[name]))
    assert len(found.same_clips) == found.num_texts == found.num_clips == 1


@pytest.mark.parametrize("name", OTHER)
def test_other_clips_are_not_the_same(made: Any, name: str) -> None:
    assert overlap(made("train", {}), made("test", OTHER[name])).same_clips == ()


def test_training_on_clips_of_the_dev_split_is_refused(
    made: Any, tiny_corpus: Path
) -> None:
    data = DataConfig(shards=(str(tiny_corpus / "shards"),))
    train = made("train", {}, {"id": "b", "text": "sonne"})
    check_same_clips(data, train, made("dev", {"id": "c"} | OTHER["an equal text"]))
    with pytest.raises(UserError, match=r"split dev must not be training clips, got 1 .*a"):
        check_same_clips(data, train, made("dev", {}))
    check_same_clips(data, train, train)  # scored on the training split on purpose


def test_training_on_clips_of_the_test_split_is_refused(
    made: Any, tiny_corpus: Path
) -> None:
    shards = tiny_corpus / "shards"
    data = DataConfig(shards=(str(shards),))
    test = load_index(shards, "test")
    with pytest.raises(UserError, match="split test must not be training clips"):
        check_same_clips(data, replace(test, split="train"), made("dev", {}))


def test_the_splits_of_a_corpus_are_compared(
    tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = str(tiny_corpus / "shards")
    overlap_command(shards, shards)
    assert "the same clip            0\n" in capsys.readouterr().out
    overlap_command(shards, shards, split_a="test")
    printed = capsys.readouterr().out
    assert "the same clip            9 (" in printed and ", ...)" in printed
