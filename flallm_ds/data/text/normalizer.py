"""The normaliser of a SentencePiece vocabulary, which transformers may leave out.

A vocabulary that was made under `nmt_nfkc`, as most were, holds `,` and `fi`, but not `，`
and `ﬁ`: text must be written in its characters before it is split, or they become
unknown. The rules are a character map in the SentencePiece model, of which
`tokenizer.json` holds a copy.
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

# protobuf makes the class at import
ModelProto: Any = vars(sentencepiece_model_pb2)["ModelProto"]

_MODEL_FILES = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_OF_SPACES = {"Replace", "Strip", "Prepend"}  # normalisers that change spaces alone


def restore_normalizer(tokenizer: Any, name: str) -> None:
    """Put back the character map that a tokenizer's class dropped, as MBartTokenizer and
    XGLMTokenizer do.

    name: the hub id or folder that the tokenizer was read from; its files have the map.
    Where they do not, a SentencePiece vocabulary without bytes gets that of `nmt_nfkc`,
    unless it holds what that would change. `save_pretrained` writes the map into
    tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer without a backend, as of M2M100, calls SentencePiece, which normalises.
    if not isinstance(backend, Tokenizer) or _map_in(_settings(backend)) is not None:
        return
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not any(token.startswith("▁") for token in vocabulary):
        return  # not by SentencePiece
    charsmap = _map_of_files(tokenizer, name)
    if charsmap is None and _was_made_normalised(backend, vocabulary):
        charsmap = nmt_nfkc()
    if charsmap:
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence(
            [normalizers.Precompiled(charsmap), *rest]
        )


def normalizer_of(tokenizer: Any) -> SentencePieceNormalizer | None:
    """SentencePiece's own normaliser by the tokenizer's character map; None where it has no map.

    `tokenizers` reads the same map one character at a time. It misses what joins several:
    the second half of `ﾊﾞ`, or Korean written in single letters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    charsmap = _map_in(_settings(backend)) if isinstance(backend, Tokenizer) else None
    return normalizer_by(charsmap) if charsmap else None


def normalizer_by(charsmap: bytes) -> SentencePieceNormalizer:
    """SentencePiece's normaliser by a character map. It leaves spaces at the ends and in
    a row."""
    model = ModelProto()
    model.normalizer_spec.precompiled_charsmap = charsmap
    return SentencePieceNormalizer(
        model_proto=model.SerializeToString(),
        add_dummy_prefix=False,
        escape_whitespaces=False,
        remove_extra_whitespaces=False,
    )


def nmt_nfkc() -> bytes:
    """The character map of SentencePiece's default: NFKC, and one space for all kinds of
    space."""
    return _map_of_model(
        SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    )


def _map_of_model(serialized: bytes) -> bytes:
    """The character map in a SentencePiece model; empty where it does not normalise."""
    model = ModelProto.FromString(serialized)
    return bytes(model.normalizer_spec.precompiled_charsmap)


def _settings(backend: Tokenizer) -> Settings | None:
    """Of the backend's normaliser, as tokenizer.json has them."""
    if backend.normalizer is None:
        return None
    settings: Settings = json.loads(backend.normalizer.__getstate__())
    return settings


def _parts(settings: Settings | None) -> list[Settings]:
    """The normalisers of a sequence, or the only one."""
    if settings is None:
        return []
    if settings["type"] != "Sequence":
        return [settings]
    parts: list[Settings] = []
    for part in settings["normalizers"]:  # sequences may hold sequences
        parts += _parts(part)
    return parts


def _map_in(settings: Settings | None) -> bytes | None:
    for part in _parts(settings):
        if part["type"] == "Precompiled":
            return base64.b64decode(part["precompiled_charsmap"])
    return None


def _map_of_files(tokenizer: Any, name: str) -> bytes | None:
    """The character map in a tokenizer's files; empty where they say that there is none,
    else None."""
    models = [type(tokenizer).vocab_files_names.get("vocab_file", "")]
    if Path(name).is_dir():
        models += _MODEL_FILES
    for file in models:
        path = _path_of(name, file) if file.endswith(".model") else None
        if path is not None:
            # tiktoken's files have such names too
            with contextlib.suppress(OSError, DecodeError):
                return _map_of_model(path.read_bytes())
    path = _path_of(name, "tokenizer.json")
    if path is None:
        return None
    return _map_in(json.loads(path.read_text(encoding="utf-8")).get("normalizer"))


def _path_of(name: str, file: str) -> Path | None:
    """A file of a folder, or of the hub's cache, where the tokenizer has been read from."""
    found = cached_file(
        name,
        file,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _was_made_normalised(backend: Tokenizer, vocabulary: Iterable[str]) -> bool:
    """Whether a vocabulary whose files say nothing cannot spell in bytes, and holds NFKC
    text alone."""
    kinds = {part["type"] for part in _parts(_settings(backend))}
    if kinds - _OF_SPACES or "<0x00>" in vocabulary:
        return False
    # No token changes under NFKC: text in other characters was never seen.
    tokens = [token.replace("▁", " ") for token in vocabulary]
    return bool(normalizer_by(nmt_nfkc()).normalize(tokens) == tokens)
