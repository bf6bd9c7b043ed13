"""No shipped DeepSpeed JSON breaks a guarantee of the trainer. Needs no DeepSpeed: the check
also runs where it is not installed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

JSONS = sorted((ROOT / "ds_configs").glob("*.json"))
# Parts of keys, and what breaks. A key may be anywhere in the file.
REFUSED = {
    "zenflow": "the accumulation",
    "compute_grad_norm": "clipping, and the check for gradients that are not finite",
    "quantized": "the precision of weights or gradients",
    "mics": "DeepSpeed has removed it",
    "hpz": "a resume",
    "check_grad_overflow": "the check for gradients that are not finite",
}


def keys(value: Any) -> Iterator[str]:
    """Every key of a JSON, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_no_shipped_json_has_a_key_that_breaks_a_guarantee(path: Path) -> None:
    found = set(keys(json.loads(path.read_text(encoding="utf-8"))))
    broken = [key for key in found if any(part in key for part in REFUSED)]
    assert broken == []


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_every_number_of_a_shipped_json_is_concrete(path: Path) -> None:
    """`auto` works only in the Trainer of transformers."""
    text = path.read_text(encoding="utf-8")
    assert '"auto"' not in text
    assert "zero_optimization" in json.loads(text)
