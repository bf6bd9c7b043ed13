"""Sentences to token ids and back, in a vocabulary trimmed to the training text."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from flallm_ds.command import nearest
from flallm_ds.errors import UserError

VOCABULARY_FILE = "vocabulary.json"


class TextCodec:
    """A Hugging Face tokenizer, the pieces of it that are kept, and the language that is spoken.

    Ids outside this class are trimmed ids: 0 to `vocab_size` - 1. A piece that was not kept becomes unknown.
    """

    def __init__(self, tokenizer: Any, language: str, kept_ids: Sequence[int] | None = None) -> None:
        self.tokenizer = tokenizer
        self.language = language
        full = len(tokenizer)
        self.kept_ids = np.asarray(sorted(set(kept_ids)) if kept_ids is not None else range(full))
        self._trimmed = np.full(full, -1, dtype=np.int64)
        self._trimmed[self.kept_ids] = np.arange(len(self.kept_ids))
        self.pad_id = self.trimmed_id(tokenizer.pad_token_id)
        self.eos_id = self.trimmed_id(tokenizer.eos_token_id)
        self._trimmed[self._trimmed == -1] = self.trimmed_id(tokenizer.unk_token_id)
        self.start_id = self.trimmed_id(language_id(tokenizer, language))

    @property
    def vocab_size(self) -> int:
        return len(self.kept_ids)

    def trimmed_id(self, full_id: int) -> int:
        return int(self._trimmed[full_id])

    def encode(self, text: str) -> list[int]:
        """The sentence's pieces and the end of sentence, without a start token."""
        full = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*self._trimmed[full].tolist(), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence, specials and everything after its end left out."""
        ids = list(ids)
        if self.eos_id in ids[1:]:  # a generated sequence may start with it
            ids = ids[: ids.index(self.eos_id, 1)]
        return str(self.tokenizer.decode(self.kept_ids[ids], skip_special_tokens=True)).strip()

    def save(self, folder: Path) -> None:
        """Tokenizer files and the map of kept pieces, in the Hugging Face layout."""
        self.tokenizer.save_pretrained(folder)
        content = {"language": self.language, "kept_ids": self.kept_ids.tolist()}
        (folder / VOCABULARY_FILE).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TextCodec":
        """What `save` wrote. Raises UserError where the folder is not whole."""
        try:
            content = json.loads((folder / VOCABULARY_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder / VOCABULARY_FILE} must be a codec's file, but is not ({error})."
            ) from error
        tokenizer = load_tokenizer(str(folder))
        if max(content["kept_ids"]) >= len(tokenizer):
            raise UserError(
                f"the tokenizer in {folder} must hold the pieces of {VOCABULARY_FILE}, but holds fewer."
            )
        return cls(tokenizer, content["language"], content["kept_ids"])

    @classmethod
    def for_training_text(cls, name: str, language: str, texts: Iterable[str], trim: bool) -> "TextCodec":
        """The codec of the LLM `name` (hub id or folder) for sentences in `language`.

        trim: keep only the pieces of `texts`, the specials and the language ids (FLa-LLM, section 4.1).
        """
        tokenizer = load_tokenizer(name)
        if not trim:
            return cls(tokenizer, language)
        kept = set(tokenizer.all_special_ids) | {language_id(tokenizer, language)}
        for text in set(texts):
            kept.update(tokenizer(text, add_special_tokens=False)["input_ids"])
        return cls(tokenizer, language, sorted(kept))


def load_tokenizer(name: str) -> Any:
    """AutoTokenizer from a hub id or a folder; UserError where there is none."""
    if ("/" not in name or name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise UserError(
            f"llm.name must be a hub id or a folder with an LLM, but there is nothing at {name}. "
            "flallm standin_llm makes a small one for machines without a hub."
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the tokenizer of {name} must load, but did not: {reason} "
            "Name a folder that holds one, or connect to the hub."
        ) from error


def language_id(tokenizer: Any, language: str) -> int:
    """The id of a language token such as de_DE. Raises UserError that lists near ones."""
    vocabulary = tokenizer.get_vocab()
    if language not in vocabulary:
        known = [t for t in tokenizer.all_special_tokens if "_" in t] or list(tokenizer.all_special_tokens)
        raise UserError(
            f"llm.language {language!r} is not an id of the tokenizer: {nearest(language, known)}"
        )
    return int(vocabulary[language])
