"""The journal of finished videos; tests/cli/test_translate.py interrupts real calls."""

import json
import os
from pathlib import Path

import pytest

from flallm_ds.errors import UserError
from flallm_ds.inference.journal import json_line, open_journal

MADE_WITH = {"model": "runs/a", "export": "0a", "beams": None, "long": None}


def write_journal(path: Path, *videos: Path, error: str = "") -> None:
    with open_journal(path, MADE_WITH) as journal:
        for number, video in enumerate(videos):
            journal.add({"path": str(video), "sentence": f"é\u2028{number}"})
            journal.finish(video, 1, error=error)
        journal.add({"path": "next", "sentence": "not finished"})


def test_a_journal_has_the_results_of_finished_videos(tmp_path: Path) -> None:
    path, videos = tmp_path / "journal", [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    write_journal(path, *videos)
    for video in videos:
        video.write_bytes(b"1")
    with open_journal(path, MADE_WITH) as journal:
        assert list(journal.finished) == list(map(str, videos))
        first = journal.of(videos[0])
        assert first is not None
        assert first.results == [{"path": str(videos[0]), "sentence": "é\u20280"}]
        assert journal.is_translated(videos[0]) and journal.num_translated() == 2
        videos[0].write_bytes(b"12")
        assert not journal.is_translated(videos[0])
        journal.finish(videos[1], 1, error="broken")
        assert not journal.is_translated(videos[1])
    assert b"not finished" not in path.read_bytes()


def test_a_video_that_was_interrupted_twice_has_its_results_once(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write_journal(path, tmp_path / "a.mp4")
    with path.open("a") as file:
        file.write('{"path": "next", "sent')
    write_journal(path, tmp_path / "b.mp4")
    write_journal(path, tmp_path / "c.mp4")
    with open_journal(path, MADE_WITH) as journal:
        results = [entry.results for entry in journal.finished.values()]
    assert [len(of_video) for of_video in results] == [1, 1, 1]


def test_options_may_change_while_no_video_is_translated(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write_journal(path, tmp_path / "a.mp4", error="broken")
    with open_journal(path, MADE_WITH | {"beams": 3}) as journal:
        assert not journal.finished
    assert len(path.read_text().splitlines()) == 1
    write_journal(path, tmp_path / "a.mp4")
    with (
        pytest.raises(UserError, match=r"has 1 translated video and was made with other"),
        open_journal(path, MADE_WITH | {"beams": 3}),
    ):
        pass


def test_a_file_name_that_is_not_utf_8_is_kept() -> None:
    name = os.fsdecode(b"\xe9.mp4")
    assert json.loads(json_line({"path": name}).encode())["path"] == name
