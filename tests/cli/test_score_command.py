"""`flallm score` as users call it."""

import json
from pathlib import Path

import pytest

from flallm_ds.cli.score import score
from flallm_ds.errors import UserError
from flallm_ds.metrics import score as score_texts
from flallm_ds.metrics.score_files import score_files
from tests.helpers.llms import make_tiny_llm
from tests.helpers.pairs import pairs


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    for name, texts in zip(("said", "meant"), pairs("de"), strict=True):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return tmp_path / "said.txt", tmp_path / "meant.txt"


def test_scores_are_printed_with_interval_rule_and_signatures(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said, meant = files
    out = tmp_path / "scores.json"
    score(hypotheses=said, references=meant, language="German", resamples=100, out=out)
    printed = capsys.readouterr().out
    stored = json.loads(out.read_text(encoding="utf-8"))
    expected = score_texts(*pairs("de"), "de")
    low, high = stored["intervals"]["bleu4"]
    cells = f"| {expected.bleu4:>13.2f} | {low:.1f}-{high:.1f} |".split()
    row = next(line for line in printed.splitlines() if line.startswith("| BLEU-4"))
    assert row.split()[2:] == cells
    assert "100 sentences, length ratio" in printed
    assert f"preset sacrebleu: {expected.rule}" in printed
    for signature in expected.signatures.values():
        assert signature in printed
    assert "ceiling" not in printed and stored["bleu4"] == expected.bleu4


def test_a_tokenizer_gives_the_ceiling_and_the_references_of_gfslt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["im norden regen am abend", "im süden sonne am abend"]
    llm = make_tiny_llm("mbart", tmp_path / "llm", texts)
    (tmp_path / "meant.txt").write_text("\n".join(texts), encoding="utf-8")
    arguments = {"hypotheses": tmp_path / "meant.txt", "references": tmp_path / "meant.txt"}
    score(**arguments, language="de", preset="gfslt", tokenizer=str(llm), resamples=0)
    printed = capsys.readouterr().out
    assert "references decoded by the tokenizer" in printed
    assert "The ceiling of the tokenizer is BLEU-4 100.00." in printed


def test_the_table_of_an_evaluation_needs_no_language(tmp_path: Path) -> None:
    said, meant = pairs("de")
    rows = []
    for number, (hypothesis, reference) in enumerate(zip(said, meant, strict=True)):
        row = {"key": str(number), "hypothesis": hypothesis, "reference": reference}
        rows.append(json.dumps(row | {"corpus": "mine", "language": "de"}))
    path = tmp_path / "test.hypotheses.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    assert score_files(path)[0] == score_texts(said, meant, "de")


def test_wrong_options_are_refused(files: tuple[Path, Path]) -> None:
    said, meant = files
    with pytest.raises(UserError, match=r"--language must be the language .*got nothing"):
        score(hypotheses=said, references=meant)
    with pytest.raises(UserError, match=r"--language must be the language .*got 'xyz'"):
        score(hypotheses=said, references=meant, language="xyz")
    with pytest.raises(UserError, match="--preset must be one of"):
        score(hypotheses=said, references=meant, language="de", preset="bleu")
    with pytest.raises(UserError, match="must be an existing path, got nowhere"):
        score(hypotheses=Path("nowhere"), language="de")
