"""Which weights of an LLM are trained, and how adapters are merged and written.

tests/training/test_engine.py tests the same under ZeRO.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    MBartConfig,
    T5Config,
)

from flallm_ds.errors import UserError
from flallm_ds.models.llm.tuning import (
    Tuning,
    check_bits,
    low_rank_targets,
    merged,
    tune,
    write_lora,
)
from tests.helpers.tensors import trained_names

VOCABULARY = 40
CONFIGS = {
    "mbart": MBartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    ),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32
    ),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
LOW_RANK = pytest.mark.parametrize("how", ["lora", "dora"])


def make_llm(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[kind]
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def tuned(kind: str, seed: int = 0, **options: Any) -> Any:
    llm = make_llm(kind)
    tune(llm, Tuning(**options), seed)
    return llm


def names_of(llm: Any) -> set[str]:
    return {name for name, _ in llm.named_parameters()}


def low_rank_layers(llm: Any) -> list[str]:
    return [name for name, module in llm.named_modules() if isinstance(module, LoraLayer)]


def logits(llm: Any) -> torch.Tensor:
    ids_BL = torch.arange(12).view(2, 6) + 5
    more = {"decoder_input_ids": ids_BL[:, :4]} if llm.config.is_encoder_decoder else {}
    with torch.no_grad():
        return llm.eval()(input_ids=ids_BL, **more).logits


def after_training(llm: Any) -> Any:
    """Change all trained parameters, as an optimizer would, and return the LLM."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return llm


def test_full_trains_all_parameters():
    assert trained_names(tuned("mbart", how="full")) == names_of(make_llm("mbart"))


def test_full_with_a_pattern_trains_the_matching_parameters():
    llm = tuned("mbart", how="full", layers=r"decoder\.layers\.1\.|layernorm_embedding")
    trained, every = trained_names(llm), names_of(llm)
    assert trained and trained < every
    for name in every:
        is_named = "decoder.layers.1." in name or "layernorm_embedding" in name
        assert (name in trained) == is_named


def test_frozen_trains_only_the_parameters_that_a_pattern_matches():
    assert trained_names(tuned("llama", how="frozen")) == set()
    llm = tuned("llama", how="frozen", layers=r"^model\.norm")
    assert trained_names(llm) == {"model.norm.weight"}


@KINDS
@LOW_RANK
def test_adapters_are_added_to_all_linear_layers_except_the_head(kind, how):
    """The logits stay the same at first, because B starts at zero."""
    llm = tuned(kind, how=how, rank=4)
    layers = low_rank_layers(llm)
    assert layers and "lm_head" not in " ".join(layers)
    assert sorted(layers) == sorted(low_rank_targets(make_llm(kind), "all-linear"))
    expected = set()
    for layer in layers:
        expected |= {f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"}
        if how == "dora":
            expected.add(f"{layer}.lora_magnitude_vector.default.weight")
    assert trained_names(llm) == expected
    torch.testing.assert_close(logits(llm), logits(make_llm(kind)), rtol=1e-4, atol=1e-5)


def test_adapters_by_pattern_and_complete_layers_are_trained_together():
    llm = tuned(
        "mbart",
        how="lora",
        targets="(q|v)_proj$",
        layers=r"decoder\.layers\.1\.self_attn\.q_proj|shared",
    )
    layers = low_rank_layers(llm)
    assert len(layers) == 12 and all(n.endswith(("q_proj", "v_proj")) for n in layers)
    whole = {name for name in trained_names(llm) if ".lora_" not in name}
    assert whole == {
        "model.shared.weight",
        "model.decoder.layers.1.self_attn.q_proj.base_layer.weight",
        "model.decoder.layers.1.self_attn.q_proj.base_layer.bias",
    }


def test_an_image_encoder_is_tuned_and_merged_in_the_same_way():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    vit, plain = ViTModel(config).eval(), ViTModel(config).eval()
    plain.load_state_dict(vit.state_dict())
    tune(vit, Tuning(how="lora", rank=2, targets="q_proj|v_proj", section="visual"))
    assert len(trained_names(vit)) == 4
    pixels_NCHW = torch.rand(2, 3, 16, 16)
    after_training(vit)
    plain.load_state_dict(dict(merged(vit.named_parameters(), vit)))
    torch.testing.assert_close(
        plain(pixels_NCHW).pooler_output, vit(pixels_NCHW).pooler_output
    )
    with pytest.raises(
        UserError, match=r"visual\.lora_targets must match the name of a linear layer"
    ):
        tune(plain, Tuning(how="lora", targets="quarry", section="visual"))


def test_adapters_depend_on_the_seed_alone_and_do_not_change_the_generator():
    first = tuned("llama", how="lora")
    torch.manual_seed(0)
    make_llm("llama")
    state = torch.get_rng_state()
    torch.rand(1)
    again, other = make_llm("llama"), tuned("llama", seed=1, how="lora")
    torch.set_rng_state(state)
    tune(again, Tuning(how="lora"))
    assert torch.equal(torch.get_rng_state(), state)
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@KINDS
@LOW_RANK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_tensors_equal_those_of_peft(kind, how, dtype):
    llm = after_training(tuned(kind, how=how, rank=4, alpha=7, layers="norm|ln_f")).to(
        dtype
    )
    found = dict(merged(llm.named_parameters(), llm))
    plain = make_llm(kind).to(dtype)
    assert found.keys() == names_of(plain)
    for module in llm.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    peft = {}
    for name, parameter in llm.named_parameters():
        peft[name.replace(".base_layer", "")] = parameter.detach()
    exact = {"rtol": 0, "atol": 0}
    if dtype == torch.bfloat16:
        exact = {"rtol": 2e-2, "atol": 1e-3}
    changed = 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, peft[name], **exact)
        changed += not torch.equal(tensor, plain.get_parameter(name))
    assert changed >= len(low_rank_targets(plain, "all-linear"))


@KINDS
@LOW_RANK
def test_a_merged_llm_gives_the_logits_of_the_tuned_one(kind, how):
    llm = after_training(tuned(kind, how=how, rank=4))
    plain = make_llm(kind)
    before = logits(plain)
    plain.load_state_dict(dict(merged(llm.named_parameters(), llm)), strict=False)
    torch.testing.assert_close(logits(plain), logits(llm), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(plain), before, atol=1e-3)


def test_merging_accepts_any_order_and_none_on_ranks_that_only_gather():
    llm = after_training(tuned("mbart", how="dora"))
    backwards = dict(merged(reversed(list(llm.named_parameters())), llm))
    for name, tensor in merged(llm.named_parameters(), llm):
        assert torch.equal(backwards[name], tensor)
    nothing = dict.fromkeys(dict(llm.named_parameters()))
    on_another_rank = dict(merged(nothing.items(), llm))
    assert on_another_rank == dict.fromkeys(names_of(make_llm("mbart")))


def test_the_tensors_of_an_llm_without_adapters_are_not_changed():
    llm = make_llm("llama")
    found = list(merged(llm.named_parameters(), llm))
    assert len(found) == len(names_of(llm))
    for (name, tensor), (own, parameter) in zip(found, llm.named_parameters(), strict=True):
        assert name == own and tensor is parameter


@KINDS
@pytest.mark.parametrize(
    ("how", "layers"),
    [("lora", ""), ("dora", ""), ("lora", "norm|ln_f|layers?.1.*(q_proj|Attention.q)")],
)
def test_peft_reads_the_folder_of_an_adapter(kind, how, layers, tmp_path):
    llm = after_training(tuned(kind, how=how, rank=4, layers=layers))
    base = tmp_path / "base"
    make_llm(kind).save_pretrained(base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_lora(folder, llm.named_parameters(), llm, str(base))
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["use_dora"] == (
        how == "dora"
    )
    auto = AutoModelForSeq2SeqLM if llm.config.is_encoder_decoder else AutoModelForCausalLM
    loaded = PeftModel.from_pretrained(auto.from_pretrained(base), str(folder)).eval()
    torch.testing.assert_close(logits(loaded), logits(llm), rtol=1e-5, atol=1e-6)
    assert llm.peft_config["default"].base_model_name_or_path != str(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"how": "lora", "targets": "q_prj"},
            r"llm\.lora_targets must match the name of a linear layer .*got 'q_prj', which matches none: did you mean",
        ),
        ({"how": "dora", "targets": "lm_head"}, "matches none"),
        (
            {"how": "full", "layers": r"decodr\.layers"},
            r"llm\.layers must match the name of a parameter.* did you mean decoder",
        ),
        ({"how": "frozen", "layers": "("}, r"llm\.layers must be a regular expression"),
    ],
)
def test_the_error_for_a_pattern_without_a_match_lists_similar_names(options, message):
    with pytest.raises(UserError, match=message) as caught:
        tuned("mbart", **options)
    assert "\n" not in str(caught.value)


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("bits", "how", "stage", "device", "installed", "message"),
    [
        (4, "full", 2, GPU, True, "integers have no gradient, got full"),
        (
            8,
            "lora",
            2,
            torch.device("cpu"),
            True,
            "must be 16 without a CUDA device, got 8",
        ),
        (
            4,
            "lora",
            2,
            GPU,
            False,
            "without the package bitsandbytes, got 4",
        ),
        (
            4,
            "dora",
            3,
            GPU,
            True,
            "cannot be partitioned, got 3 in the DeepSpeed JSON",
        ),
        (4, "frozen", 2, GPU, True, None),
        (8, "lora", 1, GPU, True, None),
        (16, "full", 3, torch.device("cpu"), False, None),
    ],
)
def test_bits_that_cannot_be_used_raise_an_error(
    bits, how, stage, device, installed, message, monkeypatch
):
    find = "flallm_ds.models.llm.tuning.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: object() if installed else None)
    if message is None:
        check_bits(bits, how, stage, device)
        return
    with pytest.raises(UserError, match=message):
        check_bits(bits, how, stage, device)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_llm_loads_and_learns(bits: int, tmp_path: Path) -> None:
    """On a GPU with bitsandbytes: train LoRA on frozen integers; merging raises an
    error."""
    pytest.importorskip("bitsandbytes")
    from flallm_ds.models.llm.load import LlmOptions, load_llm

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path), LlmOptions(bits=bits))
    tune(llm, Tuning(how="lora", rank=4))
    trained, frozen = [], {}
    for name, parameter in llm.named_parameters():
        if parameter.requires_grad:
            trained.append(parameter)
        else:
            frozen[name] = parameter.detach().clone()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids_BL = torch.arange(24, device="cuda").view(2, 12)
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", torch.bfloat16):
            loss = llm(input_ids=ids_BL, labels=ids_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, before in frozen.items():
        # bytes: the integers are stored as floats, where some of them are NaN
        now, then = (t.view(torch.uint8) for t in (llm.get_parameter(name), before))
        assert torch.equal(now, then), name
    with pytest.raises(UserError, match="its weight has 8 or 4 bits"):
        list(merged(llm.named_parameters(), llm))
    assert isinstance(llm, nn.Module)
