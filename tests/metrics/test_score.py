import dataclasses

import pytest
from sacrebleu.metrics import BLEU

from flallm_ds.errors import UserError
from flallm_ds.metrics import score, score_by_language
from flallm_ds.metrics.rouge import rouge_tokens

REFERENCES = ["am tag regnet es im norden .", "morgen scheint die sonne im süden ."]


def test_perfect_output_scores_100():
    scores = score(REFERENCES, REFERENCES, "de_DE")
    errors = dict.fromkeys(("ter", "wer", "cer"), 0)
    assert scores.values == pytest.approx(dict.fromkeys(scores.values, 100) | errors)
    assert scores.length_ratio == 1
    assert scores.num_sentences == 2


def test_scores_are_frozen_plain_values():
    scores = score(REFERENCES, REFERENCES, "de")
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.bleu4 = 0.0
    assert all(isinstance(value, float | int | str) for value in scores.as_dict().values())
    assert (
        scores.signatures["rouge_signature"] == "F|beta:1.2|tok:whitespace|mean:sentences"
    )


def test_empty_hypotheses_score_zero():
    scores = score(["", ""], REFERENCES, "de")
    errors = dict.fromkeys(("ter", "wer", "cer"), 100)
    assert scores.values == dict.fromkeys(scores.values, 0) | errors
    assert scores.length_ratio == 0


def test_one_empty_hypothesis_lowers_the_score():
    assert 0 < score([REFERENCES[0], ""], REFERENCES, "de").bleu4 < 100


def test_chinese_is_scored_by_characters():
    hypotheses, references = ["明天北部有大雨。"], ["明天北部地区有雨。"]
    scores = score(hypotheses, references, "zh_CN")
    assert scores.values["bleu1"] == pytest.approx(
        BLEU(tokenize="zh", max_ngram_order=1).corpus_score(hypotheses, [references]).score
    )
    # 7 characters in common of 8 and of 9.
    precision, recall = 7 / 8, 7 / 9
    f_score = 2.44 * precision * recall / (recall + 1.44 * precision)
    assert scores.values["rouge_l"] == pytest.approx(100 * f_score)
    assert "tok:zh" in scores.signatures["bleu_signature"]
    assert "tok:char" in scores.signatures["rouge_signature"]
    # unsplit Chinese is one wrong word
    assert scores.bleu4 > score(hypotheses, references, "de").bleu4


def test_spaces_do_not_matter_in_chinese():
    assert rouge_tokens("明天 有雨 。", characters=True) == ["明", "天", "有", "雨", "。"]
    spaced, unspaced = (
        score([text], ["明天有雨。"], "zh") for text in ("明天 有 雨 。", "明天有雨。")
    )
    assert spaced == unspaced


CHINESE = [
    "zh",
    "zh_CN",
    "zh-Hant",
    "Chinese",
    "__zh__",
    "<2zh>",
    "zho_Hant",
    "cmn",
    "yue",
    "Cantonese",
]


@pytest.mark.parametrize("language", CHINESE)
def test_all_names_of_chinese_give_the_same_score(language):
    hypotheses, references = ["明天北部有大雨，"], ["明天北部地区有雨，"]
    assert score(hypotheses, references, language) == score(hypotheses, references, "zh")


UNSPACED = [
    ("ja", "明日は雨です。", "明日は雪です。"), ("Japanese", "明日は雨です。", "明日は雪です。"),
    ("ja_XX", "明日は雨です。", "明日は雪です。"), ("th_TH", "พรุ่งนี้ฝนตกหนัก", "พรุ่งนี้ฝนตก"),
    ("khm_Khmr", "ថ្ងៃស្អែកមានភ្លៀង", "ថ្ងៃស្អែកមានព្យុះ"), ("<2lo>", "ມື້ອື່ນຝົນຕົກ", "ມື້ອື່ນຫິມະຕົກ"),
    ("Burmese", "မနက်ဖြန်မိုးရွာမည်", "မနက်ဖြန်နှင်းကျမည်"), ("bo", "སང་ཉིན་ཆར་པ་བབས།", "སང་ཉིན་གངས་བབས།"),
    ("dz", "ནངས་པ་ཆར་པ་རྐྱབ།", "ནངས་པ་ཁཝ་རྐྱབ།"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "said", "meant"), UNSPACED)
def test_languages_without_spaces_are_scored_by_characters(language, said, meant):
    scores = score([said], [meant], language)
    by_characters = BLEU(tokenize="char").corpus_score([said], [[meant]])
    assert scores.bleu4 == pytest.approx(by_characters.score) and 0 < scores.bleu4 < 100
    assert "tok:char" in scores.signatures["bleu_signature"]
    assert "tok:char" in scores.signatures["rouge_signature"]
    assert 0 < scores.values["rouge_l"] < 100
    assert score([said], [meant], "en").values["rouge_l"] == 0  # one wrong word
    spaced = score([" ".join(said)], [meant], language)
    for key in ("bleu4", "rouge_l"):
        assert spaced.values[key] == scores.values[key]


@pytest.mark.parametrize(
    "language", ["ko_KR", "Vietnamese", "de", "ja-Latn", "zh-Latn", "", "no such one"]
)
def test_languages_with_spaces_are_scored_by_words(language):
    scores = score(["im norden regen"], ["im norden regen"], language)
    assert "tok:13a" in scores.signatures["bleu_signature"]
    assert "tok:whitespace" in scores.signatures["rouge_signature"]


def test_several_names_of_a_language_are_scored_as_one_language():
    german = ["im norden regen am morgen", "im süden sonne am abend", "am tag schnee"]
    mixed = score_by_language(german[::-1], german, ["de", "German", "de_AT"])
    assert mixed == score(german[::-1], german, "de")


def test_different_numbers_of_sentences_are_refused():
    with pytest.raises(
        UserError, match=r"must equal the number of references \(2\), got 1"
    ):
        score(["a"], ["a", "b"], "de")


def test_scoring_no_sentences_is_refused():
    with pytest.raises(UserError, match="sentences to score must be at least 1, got 0"):
        score([], [], "de")


def test_each_language_has_its_own_tokenizer_and_the_same_weight():
    """Two German sentences have the same weight as one Chinese sentence."""
    german = ["im norden regen am morgen", "im süden sonne am abend"]
    said, meant = [*german, "明天北方有雨雪"], [*german, "明天北方有大雨"]
    mixed = score_by_language(said, meant, ["de", "de", "zh"])
    alone = score([said[2]], [meant[2]], "zh")
    assert 10 < alone.bleu4 < 100
    assert (
        mixed.bleu4 == pytest.approx((100 + alone.bleu4) / 2) and mixed.num_sentences == 3
    )
    signature = mixed.signatures["bleu_signature"]
    assert "de: nrefs" in signature and "zh: nrefs" in signature
    assert "tok:zh" in signature and "tok:13a" in signature


def test_one_language_alone_is_scored_as_by_score():
    said, meant = ["im norden regen am morgen"], ["im norden schnee am morgen"]
    assert score_by_language(said, meant, ["de"]) == score(said, meant, "de")
    with pytest.raises(UserError, match="sentences to score must be at least 1, got 0"):
        score_by_language([], [], [])
