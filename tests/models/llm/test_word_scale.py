"""All LLMs of the installed transformers with a tiny config: they read embeddings as words,
or raise an error.

The measured scale is compared with the complete model, and the loss with the model's own
loss from `labels=`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from flallm_ds.data.text.prompt import Wording
from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import embedding_scale, load_llm
from flallm_ds.models.sign_translator import Beam, SignTranslator
from tests.helpers.tensors import num_parameters

WIDTH, WORDS = 32, 64
# Most parameters of a tiny model.
MOST = 4_000_000
# Settings of a tiny model. A config class gets those that it knows.
TINY = {
    "vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "decoder_start_token_id": 2, "d_model": WIDTH, "hidden_size": WIDTH, "n_embd": WIDTH,
    "encoder_layers": 1, "decoder_layers": 1, "num_encoder_layers": 1, "num_decoder_layers": 1,
    "num_layers": 1, "num_hidden_layers": 2, "n_layer": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_heads": 4, "n_head": 4, "head_dim": 8,
    "d_kv": 8, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "intermediate_size": 48, "d_ff": 48,
    "n_inner": 48, "max_position_embeddings": 64, "n_positions": 64, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4,
    "scale_embedding": True, "embedding_multiplier": 3.0,
    "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0,
    "attention_window": 4,
}  # fmt: skip
MULTI_HEAD = {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 16},
    **dict.fromkeys(
        ("axk2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), MULTI_HEAD
    ),
}
REFUSED = {
    "fsmt": "its decoder attends to later tokens",
    "prophetnet": "depend on the number of later tokens",
    # It looks up the word of each embedding.
    "gemma4_text": "provide exact `inputs_embeds`",
    # Ids choose the experts.
    "deepseek_v4": "its first layer gets other inputs",
    # It cannot read embeddings.
    "cpmant": "index out of range",
    "inkling": "its first layer gets other inputs",
}


def tiny_models(mapping: Any) -> dict[str, Any]:
    """Return {model type: (class, config)} of the models that have a small config."""
    found = {}
    for kind in mapping:
        if kind in MODEL_FOR_MASKED_LM_MAPPING and mapping is MODEL_FOR_CAUSAL_LM_MAPPING:
            continue  # an encoder, not an LLM
        model_class = mapping[kind]
        if isinstance(model_class, tuple):
            model_class = model_class[0]
        # The settings that the class knows, of its own and by the common names.
        known = set(kind.attribute_map)
        for base in kind.__mro__:
            known |= set(getattr(base, "__annotations__", {}))
        wanted = TINY | OWN.get(kind.model_type, {})
        values = {name: wanted[name] for name in wanted if name in known}
        try:
            config = kind(**values)
            with torch.device("meta"):
                size = num_parameters(model_class(config))
        except Exception:  # noqa: BLE001  # a config that needs other settings
            continue
        if size <= MOST:
            found[kind.model_type] = (model_class, config)
    return found


ENCODER_DECODERS = tiny_models(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
DECODERS = tiny_models(MODEL_FOR_CAUSAL_LM_MAPPING)
for _name in ENCODER_DECODERS:
    DECODERS.pop(_name, None)


def test_the_expected_model_types_have_a_tiny_config() -> None:
    """Otherwise the tests below could skip a model type without notice."""
    assert ENCODER_DECODERS.keys() >= {
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100",
        "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet",
        "seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5", "umt5",
    }  # fmt: skip
    assert len(DECODERS) > 80


@pytest.mark.parametrize(
    ("name", "scale"),
    [("marian", WIDTH**0.5), ("pegasus", WIDTH**0.5), ("blenderbot-small", WIDTH**0.5), ("mvp", WIDTH**0.5),
     ("mbart", WIDTH**0.5), ("t5", 1.0)],
)  # fmt: skip
def test_the_scale_of_an_encoder_is_measured(name: str, scale: float) -> None:
    assert embedding_scale(built(*ENCODER_DECODERS[name])) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("name", "scale"),
    [("falcon_h1", 3.0), ("gemma2", WIDTH**0.5), ("granite", 1.0), ("xglm", WIDTH**0.5)],
)
def test_the_scale_of_a_decoder_is_measured(name: str, scale: float) -> None:
    """Granite also scales given embeddings, so visual tokens must not be scaled before."""
    assert embedding_scale(built(*DECODERS[name])) == pytest.approx(scale)


def built(model_class: Any, config: Any) -> Any:
    torch.manual_seed(0)
    llm = model_class(config).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return llm


def translator_of(llm: Any) -> SignTranslator:
    """Return a translator whose visual tokens are the features times the embedding
    scale."""
    width = llm.get_input_embeddings().embedding_dim
    adapter = nn.Linear(width, width, bias=False)
    adapter.weight.data = torch.eye(width) * embedding_scale(llm)
    return SignTranslator(None, adapter, llm, SimpleNamespace(pad_id=0, eos_id=1)).eval()  # type: ignore[arg-type]


SIGNS = ([20, 21, 22, 23, 24], [30, 31, 32])
TARGETS = ([40, 41, 42, 1], [43, 44, 1])
BEFORE, AFTER, START = (10, 11), (12,), (2,)


def our_loss(llm: Any, translator: SignTranslator, wording: Wording) -> float:
    """Return the loss with rows of the word embedding as features instead of the words."""
    rows = llm.get_input_embeddings().weight[torch.tensor([*SIGNS[0], *SIGNS[1]])]
    targets_BL = torch.full((2, 4), -100)
    for row, target in zip(targets_BL, TARGETS, strict=True):
        row[: len(target)] = torch.tensor(target)
    lengths = torch.tensor(list(map(len, SIGNS)))
    with torch.no_grad():
        return float(translator(rows, lengths, [wording] * 2, targets_BL))


def is_refused(name: str, llm: Any) -> bool:
    for kind, reason in REFUSED.items():
        if name.startswith(kind):
            said = rf"llm\.name must be an LLM that reads embeddings.*\({name}\).*{reason}"
            with pytest.raises(UserError, match=said):
                embedding_scale(llm)
            return True
    return False


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_reads_embeddings_as_words(name: str) -> None:
    llm = built(*ENCODER_DECODERS[name])
    if is_refused(name, llm):
        return
    translator = translator_of(llm)
    loss = 0.0
    for signs, target in zip(SIGNS, TARGETS, strict=True):
        with torch.no_grad():
            found = llm(
                input_ids=torch.tensor([[*BEFORE, *signs, *AFTER]]),
                attention_mask=torch.ones(
                    1, len(BEFORE) + len(signs) + len(AFTER), dtype=torch.long
                ),
                decoder_input_ids=torch.tensor([[*START, *target[:-1]]]),
                labels=torch.tensor([target]),
            )
        loss += found.loss.item() * len(target)
    ours = our_loss(llm, translator, Wording(BEFORE, AFTER, START))
    assert ours == pytest.approx(loss, rel=1e-3)
    said = translator.generate(
        llm.get_input_embeddings().weight[torch.tensor(SIGNS[0])],
        torch.tensor([len(SIGNS[0])]),
        [Wording(BEFORE, AFTER, START)],
        Beam(num_beams=2, max_new_tokens=3),
    )
    assert len(said[0][0].ids) >= 1


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_only_llm_reads_embeddings_as_words(name: str) -> None:
    llm = built(*DECODERS[name])
    if is_refused(name, llm):
        return
    translator = translator_of(llm)
    loss = 0.0
    for signs, target in zip(SIGNS, TARGETS, strict=True):
        words = [*BEFORE, *signs, *AFTER, *target[:-1]]
        with torch.no_grad():
            logits = llm(
                torch.tensor([words]),
                attention_mask=torch.ones(1, len(words)),
                use_cache=False,
            ).logits[0]
        loss += nn.functional.cross_entropy(
            logits[-len(target) :].float(), torch.tensor(target), reduction="sum"
        ).item()
    assert our_loss(llm, translator, Wording(BEFORE, AFTER)) == pytest.approx(
        loss, rel=1e-3
    )


def test_an_llm_that_cannot_read_embeddings_raises_an_error_before_weights_are_read(
    tmp_path: Path,
) -> None:
    """The folder holds no weights."""
    ENCODER_DECODERS["fsmt"][1].save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"^llm\.name must be an LLM that reads .*got {tmp_path} \(fsmt\): .*\.$",
    ):
        load_llm(str(tmp_path))
