"""Look up spoken languages by the names that people, corpora and tokenizers use.

Each language has one tag, which shards, runs and scores use: its ISO 639 code, with its
script if that is not the usual one (de, zh, zh-Hant, sr-Latn). Codes, names, and the script
that a region implies come from Unicode's CLDR, through the package Babel.
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
    """A spoken language in one script."""

    # BCP-47 tag without a region, and without the script if that is the usual one
    code: str
    name: str  # in English, empty for a rare language without one
    script: str  # code of ISO 15924, empty if it is not known
    # the sign language of most corpora with this language, "sign language" if not known
    sign_language: str


# Spoken language -> first words of the name of its sign language.
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
# Spoken language -> codes (ISO 639-3) of the sign languages of its countries.
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
# Code of a sign language -> written language of its country.
WRITTEN_WITH: dict[str, str] = {}
for _written, _signs in _SIGN_LANGUAGE_CODES.items():
    WRITTEN_WITH.update(dict.fromkeys(_signs.split(), _written))
_OWN_SIGN_LANGUAGE_NAMES = {"nl": "Sign Language of the Netherlands"}

# Codes for which tokenizers differ from Unicode: code -> code of this module.
_CODES = {
    # M2M100 and MADLAD have one token for Norwegian, and none for Nynorsk alone
    "nb": "no", "nob": "no",
    "ns": "nso",  # M2M100's code of Northern Sotho
    "pbt": "ps",  # NLLB's only Pashto
    # NLLB has these in addition to fa, ak and apc
    "prs": "prs", "twi": "tw", "tw": "tw", "ajp": "ajp",
}  # fmt: skip
# Languages without an entry in Unicode: English name and usual script.
_ADDED = {
    "ajp": ("South Levantine Arabic", "Arab"), "ber": ("Berber", "Tfng"), "prs": ("Dari",
    "Arab"),
    "quh": ("South Bolivian Quechua", "Latn"), "tw": ("Twi", "Latn"),
}  # fmt: skip
# Codes that stand for no language.
_NO_LANGUAGE = {"und", "zxx", "mul", "mis", "root"}  # codespell:ignore mis
# Script -> the one with a narrower or wider name that is used here.
_SCRIPTS = {"Hang": "Kore", "Aran": "Arab", "Hrkt": "Jpan", "Hanb": "Hant"}
# Variants that imply the Latin script.
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
# English names in addition to those of Unicode.
_NAMES = {
    "bengali": "bn", "cambodian": "km", "castilian": "es", "dari": "prs", "farsi": "fa",
    "frisian": "fy",
    "haitian": "ht", "kirghiz": "ky", "kurmanji": "ku", "laotian": "lo", "mandarin": "zh",
    "mandarin chinese": "zh", "modern greek": "el", "moldovan": "ro", "myanmar": "my",
    "oriya": "or", "panjabi": "pa", "pushto": "ps", "sinhalese": "si", "slovene": "sl",
    "sorani": "ckb", "twi": "tw",
    "uighur": "ug", "valencian": "ca",
}  # fmt: skip
# Names in prompts that differ from Unicode's: earlier models were trained with them.
_SHOWN_NAMES = {"bn": "Bengali"}

# Scripts without spaces between words. sacreBLEU has a tokenizer for Chinese; texts in the
# other scripts are split into characters. Korean and Vietnamese have spaces.
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
    """Tokens of a family of tokenizers for languages.

    pattern: regular expression for a whole token; its group is the language.
    place: where the model reads the token: `decoder` for the first tokens of the output,
    `source` for a token before the input.
    """

    pattern: re.Pattern[str]
    place: Place


# Models without such tokens (T5, Qwen, Llama, ...) get the language from a prompt, or not
# at all.
TOKEN_STYLES = (
    TokenStyle(re.compile(r"([a-z]{2,3}_[A-Z]{2})"), "decoder"),  # mBART, mBART-50: de_DE
    TokenStyle(re.compile(r"([a-z]{3}_[A-Z][a-z]{3})"), "decoder"),  # NLLB: deu_Latn
    # M2M100: __de__
    TokenStyle(re.compile(r"__([a-z]{2,3}(?:_[A-Z][a-z]{3})?)__"), "decoder"),
    # MADLAD-400: <2de>, <2zh_Hant>, <2az_RU>
    TokenStyle(re.compile(r"<2([a-z]{2,3}(?:_[A-Z][a-z]{3})?(?:_[A-Z]{2})?)>"), "source"),
)
# The tokens of mBART and mBART-50, because ordinary text can have the same form (en_US).
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
    """Return the tag of a language; see `find_language` for the names.

    what: the option or place of the name, for the message.
    Raises UserError if the name is unknown.
    """
    found = find_language(name)
    if found is None:
        near = nearest_languages(name)
        end = f": {near}" if near else "."
        raise UserError(
            f"{what} must be the language of the text, as a code (de, zh-Hant) or in English "
            f"(German), got {name!r}{end}"
        )
    return found.code


def tag_or_name(name: str) -> str:
    """Return the tag of a language, or the name itself if the language is unknown."""
    found = find_language(name)
    return name if found is None else found.code


@lru_cache(maxsize=4096)
def find_language(name: str) -> Language | None:
    """Return the language with this name, None if the name is unknown.

    name: a code of ISO 639 (de, deu, ger, iw), a BCP-47 tag (de-AT, de_AT, zh-TW), an
    English name (German, Norwegian Bokmål, Chinese (Traditional)) or a tokenizer's token
    (de_DE, deu_Latn, __de__, <2de>), in upper or lower case. A region can imply the script
    (zh-TW is zh-Hant); apart from that it is ignored.
    """
    plain = " ".join(name.split())
    wrapped = _WRAPPED.fullmatch(plain)
    tag = (wrapped[1] or wrapped[2]) if wrapped else plain
    return _of_tag(tag) or _of_name(plain)


def nearest_languages(name: str) -> str:
    """Return `did you mean …?` with the closest names; empty if no name is close."""
    written = re.sub(r" sign language$", "", name, flags=re.IGNORECASE)
    for part in (WRITTEN_WITH.get(name.lower(), ""), written, re.split("[-_]", name)[0]):
        meant = find_language(part)
        # A sign language (gsg, German Sign Language), or a wrong region (de_DF).
        if meant is not None:
            return f"did you mean {meant.code}?"
    names = filter(find_language, _english().languages.values())
    near = nearest(name, [*names, *map(str.title, _NAMES)])
    return near if near.startswith("did you mean") else ""


def word_rule(language: str) -> WordRule:
    """Return the sacreBLEU tokenizer of a language; 13a if words have spaces.

    language: any name of the language; see `find_language`.
    """
    found = find_language(language)
    script = found.script if found else ""
    if script in _CHINESE_SCRIPTS:
        return "zh"
    return "char" if script in _OTHER_UNSPACED_SCRIPTS else "13a"


def language_tokens(
    vocabulary: Iterable[str], added: Iterable[str] = ()
) -> dict[str, Place]:
    """Return the vocabulary's tokens for languages, and where the model reads each token.

    added: tokens that were added to the vocabulary and do not come from text.
    """
    found: dict[str, Place] = {}
    vocabulary = list(vocabulary)
    sure = _MBART_TOKENS.union(added)
    for style in TOKEN_STYLES:
        tokens = list(filter(style.pattern.fullmatch, vocabulary))
        # Ordinary text can have mBART's form (en_US), so only certain tokens count.
        if style is TOKEN_STYLES[0]:
            tokens = [token for token in tokens if token in sure]
        # A single token may be ordinary text.
        if len(list(filter(find_language, tokens))) > 1:
            found |= dict.fromkeys(tokens, style.place)
    return found


def token_of(
    language: str, places: Mapping[str, Place], option: str = "llm.language"
) -> tuple[str, Place] | None:
    """Return (the tokenizer's token for a language, where the model reads it).

    None if the tokenizer has no tokens for languages.
    language: a name as in `find_language`, or a token of the tokenizer.
    places: result of `language_tokens`.
    option: name of the option, for the message.
    Raises UserError if the tokenizer has tokens for languages, but none for this language
    in this script.
    """
    if language in places:
        return language, places[language]
    if not places:
        return None
    wanted = find_language(language)
    tags = {token: tag_or_name(token) for token in places}
    same: list[str] = []  # tokens of this language in this script
    other: list[str] = []  # tokens of this language in another script
    for token, tag in tags.items():
        if wanted is not None and tag == wanted.code:
            same.append(token)
        elif wanted is not None and tag.split("-")[0] == wanted.code.split("-")[0]:
            other.append(token)
    if same:
        # The shortest token has no region: MADLAD has <2fr_CA> next to <2fr>.
        token = min(same, key=lambda token: (len(token), token))
        return token, places[token]

    error = (
        f"{option} must be a language with a token in the LLM's tokenizer, got {language!r}"
    )
    if not other:
        near = nearest(language, tags)
        if wanted is None and not near.startswith("did you mean"):
            near = nearest_languages(language) or near
        raise UserError(f"{error}: {near}")
    other.sort()
    scripts = ", ".join(f"{token} ({script_name(token)})" for token in other)
    raise UserError(
        f"{error}: it has {scripts} only, in another script. Give "
        f"--{option}={tags[other[0]]} to use that token for all clips, or another LLM."
    )


def script_name(language: str) -> str:
    """Return the English name of the script that a language is written in."""
    found = find_language(language)
    return _script_name(found.script) if found else ""


# --- the parts of a tag


def _of_tag(text: str) -> Language | None:
    """Return the language of a code or a BCP-47 tag, None if a part is unknown."""
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
    """Return a region's code; empty for none and mBART's XX, None if it is unknown."""
    if region in ("", "XX"):
        return ""
    alias: str = get_global("territory_aliases").get(region, [region])[0]
    return alias if alias in _english().territories else None


def _language(code: str, script: str, region: str) -> Language | None:
    """Return the language of the parts of a tag, None if there is no such language."""
    # Replace outdated codes. `_CODES` comes first: Unicode joins codes that NLLB separates.
    likely = get_global("likely_subtags")
    alias: str = _CODES.get(code) or get_global("language_aliases").get(code, code)
    replaced, *more = alias.split("_")
    for part in more:  # sh is sr_Latn
        script = script or (part if len(part) == 4 else "")
    code = _CODES.get(replaced, replaced)
    names: dict[str, str] = dict(_english().languages)
    name, usual = _ADDED.get(code, (names.get(code, ""), _script_of(likely.get(code, ""))))
    name = _SHOWN_NAMES.get(code, name)
    # Unicode lists sign languages too, but a model does not write them.
    if code in _NO_LANGUAGE or name.endswith("Sign Language") or not (name or usual):
        return None

    # The given script, or the region's (zh_TW is Hant), or the usual one.
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
    """Return the script in Unicode's likely subtags (zh_Hans_CN); empty if none."""
    for part in likely.split("_")[1:]:
        if len(part) == 4:
            return _SCRIPTS.get(part, part)
    return ""


def _script_name(script: str) -> str:
    """Return the English name of a script, or its code if it has no name."""
    return str(_english().scripts.get(script, script))


# --- English names


def _of_name(text: str) -> Language | None:
    """Return the language of an English name, None if it is unknown.

    Forms: `German`, `Simplified Chinese`, `Chinese (Traditional)`, `Portuguese (Brazil)`.
    """
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
    """Return a name without case and accents: Norwegian Bokmål is norwegian bokmal."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(filterfalse(unicodedata.combining, letters))


def _codes_by_name(names: Mapping[str, str]) -> dict[str, str]:
    """Return folded name -> code of one of Unicode's tables."""
    return {_folded(name): code for code, name in names.items()}


@lru_cache(maxsize=1)
def _english() -> Locale:
    """Return Unicode's English names of languages, scripts and regions."""
    return Locale("en")


@lru_cache(maxsize=1)
def _tags_by_name() -> dict[str, str]:
    """Return folded name -> tag of all languages."""
    return _codes_by_name(_english().languages) | _NAMES


@lru_cache(maxsize=1)
def _parts_by_name() -> dict[str, str]:
    """Return folded name -> code of all scripts and regions."""
    regions = _codes_by_name(_english().territories)
    scripts = _codes_by_name(_english().scripts)
    return regions | {"us": "US", "uk": "GB"} | scripts
