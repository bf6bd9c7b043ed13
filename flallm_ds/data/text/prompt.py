"""Build the prompt of an LLM and the target language of its answer."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flallm_ds.data.text.languages import (
    find_language,
    nearest_languages,
    tag_or_name,
)
from flallm_ds.errors import UserError

# It ends with the video and a line break, after which the LLM writes the translation.
DECODER_ONLY_PROMPT = "Translate this {sign_language} video into {language}:{video}\n"
_PROMPT_FIELDS = {"sign_language", "language", "video"}


@dataclass(frozen=True)
class Instruction:
    """Settings of the LLM's input and target language.

    decoder_only: whether the LLM has no encoder.
    start_token: first token of an encoder-decoder's output, an id of the full vocabulary.
    rows: rows of the LLM's embedding, which may be fewer than the tokenizer has tokens.
    language: target language of all clips, as the user named it; empty: each clip's own.
    languages: tags of the languages of the training text.
    prompt: text with {video}, {language} and {sign_language}. Empty: `DECODER_ONLY_PROMPT`
    for a decoder-only LLM, no text for an encoder-decoder.
    sign_languages: corpus -> name of its sign language, if it is not the usual one.
    """

    decoder_only: bool = False
    start_token: int | None = None
    rows: int | None = None
    language: str = ""
    languages: tuple[str, ...] = ()
    prompt: str = ""
    sign_languages: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Vocabularies of earlier versions have the languages as their corpora named them.
        tags = dict.fromkeys(map(tag_or_name, self.languages))
        object.__setattr__(self, "languages", tuple(tags))

    def parts(self, language: str, corpus: str) -> tuple[str, str]:
        """Return the prompt's text (before, after) the video.

        Raises UserError if the prompt has a field without a value for this language.
        """
        template = self.prompt or (DECODER_ONLY_PROMPT if self.decoder_only else "{video}")
        check_prompt(template)
        # The value of each field. {video} stays in the text, where it is split below.
        found = find_language(language)
        names = {
            "video": "{video}",
            "language": "",
            "sign_language": self.sign_languages.get(corpus, ""),
        }
        if found is not None:
            names["language"] = found.name
            names["sign_language"] = names["sign_language"] or found.sign_language
        # An empty value would leave a gap in the sentence, so it is an error.
        for name in sorted(set(_fields(template))):
            if not names[name]:
                # Without llm.language, the language is the clip's own, from the shards.
                error = unknown_language(
                    language,
                    f"a language with a {name} for the prompt",
                    "llm.language" if self.language else "The language of each clip",
                )
                raise UserError(f"{error} Or give a --llm.prompt without {{{name}}}.")
        before, after = template.format_map(names).split("{video}")
        return before, after


def unknown_language(language: str, kind: str, what: str = "llm.language") -> UserError:
    """Return the error for a target language that is not of this kind.

    what: the option or the data that contains the language.
    """
    near = nearest_languages(language)
    remedy = (
        f": {near}" if near else ". Give a code (de, zh-Hant) or an English name (German)."
    )
    return UserError(f"{what} must be {kind}, got {language!r}{remedy}")


def new_language(language: str, known: Sequence[str]) -> UserError:
    """Return the error for a clip in a language that is not in the training text."""
    return UserError(
        "The language of each clip must be one of the training text "
        f"({', '.join(known)}), got {language!r}. Leave such clips out, or train on text "
        "of that language too."
    )


def check_prompt(template: str) -> None:
    """Raise UserError unless the prompt has {video} once and only known fields."""
    try:
        names = _fields(template)
    except ValueError as error:
        raise UserError(
            f"llm.prompt must be text with fields in braces, got {template!r} ({error})."
        ) from None
    if set(names) - _PROMPT_FIELDS or names.count("video") != 1:
        raise UserError(
            "llm.prompt must contain {video} once, and otherwise only {language} and "
            f"{{sign_language}}, got {template!r}."
        )


def _fields(template: str) -> list[str]:
    """Return the names in braces, in order; raise ValueError if the braces do not match."""
    names = []
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None:  # None for text after the last field
            names.append(name)
    return names


@dataclass(frozen=True)
class Wording:
    """Token ids around the visual tokens of a clip.

    before, after: in the LLM's input, before and after the visual tokens.
    start: first ids of the decoder; empty for a decoder-only LLM.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
