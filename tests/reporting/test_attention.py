"""Test the sentences of a report for clips whose attention cannot be shown."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import cached_file

from flallm_ds.data.index import load_index
from flallm_ds.reporting.attention import or_reason


def missing(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def no_model(folder: Path) -> object:
    """transformers raises an OSError with lines of advice for this."""
    return cached_file(folder, "model.safetensors")


def wrong_code(folder: Path) -> object:
    return {}["rope\nmore lines"]


@pytest.mark.parametrize(
    ("find", "reason"),
    [
        (missing, "Cannot read or write {}/model.safetensors: No such file or directory."),
        (no_model, "{} does not appear to have a file named model.safetensors."),
        (lambda folder: load_index(folder, "test"), "A shard folder must contain index."),
        (wrong_code, "KeyError: "),
    ],
)
def test_the_sentence_names_what_failed(
    find: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    found = or_reason(lambda: find(tmp_path))
    assert isinstance(found, str) and "\n" not in found
    assert found.startswith("The attention cannot be shown: " + reason.format(tmp_path))


def test_what_is_found_is_returned(tmp_path: Path) -> None:
    assert or_reason(lambda: tmp_path) is tmp_path
