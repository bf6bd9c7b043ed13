"""`flallm compare`: a planted difference is found, and none between equal systems."""

import json
import random
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU

from flallm_ds.cli.compare import compare
from flallm_ds.errors import UserError
from flallm_ds.metrics.bleu import BleuRule
from flallm_ds.metrics.significance import paired_tests
from tests.helpers.pairs import pairs

SAID, MEANT = pairs("de", count=200)


def better(share: float, seed: int = 0) -> list[str]:
    """Replace a share of the hypotheses by their references."""
    draw = random.Random(seed)
    return [
        meant if draw.random() < share else said
        for said, meant in zip(SAID, MEANT, strict=True)
    ]


def run_folder(path: Path, hypotheses: list[str], order: list[int] | None = None) -> str:
    rows = []
    for number in order or range(len(MEANT)):
        row = {"key": str(number), "hypothesis": hypotheses[number]}
        rows.append(json.dumps(row | {"reference": MEANT[number], "language": "de"}))
    (path / "evaluation").mkdir(parents=True)
    file = path / "evaluation" / "test.hypotheses.jsonl"
    file.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def results_of(
    first: list[str], second: list[str]
) -> dict[str, tuple[float, float, float]]:
    found = paired_tests(first, second, MEANT, BleuRule(), resamples=200, trials=200)
    return {one.metric: (one.gap, one.bootstrap, one.randomization) for one in found}


def test_a_planted_difference_is_found_by_every_metric() -> None:
    found = results_of(SAID, better(0.3))
    assert found.keys() == {"BLEU", "chrF2", "TER"}
    for metric, (gap, *chances) in found.items():
        assert (gap < 0) == (metric == "TER") and max(chances) < 0.01


def test_identical_systems_do_not_differ() -> None:
    """sacreBLEU itself would give p = 1 / (resamples + 1)."""
    assert set(results_of(SAID, SAID).values()) == {(0.0, 1.0, 1.0)}


def test_equally_good_systems_do_not_differ() -> None:
    found = results_of(better(0.3, seed=1), better(0.3, seed=2))
    assert all(min(chances) > 0.05 for _, *chances in found.values())


def test_runs_are_joined_by_key_and_the_better_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run_folder(tmp_path / "one", better(0.4))
    other = run_folder(tmp_path / "other", SAID, order=list(reversed(range(200))))
    compare(one, other, resamples=100, trials=100)
    printed = capsys.readouterr().out
    for hypotheses in (better(0.4), SAID):
        bleu = BLEU().corpus_score(hypotheses, [MEANT]).score
        assert f" {bleu:.2f} |" in printed
    for metric in ("BLEU", "chrF2", "TER"):
        assert f"The first system is significantly better in {metric}." in printed
    assert "BLEU signature: nrefs:1|" in printed and "tok:13a" in printed
    compare(one, one, resamples=100, trials=100)
    assert capsys.readouterr().out.count("There is no significant difference in") == 3


def test_seeds_have_a_mean_and_a_deviation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        run_folder(tmp_path / f"good_seed{seed}", better(0.4, seed))
        run_folder(tmp_path / f"bad_seed{seed}", better(0.1, seed))
    pattern = f"{tmp_path}/good_seed*"
    compare(runs=pattern)
    printed = capsys.readouterr().out
    values = []
    for line in printed.splitlines():
        if "good_seed" in line and "*" not in line:
            values.append(float(line.split("|")[5]))
    mean = next(line for line in printed.splitlines() if "mean of 3" in line)
    assert float(mean.split("|")[5]) == pytest.approx(sum(values) / 3, abs=0.01)
    assert "deviation" in printed
    compare(f"{tmp_path}/bad_seed*", pattern, resamples=100)
    printed = capsys.readouterr().out
    assert "test sets without a gain 0.000" in printed and "BLEU-4 +" in printed


def test_files_are_compared_with_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {}
    for name, texts in (("a", SAID), ("b", better(0.5)), ("meant", MEANT)):
        (tmp_path / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
        names[name] = str(tmp_path / name)
    options = {
        "references": tmp_path / "meant",
        "language": "de",
        "resamples": 50,
        "trials": 50,
    }
    compare(names["a"], names["b"], preset="gfslt", **options)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "The second system is significantly better in BLEU." in printed
    assert "tok:none" in printed


def test_systems_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one", SAID)
    fewer = run_folder(tmp_path / "fewer", SAID, order=list(range(100)))
    for options in ({"a": one, "b": fewer}, {"runs": f"{tmp_path}/*e*"}):
        with pytest.raises(UserError, match=r"got '1\d+' only in one of"):
            compare(**options)
    other = Path(run_folder(tmp_path / "changed", SAID))
    file = other / "evaluation" / "test.hypotheses.jsonl"
    rows = file.read_text(encoding="utf-8").replace('"reference": "', '"reference": "x', 1)
    file.write_text(rows, encoding="utf-8")
    with pytest.raises(UserError, match="must be compared on the same references"):
        compare(one, str(other))
    with pytest.raises(UserError, match=r"dev was not evaluated. Run deepspeed"):
        compare(one, one, split="dev")
    with pytest.raises(UserError, match="Cannot find a run or file for"):
        compare(runs=f"{tmp_path}/x*")
    with pytest.raises(UserError, match="A and B, or --runs, must be given"):
        compare(one)
