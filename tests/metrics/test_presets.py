"""Presets give the scores of the projects' own scripts, by independent public tools."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_bleu
from rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER

from flallm_ds.errors import UserError
from flallm_ds.metrics import rouge, score
from flallm_ds.metrics.presets import PRESET_NAMES
from tests.helpers.pairs import pairs

LANGUAGES = ("de", "en", "zh", "ja")
# Equal to two decimals.
CLOSE = 0.005


def split(texts: Sequence[str]) -> list[str]:
    """Write each character as a word."""
    return [" ".join(text) for text in texts]


def _spaced(text: str, glue: str) -> str:
    """Write the words of a text, or without glue its characters, with one space between."""
    joined = glue.join(text.split())
    return joined if glue else " ".join(joined)


def sacrebleu(said: Sequence[str], meant: Sequence[str], **options: object) -> list[float]:
    found = []
    for order in range(1, 5):
        metric = BLEU(max_ngram_order=order, **options)
        found.append(metric.corpus_score(list(said), [list(meant)]).score)
    return found


def coco_bleu(said: Sequence[str], meant: Sequence[str]) -> list[float]:
    found = []
    for order in range(1, 5):
        weights = [1 / order] * order
        references = [[text.split()] for text in meant]
        found.append(100 * nltk_bleu(references, [text.split() for text in said], weights))
    return found


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else longest
    return int(table[-1, -1])


def f_rouge(said: Sequence[str], meant: Sequence[str], beta: float | None) -> float:
    """COCO's ROUGE-L, or with beta None that of tf-seq2seq, over the parts of split(" ")."""
    total = 0.0
    for one, other in zip(said, meant, strict=True):
        h, r = one.split(" "), other.split(" ")
        common = lcs(h, r)
        p, q = common / len(h), common / len(r)
        if common:
            b = p / q if beta is None else beta
            total += (1 + b**2) * p * q / (q + b**2 * p)
    return 100 * total / len(said)


def package_rouge(said: Sequence[str], meant: Sequence[str]) -> float:
    """The package refuses sentences without words; they count as 0."""
    full = [(h, r) for h, r in zip(said, meant, strict=True) if h.strip(" .")]
    scores = Rouge().get_scores(*map(list, zip(*full, strict=True)), avg=True)
    return 100 * scores["rouge-l"]["f"] * len(full) / len(said)


def google(said: Sequence[str], meant: Sequence[str], stemmer: bool) -> float:
    scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
    values = []
    for hypothesis, reference in zip(said, meant, strict=True):
        values.append(scorer.score(reference, hypothesis)["rougeL"].fmeasure)
    return 100 * float(np.mean(values))


def check(
    said: Sequence[str],
    meant: Sequence[str],
    language: str,
    preset: str,
    bleu: Sequence[float],
    rouge_l: float,
) -> None:
    found = score(said, meant, language, preset, error_rates=False)
    assert found.values["rouge_l"] == pytest.approx(rouge_l, abs=CLOSE)
    orders = [found.values[f"bleu{order}"] for order in range(1, 5)]
    assert orders == pytest.approx(list(bleu), abs=CLOSE)
    assert 1 < found.bleu4 < 99, "the pairs must not be trivial"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_default_is_sacrebleu_with_the_tokenizer_of_the_language(language: str) -> None:
    said, meant = pairs(language)
    tokenize = {"zh": "zh", "ja": "char"}.get(language, "13a")
    glue = "" if language in ("zh", "ja") else " "
    tokens = [[_spaced(text, glue) for text in texts] for texts in (said, meant)]
    expected = 0.0
    for one, other in zip(*tokens, strict=True):
        expected += f_rouge([one], [other], 1.2) if one and other else 0.0
    check(
        said, meant, language, "sacrebleu", sacrebleu(said, meant, tokenize=tokenize),
        expected / len(said),
    )  # fmt: skip
    found = score(said, meant, language)
    chrf = CHRF().corpus_score(said, [meant]).score
    assert found.values["chrf"] == pytest.approx(chrf, abs=CLOSE)
    ter = TER().corpus_score(tokens[0], [tokens[1]]).score
    assert found.values["ter"] == pytest.approx(ter, abs=CLOSE)


@pytest.mark.parametrize("language", ["de", "en"])
def test_signjoey(language: str) -> None:
    said, meant = pairs(language)
    rule = {"smooth_method": "floor", "smooth_value": 0.0, "effective_order": True}
    bleu = sacrebleu(said, meant, tokenize="none", **rule)
    check(said, meant, language, "signjoey", bleu, f_rouge(said, meant, 1.2))


@pytest.mark.parametrize("language", ["de", "en"])
def test_gfslt_is_the_coco_caption_evaluation(language: str) -> None:
    said, meant = pairs(language)
    without = sacrebleu(said, meant, tokenize="none", smooth_method="none")
    check(said, meant, language, "gfslt", without, f_rouge(said, meant, 1.2))
    # nltk counts one n-gram of a sentence that is too short to have any.
    long = [(h, r) for h, r in zip(said, meant, strict=True) if len(h.split()) > 3]
    said, meant = map(list, zip(*long, strict=True))
    check(said, meant, language, "gfslt", coco_bleu(said, meant), f_rouge(said, meant, 1.2))


def test_gfslt_encodes_and_decodes_the_references() -> None:
    """A tokenizer with NFKC writes a half-width comma, and this must cost nothing."""
    said, meant = ["今天 , 有 大 雨"], ["今天 ， 有 大 雨"]

    def narrow(texts: Sequence[str]) -> list[str]:
        return [text.replace("，", ",") for text in texts]

    assert score(said, meant, "zh", "gfslt", round_trip=narrow).bleu4 == pytest.approx(100)
    alone = score(said, meant, "zh", "gfslt")
    assert alone.bleu4 < 50 and "as given, not by a tokenizer" in alone.rule


@pytest.mark.parametrize("language", LANGUAGES)
def test_slrt_splits_languages_without_spaces_into_characters(language: str) -> None:
    said, meant = pairs(language)
    cut = (split(said), split(meant)) if language in ("zh", "ja") else (said, meant)
    rule = {"smooth_method": "floor", "smooth_value": 0.0, "effective_order": True}
    bleu = sacrebleu(*cut, tokenize="none", **rule)
    check(said, meant, language, "slrt", bleu, f_rouge(*cut, None))


@pytest.mark.parametrize("language", ["de", "en", "zh"])
def test_unisign(language: str) -> None:
    said, meant = pairs(language)
    cut = said, meant
    if language == "zh":
        wide = [t.replace("，", ",").replace("？", "?").replace(" ", "") for t in meant]
        cut = split([t.replace(" ", "") for t in said]), split(wide)
    check(said, meant, language, "unisign", sacrebleu(*cut), package_rouge(*cut))


@pytest.mark.parametrize("language", ["de", "en"])
def test_ssvp(language: str) -> None:
    said, meant = pairs(language)
    bleu = sacrebleu(said, meant)
    check(said, meant, language, "ssvp", bleu, google(said, meant, stemmer=False))


@pytest.mark.parametrize("language", ["de", "en"])
def test_spamo_lowers_the_text_and_adds_a_period(language: str) -> None:
    said, meant = pairs(language)
    cut = []
    for texts in (said, meant):
        lowered = [text.strip().lower() for text in texts]
        cut.append([text if text.endswith(".") else text + "." for text in lowered])
    check(said, meant, language, "spamo", sacrebleu(*cut), google(*cut, stemmer=True))


@pytest.mark.parametrize("preset", ["ssvp", "spamo"])
@pytest.mark.parametrize("language", ["zh", "ja", "ru", "ko"])
def test_google_rouge_is_refused_for_scripts_that_it_ignores(
    preset: str, language: str
) -> None:
    assert google(["今天有雨"], ["今天有雨"], stemmer=False) == 0, "why it is refused"
    with pytest.raises(UserError, match=r"must fit the language, got .* would be 0.00"):
        score(["今天有雨"], ["今天有雨"], language, preset)


@pytest.mark.parametrize("preset", ["signjoey", "gfslt"])
def test_unsplit_chinese_is_refused_where_words_are_separated_by_spaces(
    preset: str,
) -> None:
    with pytest.raises(UserError, match=f"got {preset} for Chinese: .* have none"):
        score(["今天有雨"], ["今天有雨"], "zh", preset)
    assert score(["今天 有 大 雨"], ["今天 有 大 雨"], "zh", preset).bleu4 == pytest.approx(
        100
    )


def test_unisign_is_refused_for_unsplit_japanese() -> None:
    with pytest.raises(UserError, match="got unisign for Japanese"):
        score(["明日は雨"], ["明日は雨"], "ja", "unisign")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be one of sacrebleu, signjoey.*got 'moses'"):
        score(["a"], ["a"], "de", "moses")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(rouge, "import_module", missing)
    rouge._rouge_scorer.cache_clear()
    with pytest.raises(UserError, match=r"package rouge_score is not installed. Run pip"):
        score(["a b c d"], ["a b c d"], "de", "ssvp")


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_identical_texts_score_100_and_the_rule_is_recorded(preset: str) -> None:
    texts = ["am tag regnet es im norden", "morgen scheint die sonne im süden"]
    found = score(texts, texts, "de", preset)
    for key in ("bleu1", "bleu4", "rouge_l", "chrf"):
        assert found.values[key] == pytest.approx(100, abs=1e-4)
    stored = found.as_dict()
    assert stored["preset"] == preset and stored["rule"]
    assert "tok:" in stored["bleu_signature"] and stored["rouge_signature"]


# --- facts about published scores


def test_a_final_period_raises_every_score() -> None:
    said, meant = pairs("de")
    before = score(said, meant, "de", error_rates=False)
    after = score(
        [f"{h} ." for h in said], [f"{r} ." for r in meant], "de", error_rates=False
    )
    for key in ("bleu1", "bleu4", "rouge_l"):
        assert after.values[key] > before.values[key] + 0.5


def test_unsplit_chinese_scores_far_lower_with_13a() -> None:
    said, meant = pairs("zh")
    unsplit = score(said, meant, "de", error_rates=False).bleu4
    assert unsplit < score(said, meant, "zh", error_rates=False).bleu4 / 3
    by_characters = score(said, meant, "zh", "slrt", error_rates=False).bleu4
    assert by_characters > 3 * unsplit


def test_final_punctuation_counts_in_chinese() -> None:
    said, meant = pairs("zh")
    bare = (
        [text.rstrip("，。？！、") for text in said],
        [t.rstrip("，。？！、") for t in meant],
    )
    kept = [f"{text}。" for text in bare[0]], [f"{text}。" for text in bare[1]]
    difference = score(*kept, "zh").bleu4 - score(*bare, "zh").bleu4
    assert difference > 0.5


def test_tokenizers_differ_on_the_same_output() -> None:
    said, meant = pairs("en")
    none = score(said, meant, "en", "signjoey", error_rates=False).bleu4
    rule_13a = score(said, meant, "en", error_rates=False).bleu4
    assert rule_13a > none + 0.5


def test_bleu_averaged_over_ranks_is_another_number() -> None:
    said, meant = pairs("de")
    whole = score(said, meant, "de", error_rates=False).bleu4
    shards = []
    for rank in range(20):
        part = score(said[rank::20], meant[rank::20], "de", error_rates=False)
        shards.append(part.bleu4)
    assert not math.isclose(float(np.mean(shards)), whole, abs_tol=0.2)
