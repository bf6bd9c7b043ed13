"""Compute BLEURT with the checkpoint in a folder.

BLEURT (Sellam et al., 2020) is trained on the judgements of people. A BERT reads the
reference and the hypothesis as one sequence. A linear layer on its pooled first token gives
the score of the sentence. The score of a corpus is the mean.

B pairs of a batch, L tokens of the longest pair.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    RemBertConfig,
    RemBertForSequenceClassification,
)

from flallm_ds.errors import UserError
from flallm_ds.files import file_sha256
from flallm_ds.metrics.counts import Counts
from flallm_ds.models.llm.stored import checkpoint_files
from flallm_ds.models.pretrained import (
    UNREADABLE,
    check_no_lfs_pointer,
    check_weights,
    first_line,
    unreadable,
)

PAIRS_A_BATCH = 32
# Files of BLEURT-20 and of RemBERT. transformers replaces the normaliser of the file, so
# SentencePiece reads it.
_SENTENCEPIECE = ("spm.model", "sentencepiece.model")
# Files of a tokenizer that transformers reads as it is.
_TOKENIZERS = ("tokenizer.json", "vocab.txt")
# Names of the tensors of the model type bleurt, and the names of transformers.
_AS_BERT = {r"^bleurt\.": "bert."}
_AS_REMBERT = {
    r"^bleurt\.encoder\.embedding_projection\.": "rembert.encoder.embedding_hidden_mapping_in.",
    r"^bleurt\.": "rembert.",
}
# Fields of config.json that say which class reads it.
_CLASS_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")


@dataclass(frozen=True)
class _Tokenizer:
    """encode: returns the token ids of a text. cls, sep: ids. num_tokens: of all ids."""

    encode: Callable[[str], list[int]]
    cls: int
    sep: int
    num_tokens: int


@dataclass(frozen=True)
class Bleurt:
    """A BLEURT model. signature: of its scores, with the checkpoint."""

    model: Any
    tokenizer: _Tokenizer
    signature: str

    def counts(self, hypotheses: Sequence[str], references: Sequence[str]) -> Counts:
        """Return the score of each sentence and a count of 1, (N, 2)."""
        scores_N = self.scores(hypotheses, references)
        counts_NC = np.stack([scores_N, np.ones(len(scores_N))], axis=1)
        return Counts(("bleurt",), counts_NC, _mean, {"bleurt_signature": self.signature})

    def scores(self, hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Return the score of each sentence, float (N,), in any range; about 0 to 1."""
        pairs = []
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            pairs.append(self._pair(hypothesis, reference))
        # Pairs of similar length share a batch.
        order = sorted(range(len(pairs)), key=lambda row: len(pairs[row][0]))
        scores_N = np.empty(len(pairs))
        for begin in range(0, len(order), PAIRS_A_BATCH):
            rows = order[begin : begin + PAIRS_A_BATCH]
            scores_N[rows] = self._score([pairs[row] for row in rows])
        return scores_N

    def _pair(self, hypothesis: str, reference: str) -> tuple[list[int], int]:
        """Return the ids of [CLS] reference [SEP] hypothesis [SEP], and those up to there.

        A pair that is too long loses the last tokens of the longer text, as in training.
        """
        said = self.tokenizer.encode(hypothesis)
        meant = self.tokenizer.encode(reference)
        while len(said) + len(meant) + 3 > self.model.config.max_position_embeddings:
            (meant if len(meant) > len(said) else said).pop()
        cls, sep = self.tokenizer.cls, self.tokenizer.sep
        return [cls, *meant, sep, *said, sep], len(meant) + 2

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], int]]) -> np.ndarray:
        """Return the scores of one batch, (B,)."""
        length = max(len(ids) for ids, _ in pairs)
        ids_BL = torch.zeros(len(pairs), length, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        segments_BL = torch.zeros_like(ids_BL)  # 0 for the reference, 1 for the hypothesis
        for row, (ids, num_reference) in enumerate(pairs):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            mask_BL[row, : len(ids)] = 1
            segments_BL[row, num_reference : len(ids)] = 1
        device = self.model.device
        output = self.model(
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.to(device),
            token_type_ids=segments_BL.to(device),
        )
        scores: np.ndarray = output.logits.flatten().double().cpu().numpy()
        return scores


def _mean(sums_C: np.ndarray) -> list[float]:
    """Return the mean of the scores, in percent."""
    total, num_sentences = sums_C.tolist()
    return [100 * total / num_sentences]


def load_bleurt(folder: Path) -> Bleurt:
    """Load a checkpoint, on the GPU if there is one.

    folder: config.json, weights and tokenizer of a BertForSequenceClassification, a
    RemBertForSequenceClassification or a BleurtForSequenceClassification (model type
    bleurt) with one label. Raises UserError if it holds anything else.
    """
    fields = _read_config(folder)
    model = _load_model(folder, fields)
    try:
        tokenizer = _load_tokenizer(folder, fields)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"Cannot load the tokenizer of {folder}: {first_line(error).rstrip('.')}. Fetch "
            "the model again."
        ) from error
    if tokenizer.num_tokens > model.config.vocab_size:
        raise _refused(
            folder,
            f"a tokenizer of {tokenizer.num_tokens} tokens for "
            f"{model.config.vocab_size} rows of the embedding",
        )
    # Of each file, as the program sha256sum prints it.
    digests = "+".join(map(file_sha256, checkpoint_files(str(folder))))
    signature = f"checkpoint:{folder.resolve().name}|sha256:{digests}|mean:sentences"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Bleurt(model.eval().to(device), tokenizer, signature)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json. Raises UserError if the folder has none."""
    path = folder / "config.json"
    if not path.is_file():
        got = "no config.json"
        if (folder / "saved_model.pb").is_file():
            got = "a checkpoint of TensorFlow"
        raise _refused(folder, got)
    check_no_lfs_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {path}: {first_line(error).rstrip('.')}. Fetch it again."
        ) from error
    if not isinstance(fields, dict):
        raise _refused(folder, f"a config.json with {type(fields).__name__}")
    return fields


def _refused(folder: Path, got: str) -> UserError:
    """Return the error for a folder that holds no BLEURT checkpoint for PyTorch."""
    return UserError(
        "--bleurt must be a folder with config.json, weights and tokenizer of a "
        "BertForSequenceClassification, RemBertForSequenceClassification or "
        f"BleurtForSequenceClassification with one label, got {folder} with {got}. Fetch a "
        "conversion of BLEURT to PyTorch, such as lucadiliello/BLEURT-20."
    )


def _load_model(folder: Path, fields: dict[str, Any]) -> Any:
    """Return the model with its weights. Raises UserError if they are of another one.

    The model type bleurt is BERT, or RemBERT if its embedding has another width; only the
    names of its tensors differ.
    """
    kind = fields.get("model_type")
    options = {name: fields[name] for name in fields.keys() - set(_CLASS_FIELDS)}
    width = options.get("embedding_size")
    names: dict[str, str] = {}
    wanted: Any = BertForSequenceClassification
    config_class: Any = BertConfig
    if kind == "bleurt":
        names = _AS_BERT if width is None else _AS_REMBERT
    if kind == "rembert" or names is _AS_REMBERT:
        wanted, config_class = RemBertForSequenceClassification, RemBertConfig
    if names is _AS_REMBERT:
        options["input_embedding_size"] = width
    elif kind not in ("bert", "rembert", "bleurt"):
        raise _refused(folder, f"a config.json of the type {kind}")

    check_weights(str(folder), section="")
    try:
        config = config_class(**options)
        if config.num_labels != 1:
            raise _refused(folder, f"{config.num_labels} labels")
        model, info = wanted.from_pretrained(
            folder,
            config=config,
            key_mapping=names,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name of the first one
        )
    except (*UNREADABLE, StrictDataclassError, TypeError) as error:
        raise unreadable(str(folder), error) from error
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    wrong = _needed([*info["missing_keys"], *mismatched, *info["unexpected_keys"]])
    if wrong:
        raise _refused(folder, f"weights that do not fit the config ({wrong[0]})")
    return model


def _needed(names: Iterable[str]) -> list[str]:
    """Return the names without that of the numbers of the positions, which are computed."""
    return sorted(name for name in names if not name.endswith("position_ids"))


def _load_tokenizer(folder: Path, fields: dict[str, Any]) -> _Tokenizer:
    """Return the tokenizer of a folder. Raises UserError if it has none."""
    for name in _SENTENCEPIECE:
        if (folder / name).is_file():
            check_no_lfs_pointer(folder / name)
            processor = SentencePieceProcessor(model_file=str(folder / name))
            cls, sep = processor.piece_to_id(["[CLS]", "[SEP]"])
            if processor.unk_id() in (cls, sep):
                raise _refused(folder, f"{name} without the tokens [CLS] and [SEP]")
            return _Tokenizer(processor.encode, cls, sep, len(processor))
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        files = ", ".join((*_SENTENCEPIECE, *_TOKENIZERS))
        raise _refused(folder, f"no tokenizer ({files})")
    # transformers does not know the model type bleurt.
    loader: Any = BertTokenizer if fields["model_type"] == "bleurt" else AutoTokenizer
    tokenizer = loader.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if cls is None or sep is None:
        raise _refused(folder, "a tokenizer without [CLS] and [SEP]")
    return _Tokenizer(encode, cls, sep, len(tokenizer))
