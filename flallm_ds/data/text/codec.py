"""Encode sentences to token ids and decode them, with a trimmed vocabulary.

The vocabulary is trimmed to the tokens of the training text. The codec also makes the token
ids around a video: the prompt and the start of the decoder.
"""

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
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
from flallm_ds.data.text.unknown_tokens import UnknownTokens
from flallm_ds.errors import UserError
from flallm_ds.models.pretrained import check_llm_source

VOCABULARY_FILE = "vocabulary.json"


class TextCodec:
    """A Hugging Face tokenizer with a trimmed vocabulary, and the LLM's prompt.

    All ids outside of this class are trimmed ids, from 0 to `vocab_size` - 1. A token that
    was not kept becomes the unknown token; without one, its bytes become tokens.

    instruction: the prompt and the target language.
    kept_ids: ids of the full vocabulary to keep; None keeps all rows of the embedding.
    light_t: make the ids around a video for Light-T instead of the LLM.
    Raises UserError if the LLM's embedding has no row for a special token.
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

        # kept_ids maps a trimmed id to its full id; _trimmed maps the other way, -1 for
        # tokens that were not kept.
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
        self.pad_id = self.eos_id if pad_id < 0 else pad_id  # padding is always masked
        self._unknown_id = self._find_unknown_id()

    def _find_unknown_id(self) -> int | None:
        """Return the trimmed id of the unknown token, None if bytes replace it."""
        unknown = self.tokenizer.unk_token_id
        # GPT-2 uses one token as the unknown token and as the end of a text.
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
        """The language of all hypotheses; empty if there are several."""
        known = self.instruction.languages
        return self.instruction.language or (known[0] if len(known) == 1 else "")

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    @cached_property
    def _language_tokens(self) -> dict[str, Place]:
        return language_tokens(self._vocabulary, self.tokenizer.get_added_vocab())

    def trimmed_id(self, full_id: int) -> int:
        """Return the trimmed id of a token of the full vocabulary.

        -1 if the token was not kept, or is not in the tokenizer or the embedding.
        """
        return int(self._trimmed[full_id]) if 0 <= full_id < len(self._trimmed) else -1

    def _without_row(self, what: str, full_id: int) -> UserError:
        """Return the error for a special token that the LLM's embedding does not have."""
        known = 0 <= full_id < len(self.tokenizer)
        token = f"{self.tokenizer.convert_ids_to_tokens(full_id)!r}, " if known else ""
        rows = self.instruction.rows
        if rows is None:
            rows = len(self.tokenizer)
        return UserError(
            f"The {what} of the LLM ({token}id {full_id}) must be in its tokenizer "
            f"({len(self.tokenizer)} tokens) and have a row in its embedding ({rows} "
            "rows), got none. Resize the embedding with "
            "model.resize_token_embeddings(len(tokenizer)) and save both, or give another "
            "--llm.name."
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a sentence with an end token, without a start token."""
        text = self._normal(text)
        if self._normalizer is not None:
            # SentencePiece joins spaces; some tokenizers made from its models do not.
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
        """Return the token ids of a part of a prompt; specials: with special tokens."""
        return self._split(self._normal(text), specials)

    def _split(self, text: str, specials: bool = False) -> list[int]:
        """Return the token ids of a normalised text."""
        if not text and not specials:
            return []
        full_ids = self.tokenizer(text, add_special_tokens=specials)["input_ids"]
        # The LLM was trained without special tokens that have no row in its embedding, such
        # as a start of text that was added later.
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
        """Return the text as the vocabulary's normaliser writes it."""
        return text if self._normalizer is None else str(self._normalizer.normalize(text))

    def unknown_tokens(self, texts: Iterable[str]) -> UnknownTokens:
        """Count the tokens and the unknown tokens of sentences, with their end tokens."""
        # Equal sentences are encoded once.
        num_tokens = num_unknown = 0
        words: Counter[str] = Counter()  # words of sentences with unknown tokens
        for text, times in Counter(texts).items():
            ids = self.encode(text)
            num_tokens += times * len(ids)
            if self._unknown_id in ids:
                num_unknown += times * ids.count(self._unknown_id)
                for word in text.split():
                    words[word] += times

        # Look for the unknown characters with the full vocabulary: the trimmed one has some
        # characters only within longer tokens.
        characters: Counter[str] = Counter()
        whole = self.untrimmed() if words else self
        for word, times in words.items():
            for character in whole._unknown_parts(word):
                characters[character] += times
        return UnknownTokens(num_tokens, num_unknown, tuple(characters.most_common()))

    def _unknown_parts(self, word: str) -> list[str]:
        """Return the characters of a word that are unknown by themselves.

        The word itself if it has unknown tokens, but no such character.
        """
        if not self._has_unknown(word):
            return []
        characters = unicodedata.normalize("NFC", word)
        return list(filter(self._has_unknown, characters)) or [word]

    def _has_unknown(self, text: str) -> bool:
        return self._unknown_id is not None and self._unknown_id in self.encode(text)

    def _known(self, full_id: int, trimmed: int) -> list[int]:
        """Return the ids that stand for a token: its own, the unknown one, or its bytes."""
        if trimmed >= 0:
            return [trimmed]
        if self._unknown_id is not None:
            return [self._unknown_id]
        # In a byte-level vocabulary each letter of a token stands for a byte, and is a
        # token by itself.
        ids = []
        for letter in self.tokenizer.convert_ids_to_tokens(int(full_id)):
            byte_id = self.trimmed_id(self._vocabulary.get(letter, -1))
            if byte_id >= 0:
                ids.append(byte_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the sentence up to its end token, without special tokens."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        # An LLM's embedding may have more rows than the tokenizer has tokens.
        ids = [i for i in ids if i < len(self.kept_ids)]
        # Many configs on the hub ask for a clean-up that removes spaces: "regen ." would
        # become "regen.".
        text = self.tokenizer.decode(
            self.kept_ids[ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).strip()

    def wording(self, language: str = "", corpus: str = "") -> Wording:
        """Return the ids around a clip's visual tokens.

        language: language of the clip; ignored if the run has one target language, and
        optional if the training text has one language.
        corpus: name of the clip's corpus, for its sign language.
        Raises UserError for a language that the model cannot write.
        """
        language = self.instruction.language or language or self.language
        if (language, corpus) not in self._wordings:
            make = self._light_wording if self._light_t else self._llm_wording
            self._wordings[language, corpus] = make(language, corpus)
        return self._wordings[language, corpus]

    def for_light_t(self) -> "TextCodec":
        """Return the same codec with `wording` for Light-T instead of the LLM."""
        return TextCodec(
            self.tokenizer, self.instruction, self.kept_ids.tolist(), light_t=True
        )

    def _light_wording(self, language: str, corpus: str) -> Wording:
        """Return the ids for Light-T, which has no prompt."""
        languages = self.instruction.languages
        start = self._llm_wording(language, corpus).start
        if self.instruction.language or len(languages) < 2 or self._starts_differ:
            return Wording(start=start or (self.eos_id,))
        # Light-T has no pretrained embeddings, so any id can stand for a language.
        if language not in languages:
            raise new_language(language, languages)
        return Wording(start=(self.eos_id, languages.index(language)))

    @cached_property
    def _starts_differ(self) -> bool:
        """Whether the LLM's decoder start differs between all languages of the text."""
        languages = self.instruction.languages
        starts = {self._llm_wording(language, "").start for language in languages}
        return len(starts) == len(languages)

    def _llm_wording(self, language: str, corpus: str) -> Wording:
        """Return the ids for the LLM: prompt, language token, start of the decoder."""
        before, after = self.instruction.parts(language, corpus)
        named = self.instruction.language
        if self.instruction.decoder_only:
            if named and find_language(language) is None:
                raise unknown_language(language, "a known language")
            ids = self._ids(before, specials=True)
            # Some tokenizers add an end to every text; this one continues with the video.
            if len(ids) > 1 and ids[-1] == self.eos_id:
                ids = ids[:-1]
            return Wording(tuple(ids), tuple(self._ids(after)))

        # Encoder-decoders without language tokens (T5) have only the prompt.
        found = token_of(language, self._language_tokens)
        if found is None:
            if named and find_language(language) is None:
                raise unknown_language(language, "a known language")
            start = self._decoder_start(())
            return Wording(tuple(self._ids(before)), tuple(self._ids(after)), start)

        # The LLM reads the language token before its input or at the start of its output.
        token, place = found
        language_id = self._language_id(language, token)
        if place == "source":
            source, start = [language_id], self._decoder_start(())
        else:
            source, start = [], self._decoder_start((language_id,))
        return Wording((*source, *self._ids(before)), tuple(self._ids(after)), start)

    def _language_id(self, language: str, token: str) -> int:
        """Return the trimmed id of a language token. Raises UserError if it has none."""
        full_id = self._vocabulary[token]
        trimmed = self.trimmed_id(full_id)
        if trimmed >= 0:
            return trimmed
        if self.instruction.rows is not None and full_id >= self.instruction.rows:
            raise self._without_row(f"token of the language {language}", full_id)
        # Trimming kept the tokens of the training text's languages only.
        raise new_language(language, self.instruction.languages)

    def _decoder_start(self, language_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the decoder's first ids: the LLM's start token, the language token."""
        if not self._starts_with_its_own_token(bool(language_ids)):
            return language_ids
        own = self.instruction.start_token or 0
        if self.trimmed_id(own) < 0:
            raise self._without_row("decoder_start_token_id", own)
        return (self.trimmed_id(own), *language_ids)

    def _starts_with_its_own_token(self, starts_with_language: bool) -> bool:
        """Return whether the decoder begins with the start token of the LLM's config.

        The config of mBART may have a language token there, which must not be used.
        """
        start = self.instruction.start_token
        ordinary = {
            self.tokenizer.pad_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.bos_token_id,
        }
        return start is not None and (start in ordinary or not starts_with_language)

    def save(self, folder: Path) -> None:
        """Write the tokenizer in the Hugging Face layout, and `VOCABULARY_FILE`."""
        self.tokenizer.save_pretrained(folder)
        content = {
            **dataclasses.asdict(self.instruction),
            "kept_ids": self.kept_ids.tolist(),
        }
        (folder / VOCABULARY_FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, hub_code: bool = False) -> "TextCodec":
        """Load a codec that `save` wrote.

        hub_code: run the Python code in the tokenizer's repository.
        Raises UserError if a file is missing or damaged.
        """
        try:
            content = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
            kept_ids = content.pop("kept_ids")
            # The file may come from anyone. isinstance would accept a bool as an int.
            if not kept_ids or not all(type(i) is int and i >= 0 for i in kept_ids):
                raise ValueError("kept_ids must be token ids, got other values")
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
                f"Cannot read the vocabulary {folder / VOCABULARY_FILE}: {error}. Copy or "
                "export the folder again."
            ) from error
        tokenizer = load_tokenizer(str(folder), hub_code)
        if max(kept_ids) >= len(tokenizer):
            raise UserError(
                f"The tokenizer in {folder} must have all tokens of {VOCABULARY_FILE} (ids "
                f"up to {max(kept_ids)}), got {len(tokenizer)} tokens. Copy or export the "
                "folder again."
            )
        return cls(tokenizer, instruction, kept_ids)

    def untrimmed(self) -> "TextCodec":
        """Return the codec with the full vocabulary of its tokenizer."""
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
        """Make the codec of an LLM for a training text.

        name: hub id or folder of the LLM.
        trim: keep only the tokens of `texts` and of the prompts, the special tokens, the
        language tokens and the tokens for bytes (FLa-LLM, section 4.1).
        hub_code: run the Python code in the tokenizer's repository.
        Raises UserError if the LLM cannot write a language, or cannot tell which of several
        languages to write.
        """
        check_llm_source(name)
        tokenizer = load_tokenizer(name, hub_code)
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {name} must have an end-of-sentence token, got none. Give "
                "another --llm.name."
            )
        whole = cls(tokenizer, instruction)
        languages: Sequence[str] = instruction.languages or [""]
        if instruction.language:
            languages = [instruction.language]
        corpora = ["", *instruction.sign_languages]
        # All prompts and decoder starts that a clip can have. They must differ by language.
        wordings = set(starmap(whole.wording, product(languages, corpora)))
        if len(set(map(whole.wording, languages))) < len(set(languages)):
            raise UserError(
                "llm.prompt must contain {language}, because the tokenizer of "
                f"{name} has no tokens for the target languages ({', '.join(languages)}), "
                f"got {instruction.prompt!r}. Give a --llm.prompt with {{language}}."
            )
        if not trim:
            return whole

        # Full ids of all tokens that the run reads or writes and that have a row in the
        # embedding.
        kept = set(tokenizer.all_special_ids) | byte_tokens(whole._vocabulary)
        for wording in wordings:
            around = [*wording.before, *wording.after, *wording.start]
            kept.update(whole.kept_ids[around].tolist())
        for text in set(texts):
            kept.update(whole.kept_ids[whole.encode(text)].tolist())
        return cls(tokenizer, instruction, list(kept.intersection(whole.kept_ids.tolist())))
