"""Each language has one tag for all names that people, corpora and tokenizers use."""

import pytest
from transformers.models.m2m_100.tokenization_m2m_100 import (
    FAIRSEQ_LANGUAGE_CODES as M2M100_CODES,
)
from transformers.models.mbart.tokenization_mbart import (
    FAIRSEQ_LANGUAGE_CODES as MBART_CODES,
)
from transformers.models.mbart50.tokenization_mbart50 import (
    FAIRSEQ_LANGUAGE_CODES as MBART50_CODES,
)
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES

from flallm_ds.data.text.languages import (
    find_language,
    language_tag,
    language_tokens,
    tag_or_name,
    token_of,
    word_rule,
)
from flallm_ds.errors import UserError

M2M100 = [f"__{code}__" for code in M2M100_CODES["m2m100"]]
# Some of MADLAD's 450 tokens: scripts and regions of their own, old and collective codes;
# the last are no languages.
MADLAD = [f"<2{code}>" for code in (
    "de", "en", "fr", "fr_CA", "bg", "is", "he", "id", "yi", "no", "nn", "zh", "zh_Hant", "zh_Latn", "yue",
    "sr", "sh", "az", "az_RU", "uz", "kk", "ru", "ru_Latn", "ms", "ms_Arab", "ms_Arab_BN", "fil", "prs", "fa",
    "ber", "ber_Latn", "quh", "ubu", "nan_Latn_TW", "ndc_ZW", "", "translate", "Hant", "CA", "en_xx_simple",
)]  # fmt: skip
VOCABULARIES = {
    "mbart": MBART_CODES,
    "mbart50": MBART50_CODES,
    "m2m100": M2M100,
    "nllb": NLLB_CODES,
    "madlad": MADLAD,
}
ORDINARY = ["▁the", "en_US", "</s>", "a_b", "__init__", "<2", "<extra_id_0>"]

SAME = {
    "de": "de, DE, de-AT, de_AT, de_DE, deu, ger, deu_Latn, __de__, <2de>, German, german, deu_DEU, de-1996",
    "en": "en, en-US, en_GB, en_XX, en-UK, eng, eng_Latn, English, British English, English (US)",
    "no": "no, nb, nob, nor, nb-NO, nob_Latn, __no__, Norwegian, Norwegian Bokmål, norwegian bokmal",
    "nn": "nn, nno, nno_Latn, Norwegian Nynorsk",
    "he": "he, iw, heb, he_IL, heb_Hebr, Hebrew, iw-IL",
    "id": "id, in, ind, id_ID, Indonesian",
    "yi": "yi, ji, yid, ydd_Hebr, Yiddish",
    "jv": "jv, jw, jav, Javanese",
    "fil": "fil, tl, tl_XX, tgl_Latn, __tl__, Filipino, Tagalog",
    "ro": "ro, mo, ron, rum, ro-MD, Romanian, Moldavian",
    "zh": "zh, cmn, zho, chi, zh-CN, zh_CN, zh-Hans, zh-cmn, zho_Hans, zh-SG, __zh__, <2zh>, Chinese, "
    "Mandarin, Simplified Chinese, Chinese (Simplified), zh-Hans-CN, zh-Hani, zh-hans-cn",
    "zh-Hant": "zh-Hant, zh-TW, zh_HK, zh-MO, zho_Hant, cmn-Hant, <2zh_Hant>, Traditional Chinese, "
    "zh-hant-tw, Chinese (Traditional)",
    "zh-Latn": "zh-Latn, zh-Latn-pinyin, zh-pinyin, <2zh_Latn>",
    "yue": "yue, yue-HK, zh-yue, yue_Hant, Cantonese",
    "sr": "sr, sr-RS, sr-Cyrl, srp, srp_Cyrl, Serbian, Serbian (Cyrillic)",
    "sr-Latn": "sr-Latn, sr_Latn_RS, sr-ME, sh, Serbian (Latin), <2sh>",
    "kk": "kk, kk_KZ, kaz_Cyrl, Kazakh",
    "kk-Latn": "kk-Latn, kk-Latn-KZ, Kazakh (Latin)",
    "uz": "uz, uz-Latn, uzn_Latn, Uzbek",
    "uz-Cyrl": "uz-Cyrl, uz_Cyrl_UZ",
    "az-Cyrl": "az-Cyrl, az-RU, <2az_RU>",
    "pa-Arab": "pa-Arab, pa-PK",
    "pt": "pt, pt-BR, pt_PT, pt_XX, por_Latn, Portuguese, Brazilian Portuguese, Portuguese (Brazil)",
    "es": "es, es-419, es_MX, spa, Spanish, Castilian",
    "ar": "ar, ar_AR, arb_Arab, ara, Arabic, Modern Standard Arabic",
    "fa": "fa, pes_Arab, fa_IR, Persian, Farsi",
    "ko": "ko, ko_KR, kor_Hang, ko-Kore, Korean",
    "nso": "nso, __ns__, Northern Sotho",
    "ps": "ps, ps_AF, pbt_Arab, Pashto",
    "my": "my, my_MM, mya_Mymr, Burmese, Myanmar",
    "bg": "bg, bul, bg-BG, bul_Cyrl, Bulgarian",
    "is": "is, isl, ice, isl_Latn, Icelandic",
}


@pytest.mark.parametrize(
    ("tag", "name"),
    [(tag, name) for tag, names in SAME.items() for name in names.split(", ")],
)
def test_every_name_of_a_language_has_one_tag(tag, name):
    assert language_tag(name, "--language") == tag
    assert tag_or_name(tag) == tag and tag_or_name(f" {name.upper()} ") == tag


@pytest.mark.parametrize(
    "name", ["", " ", "Germann", "de_DF", "de-Abcd", "xx", "qqq", "und", "zxx", "mul", "gsg", "ase", "mixed",
             "American "
             "Sign "
             "Language", "de_DE.UTF-8", "sr_RS@latin", "<2>", "__", "1", "translate", "de/en"]
)  # fmt: skip
def test_other_names_are_not_taken_for_languages(name):
    assert (
        find_language(name) is None
        and tag_or_name(name) == name
        and word_rule(name) == "13a"
    )


@pytest.mark.parametrize(
    ("name", "near"), [("Germann", "German"), ("de_DF", "de"), ("gsg", "de"), ("Icelandik", "Icelandic"),
                       ("German Sign Language", "de"), ("zh-Abcd", "zh")]
)  # fmt: skip
def test_an_unknown_language_is_refused_with_near_ones(name, near):
    with pytest.raises(
        UserError,
        match=rf"^--language must be .*, got '{name}': did you mean .*\b{near}\b.*\?$",
    ):
        language_tag(name, "--language")


@pytest.mark.parametrize("family", VOCABULARIES)
def test_every_language_of_a_tokenizer_has_a_tag_that_gives_its_token_back(family):
    vocabulary = VOCABULARIES[family]
    places = language_tokens([*ORDINARY, *vocabulary])
    assert set(vocabulary) - set(places) <= {
        "<2>",
        "<2translate>",
        "<2Hant>",
        "<2CA>",
        "<2en_xx_simple>",
    }
    assert set(places) <= set(vocabulary)
    # a token with a region has the tag of the language
    regional = {"<2fr_CA>": "<2fr>", "<2ms_Arab_BN>": "<2ms_Arab>"}
    place = "source" if family == "madlad" else "decoder"
    for token in places:
        assert token_of(token, places) == (token, place)
        assert token_of(language_tag(token, "--language"), places) == (
            regional.get(token, token),
            place,
        )


@pytest.mark.parametrize(
    "vocabulary", [ORDINARY, [*ORDINARY, "pt_BR", "nl_BE"], [*ORDINARY, "__de__"]]
)
def test_ordinary_text_is_not_taken_for_language_tokens(vocabulary):
    assert language_tokens(vocabulary) == {} and token_of("de", {}) is None


def test_tokens_that_were_added_to_a_tokenizer_are_language_tokens():
    vocabulary = [*ORDINARY, *MBART_CODES, "bg_BG", "xx_QQ"]
    assert token_of("Bulgarian", language_tokens(vocabulary, ["bg_BG", "xx_QQ"])) == (
        "bg_BG",
        "decoder",
    )
    assert token_of("xx_QQ", language_tokens(vocabulary, ["bg_BG", "xx_QQ"])) == (
        "xx_QQ",
        "decoder",
    )


@pytest.mark.parametrize(
    ("family", "language", "instead"),
    [
        ("mbart", "zh-Hant", "zh"),
        ("mbart50", "zh-TW", "zh"),
        ("m2m100", "zh-HK", "zh"),
        ("m2m100", "sr-Latn", "sr"),
        ("nllb", "Serbian (Latin)", "sr"),
        ("nllb", "uz-Cyrl", "uz"),
        ("nllb", "kk-Latn", "kk"),
        ("nllb", "sat", "sat-Beng"),  # codespell:ignore beng
        ("madlad", "uz-Cyrl", "uz"),
        ("mbart50", "az-Cyrl", "az"),
    ],
)
def test_another_script_is_refused_and_the_remedy_works(family, language, instead):
    places = language_tokens(VOCABULARIES[family])
    with pytest.raises(
        UserError, match=rf"in another script\. Give --llm\.language={instead} "
    ) as error:
        token_of(language, places)
    token = token_of(instead, places)[0]
    assert f"it has {token} (" in str(error.value)


def test_a_language_without_a_token_is_refused():
    for language in ("yue", "nn", "bg", "is"):
        with pytest.raises(
            UserError, match=rf"must be a language with a token .*, got '{language}'"
        ):
            token_of(language, language_tokens(MBART_CODES))
    with pytest.raises(UserError, match="did you mean Icelandic"):
        token_of("Icelandik", language_tokens(M2M100))


@pytest.mark.parametrize(
    ("rule", "languages"),
    [
        (
            "zh",
            "zh zh_CN zh-Hant Chinese __zh__ <2zh> zho_Hant cmn yue Cantonese wuu lzh "
            "zh-TW",
        ),
        (
            "char",
            "ja ja_XX Japanese jpn_Jpan th tha_Thai Khmer km_KH lo Lao my my_MM bo "
            "dzo_Tibt shn_Mymr",
        ),
        ("13a", "de ko Korean kor_Hang vi zh-Latn ja-Latn hi ar en_XX id su jv"),
    ],
)
def test_the_script_chooses_the_rule_for_words(rule, languages):
    assert {
        language: word_rule(language) for language in languages.split()
    } == dict.fromkeys(languages.split(), rule)


def test_names_and_sign_languages_for_prompts():
    facts = {
        tag: (find_language(tag).name, find_language(tag).sign_language) for tag in SAME
    }
    assert facts["de"] == ("German", "German Sign Language")
    assert facts["en"] == ("English", "American Sign Language")
    assert facts["zh"] == ("Chinese", "Chinese Sign Language")
    assert facts["zh-Hant"][0] == "Traditional Chinese"
    assert facts["sr-Latn"] == ("Serbian (Latin)", "Serbian Sign Language")
    assert facts["nso"] == ("Northern Sotho", "sign language")  # no known sign language
    assert find_language("bn").name == "Bengali" and find_language("no").name == "Norwegian"
