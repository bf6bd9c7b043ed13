"""Spoken languages: the one place that knows how people, corpora and tokenizers name them.

A language has one tag, which shards, runs and scores use: its ISO 639 code, and its
script where that is not the usual one (de, zh, zh-Hant, sr-Latn). Codes, names, and the
script that a region implies come from Unicode (CLDR), by Babel.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import filterfalse
from typing import Literal

from babel import Locale
from babel.core import get_global

from flallm_ds.command import nearest
from flallm_ds.errors import UserError

Place = Literal["decoder", "source"]
WordRule = Literal["13a", "zh", "char"]


@dataclass(frozen=True)
class Language:
    """A spoken language as it is written."""

    # BCP-47 tag, without a region, and without the script that is the usual one
    code: str
    name: str  # in English, empty for a rare language without one
    script: str  # ISO 15924, empty where it is not known
    # of most corpora with this language; "sign language" where it is not known
    sign_language: str


_SIGN_LANGUAGES = {
    "ar": "Arabic", "az": "Azerbaijani", "bg": "Bulgarian", "bn": "Bengali",
    "ca": "Catalan", "cs": "Czech",
    "da": "Danish", "de": "German", "el": "Greek", "en": "American", "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian", "fi": "Finnish", "fil": "Filipino", "fr": "French", "ga": "Irish",
    "he": "Israeli",
    "hi": "Indian", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian",
    "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh-Russian",
    "km": "Cambodian", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian",
    "mk": "Macedonian",
    "mn": "Mongolian", "ms": "Malaysian", "mt": "Maltese", "my": "Myanmar", "ne": "Nepali",
    "nn": "Norwegian",
    "no": "Norwegian", "pl": "Polish", "pt": "Brazilian", "ro": "Romanian", "ru": "Russian",
    "si": "Sri Lankan", "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian",
    "sr": "Serbian",
    "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Pakistan",
    "vi": "Vietnamese", "yue": "Hong Kong", "zh": "Chinese",
}  # fmt: skip
_SIGN_LANGUAGE_CODES = {
    "ar": "sdl", "bg": "bqn", "cs": "cse", "da": "dsl", "de": "gsg asq sgg", "el": "gss",
    "en": "ase bfi asf nzs isg sfs ins psp", "es": "ssp mfs aed csg csn prl vsl csc",
    "et": "eso",
    "fi": "fse", "fr": "fsl sfb fcs ssr", "he": "isr", "hr": "csq", "hu": "hsh",
    "is": "icl",
    "it": "ise slf", "ja": "jsl", "ko": "kvk", "lt": "lls", "lv": "lsl", "nl": "dse vgt",
    "no": "nsl",
    "pl": "pso", "pt": "bzs psr", "ro": "rms", "ru": "rsl", "sk": "svk", "sv": "swl fss",
    "th": "tsq",
    "tr": "tsm", "uk": "ukl", "zh": "csl tss hks",
}  # fmt: skip
# The written language of a country by the code of its sign language (ISO 639-3).
WRITTEN_WITH: dict[str, str] = {}
for _written, _signs in _SIGN_LANGUAGE_CODES.items():
    WRITTEN_WITH.update(dict.fromkeys(_signs.split(), _written))
_OWN_SIGN_LANGUAGE_NAMES = {"nl": "Sign Language of the Netherlands"}

# Where tokenizers tell apart what Unicode joins, or join what Unicode tells apart.
_CODES = {
    # M2M100 and MADLAD have one token for Norwegian; Nynorsk is another
    "nb": "no", "nob": "no",
    "ns": "nso",  # M2M100's code of Northern Sotho
    "pbt": "ps",  # NLLB's only Pashto
    # NLLB has these next to fa, ak and apc
    "prs": "prs", "twi": "tw", "tw": "tw", "ajp": "ajp",
}  # fmt: skip
# What Unicode has no entry for: English name and usual script.
_ADDED = {
    "ajp": ("South Levantine Arabic", "Arab"), "ber": ("Berber", "Tfng"), "prs": ("Dari",
    "Arab"),
    "quh": ("South Bolivian Quechua", "Latn"), "tw": ("Twi", "Latn"),
}  # fmt: skip
_NO_LANGUAGE = {"und", "zxx", "mul", "mis", "root"}
# narrower or wider names
_SCRIPTS = {"Hang": "Kore", "Aran": "Arab", "Hrkt": "Jpan", "Hanb": "Hant"}
_ROMANISATIONS = {
    "pinyin",
    "wadegile",
    "tongyong",
    "jyutping",
    "hepburn",
    "heploc",
    "alalc97",
    "alaluc",
}
# English names beside those of Unicode.
_NAMES = {
    "bengali": "bn", "cambodian": "km", "castilian": "es", "dari": "prs", "farsi": "fa",
    "frisian": "fy",
    "haitian": "ht", "kirghiz": "ky", "kurmanji": "ku", "laotian": "lo", "mandarin": "zh",
    "mandarin "
    "chinese": "zh", "modern greek": "el", "moldovan": "ro", "myanmar": "my", "oriya": "or",
    "panjabi": "pa", "pushto": "ps", "sinhalese": "si", "slovene": "sl", "sorani": "ckb",
    "twi": "tw",
    "uighur": "ug", "valencian": "ca",
}  # fmt: skip
_SHOWN_NAMES = {"bn": "Bengali"}  # as prompts have said since the first model

# Scripts that put no spaces between words. sacreBLEU has a tokenizer for Chinese; texts
# in the others are split into characters. Korean and Vietnamese have spaces.
_CHINESE_SCRIPTS = {"Hans", "Hant", "Hani"}
_OTHER_UNSPACED_SCRIPTS = {
    "Jpan", "Hira", "Kana", "Thai", "Khmr", "Laoo", "Mymr", "Tibt", "Lana", "Talu", "Tavt",
}  # fmt: skip

_TAG = re.compile(
    r"(?P<code>[a-z]{2,3})(?:-(?P<extended>[a-z]{3}))?(?:-(?P<script>[a-z]{4}))?"
    r"(?:-(?P<region>[a-z]{2}|\d{3}))?(?P<variants>(?:-(?:\d[a-z\d]{3}|[a-z\d]{5,8}))*)"
    r"(?:-[a-z\d](?:-[a-z\d]{1,8})+)*"  # extensions, such as -u-co-phonebk
)


@dataclass(frozen=True)
class TokenStyle:
    """How a family of tokenizers writes a language, and where its models read it.

    pattern: regular expression of a whole token; its group is the language. place:
    `decoder` is told it by its first tokens, `source` by a token ahead of what is
    translated.
    """

    pattern: re.Pattern[str]
    place: Place


# Models with none of these (T5, Qwen, Llama, ...) are told the language by a prompt, or
# not at all.
TOKEN_STYLES = (
    TokenStyle(re.compile(r"([a-z]{2,3}_[A-Z]{2})"), "decoder"),  # mBART, mBART-50: de_DE
    TokenStyle(re.compile(r"([a-z]{3}_[A-Z][a-z]{3})"), "decoder"),  # NLLB: deu_Latn
    # M2M100: __de__
    TokenStyle(re.compile(r"__([a-z]{2,3}(?:_[A-Z][a-z]{3})?)__"), "decoder"),
    # MADLAD-400: <2de>, <2zh_Hant>, <2az_RU>
    TokenStyle(re.compile(r"<2([a-z]{2,3}(?:_[A-Z][a-z]{3})?(?:_[A-Z]{2})?)>"), "source"),
)
_MBART_TOKENS = {
    "af_ZA", "ar_AR", "az_AZ", "bn_IN", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE",
    "fa_IR", "fi_FI",
    "fr_XX", "gl_ES", "gu_IN", "he_IL", "hi_IN", "hr_HR", "id_ID", "it_IT", "ja_XX",
    "ka_GE", "kk_KZ",
    "km_KH", "ko_KR", "lt_LT", "lv_LV", "mk_MK", "ml_IN", "mn_MN", "mr_IN", "my_MM",
    "ne_NP", "nl_XX",
    "pl_PL", "ps_AF", "pt_XX", "ro_RO", "ru_RU", "si_LK", "sl_SI", "sv_SE", "sw_KE",
    "ta_IN", "te_IN",
    "th_TH", "tl_XX", "tr_TR", "uk_UA", "ur_PK", "vi_VN", "xh_ZA", "zh_CN",
}  # fmt: skip
_WRAPPED = re.compile(r"__(.+)__|<2(.+)>")


def language_tag(name: str, what: str) -> str:
    """Return the tag of a language that people or corpora name; see `find_language`.

    what: the option or place that the name comes from; it begins the message.
    Raises UserError where the name is unknown.
    """
    found = find_language(name)
    if found is None:
        near = nearest_languages(name)
        raise UserError(
            f"{what} must be that of the text, as a code (de, zh-Hant) or in English "
            f"(German), got {name!r}{f': {near}' if near else '.'}"
        )
    return found.code


def tag_of(name: str) -> str:
    """Return the tag of a language, or the name as it is where the language is unknown."""
    found = find_language(name)
    return name if found is None else found.code


@lru_cache(maxsize=4096)
def find_language(name: str) -> Language | None:
    """Return the language of a name, None for a name that is unknown.

    name: a code of ISO 639 (de, deu, ger, iw), a BCP-47 tag (de-AT, de_AT, zh-TW), an
    English name (German, Norwegian Bokmål, Chinese (Traditional)) or a tokenizer's token
    (de_DE, deu_Latn, __de__, <2de>). Case does not matter. A region decides the script
    where it implies one (zh-TW is zh-Hant), and is left out.
    """
    plain = " ".join(name.split())
    wrapped = _WRAPPED.fullmatch(plain)
    tag = (wrapped[1] or wrapped[2]) if wrapped else plain
    return _of_tag(tag) or _of_name(plain)


def nearest_languages(name: str) -> str:
    """Return `did you mean …?` with the closest names; empty where nothing is close."""
    written = re.sub(r" sign language$", "", name, flags=re.IGNORECASE)
    for part in (WRITTEN_WITH.get(name.lower(), ""), written, re.split("[-_]", name)[0]):
        meant = find_language(part)
        if meant is not None:  # gsg, German Sign Language, or a wrong region: de_DF
            return f"did you mean {meant.code}?"
    names = filter(find_language, _english().languages.values())
    near = nearest(name, [*names, *map(str.title, _NAMES)])
    return near if near.startswith("did you mean") else ""


def word_rule(language: str) -> WordRule:
    """Return the sacreBLEU tokenizer that finds the words of a text.

    language: of the text, by any name (see `find_language`). 13a where spaces separate
    the words.
    """
    found = find_language(language)
    script = found.script if found else ""
    if script in _CHINESE_SCRIPTS:
        return "zh"
    return "char" if script in _OTHER_UNSPACED_SCRIPTS else "13a"


def language_tokens(
    vocabulary: Iterable[str], added: Iterable[str] = ()
) -> dict[str, Place]:
    """Return the tokens that stand for a language, and where a model reads each of them.

    added: those of the vocabulary that are no ordinary text, as the tokenizer says.
    """
    found: dict[str, Place] = {}
    vocabulary = list(vocabulary)
    sure = _MBART_TOKENS.union(added)
    for style in TOKEN_STYLES:
        tokens = list(filter(style.pattern.fullmatch, vocabulary))
        if style is TOKEN_STYLES[0]:  # as ordinary text looks: en_US
            tokens = [token for token in tokens if token in sure]
        # one alone may be ordinary text
        if len(list(filter(find_language, tokens))) > 1:
            found |= dict.fromkeys(tokens, style.place)
    return found


def token_of(
    language: str, places: Mapping[str, Place], option: str = "llm.language"
) -> tuple[str, Place] | None:
    """Return (the tokenizer's token of a language, where it is read).

    None where the tokenizer has no such tokens. language: as for `find_language`, or one
    of the tokenizer's own tokens. places: of `language_tokens`. option: for the message.
    Raises UserError where the tokenizer has tokens of languages, but not of this one in
    this script.
    """
    if language in places:
        return language, places[language]
    if not places:
        return None
    wanted = find_language(language)
    tags = {token: tag_of(token) for token in places}
    same: list[str] = []
    other: list[str] = []  # the same language in another script
    for token, tag in tags.items():
        if wanted is not None and tag == wanted.code:
            same.append(token)
        elif wanted is not None and tag.split("-")[0] == wanted.code.split("-")[0]:
            other.append(token)
    if same:
        # The shortest first: MADLAD has <2fr_CA> next to <2fr>.
        token = min(same, key=lambda token: (len(token), token))
        return token, places[token]

    error = f"{option} must be one that the LLM's tokenizer has a token for, but is {language!r}: "
    if not other:
        near = nearest(language, tags)
        if wanted is None and not near.startswith("did you mean"):
            near = nearest_languages(language) or near
        raise UserError(f"{error}{near}")
    other.sort()
    scripts = ", ".join(f"{token} ({script_name(token)})" for token in other)
    raise UserError(
        f"{error}of this language it has {scripts} only, in another script. Give "
        f"--{option}={tags[other[0]]} to use that token for all clips, or another LLM."
    )


def script_name(language: str) -> str:
    """Return the English name of the script that a language is written in."""
    found = find_language(language)
    return _script_name(found.script) if found else ""


# --- the parts of a tag


def _of_tag(text: str) -> Language | None:
    """The language of a code or a BCP-47 tag; None for what is none, or holds an unknown part."""
    match = _TAG.fullmatch(text.lower().replace("_", "-"))
    if match is None:
        return None
    code, extended = match["code"], match["extended"] or ""
    script = (match["script"] or "").title()
    region = (match["region"] or "").upper()
    if extended and code in ("zh", "ar", "ms"):  # zh-yue is yue
        code = extended
    elif extended:  # a region in three letters, deu_DEU
        region = region or extended.upper()
    if script and script not in _english().scripts:
        return None
    known_region = _region(region)
    if known_region is None:
        return None
    if _ROMANISATIONS.intersection(match["variants"].split("-")):
        script = script or "Latn"
    return _language(code, script, known_region)


def _region(region: str) -> str | None:
    """A region's two letters or three digits; empty for none and mBART's XX; None where
    unknown."""
    if region in ("", "XX"):
        return ""
    alias: str = get_global("territory_aliases").get(region, [region])[0]
    return alias if alias in _english().territories else None


def _language(code: str, script: str, region: str) -> Language | None:
    # The code of today, by our own table first: Unicode joins what NLLB tells apart.
    likely = get_global("likely_subtags")
    alias: str = _CODES.get(code) or get_global("language_aliases").get(code, code)
    replaced, *more = alias.split("_")
    for part in more:  # sh is sr_Latn
        script = script or (part if len(part) == 4 else "")
    code = _CODES.get(replaced, replaced)
    names: dict[str, str] = dict(_english().languages)
    name, usual = _ADDED.get(code, (names.get(code, ""), _script_of(likely.get(code, ""))))
    name = _SHOWN_NAMES.get(code, name)
    # Unicode lists sign languages among the others; they are not what a model writes.
    if code in _NO_LANGUAGE or name.endswith("Sign Language") or not (name or usual):
        return None

    # The script: as given, or as the region implies (zh_TW is Hant), or the usual one.
    if not script and region:
        script = _script_of(likely.get(f"{code}_{region}", ""))
    script = script or usual
    script = _SCRIPTS.get(script, script)
    if script == "Hani" and usual in ("Hans", "Hant"):
        script = usual

    tag = code
    if script != usual:
        tag = f"{code}-{script}"
        with_script = f"{name} ({_script_name(script)})" if name else ""
        name = names.get(f"{code}_{script}") or with_script
    signed = _SIGN_LANGUAGES.get(code)
    usual_name = f"{signed} Sign Language" if signed else "sign language"
    return Language(tag, name, script, _OWN_SIGN_LANGUAGE_NAMES.get(code, usual_name))


def _script_of(likely: str) -> str:
    """The script of Unicode's likely subtags, zh_Hans_CN; empty where they name none."""
    for part in likely.split("_")[1:]:
        if len(part) == 4:
            return _SCRIPTS.get(part, part)
    return ""


def _script_name(script: str) -> str:
    return str(_english().scripts.get(script, script))


# --- English names


def _of_name(text: str) -> Language | None:
    """The language of `German`, `Simplified Chinese`, `Chinese (Traditional)`,
    `Portuguese (Brazil)`."""
    tag = _tags_by_name().get(_folded(text))
    if tag is not None:
        return _of_tag(tag)
    match = re.fullmatch(r"(.+?)(?: \((.+)\)|, (.+))", text)
    tag = _tags_by_name().get(_folded(match[1])) if match else None
    part = _parts_by_name().get(_folded(match[2] or match[3])) if match else None
    if tag is None or part is None:
        return None
    return _of_tag(f"{tag.split('_')[0]}_{part}")


def _folded(name: str) -> str:
    """A name without case and accents: Norwegian Bokmål is norwegian bokmal."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(filterfalse(unicodedata.combining, letters))


def _codes_by_name(names: Mapping[str, str]) -> dict[str, str]:
    """The codes of a table of Unicode by their English names, folded."""
    return {_folded(name): code for code, name in names.items()}


@lru_cache(maxsize=1)
def _english() -> Locale:
    return Locale("en")


@lru_cache(maxsize=1)
def _tags_by_name() -> dict[str, str]:
    return _codes_by_name(_english().languages) | _NAMES


@lru_cache(maxsize=1)
def _parts_by_name() -> dict[str, str]:
    """Scripts and regions by their names."""
    regions = _codes_by_name(_english().territories)
    scripts = _codes_by_name(_english().scripts)
    return regions | {"us": "US", "uk": "GB"} | scripts
