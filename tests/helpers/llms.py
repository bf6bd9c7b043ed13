"""Tiny LLMs with random weights, in the layout of each family's repository on the hub.

What a family does in its own way is as there: special tokens and their ids, whether it is
given the language by a token, rows of the embedding beyond the tokenizer (or too few of
them), tied heads, ids in config and generation config. The tokenizers are trained on the
spot. All are read back by the Auto classes.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    XGLMTokenizer,
)
from transformers.models.m2m_100.tokenization_m2m_100 import (
    FAIRSEQ_LANGUAGE_CODES as M2M100_CODES,
)
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

WIDTH, HEADS, LAYERS, FFN = 32, 4, 2, 64
NUM_TOKENS = 300

Ids = Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """How one family's folder is written.

    tokenizer: writes its files into a folder, from texts. config: fields of config.json
    that are its own, from the ids of its tokens. generation: of generation_config.json.
    spare_rows: of the embedding beyond the tokenizer's length.
    """

    example: str  # a hub id
    model_type: str
    tokenizer: Callable[[Path, Sequence[str]], None]
    config: Callable[[Ids], dict[str, Any]]
    generation: Callable[[Ids], dict[str, Any]] = lambda ids: {}
    decoder_only: bool = False
    spare_rows: int = 0
    # weights of its own in a model class whose config says that heads are tied
    own_head: bool = False


def make_tiny_llm(family: str, folder: Path, texts: Sequence[str]) -> Path:
    """Write the LLM into a folder; the same bytes each time. The tokens of `texts` are in
    its tokenizer."""
    entry = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    # AutoTokenizer asks it for the class
    _write(folder / "config.json", {"model_type": entry.model_type})
    entry.tokenizer(folder, list(texts))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.get_vocab()
    rows = len(tokenizer) + entry.spare_rows
    config = AutoConfig.for_model(entry.model_type, vocab_size=rows, **entry.config(ids))
    auto = AutoModelForCausalLM if entry.decoder_only else AutoModelForSeq2SeqLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
        if entry.own_head:
            model.lm_head.weight = torch.nn.Parameter(torch.randn(rows, WIDTH) * 0.1)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(folder)
    model.generation_config.update(**entry.generation(ids))
    # As published: save_pretrained would refuse what hubs hold, such as a temperature
    # without do_sample.
    model.generation_config.to_json_file(folder / "generation_config.json")
    if entry.own_head:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _write(folder / "config.json", saved | {"tie_word_embeddings": False})
    return folder


_OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

"""


def make_llm_with_own_code(folder: Path, texts: Sequence[str], methods: str) -> Path:
    """Write a tiny Llama whose class comes with it and has these methods; for
    --llm.hub_code=true."""
    make_tiny_llm("llama3", folder, texts)
    (folder / "modeling_own.py").write_text(_OWN_CODE + methods, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    _write(folder / "config.json", config | {"model_type": "own", "auto_map": own})
    return folder


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# --- tokenizers


def _trained_model(texts: Sequence[str], kind: str = "unigram", **options: Any) -> bytes:
    """A SentencePiece model; `NUM_TOKENS` tokens next to letters and bytes."""
    model = io.BytesIO()
    letters = len(set("".join(texts)))
    size = NUM_TOKENS + letters + (256 if options.get("byte_fallback") else 0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type=kind, vocab_size=size,
        character_coverage=1.0, num_threads=1, minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return model.getvalue()


def _sentencepiece(
    file: str, options: dict[str, Any], settings: dict[str, Any], fast: Any = AutoTokenizer
) -> Callable[[Path, Sequence[str]], None]:
    """Files of a tokenizer that was trained by SentencePiece.

    fast: writes the tokenizer.json next to the SentencePiece model; None where the hub's
    folder has none.
    """

    def write(folder: Path, texts: Sequence[str]) -> None:
        (folder / file).write_bytes(_trained_model(texts, **options))
        _write(folder / "tokenizer_config.json", settings)
        if fast is not None:
            fast.from_pretrained(folder).save_pretrained(folder)
            _publish_normalizer(folder, folder / file)

    return write


def _publish_normalizer(folder: Path, model: Path) -> None:
    """Put the character map into tokenizer.json as on the hub, whatever class wrote it
    without."""
    spec = ModelProto.FromString(model.read_bytes()).normalizer_spec
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if spec.precompiled_charsmap and "Precompiled" not in str(content["normalizer"]):
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        parts = [{"type": "Precompiled", "precompiled_charsmap": charsmap}]
        parts += [content["normalizer"]] if content["normalizer"] else []
        content["normalizer"] = {"type": "Sequence", "normalizers": parts}
        _write(folder / "tokenizer.json", content)


def _m2m100(folder: Path, texts: Sequence[str]) -> None:
    model = _trained_model(texts)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = [processor.id_to_piece(i) for i in range(3, len(processor))]
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    _write(
        folder / "vocab.json", {token: i for i, token in enumerate((*specials, *tokens))}
    )
    languages = [f"__{code}__" for code in M2M100_CODES["m2m100"]]
    settings = {
        "tokenizer_class": "M2M100Tokenizer",
        "additional_special_tokens": languages,
    }
    _write(folder / "tokenizer_config.json", settings)


def _xglm(folder: Path, texts: Sequence[str]) -> None:
    model = folder / "sentencepiece.bpe.model"
    model.write_bytes(_trained_model(texts))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = [
        (processor.id_to_piece(i), processor.get_score(i)) for i in range(3, len(processor))
    ]
    specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    XGLMTokenizer(vocab=[*specials, *tokens]).save_pretrained(folder)
    _publish_normalizer(folder, model)


def _byte_level(
    first: Sequence[str],
    last: Sequence[str],
    split: str | None,
    bos: str | None,
    **settings: Any,
) -> Callable[[Path, Sequence[str]], None]:
    """Files of a byte-level BPE tokenizer.

    first, last: special tokens ahead of and behind the tokens. split: its regular
    expression for words; none: GPT-2's. bos: put ahead of each text. settings: of
    tokenizer_config.json.
    """

    def write(folder: Path, texts: Sequence[str]) -> None:
        tokenizer = Tokenizer(models.BPE())
        words = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
        if split is not None:
            words.insert(0, pre_tokenizers.Split(Regex(split), behavior="isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=NUM_TOKENS + 256, special_tokens=list(first), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(list(last))
        post = [processors.ByteLevel(trim_offsets=False)]
        if bos:
            ids = [(bos, tokenizer.token_to_id(bos))]
            post.append(
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ids
                )
            )
        tokenizer.post_processor = processors.Sequence(post)
        tokenizer.save(str(folder / "tokenizer.json"))
        _write(folder / "tokenizer_config.json", settings)

    return write


def _gemma(*extra: str) -> Callable[[Path, Sequence[str]], None]:
    """extra: special tokens behind the tokens."""
    settings = {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>",
        "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
    }  # fmt: skip
    options = {
        "kind": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False,
        "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "eos_piece": "<eos>", "bos_piece": "<bos>",
        "user_defined_symbols": ["<mask>"], "normalization_rule_name": "identity",
    }  # fmt: skip
    plain = _sentencepiece("tokenizer.model", options, settings)

    def write(folder: Path, texts: Sequence[str]) -> None:
        plain(folder, texts)
        if extra:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.add_special_tokens(
                {"extra_special_tokens": [AddedToken(e, special=True) for e in extra]}
            )
            tokenizer.save_pretrained(folder)

    return write


_LLAMA = _sentencepiece(
    "tokenizer.model",
    {"kind": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None,
    },
    fast=LlamaTokenizer,
)  # fmt: skip
_T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
_T5 = _sentencepiece(
    "spiece.model", _T5_IDS, {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
)
_MADLAD_CODES = (
    "de", "en", "es", "fr", "fr_CA", "it", "ru", "zh", "zh_Hant", "ja", "no", "he", "bg", "is",
)  # fmt: skip
_QWEN_SETTINGS: dict[str, Any] = {
    "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "unk_token": None,
    "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}  # fmt: skip
_QWEN_LAST = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NLLB_SETTINGS = {
    "tokenizer_class": "NllbTokenizer",
    "additional_special_tokens": NLLB_CODES,
}
_COHERE = _byte_level(
    ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>"),
    ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    None,
    "<BOS_TOKEN>",
    tokenizer_class="CohereTokenizer", add_bos_token=True, add_eos_token=False, bos_token="<BOS_TOKEN>",
    eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>", unk_token=None, cls_token="<CLS>",
    sep_token="<SEP>", mask_token="<MASK_TOKEN>",
)  # fmt: skip
# --- models


def _bart_like(ids: Ids) -> dict[str, Any]:
    return {
        "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS, "encoder_ffn_dim": FFN, "decoder_ffn_dim": FFN,
        "scale_embedding": True, "max_position_embeddings": 256, "bos_token_id": 0, "pad_token_id": 1,
        "eos_token_id": 2, "init_std": 0.1,
    }  # fmt: skip


def _t5_like(ids: Ids) -> dict[str, Any]:
    return {
        "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": FFN, "num_layers": 1, "num_decoder_layers": 1,
        "num_heads": HEADS, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip


def _llama_like(ids: Ids) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }  # fmt: skip


def _gemma_like(ids: Ids) -> dict[str, Any]:
    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return (
        _llama_like(ids)
        | own
        | layers
        | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    )


def _cohere_like(ids: Ids) -> dict[str, Any]:
    return _llama_like(ids) | {
        "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": ids["<|END_OF_TURN_TOKEN|>"],
        "logit_scale": 0.5, "initializer_range": 0.3,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "mbart": Family(
        "facebook/mbart-large-cc25",
        "mbart",
        _sentencepiece(
            "sentencepiece.bpe.model", {}, {"tokenizer_class": "MBartTokenizer"}
        ),
        _bart_like,  # like the real one it does not store how the decoder starts
        lambda ids: {"forced_eos_token_id": 2, "num_beams": 5, "max_length": 1024},
    ),
    "mbart50": Family(
        "facebook/mbart-large-50-many-to-many-mmt",
        "mbart",
        _sentencepiece(
            "sentencepiece.bpe.model",
            {},
            {"tokenizer_class": "MBart50Tokenizer"},
            fast=None,
        ),
        lambda ids: _bart_like(ids) | {"decoder_start_token_id": 2},
        lambda ids: {"forced_eos_token_id": 2, "num_beams": 5, "max_length": 200},
    ),
    "m2m100": Family(
        "facebook/m2m100_418M",
        "m2m_100",
        _m2m100,
        lambda ids: _bart_like(ids) | {"decoder_start_token_id": 2},
        lambda ids: {"num_beams": 5, "max_length": 200, "early_stopping": True},
        spare_rows=8,
    ),
    "nllb": Family(
        "facebook/nllb-200-distilled-600M",
        "m2m_100",
        _sentencepiece("sentencepiece.bpe.model", {"kind": "bpe"}, _NLLB_SETTINGS),
        lambda ids: _bart_like(ids) | {"decoder_start_token_id": 2},
        lambda ids: {"max_length": 200},
        spare_rows=2,
    ),
    "t5": Family("google-t5/t5-small", "t5", _T5, _t5_like, spare_rows=28),
    "flan_t5": Family(
        "google/flan-t5-base",
        "t5",
        _T5,
        lambda ids: (
            _t5_like(ids)
            | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        ),
        spare_rows=28,
        own_head=True,
    ),
    "mt5": Family(
        "google/mt5-base",
        "mt5",
        _sentencepiece(
            "spiece.model",
            _T5_IDS,
            {"tokenizer_class": "T5Tokenizer", "extra_ids": 0},
            fast=None,
        ),
        lambda ids: (
            _t5_like(ids)
            | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        ),
        spare_rows=12,
        own_head=True,
    ),
    "madlad": Family(
        "google/madlad400-3b-mt",
        "t5",
        _sentencepiece(
            "spiece.model",
            {"user_defined_symbols": [f"<2{code}>" for code in _MADLAD_CODES]},
            {
                "tokenizer_class": "T5Tokenizer",
                "extra_ids": 0,
                "pad_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            },
        ),
        lambda ids: (
            _t5_like(ids)
            | {
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
                "pad_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 0,
            }
        ),
        own_head=True,
    ),
    "qwen2": Family(
        "Qwen/Qwen2.5-0.5B",
        "qwen2",
        _byte_level(
            (),
            _QWEN_LAST,
            PRETOKENIZE_REGEX,
            None,
            eos_token="<|endoftext|>",
            **_QWEN_SETTINGS,
        ),
        lambda ids: (
            _llama_like(ids)
            | {
                "tie_word_embeddings": True,
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|endoftext|>"],
            }
        ),
        lambda ids: {"max_new_tokens": 2048},
        decoder_only=True,
        spare_rows=16,
    ),
    "qwen3": Family(
        "Qwen/Qwen3-0.6B",
        "qwen3",
        _byte_level(
            (),
            _QWEN_LAST,
            PRETOKENIZE_REGEX,
            None,
            eos_token="<|im_end|>",
            **_QWEN_SETTINGS,
        ),
        lambda ids: (
            _llama_like(ids)
            | {
                "tie_word_embeddings": True,
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
                "head_dim": 16,
            }
        ),
        lambda ids: {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
        decoder_only=True,
        spare_rows=16,
    ),
    "llama": Family(
        "meta-llama/Llama-2-7b-hf",
        "llama",
        _LLAMA,
        lambda ids: _llama_like(ids) | {"bos_token_id": 1, "eos_token_id": 2},
        lambda ids: {"temperature": 0.9, "top_p": 0.6},  # without do_sample
        decoder_only=True,
    ),
    "llama3": Family(
        "meta-llama/Llama-3.2-1B",
        "llama",
        _byte_level(
            (),
            ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
            None,
            "<|begin_of_text|>",
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        ),
        lambda ids: (
            _llama_like(ids)
            | {
                "tie_word_embeddings": True,
                "bos_token_id": ids["<|begin_of_text|>"],
                "eos_token_id": ids["<|end_of_text|>"],
            }
        ),
        lambda ids: {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        decoder_only=True,
    ),
    "gemma2": Family(
        "google/gemma-2-2b",
        "gemma2",
        _gemma(),
        _gemma_like,
        decoder_only=True,
    ),
    "gemma3": Family(
        "google/gemma-3-1b-pt",
        "gemma3_text",
        _gemma("<image_soft_token>"),
        _gemma_like,
        lambda ids: {"do_sample": True, "top_k": 64, "top_p": 0.95},
        decoder_only=True,
        spare_rows=-1,  # there is no row for <image_soft_token>
    ),
    "mistral": Family(
        "mistralai/Mistral-7B-v0.1",
        "mistral",
        _LLAMA,
        lambda ids: (
            _llama_like(ids) | {"bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16}
        ),
        decoder_only=True,
    ),
    "bloom": Family(
        "bigscience/bloomz-560m",
        "bloom",
        _byte_level(
            ("<unk>", "<s>", "</s>", "<pad>"),
            (),
            r" ?[^(\s|[.,!?…。，、।۔،])]+",
            None,
            tokenizer_class="BloomTokenizerFast",
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
        ),
        lambda ids: {
            "hidden_size": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        },
        decoder_only=True,
        spare_rows=8,
    ),
    "xglm": Family(
        "facebook/xglm-564M",
        "xglm",
        _xglm,
        lambda ids: {
            "d_model": WIDTH,
            "ffn_dim": FFN,
            "num_layers": LAYERS,
            "attention_heads": HEADS,
            "init_std": 0.1,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "scale_embedding": True,
        },
        decoder_only=True,
    ),
    "cohere": Family(
        "CohereLabs/aya-expanse-8b", "cohere", _COHERE, _cohere_like, decoder_only=True
    ),
    "cohere2": Family(
        "CohereLabs/c4ai-command-r7b-12-2024",
        "cohere2",
        _COHERE,
        lambda ids: (
            _cohere_like(ids)
            | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        ),
        decoder_only=True,
    ),
}
