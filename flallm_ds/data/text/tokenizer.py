"""Load a Hugging Face tokenizer and find its tokens for bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from flallm_ds.data.text.normalizer import restore_normalizer
from flallm_ds.errors import UserError
from flallm_ds.models.pretrained import check_llm_source

# the tokens of SentencePiece's byte fallback
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def byte_tokens(vocabulary: Mapping[str, int]) -> set[int]:
    """Return the ids of the 256 tokens that stand for bytes; empty if there are none.

    They are those of byte-level BPE or of SentencePiece's byte fallback.
    """
    for tokens in (ByteLevel.alphabet(), _BYTE_TOKENS):
        if vocabulary.keys() >= set(tokens):
            return {vocabulary[token] for token in tokens}
    return set()


def load_tokenizer(name: str, hub_code: bool = False) -> Any:
    """Load a tokenizer from a hub id or a folder, with its normaliser.

    hub_code: run the Python code in the tokenizer's repository.
    Raises UserError if there is no tokenizer.
    """
    # This raises an error with the cause if there is no such model on the hub.
    if not Path(name).is_dir():
        check_llm_source(name)
    reason = "it has no files"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=hub_code)
        # Without files, transformers makes a tokenizer that has special tokens only.
        ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        if len(ordinary) > 1:
            restore_normalizer(tokenizer, name)
            return tokenizer
    except TypeError:
        # For a missing file, the tokenizers of M2M100 and NLLB open a path that is None.
        reason = "a file of the tokenizer is missing or damaged"
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    raise UserError(
        f"Cannot load the tokenizer of {name}: {reason.rstrip('.')}. Give a folder with a "
        "tokenizer, or connect to the hub."
    )
