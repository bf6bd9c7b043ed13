"""Restore the normaliser of a SentencePiece vocabulary if transformers dropped it.

Most vocabularies were trained with the rules `nmt_nfkc`: they have `,` and `fi`, but not
`，` and `ﬁ`. Text must be normalised in the same way before it is split into tokens, or
such characters become unknown. The rules are a character map in the SentencePiece model;
`tokenizer.json` has a copy.
"""

import base64
import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceNormalizer, sentencepiece_model_pb2
from tokenizers import Tokenizer, normalizers
from transformers.utils import cached_file

Settings = dict[str, Any]

# protobuf creates the class at import, so type checkers do not find it.
ModelProto: Any = vars(sentencepiece_model_pb2)["ModelProto"]

# Names of SentencePiece models in repositories on the hub.
_MODEL_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_OF_SPACES = {"Replace", "Strip", "Prepend"}  # normalisers that change spaces only


def restore_normalizer(tokenizer: Any, name: str) -> None:
    """Restore the character map that some tokenizer classes drop.

    MBartTokenizer and XGLMTokenizer do.
    name: the hub id or folder of the tokenizer. The map is read from its files. Without
    one, a SentencePiece vocabulary without tokens for bytes gets the map of `nmt_nfkc`, if
    that map changes none of the tokens.

    `save_pretrained` then writes the map into tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer without a backend (M2M100) calls SentencePiece, which normalises.
    if not isinstance(backend, Tokenizer) or _map_in(_settings(backend)) is not None:
        return
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not any(token.startswith("▁") for token in vocabulary):
        return  # not a SentencePiece vocabulary
    charsmap = _map_of_files(tokenizer, name)
    if charsmap is None and _was_made_normalised(backend, vocabulary):
        charsmap = nmt_nfkc()
    # The map comes first: the other parts change the spaces of its result.
    if charsmap:
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(charsmap), *rest]
        )


def normalizer_of(tokenizer: Any) -> SentencePieceNormalizer | None:
    """Return SentencePiece's normaliser with the tokenizer's map, None if it has no map.

    The library `tokenizers` applies the map to single characters. It misses sequences, such
    as `ﾊﾞ` or Korean in single letters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    charsmap = _map_in(_settings(backend)) if isinstance(backend, Tokenizer) else None
    return normalizer_by(charsmap) if charsmap else None


def normalizer_by(charsmap: bytes) -> SentencePieceNormalizer:
    """Return SentencePiece's normaliser with a character map. It keeps all spaces."""
    # All space options are off, so that the map is the only change.
    model = ModelProto()
    model.normalizer_spec.precompiled_charsmap = charsmap
    return SentencePieceNormalizer(
        model_proto=model.SerializeToString(),
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )


def nmt_nfkc() -> bytes:
    """Return SentencePiece's default character map: NFKC, and one kind of space."""
    return _map_of_model(
        SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    )


def _map_of_model(serialized: bytes) -> bytes:
    """Return the character map of a SentencePiece model; empty if it has none."""
    model = ModelProto.FromString(serialized)
    return bytes(model.normalizer_spec.precompiled_charsmap)


def _settings(backend: Tokenizer) -> Settings | None:
    """Return the settings of the backend's normaliser, as in tokenizer.json."""
    if backend.normalizer is None:
        return None
    settings: Settings = json.loads(backend.normalizer.__getstate__())
    return settings


def _parts(settings: Settings | None) -> list[Settings]:
    """Return the settings of each normaliser, also of those in a sequence."""
    if settings is None:
        return []
    if settings["type"] != "Sequence":
        return [settings]
    parts: list[Settings] = []
    for part in settings["normalizers"]:  # a part may be a sequence too
        parts += _parts(part)
    return parts


def _map_in(settings: Settings | None) -> bytes | None:
    """Return the character map in a normaliser's settings."""
    for part in _parts(settings):
        if part["type"] == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return None


def _map_of_files(tokenizer: Any, name: str) -> bytes | None:
    """Return the character map in a tokenizer's files.

    Empty if the vocabulary was made without a map, None if the files do not say.
    """
    # First the SentencePiece model, then tokenizer.json, which may be without the map.
    models = [type(tokenizer).vocab_files_names.get("vocab_file", "")]
    if Path(name).is_dir():
        models += _MODEL_FILES
    for file in models:
        path = _path_of(name, file) if file.endswith(".model") else None
        if path is not None:
            # Files of tiktoken have the same names.
            with contextlib.suppress(OSError, DecodeError):
                return _map_of_model(path.read_bytes())
    path = _path_of(name, "tokenizer.json")
    if path is None:
        return None
    return _map_in(json.loads(path.read_text(encoding="utf-8")).get("normalizer"))


def _path_of(name: str, file: str) -> Path | None:
    """Return the path of a file in the folder or in the hub's cache, None if missing."""
    found = cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _was_made_normalised(backend: Tokenizer, vocabulary: Iterable[str]) -> bool:
    """Return whether a vocabulary was probably made from NFKC text.

    For vocabularies whose files do not say. Those with tokens for bytes need no map.
    """
    # Other normalisers, such as NFC or lower case, say how the vocabulary was made.
    kinds = {part["type"] for part in _parts(_settings(backend))}
    if kinds - _OF_SPACES or "<0x00>" in vocabulary:
        return False
    # The training text had no other characters if NFKC changes no token.
    tokens = [token.replace("▁", " ") for token in vocabulary]
    return bool(normalizer_by(nmt_nfkc()).normalize(tokens) == tokens)
