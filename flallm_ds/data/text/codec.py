"""Sentences to token ids and back, in a vocabulary trimmed to the training text; the ids
around a video."""

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product, starmap
from pathlib import Path
from typing import Any

import numpy as np

from flallm_ds.data.text.languages import (
    Place,
    find_language,
    language_tokens,
    token_of,
)
from flallm_ds.data.text.normalizer import normalizer_of
from flallm_ds.data.text.prompt import Instruction, Wording, new_language, unknown_language
from flallm_ds.data.text.tokenizer import byte_tokens, load_tokenizer
from flallm_ds.errors import UserError
from flallm_ds.models.pretrained import check_llm_source

VOCABULARY_FILE = "vocabulary.json"


@dataclass(frozen=True)
class UnknownTokens:
    """What of some sentences a codec cannot write.

    characters: (a character, how often it stands in the sentences), the most frequent
    first. A word instead of characters where a tokenizer knows whole words only.
    """

    num_tokens: int
    num_unknown: int
    characters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        share = 100 * self.num_unknown / max(1, self.num_tokens)
        text = f"{share:.2g} % of {self.num_tokens:,} tokens"
        if not self.characters:
            return text
        shown = self.characters[:10]
        listed = ", ".join(f"{character!r} ({times:,})" for character, times in shown)
        text += f", because of {listed}"
        more = len(self.characters) - len(shown)
        return f"{text} and {more} more" if more else text


class TextCodec:
    """A Hugging Face tokenizer, the pieces of it that are kept, and how the LLM is told
    what to say.

    Ids outside this class are trimmed ids: 0 to `vocab_size` - 1. A piece that was not
    kept becomes unknown; a tokenizer without an unknown token spells it in bytes.
    """

    def __init__(
        self,
        tokenizer: Any,
        instruction: Instruction,
        kept_ids: Sequence[int] | None = None,
        light_t: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.instruction = instruction
        self._light_t = light_t
        self._normalizer = normalizer_of(tokenizer)
        self._wordings: dict[tuple[str, str], Wording] = {}

        # Two maps: kept_ids[trimmed id] is the full id, _trimmed[full id] the trimmed one.
        full = len(tokenizer)
        if kept_ids is None:
            kept_ids = range(min(full, instruction.rows or full))
        self.kept_ids = np.asarray(sorted(set(kept_ids)))
        self._trimmed = np.full(full, -1, dtype=np.int64)
        self._trimmed[self.kept_ids] = np.arange(len(self.kept_ids))

        self.eos_id = self.trimmed_id(tokenizer.eos_token_id)
        if self.eos_id < 0:
            raise self._without_row("end-of-sentence token", tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id
        pad_id = -1 if pad is None else self.trimmed_id(pad)
        self.pad_id = self.eos_id if pad_id < 0 else pad_id  # masked wherever it stands
        self._unknown_id = self._find_unknown_id()

    def _find_unknown_id(self) -> int | None:
        """The trimmed id of the unknown token; None where the tokenizer writes bytes instead."""
        unknown = self.tokenizer.unk_token_id
        # GPT-2 and its relatives give one id to both.
        if unknown in (None, self.tokenizer.eos_token_id):
            return None
        trimmed = self.trimmed_id(unknown)
        if trimmed >= 0:
            return trimmed
        if not byte_tokens(self._vocabulary):
            raise self._without_row("unknown token", unknown)
        return None

    @property
    def vocab_size(self) -> int:
        return len(self.kept_ids)

    @property
    def language(self) -> str:
        """The language of every hypothesis; empty where there are several."""
        known = self.instruction.languages
        return self.instruction.language or (known[0] if len(known) == 1 else "")

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def _language_tokens(self) -> dict[str, Place]:
        return language_tokens(self._vocabulary, self.tokenizer.get_added_vocab())

    def trimmed_id(self, full_id: int) -> int:
        """-1 for a piece that was not kept, or that the tokenizer or the embedding does
        not have."""
        return int(self._trimmed[full_id]) if 0 <= full_id < len(self._trimmed) else -1

    def _without_row(self, what: str, full_id: int) -> UserError:
        """The error for a special token that was added to the tokenizer or a config, but
        not to the LLM."""
        known = 0 <= full_id < len(self.tokenizer)
        token = f"{self.tokenizer.convert_ids_to_tokens(full_id)!r}, " if known else ""
        rows = (
            len(self.tokenizer) if self.instruction.rows is None else self.instruction.rows
        )
        return UserError(
            f"The {what} of the LLM ({token}id {full_id}) must be in its tokenizer "
            f"({len(self.tokenizer)} tokens) and have a row in its embedding ({rows} "
            "rows), but has none. Resize the embedding with "
            "model.resize_token_embeddings(len(tokenizer)) and save both, or give another "
            "--llm.name."
        )

    def encode(self, text: str) -> list[int]:
        """The sentence's pieces and the end of sentence, without a start token."""
        text = self._normal(text)
        if self._normalizer is not None:
            # SentencePiece does; not all tokenizers made of its models do
            text = " ".join(text.split())
        ids = []
        for token in self._split(text):
            if token != self.eos_id:
                ids.append(token)
            # An end of sentence here was written in the text, or is what transformers
            # takes for MADLAD's unknown token.
            elif self._unknown_id is not None:
                ids.append(self._unknown_id)
        return [*ids, self.eos_id]

    def _ids(self, text: str, specials: bool = False) -> list[int]:
        return self._split(self._normal(text), specials)

    def _split(self, text: str, specials: bool = False) -> list[int]:
        if not text and not specials:
            return []
        full_ids = self.tokenizer(text, add_special_tokens=specials)["input_ids"]
        # one that was added without a row, such as a start of text, was never read by the
        # LLM
        if specials:
            missing = set(self.tokenizer.all_special_ids).difference(self.kept_ids.tolist())
            full_ids = [i for i in full_ids if i not in missing]

        trimmed: list[int] = self._trimmed[np.asarray(full_ids, np.int64)].tolist()
        if min(trimmed, default=0) >= 0:
            return trimmed
        ids: list[int] = []
        for full_id, trimmed_id in zip(full_ids, trimmed, strict=True):
            ids += self._known(full_id, trimmed_id)
        return ids

    def _normal(self, text: str) -> str:
        """The text as the vocabulary's own normaliser writes it."""
        return text if self._normalizer is None else str(self._normalizer.normalize(text))

    def unknown_tokens(self, texts: Iterable[str]) -> UnknownTokens:
        """Count the unknown tokens of sentences, ends of sentences among all tokens."""
        num_tokens = num_unknown = 0
        words: Counter[str] = Counter()  # of sentences with unknown tokens
        for text, times in Counter(texts).items():
            ids = self.encode(text)
            num_tokens += times * len(ids)
            if self._unknown_id in ids:
                num_unknown += times * ids.count(self._unknown_id)
                for word in text.split():
                    words[word] += times

        # The causes are looked for in the whole vocabulary: it has the characters that the
        # trimmed one holds within longer tokens only.
        characters: Counter[str] = Counter()
        whole = self.untrimmed() if words else self
        for word, times in words.items():
            for character in whole._unknown_parts(word):
                characters[character] += times
        return UnknownTokens(num_tokens, num_unknown, tuple(characters.most_common()))

    def _unknown_parts(self, word: str) -> list[str]:
        """The characters of a word that are unknown alone, or the word itself where none is."""
        if not self._has_unknown(word):
            return []
        characters = unicodedata.normalize("NFC", word)
        return list(filter(self._has_unknown, characters)) or [word]

    def _has_unknown(self, text: str) -> bool:
        return self._unknown_id is not None and self._unknown_id in self.encode(text)

    def _known(self, full_id: int, trimmed: int) -> list[int]:
        if trimmed >= 0:
            return [trimmed]
        if self._unknown_id is not None:
            return [self._unknown_id]
        # In a byte-level vocabulary each letter of a token is one byte, with a token of its
        # own.
        ids = []
        for letter in self.tokenizer.convert_ids_to_tokens(int(full_id)):
            byte_id = self.trimmed_id(self._vocabulary.get(letter, -1))
            if byte_id >= 0:
                ids.append(byte_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence, specials and everything after its end left out."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        # an LLM's embedding may have rows to spare
        ids = [i for i in ids if i < len(self.kept_ids)]
        # Many hub configs ask for a clean-up that takes spaces away: "regen ." would come
        # back as "regen.".
        text = self.tokenizer.decode(
            self.kept_ids[ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def wording(self, language: str = "", corpus: str = "") -> Wording:
        """The ids around a clip's visual tokens.

        language: the clip's, where the run does not say one for all; empty where there is
        only one. Raises UserError for a language that the LLM cannot be told.
        """
        language = self.instruction.language or language or self.language
        if (language, corpus) not in self._wordings:
            make = self._light_wording if self._light_t else self._llm_wording
            self._wordings[language, corpus] = make(language, corpus)
        return self._wordings[language, corpus]

    def for_light_t(self) -> "TextCodec":
        """The same codec for Light-T instead of the LLM."""
        return TextCodec(
            self.tokenizer, self.instruction, self.kept_ids.tolist(), light_t=True
        )

    def _light_wording(self, language: str, corpus: str) -> Wording:
        languages = self.instruction.languages
        start = self._llm_wording(language, corpus).start
        if self.instruction.language or len(languages) < 2 or self._starts_differ:
            return Wording(start=start or (self.eos_id,))
        # Every word of Light-T is new, so any id can stand for a language.
        if language not in languages:
            raise new_language(language, languages)
        return Wording(start=(self.eos_id, languages.index(language)))

    @cached_property
    def _starts_differ(self) -> bool:
        """Whether each language of the training text has a decoder start of its own."""
        languages = self.instruction.languages
        starts = {self._llm_wording(language, "").start for language in languages}
        return len(starts) == len(languages)

    def _llm_wording(self, language: str, corpus: str) -> Wording:
        before, after = self.instruction.parts(language, corpus)
        named = self.instruction.language
        if self.instruction.decoder_only:
            if named and find_language(language) is None:
                raise unknown_language(language, "is known")
            ids = self._ids(before, specials=True)
            # Some tokenizers end every text; this one continues with the video.
            if len(ids) > 1 and ids[-1] == self.eos_id:
                ids = ids[:-1]
            return Wording(tuple(ids), tuple(self._ids(after)))

        found = token_of(language, self._language_tokens)
        if found is None:
            if named and find_language(language) is None:
                raise unknown_language(language, "is known")
            start = self._decoder_start(())
            return Wording(tuple(self._ids(before)), tuple(self._ids(after)), start)

        # The LLM reads the language's token ahead of the source, or as the decoder's start.
        token, place = found
        language_id = self._language_id(language, token)
        if place == "source":
            source, start = [language_id], self._decoder_start(())
        else:
            source, start = [], self._decoder_start((language_id,))
        return Wording((*source, *self._ids(before)), tuple(self._ids(after)), start)

    def _language_id(self, language: str, token: str) -> int:
        full_id = self._vocabulary[token]
        trimmed = self.trimmed_id(full_id)
        if trimmed >= 0:
            return trimmed
        if self.instruction.rows is not None and full_id >= self.instruction.rows:
            raise self._without_row(f"token of the language {language}", full_id)
        # its token was not kept
        raise new_language(language, self.instruction.languages)

    def _decoder_start(self, language_ids: tuple[int, ...]) -> tuple[int, ...]:
        if not self._starts_with_its_own_token(bool(language_ids)):
            return language_ids
        own = self.instruction.start_token or 0
        if self.trimmed_id(own) < 0:
            raise self._without_row("decoder_start_token_id", own)
        return (self.trimmed_id(own), *language_ids)

    def _starts_with_its_own_token(self, starts_with_language: bool) -> bool:
        """Not mBART, whose stored start, if any, is some language's token."""
        start = self.instruction.start_token
        ordinary = {
            self.tokenizer.pad_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.bos_token_id,
        }
        return start is not None and (start in ordinary or not starts_with_language)

    def save(self, folder: Path) -> None:
        """Tokenizer files and the map of kept pieces, in the Hugging Face layout."""
        self.tokenizer.save_pretrained(folder)
        content = {
            **dataclasses.asdict(self.instruction),
            "kept_ids": self.kept_ids.tolist(),
        }
        (folder / VOCABULARY_FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, hub_code: bool = False) -> "TextCodec":
        """What `save` wrote. Raises UserError where the folder is not whole."""
        try:
            content = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
            kept_ids = content.pop("kept_ids")
            # A bool is an int to isinstance, and a hub's file may hold anything.
            if not kept_ids or not all(type(i) is int and i >= 0 for i in kept_ids):
                raise ValueError("kept_ids must be ids of tokens")
            content["languages"] = tuple(content["languages"])
            instruction = Instruction(**content)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{folder / VOCABULARY_FILE} must be a codec's file, but is not ({error})."
            ) from error
        tokenizer = load_tokenizer(str(folder), hub_code)
        if max(kept_ids) >= len(tokenizer):
            raise UserError(
                f"the tokenizer in {folder} must hold the pieces of {VOCABULARY_FILE}, but "
                "holds fewer."
            )
        return cls(tokenizer, instruction, kept_ids)

    def untrimmed(self) -> "TextCodec":
        """The same with all pieces of its tokenizer."""
        return TextCodec(self.tokenizer, self.instruction)

    @classmethod
    def for_training_text(
        cls,
        name: str,
        instruction: Instruction,
        texts: Iterable[str],
        trim: bool,
        hub_code: bool = False,
    ) -> "TextCodec":
        """The codec of the LLM `name` (hub id or folder) for sentences in
        `instruction.languages`.

        trim: keep only the pieces of `texts` and of the prompts, the specials, the
        language ids, and bytes where pieces are spelled in them (FLa-LLM, section 4.1).
        Raises UserError for a language that the LLM cannot be told, or where there are
        several and nothing tells it which.
        """
        check_llm_source(name)
        tokenizer = load_tokenizer(name, hub_code)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {name} must have an end-of-sentence token, but has none."
            )
        whole = cls(tokenizer, instruction)
        languages: Sequence[str] = instruction.languages or [""]
        if instruction.language:
            languages = [instruction.language]
        corpora = ["", *instruction.sign_languages]
        wordings = set(starmap(whole.wording, product(languages, corpora)))
        if len(set(map(whole.wording, languages))) < len(set(languages)):
            raise UserError(
                f"the LLM {name} must be told which of {', '.join(languages)} to speak, "
                "but its tokenizer has no tokens for them. Give a --llm.prompt with "
                "{language}."
            )
        if not trim:
            return whole

        # Full ids of all that the run reads or writes, as far as the embedding has rows.
        kept = set(tokenizer.all_special_ids) | byte_tokens(whole._vocabulary)
        for wording in wordings:
            around = [*wording.before, *wording.after, *wording.start]
            kept.update(whole.kept_ids[around].tolist())
        for text in set(texts):
            kept.update(whole.kept_ids[whole.encode(text)].tolist())
        return cls(tokenizer, instruction, list(kept.intersection(whole.kept_ids.tolist())))
