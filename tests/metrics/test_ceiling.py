import pytest

from flallm_ds.metrics import score
from flallm_ds.metrics.ceiling import ceiling

CHINESE = ["今天，到处都是阳光！", "明天，南方有雨……对吗？", "后天，南方有雨，北方有雪。"]
WRITTEN = ["今天,到处都是阳光!", "明天,南方有雨......对吗?", "后天,南方有雨,北方有雪。"]


def test_the_ceiling_is_the_score_of_decoded_references_and_lists_their_changes():
    found = ceiling(WRITTEN, CHINESE, ["zh"] * 3)
    assert found.bleu4 == score(WRITTEN, CHINESE, "zh").bleu4 < 99.5
    assert found.changes == (
        ("，", ",", 4),
        ("…", "...", 2),
        ("！", "!", 1),
        ("？", "?", 1),
    )
    assert str(found) == (
        f"A perfect model would score BLEU-4 {found.bleu4:.2f}, because its tokenizer "
        "changes the references: '，' -> ',' (4), '…' -> '...' (2), '！' -> '!' (1), '？' -> "
        "'?' (1)."
    )


def test_unchanged_text_has_a_ceiling_of_100_and_no_message():
    found = ceiling(CHINESE, CHINESE, ["zh"] * 3)
    assert found.bleu4 == pytest.approx(100) and not found.changes and str(found) == ""


@pytest.mark.parametrize(
    ("reference", "written", "changes"),
    [
        ("morgen 😀 regnet es im norden", "morgen regnet es im norden", (("😀", "", 1),)),
        (
            "Morgen Regnet Es Im Norden",
            "morgen regnet es im norden",
            (("M", "m", 1), ("R", "r", 1)),
        ),
        ("ein wort das fehlt ist hier", "ein wort das ist hier", (("fehlt", "", 1),)),
        ("don 't do that any more now", "don't do that any more now", ((" ", "", 1),)),
        ("morgen  regnet es im norden . ", "morgen regnet es im norden .", ()),
    ],
)
def test_lost_and_changed_text_is_listed(reference, written, changes):
    found = ceiling([written], [reference], ["de"])
    assert found.changes[:2] == changes


def test_only_the_most_frequent_changes_are_printed():
    letters = "ÀÈÌÒÙÁÉÍÓÚÂÊ"
    references = [" ".join(letters[: n + 1]) for n in range(len(letters))]
    plain = str.maketrans(letters, "aeiouaeiouae")
    text = str(
        ceiling(
            [r.translate(plain) for r in references], references, ["de"] * len(references)
        )
    )
    assert "'À' -> 'a' (12), 'È' -> 'e' (11)" in text and text.endswith(
        "'Ú' -> 'u' (3) and 2 more."
    )


def test_the_ceiling_of_several_languages_is_their_mean():
    german = ["heute scheint im norden die sonne"]
    found = ceiling([*german, *WRITTEN], [*german, *CHINESE], ["de", "zh", "zh", "zh"])
    assert found.bleu4 == pytest.approx(
        (100 + ceiling(WRITTEN, CHINESE, ["zh"] * 3).bleu4) / 2
    )
