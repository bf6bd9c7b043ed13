"""The quickstart's corpus is made in the folder in which the runs look for it."""

from pathlib import Path

import pytest

from flallm_ds import quickstart
from flallm_ds.recipes import config_of


def test_everything_is_made_where_the_recipes_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both use paths relative to the current folder."""
    made: list[str] = []

    def record(command: list[str], environment: object) -> None:
        made.extend(w.removeprefix("--out=") for w in command if w.startswith("--out="))

    monkeypatch.setattr(quickstart, "_run", record)
    monkeypatch.chdir(tmp_path)
    quickstart.prepare()
    for recipe in ("quickstart_visual", "quickstart_llm", "quickstart_joint"):
        config = config_of(recipe)
        looked_for = {*config.data.shards, config.visual.weights, config.llm.name}
        assert looked_for <= set(made)
    assert len(made) == 4 and not any(Path(place).is_absolute() for place in made)
    assert list((tmp_path / "data").rglob("*")) == []


def test_existing_results_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "shards", "backbone", "llm"):
        (tmp_path / "data" / "signsim" / name).mkdir(parents=True)
    monkeypatch.setattr(quickstart, "_run", pytest.fail)
    quickstart.prepare()
    assert capsys.readouterr().out.count("exists already") == 4


def test_the_launcher_prints_no_lines_of_its_own() -> None:
    command, _ = quickstart._launcher()
    assert "--quiet" in command
