"""Sentences to token ids and back, in a vocabulary trimmed to the training text; the ids
around a video."""

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from flallm_ds.data.text.languages import (
    Place,
    find_language,
    language_tokens,
    token_of,
)
from flallm_ds.data.text.normalizer import normalizer_of, restore_normalizer
from flallm_ds.data.text.prompt import Instruction, Wording, new_language, unknown_language
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
        listed = [f"{character!r} ({times:,})" for character, times in self.characters[:10]]
        more = len(self.characters) - len(listed)
        text = f"{share:.2g} % of {self.num_tokens:,} tokens"
        why = f", because of {', '.join(listed)}" if listed else ""
        return f"{text}{why} and {more} more" if more else f"{text}{why}"


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
    ) -> None:
        self.tokenizer = tokenizer
        self.instruction = instruction
        self._normalizer = normalizer_of(tokenizer)
        full = len(tokenizer)
        whole = range(min(full, instruction.rows or full))
        self.kept_ids = np.asarray(sorted(set(whole if kept_ids is None else kept_ids)))
        self._trimmed = np.full(full, -1, dtype=np.int64)
        self._trimmed[self.kept_ids] = np.arange(len(self.kept_ids))
        self.eos_id = self.trimmed_id(tokenizer.eos_token_id)
        if self.eos_id < 0:
            raise self._without_row("end-of-sentence token", tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id
        pad_id = -1 if pad is None else self.trimmed_id(pad)
        self.pad_id = self.eos_id if pad_id < 0 else pad_id  # masked wherever it stands
        unknown = tokenizer.unk_token_id
        self._unknown_id = (
            None if unknown in (None, tokenizer.eos_token_id) else self.trimmed_id(unknown)
        )
        if self._unknown_id == -1:
            if not _byte_pieces(self._vocabulary):
                raise self._without_row("unknown token", unknown)
            self._unknown_id = None
        self._wordings: dict[tuple[str, str], Wording] = {}

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
        ids = self._split(text)
        # written in the text, or what transformers takes for MADLAD's unknown token
        if self.eos_id in ids:
            unknown = [] if self._unknown_id is None else [self._unknown_id]
            ids = [i for one in ids for i in (unknown if one == self.eos_id else [one])]
        return [*ids, self.eos_id]

    def _ids(self, text: str, specials: bool = False) -> list[int]:
        return self._split(self._normal(text), specials)

    def _split(self, text: str, specials: bool = False) -> list[int]:
        full = (
            self.tokenizer(text, add_special_tokens=specials)["input_ids"]
            if text or specials
            else []
        )
        # one that was added without a row, such as a start of text, was never read by the
        # LLM
        if specials:
            ours = set(self.tokenizer.all_special_ids)
            full = [i for i in full if i not in ours or self.trimmed_id(i) >= 0]
        ids = self._trimmed[np.asarray(full, np.int64)]
        if len(ids) == 0 or ids.min() >= 0:
            return [int(i) for i in ids]
        return [
            i
            for one, trimmed in zip(full, ids, strict=True)
            for i in self._known(one, int(trimmed))
        ]

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
            unknown = ids.count(self._unknown_id) if self._unknown_id is not None else 0
            num_unknown += times * unknown
            for word in text.split() if unknown else ():
                words[word] += times
        characters: Counter[str] = Counter()
        # which knows a character that is kept in words alone
        whole = self.untrimmed() if words else self
        for word, times in words.items():
            if whole._has_unknown(word):
                alone = [
                    c for c in unicodedata.normalize("NFC", word) if whole._has_unknown(c)
                ]
                for character in alone or [word]:
                    characters[character] += times
        return UnknownTokens(num_tokens, num_unknown, tuple(characters.most_common()))

    def _has_unknown(self, text: str) -> bool:
        return self._unknown_id is not None and self._unknown_id in self.encode(text)

    def _known(self, full_id: int, trimmed: int) -> list[int]:
        if trimmed >= 0:
            return [trimmed]
        if self._unknown_id is not None:
            return [self._unknown_id]
        # of byte-level pieces: one a byte
        letters = self.tokenizer.convert_ids_to_tokens(int(full_id))
        spelled = [self._vocabulary.get(letter, -1) for letter in letters]
        return [self.trimmed_id(i) for i in spelled if i >= 0 and self.trimmed_id(i) >= 0]

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
            self._wordings[language, corpus] = self._wording(language, corpus)
        return self._wordings[language, corpus]

    def light_wording(self, language: str = "", corpus: str = "") -> Wording:
        """The same for Light-T, of which every word is new: any id can stand for a language."""
        languages = self.instruction.languages
        start = self.wording(language, corpus).start
        told_apart = len({self.wording(each).start for each in languages}) == len(languages)
        if self.instruction.language or len(languages) < 2 or told_apart:
            return Wording(start=start or (self.eos_id,))
        if language not in languages:
            raise new_language(language, languages)
        return Wording(start=(self.eos_id, languages.index(language)))

    def _wording(self, language: str, corpus: str) -> Wording:
        before, after = self.instruction.parts(language, corpus)
        decoder_only = self.instruction.decoder_only
        token = None if decoder_only else token_of(language, self._language_tokens)
        if token is None and self.instruction.language and find_language(language) is None:
            raise unknown_language(language, "is known")
        if decoder_only:
            ids = self._ids(before, specials=True)
            if len(ids) > 1 and ids[-1] == self.eos_id:
                ids = ids[:-1]
            return Wording(tuple(ids), tuple(self._ids(after)))
        language_ids = (
            [] if token is None else [self.trimmed_id(self._vocabulary[token[0]])]
        )
        in_source = language_ids if token is not None and token[1] == "source" else []
        start = [] if in_source else language_ids
        if self._starts_with_its_own_token(bool(start)):
            start = [self.trimmed_id(self.instruction.start_token or 0), *start]
        if token is not None and language_ids[0] < 0:
            full_id = self._vocabulary[token[0]]
            if self.instruction.rows is not None and full_id >= self.instruction.rows:
                raise self._without_row(f"token of the language {language}", full_id)
            # its token was not kept
            raise new_language(language, self.instruction.languages)
        if min(start, default=0) < 0:
            raise self._without_row(
                "decoder_start_token_id", self.instruction.start_token or 0
            )
        return Wording(
            (*in_source, *self._ids(before)), tuple(self._ids(after)), tuple(start)
        )

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
        languages = (
            [instruction.language]
            if instruction.language
            else list(instruction.languages) or [""]
        )
        corpora = ["", *instruction.sign_languages]
        wordings = {
            whole.wording(language, corpus) for language in languages for corpus in corpora
        }
        if len({whole.wording(language) for language in languages}) < len(set(languages)):
            raise UserError(
                f"the LLM {name} must be told which of {', '.join(languages)} to speak, "
                "but its tokenizer has no tokens for them. Give a --llm.prompt with "
                "{language}."
            )
        if not trim:
            return whole
        kept = set(tokenizer.all_special_ids) | _byte_pieces(whole._vocabulary)
        kept.update(
            int(whole.kept_ids[i])
            for w in wordings
            for i in (*w.before, *w.after, *w.start)
        )
        for text in set(texts):
            kept.update(whole.kept_ids[whole.encode(text)].tolist())
        return cls(tokenizer, instruction, [i for i in kept if whole.trimmed_id(i) >= 0])


def _byte_pieces(vocabulary: Mapping[str, int]) -> set[int]:
    """Ids of the 256 pieces that stand for bytes, of byte-level BPE or of SentencePiece's
    byte fallback."""
    for names in (ByteLevel.alphabet(), [f"<0x{byte:02X}>" for byte in range(256)]):
        if all(name in vocabulary for name in names):
            return {vocabulary[name] for name in names}
    return set()


def load_tokenizer(name: str, hub_code: bool = False) -> Any:
    """AutoTokenizer from a hub id or a folder, with its normaliser; UserError where there
    is none.

    hub_code: run code that comes with the tokenizer.
    """
    if not Path(name).is_dir():
        check_llm_source(name)
    reason = "there are no files of one."
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=hub_code)
        # Where there are no files, transformers makes one that knows its special tokens
        # alone.
        if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) > 1:
            restore_normalizer(tokenizer, name)
            return tokenizer
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(
        f"the tokenizer of {name} must load, but did not: {reason} "
        "Name a folder that holds one, or connect to the hub."
    )
