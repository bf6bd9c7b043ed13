"""The loss of the target tokens: the logits of each model type, all at once or in
chunks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from flallm_ds.errors import UserError
from flallm_ds.models import loss
from flallm_ds.models.loss import Head, token_loss

# The same sizes by the names of each config class.
NAMES = {
    "encoder-decoder": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 4, "ffn_dim": 64},
    "common": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
}  # fmt: skip
SIZES = {
    "mbart": NAMES["encoder-decoder"], "m2m_100": NAMES["encoder-decoder"], "t5": NAMES["t5"],
    "mt5": NAMES["t5"], "bloom": NAMES["bloom"], "xglm": NAMES["xglm"],
}  # fmt: skip
# Settings with which a scale or a cap changes the logits.
RULES: dict[str, list[dict[str, Any]]] = {
    "t5": [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}],
    "mt5": [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}],
    "gemma2": [{"final_logit_softcapping": 0.5}, {"final_logit_softcapping": None}],
    "gemma3_text": [{"final_logit_softcapping": 0.5}, {}],
    "cohere": [{"logit_scale": 0.3}],
    "cohere2": [{"logit_scale": 0.3}],
    "granite": [{"logits_scaling": 7.0}],
}
VOCABULARY = 53


def tiny_model(model_type: str, rules: dict[str, Any], vocab_size: int = VOCABULARY) -> Any:
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2, **SIZES.get(model_type, NAMES["common"]), **rules,
    )  # fmt: skip
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def states_and_logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the states of the decoder, the logits of the model) of one forward pass."""
    states: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_hook(
        lambda module, args, out: states.append(out[0])
    )
    ids = torch.randint(3, VOCABULARY, (2, 7))
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(ids, **decoder).logits
    hook.remove()
    return states[0], logits


HEADS: list[tuple[str, dict[str, Any]]] = []
for _model_type in sorted(loss.VERIFIED):
    for _rules in RULES.get(_model_type, [{}]):
        HEADS.append((_model_type, _rules))


@pytest.mark.parametrize(("model_type", "rules"), HEADS)
def test_the_head_of_each_verified_type_gives_the_models_own_logits(
    model_type: str, rules: dict[str, Any]
) -> None:
    model = tiny_model(model_type, rules)
    head = Head.of(model)
    assert head is not None and head.vocab_size == VOCABULARY
    with torch.no_grad():
        states, expected = states_and_logits(model)
        torch.testing.assert_close(head.logits(states), expected, rtol=1e-6, atol=1e-6)
        # The rule must change the logits, or this test would show nothing.
        if rules or model_type == "mbart":
            bare = model.get_output_embeddings()(states)
            plain = rules in (
                {"final_logit_softcapping": None},
                {"tie_word_embeddings": False},
            ) or (model_type == "mt5")
            assert torch.allclose(bare, expected, atol=1e-3) == plain


def test_a_model_type_that_is_not_verified_has_no_head() -> None:
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4)
    )
    assert Head.of(gpt2) is None


def loss_and_gradients(
    model: Any, states: torch.Tensor, targets: torch.Tensor, how: Any
) -> list[torch.Tensor]:
    head = Head.of(model)
    assert head is not None
    states = states.detach().requires_grad_()
    model.zero_grad()
    value = token_loss(head, states, targets, 0.2, how)
    (value * 0.37).backward()  # as a step's token count scales it
    return [value.detach(), states.grad, model.get_output_embeddings().weight.grad.clone()]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("model_type", ["mbart", "t5", "gemma2", "cohere"])
def test_chunks_give_the_loss_and_gradients_of_plain_cross_entropy(
    model_type: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * VOCABULARY * 4)  # 64 tokens in 13 chunks
    model = tiny_model(model_type, RULES.get(model_type, [{}])[0])
    states, targets = torch.randn(num_tokens, 32), torch.randint(VOCABULARY, (num_tokens,))
    plain = loss_and_gradients(model, states, targets, "logits")
    chunked = loss_and_gradients(model, states, targets, "chunks")
    assert "forward" not in vars(model.get_output_embeddings())
    head = Head.of(model)
    assert head is not None
    expected = F.cross_entropy(
        head.logits(states), targets, reduction="sum", label_smoothing=0.2
    )
    torch.testing.assert_close(plain[0], expected.detach(), rtol=1e-6, atol=0)
    for a, b in zip(chunked, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunks_under_autocast_give_the_loss_of_logits_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * VOCABULARY * 4)
    model = tiny_model("mbart", {})
    states, targets = torch.randn(64, 32), torch.randint(VOCABULARY, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_and_gradients(model, states, targets, "logits")
        chunked = loss_and_gradients(model, states, targets, "chunks")
    assert plain[0].dtype == chunked[0].dtype == torch.float32
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-5, atol=0)
    for a, b in zip(chunked[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)  # chunks sum in fp32


def test_never_more_logits_than_a_chunk_are_computed_for_a_large_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with "auto": logits of 300 tokens over 250,000 entries are 300 MB in fp32."""
    model = tiny_model("qwen3", {}, vocab_size=250_000)
    sizes: list[int] = []
    plain = F.cross_entropy

    def noting(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(logits.numel() * 4)
        return plain(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", noting)
    states, targets = torch.randn(300, 32), torch.randint(250_000, (300,))
    loss_and_gradients(model, states, targets, "auto")
    assert len(sizes) == 5 and max(sizes) <= loss.CHUNK_BYTES
    sizes.clear()
    loss_and_gradients(model, states[:100], targets[:100], "auto")
    assert sizes == [100 * 250_000 * 4]


def test_chunks_compute_only_the_gradients_that_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 5 * VOCABULARY * 4)
    model = tiny_model("qwen3", {})
    head, weight = Head.of(model), model.get_output_embeddings().weight
    assert head is not None
    states, targets = torch.randn(12, 32), torch.randint(VOCABULARY, (12,))
    expected = token_loss(head, states, targets, 0.2, "logits")
    with torch.no_grad():
        assert torch.allclose(token_loss(head, states, targets, 0.2, "chunks"), expected)
    token_loss(head, states, targets, 0.2, "chunks").backward()
    assert weight.grad is not None and states.grad is None
    weight.grad = None
    weight.requires_grad_(False)
    token_loss(head, states.requires_grad_(), targets, 0.2, "chunks").backward()
    assert weight.grad is None and states.grad is not None


def test_a_head_with_a_bias_uses_logits_and_raises_an_error_for_chunks() -> None:
    model = tiny_model("qwen3", {})
    model.set_output_embeddings(nn.Linear(32, VOCABULARY, bias=True))
    head = Head.of(model)
    assert head is not None
    states, targets = torch.randn(4, 32), torch.randint(VOCABULARY, (4,))
    assert token_loss(head, states, targets, 0.0) == token_loss(
        head, states, targets, 0.0, "logits"
    )
    with pytest.raises(
        UserError,
        match=r"llm\.loss=chunks: .* not a Linear without bias \(Linear\(.*bias=True",
    ):
        token_loss(head, states, targets, 0.0, "chunks")


def test_liger_without_a_gpu_raises_an_error() -> None:
    head = Head.of(tiny_model("qwen3", {}))
    assert head is not None
    with pytest.raises(
        UserError, match=r"there is no CUDA device\. Give --llm\.loss=auto\.$"
    ):
        token_loss(head, torch.randn(2, 32), torch.tensor([3, 4]), 0.2, "liger")
    assert token_loss(head, torch.randn(2, 32), torch.tensor([3, 4]), 0.2, "auto") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "model_type", ["mbart", "t5", "gemma2", "cohere", "granite", "qwen3"]
)
def test_liger_gives_the_loss_and_gradients_of_plain_cross_entropy(
    model_type: str, frozen: bool, autocast: bool
) -> None:
    pytest.importorskip("liger_kernel")
    model = tiny_model(model_type, RULES.get(model_type, [{}])[0]).cuda()
    model.get_output_embeddings().requires_grad_(not frozen)
    states = torch.randn(65, 32, device="cuda")
    targets = torch.randint(VOCABULARY, (65,), device="cuda")
    head = Head.of(model)
    assert head is not None
    results = []
    for how in ("logits", "liger"):
        inputs = states.clone().requires_grad_()
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            value = token_loss(head, inputs, targets, 0.2, how)
        (value * 0.37).backward()
        weight = model.get_output_embeddings().weight.grad
        assert (weight is None) == frozen
        results.append([value.detach(), inputs.grad, *([] if frozen else [weight.clone()])])
    rough = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, b, **rough)
