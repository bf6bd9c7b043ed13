"""Tiny BLEURT checkpoints with random weights, in the layout of the folders on the hub.

BLEURT20 is as lucadiliello/BLEURT-20: the model type bleurt with a narrower embedding, and
a SentencePiece model without a tokenizer.json. BLEURT_BASE is as lucadiliello/bleurt-base:
the same type as wide as its embedding, with the tokenizer of BERT. BERT is as
Elron/bleurt-base, REMBERT as a conversion with the classes of transformers.
"""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

BLEURT20, BLEURT_BASE, BERT, REMBERT = "bleurt20", "bleurt_base", "bert", "rembert"
KINDS = (BLEURT20, BLEURT_BASE, BERT, REMBERT)
WIDTH, FFN, LAYERS, HEADS, POSITIONS, EMBEDDING = 16, 24, 2, 4, 24, 8

# Maps a kind to model type, class, the first part of the names, and that of the projection.
_NAMES = {
    BLEURT20: ("bleurt", "BleurtFor", "bleurt", "embedding_projection"),
    BLEURT_BASE: ("bleurt", "BleurtFor", "bleurt", ""),
    BERT: ("bert", "BertFor", "bert", ""),
    REMBERT: ("rembert", "RemBertFor", "rembert", "embedding_hidden_mapping_in"),
}


def write_bleurt(kind: str, folder: Path, texts: list[str], pickled: bool = False) -> Path:
    """Write a checkpoint with a tokenizer of `texts`. pickled: weights as a .bin file."""
    folder.mkdir(parents=True)
    model_type, name, first, projection = _NAMES[kind]
    if projection:
        file = "spm.model" if kind == BLEURT20 else "sentencepiece.model"
        num_tokens = _write_sentencepiece(folder / file, texts)
    else:
        num_tokens = _write_wordpiece(folder, texts)
    config: dict[str, Any] = {
        "architectures": [f"{name}SequenceClassification"], "model_type": model_type,
        "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": WIDTH, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "initializer_range": 0.02, "intermediate_size": FFN, "layer_norm_eps": 1e-12,
        "max_position_embeddings": POSITIONS, "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS, "pad_token_id": 0, "position_embedding_type": "absolute",
        "torch_dtype": "float32", "transformers_version": "4.25.1", "type_vocab_size": 2,
        "use_cache": False, "vocab_size": num_tokens + 3,
    }  # fmt: skip
    if model_type == "bleurt":
        width = EMBEDDING if projection else None
        config |= {
            "embedding_size": width,
            "classifier_dropout": None,
            "tie_word_embeddings": False,
        }
    if kind == REMBERT:
        config |= {"input_embedding_size": EMBEDDING, "output_embedding_size": 2 * WIDTH}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = _random_state(first, projection, num_tokens + 3)
    if pickled:
        # Conversions of 2023 store the numbers of the positions.
        state[f"{first}.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def _write_sentencepiece(path: Path, texts: list[str]) -> int:
    """Write a SentencePiece model with NFKC, and return its number of tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
        vocab_size=80, hard_vocab_limit=False, character_coverage=1.0, num_threads=1,
        minloglevel=2, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="[PAD]",
        unk_piece="[UNK]", control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    # BLEURT-20 has a class that transformers does not know.
    settings = {
        "tokenizer_class": "BleurtSPTokenizer",
        "do_lower_case": False,
        "cls_token": "[CLS]",
    }
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps(settings), encoding="utf-8"
    )
    return len(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


def _write_wordpiece(folder: Path, texts: list[str]) -> int:
    """Write the files of an uncased BERT tokenizer, and return its number of tokens."""
    letters = sorted(set("".join(texts).lower()) - {" "})
    words = sorted({word for text in texts for word in text.lower().split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokens += [f"##{letter}" for letter in letters]
    tokens += [word for word in words if word not in tokens]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    settings = {
        "tokenizer_class": "BleurtTokenizer",
        "do_lower_case": True,
        "cls_token": "[CLS]",
    }
    settings |= {"sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    if "bleurt" not in folder.name:
        settings["tokenizer_class"] = "BertTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(tokens)


def _random_state(first: str, projection: str, num_rows: int) -> dict[str, torch.Tensor]:
    width = EMBEDDING if projection else WIDTH
    shapes = {
        "embeddings.word_embeddings.weight": (num_rows, width),
        "embeddings.position_embeddings.weight": (POSITIONS, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,), "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (WIDTH, WIDTH), "pooler.dense.bias": (WIDTH,),
    }  # fmt: skip
    if projection:
        shapes |= {f"encoder.{projection}.weight": (WIDTH, width)}
        shapes |= {f"encoder.{projection}.bias": (WIDTH,)}
    for layer in range(LAYERS):
        for part, inner, outer in (
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", WIDTH, FFN),
            ("output.dense", FFN, WIDTH),
        ):
            shapes[f"encoder.layer.{layer}.{part}.weight"] = (outer, inner)
            shapes[f"encoder.layer.{layer}.{part}.bias"] = (outer,)
        for part in ("attention.output", "output"):
            shapes[f"encoder.layer.{layer}.{part}.LayerNorm.weight"] = (WIDTH,)
            shapes[f"encoder.layer.{layer}.{part}.LayerNorm.bias"] = (WIDTH,)
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        drawn = 0.5 * torch.randn(shape, generator=draw)
        # Weights of norms are near 1, so that the sentences have different scores.
        state[f"{first}.{name}"] = drawn + name.endswith("LayerNorm.weight")
    state["classifier.weight"] = torch.randn(1, WIDTH, generator=draw)
    state["classifier.bias"] = torch.randn(1, generator=draw)
    return state


def plain_scores(folder: Path, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Score pairs of (ids of the reference, ids of the hypothesis), without padding.

    Written from the papers of BERT and BLEURT, with the names of the stored tensors.
    """
    stored = load_file(folder / "model.safetensors")
    # Without the first part, and with one name for the projection.
    state = {}
    for name, tensor in stored.items():
        short = name if name.startswith("classifier") else name.split(".", 1)[1]
        short = short.replace("embedding_hidden_mapping_in", "embedding_projection")
        state[short] = tensor.double()
    return [_plain_score(state, *pair) for pair in pairs]


def _plain_score(
    state: dict[str, torch.Tensor], reference: list[int], hypothesis: list[int]
) -> float:
    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]

    # The ids 2 and 3 are [CLS] and [SEP] in all tokenizers of this file.
    ids = [2, *reference, 3, *hypothesis, 3]
    segments = [0] * (len(reference) + 2) + [1] * (len(hypothesis) + 1)
    x = state["embeddings.word_embeddings.weight"][ids]
    x = x + state["embeddings.position_embeddings.weight"][: len(ids)]
    x = x + state["embeddings.token_type_embeddings.weight"][segments]
    x = norm("embeddings.LayerNorm", x)
    if "encoder.embedding_projection.weight" in state:
        x = linear("encoder.embedding_projection", x)
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            query, key, value = (
                linear(f"{at}.attention.self.{name}", x)[:, part]
                for name in ("query", "key", "value")
            )
            weights = (query @ key.T / (WIDTH / HEADS) ** 0.5).softmax(-1)
            heads.append(weights @ value)
        attended = linear(f"{at}.attention.output.dense", torch.cat(heads, -1))
        x = norm(f"{at}.attention.output.LayerNorm", x + attended)
        inner = linear(f"{at}.intermediate.dense", x)
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", inner))
    pooled = linear("pooler.dense", x[0]).tanh()
    return float(linear("classifier", pooled))
