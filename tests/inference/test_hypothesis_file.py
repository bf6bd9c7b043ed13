"""Tests of the file of hypotheses."""

from pathlib import Path

from flallm_ds.batch import Hypothesis
from flallm_ds.inference.hypothesis_file import read_hypotheses, write_hypotheses


def test_hypotheses_are_read_from_their_file_unchanged(tmp_path: Path) -> None:
    nbest = (("a b c d", -0.5), ("a", -1.5))
    said = [Hypothesis("0_0", "im norden regen", "im norden schnee", "phoenix14t", "de")]
    said.append(Hypothesis("1_0", "a b c d", "im norden regen", "mine", "de", nbest))
    said.append(Hypothesis("2_0", "a\u2028b", "a\x85b", "mine", "de"))
    write_hypotheses(tmp_path / "said.jsonl", said)
    assert read_hypotheses(tmp_path / "said.jsonl") == said
    first = (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert '"nbest"' not in first
