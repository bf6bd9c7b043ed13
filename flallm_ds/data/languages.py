"""Spoken languages: how people and tokenizers name them, and which sign language goes with each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from flallm_ds.command import nearest
from flallm_ds.errors import UserError


@dataclass(frozen=True)
class Language:
    """A spoken language. sign_language: the one most of its corpora are signed in."""

    code: str  # ISO 639-1
    name: str
    mbart: str  # token of mBART and mBART-50
    nllb: str  # token of NLLB
    sign_language: str


_ROWS = """
ar|Arabic|ar_AR|arb_Arab|Arabic Sign Language
bn|Bengali|bn_IN|ben_Beng|Bengali Sign Language
cs|Czech|cs_CZ|ces_Latn|Czech Sign Language
da|Danish||dan_Latn|Danish Sign Language
de|German|de_DE|deu_Latn|German Sign Language
el|Greek||ell_Grek|Greek Sign Language
en|English|en_XX|eng_Latn|American Sign Language
es|Spanish|es_XX|spa_Latn|Spanish Sign Language
et|Estonian|et_EE|est_Latn|Estonian Sign Language
fa|Persian|fa_IR|pes_Arab|Persian Sign Language
fi|Finnish|fi_FI|fin_Latn|Finnish Sign Language
fr|French|fr_XX|fra_Latn|French Sign Language
he|Hebrew|he_IL|heb_Hebr|Israeli Sign Language
hi|Hindi|hi_IN|hin_Deva|Indian Sign Language
hr|Croatian|hr_HR|hrv_Latn|Croatian Sign Language
hu|Hungarian||hun_Latn|Hungarian Sign Language
id|Indonesian|id_ID|ind_Latn|Indonesian Sign Language
it|Italian|it_IT|ita_Latn|Italian Sign Language
ja|Japanese|ja_XX|jpn_Jpan|Japanese Sign Language
kk|Kazakh|kk_KZ|kaz_Cyrl|Kazakh-Russian Sign Language
ko|Korean|ko_KR|kor_Hang|Korean Sign Language
lt|Lithuanian|lt_LT|lit_Latn|Lithuanian Sign Language
lv|Latvian|lv_LV|lvs_Latn|Latvian Sign Language
nl|Dutch|nl_XX|nld_Latn|Sign Language of the Netherlands
no|Norwegian||nob_Latn|Norwegian Sign Language
pl|Polish|pl_PL|pol_Latn|Polish Sign Language
pt|Portuguese|pt_XX|por_Latn|Brazilian Sign Language
ro|Romanian|ro_RO|ron_Latn|Romanian Sign Language
ru|Russian|ru_RU|rus_Cyrl|Russian Sign Language
sk|Slovak||slk_Latn|Slovak Sign Language
sl|Slovenian|sl_SI|slv_Latn|Slovenian Sign Language
sv|Swedish|sv_SE|swe_Latn|Swedish Sign Language
th|Thai|th_TH|tha_Thai|Thai Sign Language
tr|Turkish|tr_TR|tur_Latn|Turkish Sign Language
uk|Ukrainian|uk_UA|ukr_Cyrl|Ukrainian Sign Language
vi|Vietnamese|vi_VN|vie_Latn|Vietnamese Sign Language
zh|Chinese|zh_CN|zho_Hans|Chinese Sign Language
"""
LANGUAGES = {row.split("|")[0]: Language(*row.split("|")) for row in _ROWS.split("\n") if row}


@dataclass(frozen=True)
class TokenStyle:
    """How a family of tokenizers writes a language, and where its models read it.

    place: `decoder` is told it by its first tokens, `source` by a token ahead of what is translated.
    """

    pattern: str  # of str.format, with the fields of Language
    place: Literal["decoder", "source"]


# Models with none of these (T5, Qwen, Llama, ...) are told the language by a prompt, or not at all.
TOKEN_STYLES = (
    TokenStyle("{mbart}", "decoder"),  # mBART, mBART-50
    TokenStyle("{nllb}", "decoder"),  # NLLB
    TokenStyle("__{code}__", "decoder"),  # M2M100
    TokenStyle("<2{code}>", "source"),  # MADLAD-400
)


def find_language(name: str) -> Language | None:
    """The language of a code (de, de-AT), a name (German) or a tokenizer's token (de_DE, deu_Latn, <2de>)."""
    wanted = name.strip().lower()
    for language in LANGUAGES.values():
        names = [language.name, *(style.pattern.format_map(vars(language)) for style in TOKEN_STYLES)]
        if wanted in (n.lower() for n in names if n):
            return language
    return LANGUAGES.get(wanted.split("-")[0])  # not of de_DF, which is a token misspelt


def token_of(language: str, vocabulary: Iterable[str]) -> tuple[str, Literal["decoder", "source"]] | None:
    """(the tokenizer's token of a language, where it is read); None where its tokenizer has no such tokens.

    language: as for `find_language`, or the tokenizer's own token of a language that is not in our table.
    Raises UserError where the tokenizer has tokens of languages, but not of this one.
    """
    vocabulary = set(vocabulary)
    known: list[str] = []
    found = find_language(language)
    for style in TOKEN_STYLES:
        tokens = {c: style.pattern.format_map(vars(entry)) for c, entry in LANGUAGES.items()}
        have = [token for token in tokens.values() if token and token in vocabulary]
        if found is not None and tokens[found.code] in have:
            return tokens[found.code], style.place
        if len(have) > 1:  # one alone may be an ordinary piece
            known += have
            if found is None and language in vocabulary:
                return language, style.place
    if known:
        raise UserError(
            f"llm.language must be one that the LLM's tokenizer has a token for, but is {language!r}: "
            f"{nearest(language, known)}"
        )
    return None
