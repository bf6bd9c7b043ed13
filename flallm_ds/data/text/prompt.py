"""What an LLM is told around a clip: the prompt, and the language of its answer."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flallm_ds.data.text.languages import (
    find_language,
    nearest_languages,
    tag_of,
)
from flallm_ds.errors import UserError

DECODER_ONLY_PROMPT = "Translate this {sign_language} video into {language}:{video}\n"
_PROMPT_FIELDS = {"sign_language", "language", "video"}


@dataclass(frozen=True)
class Instruction:
    """How an LLM is told what to say of a video.

    prompt: text around {video}, with {language} and {sign_language}; empty:
    `DECODER_ONLY_PROMPT` for a decoder-only LLM, nothing for an encoder-decoder.
    start_token: the encoder-decoder's own first token, an id of its whole vocabulary.
    rows: of its embedding, which may be fewer than its tokenizer has pieces. language: of
    all clips, as the user named it; empty: each clip's own.
    """

    decoder_only: bool = False
    start_token: int | None = None
    rows: int | None = None
    language: str = ""
    languages: tuple[str, ...] = ()  # of the training text; their tags
    prompt: str = ""
    # by corpus, if not the usual one
    sign_languages: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Vocabularies of earlier versions hold languages as their corpora named them.
        object.__setattr__(
            self, "languages", tuple(dict.fromkeys(map(tag_of, self.languages)))
        )

    def parts(self, language: str, corpus: str) -> tuple[str, str]:
        """The text (before, after) the video. Raises UserError for a language that the
        prompt cannot name."""
        template = self.prompt or (DECODER_ONLY_PROMPT if self.decoder_only else "{video}")
        check_prompt(template)
        found = find_language(language)
        names = {
            "video": "{video}",
            "language": "",
            "sign_language": self.sign_languages.get(corpus, ""),
        }
        if found is not None:
            names["language"] = found.name
            names["sign_language"] = names["sign_language"] or found.sign_language
        for name in sorted(set(_fields(template))):
            if not names[name]:
                error = unknown_language(language, f"has a {name} that the prompt can name")
                raise UserError(f"{error} Or give a --llm.prompt of your own.")
        before, after = template.format_map(names).split("{video}")
        return before, after


def unknown_language(language: str, must: str) -> UserError:
    near = (
        nearest_languages(language)
        or "give a code (de, zh-Hant) or an English name (German)."
    )
    return UserError(f"llm.language must be one that {must}, but is {language!r}: {near}")


def new_language(language: str, known: Sequence[str]) -> UserError:
    return UserError(
        f"the language of each clip must be one of the training text ({', '.join(known)}), "
        f"but one is {language!r}. Leave such clips out, or train on text of that language "
        "too."
    )


def check_prompt(template: str) -> None:
    """Raise UserError if a prompt does not hold {video} once, or holds a field that does
    not exist."""
    try:
        names = _fields(template)
    except ValueError as error:
        raise UserError(
            f"llm.prompt must be text with fields in braces, but {error}: {template}."
        ) from None
    if set(names) - _PROMPT_FIELDS or names.count("video") != 1:
        raise UserError(
            "llm.prompt must hold {video} once, and else only {language} and "
            f"{{sign_language}}, but is {template!r}."
        )


def _fields(template: str) -> list[str]:
    """The names in braces, in order. Raises ValueError where the braces do not match."""
    names = []
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None:  # as it is after the last field
            names.append(name)
    return names


@dataclass(frozen=True)
class Wording:
    """Ids around the visual tokens of one clip.

    before, after: ahead of and behind them, in the LLM's input. start: the decoder's
    first ids; none for a decoder-only LLM.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
