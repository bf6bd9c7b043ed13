"""Encode sentences with a tokenizer and decode them: what its model could write."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flallm_ds.data.text.codec import VOCABULARY_FILE, TextCodec
from flallm_ds.data.text.prompt import Instruction
from flallm_ds.data.text.tokenizer import load_tokenizer
from flallm_ds.errors import UserError


def round_trip_of(name: str) -> Callable[[Sequence[str]], list[str]]:
    """Return a function that encodes and decodes sentences.

    name: a folder with a tokenizer, an export, a run folder, or a hub id. Raises UserError
    if there is no tokenizer.
    """
    codec = _codec_of(name)

    def round_trip(texts: Sequence[str]) -> list[str]:
        return [codec.decode(codec.encode(text)) for text in texts]

    return round_trip


def _codec_of(name: str) -> TextCodec:
    # The codec of an export, of a run folder, or the folder of a codec itself.
    for part in ("language_model", "best/language_model", ""):
        if (Path(name) / part / VOCABULARY_FILE).is_file():
            return TextCodec.load(Path(name) / part)
    tokenizer = load_tokenizer(name)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {name} must have an end-of-sentence token, got none. Give "
            "another --tokenizer."
        )
    return TextCodec(tokenizer, Instruction())
