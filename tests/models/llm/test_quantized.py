"""LLMs with quantised weights: they are read as ordinary ones, or an error names the
method."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
)

from flallm_ds.errors import UserError
from flallm_ds.models.llm.load import LlmOptions, load_llm
from flallm_ds.models.llm.source import check_llm
from flallm_ds.models.llm.trim import trim_llm, untrim_llm
from tests.helpers.llms import make_tiny_llm
from tests.models.llm.test_load import SPOKEN, codec_of, logits_LV

FP8_MAX = 448.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llm("llama3", tmp_path_factory.mktemp("llama"), SPOKEN)


def rewritten(
    llama: Path, folder: Path, tensors: dict[str, torch.Tensor], quantization: object
) -> Path:
    shutil.copytree(llama, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() == 2 and "embed" not in name


def in_fp8(
    weight: torch.Tensor, block: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (float8 weight, scales) with one scale for each block, as models of the
    hub."""
    rows, cols = weight.shape
    height, width = block or (rows, cols)
    scales = torch.empty(-(-rows // height), -(-cols // width))
    for i, strip in enumerate(weight.split(height, 0)):
        for j, part in enumerate(strip.split(width, 1)):
            scales[i, j] = part.abs().max() / FP8_MAX
    spread = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    spread = spread[:rows, :cols]
    small = (weight / spread).to(torch.float8_e4m3fn)
    return small, scales if block else scales.reshape(())


def fp8(llama: Path, folder: Path, block: tuple[int, int] | None) -> Path:
    tensors = {}
    for name, tensor in load_file(llama / "model.safetensors").items():
        if is_linear(name, tensor):
            # The scales are at most a thousandth: without them the error is a factor of
            # 1000.
            tensors[name], tensors[f"{name}_scale_inv"] = in_fp8(tensor, block)
            if block is None:
                tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
        else:
            tensors[name] = tensor.bfloat16()
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if block else "static",
        "fmt": "e4m3",
    }
    return rewritten(
        llama,
        folder,
        tensors,
        settings | {"weight_block_size": list(block) if block else None},
    )


# A block that divides the weights, a block that does not (such as 128 for 576 rows in
# DeepSeek), and one scale for each weight.
BLOCKS = [(16, 16), (24, 20), None]


@pytest.mark.parametrize("block", BLOCKS)
def test_an_fp8_checkpoint_is_read_with_its_scales(llama, tmp_path, block):
    folder = fp8(llama, tmp_path / "fp8", block)
    expected = load_file(llama / "model.safetensors")
    codec = codec_of(folder)
    trim_llm(str(folder), codec, tmp_path / "trimmed")
    whole, small = load_llm(str(folder)), load_llm(str(tmp_path / "trimmed"))
    untrim_llm(tmp_path / "trimmed", str(folder), codec, tmp_path / "again")
    untrimmed = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for tensor in untrimmed.values()} == {torch.bfloat16}
    for llm in (whole, small, load_llm(str(tmp_path / "again"))):
        assert {p.dtype for p in llm.parameters()} == {torch.float32}
        assert not hasattr(llm.config, "quantization_config")
        for name, parameter in llm.named_parameters():
            if is_linear(name, parameter):
                error = (parameter - expected[name]).norm() / expected[name].norm()
                assert 0 < error < 0.05, name
    assert torch.allclose(
        logits_LV(tmp_path / "trimmed", codec, range(codec.vocab_size)),
        logits_LV(folder, codec, codec.kept_ids)[:, codec.kept_ids],
        atol=1e-4,
    )


def test_an_fp8_checkpoint_is_read_as_transformers_reads_it(llama, tmp_path):
    folder = fp8(llama, tmp_path / "fp8", (16, 16))
    settings = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    ours = dict(load_llm(str(folder), LlmOptions(bits=16)).named_parameters())
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, ours[name]), name


def mxfp4(llama: Path, folder: Path) -> Path:
    """Write experts as openai/gpt-oss-20b: blocks of 32 numbers of 4 bits and an
    exponent."""
    config = GptOssConfig(
        vocab_size=json.loads((llama / "config.json").read_text())["vocab_size"], hidden_size=64,
        intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=2, num_experts_per_tok=1, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).bfloat16()
    shutil.copytree(llama, folder)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, (rows, groups) in (("gate_up_proj", (64, 2)), ("down_proj", (64, 1))):
        key = f"model.layers.0.mlp.experts.{name}"
        assert tensors.pop(key).shape == (2, groups * 32, rows)
        tensors[f"{key}_blocks"] = torch.randint(
            0, 256, (2, rows, groups, 16), dtype=torch.uint8
        )
        tensors[f"{key}_scales"] = torch.randint(
            118, 124, (2, rows, groups), dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    settings = {
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["lm_head"],
        }
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def test_an_mxfp4_checkpoint_is_read_as_transformers_reads_it(llama, tmp_path):
    mxfp4(llama, tmp_path / "llm")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llm",
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
    )
    codec = codec_of(tmp_path / "llm")
    trim_llm(str(tmp_path / "llm"), codec, tmp_path / "trimmed")
    for folder in (tmp_path / "llm", tmp_path / "trimmed"):
        ours = dict(load_llm(str(folder), LlmOptions(bits=16)).named_parameters())
        for name, parameter in reference.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                assert torch.equal(parameter, ours[name]), name
                assert parameter.std() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_8_and_4_bits_for_quantised_weights_raise_an_error_unless_trimmed(
    llama, tmp_path, bits
):
    folder = fp8(llama, tmp_path / "fp8", (16, 16))
    for read in (
        lambda name: load_llm(name, LlmOptions(bits=bits)),
        lambda name: check_llm(name, bits=bits),
    ):
        with pytest.raises(
            UserError,
            match=rf"quantised with fp8, got {bits}\. .*--llm\.trim_vocabulary=true",
        ):
            read(str(folder))
    trim_llm(str(folder), codec_of(folder), tmp_path / "trimmed")
    check_llm(str(tmp_path / "trimmed"), bits=bits)


METHODS = {
    "gptq": {"bits": 4, "group_size": 128},
    "awq": {"bits": 4, "group_size": 128, "version": "gemm"},
    "compressed-tensors": {"format": "float-quantized", "config_groups": {}},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fbgemm_fp8": {},
    "torchao": {
        "quant_type": {
            "default": {"_type": "Int4WeightOnlyConfig", "_data": {}, "_version": 1}
        }
    },
    "hqq": {"quant_config": {}},
    "aqlm": {},
    "quanto": {"weights": "int8"},
    "modelopt": {"quant_algo": "NVFP4"},
    "a_new_one": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_error_for_another_method_names_it(llama, tmp_path, method):
    tensors = load_file(llama / "model.safetensors")
    folder = rewritten(
        llama, tmp_path / "llm", tensors, {"quant_method": method, **METHODS[method]}
    )
    codec = codec_of(llama)
    for load in (
        lambda: check_llm(str(folder)),
        lambda: load_llm(str(folder)),
        lambda: load_llm(str(folder), LlmOptions(pretrained=False)),
        lambda: trim_llm(str(folder), codec, tmp_path / "out"),
        lambda: codec_of(folder),
    ):
        with pytest.raises(
            UserError, match=rf"is quantised with {method}\. Name the unquantised model"
        ):
            load()
    assert not (tmp_path / "out").exists()


PARTS = {
    "fp8": {"weight_scale_inv": torch.ones(2, 2)},
    "GPTQ or AWQ": {
        "qweight": torch.ones(4, 32, dtype=torch.int32),
        "scales": torch.ones(1, 32),
    },
    "compressed-tensors": {"weight_packed": torch.ones(32, 4, dtype=torch.int32)},
    "bitsandbytes": {"weight.absmax": torch.ones(8), "weight.quant_map": torch.ones(16)},
    "mxfp4": {"down_proj_blocks": torch.ones(2, 2, 1, 16, dtype=torch.uint8)},
}


@pytest.mark.parametrize("method", PARTS)
def test_parts_of_quantised_weights_that_the_config_does_not_mention_raise_an_error(
    llama, tmp_path, method
):
    """For example, config.json was copied from the unquantised model."""
    tensors = load_file(llama / "model.safetensors")
    prefix = "model.layers.1.self_attn.q_proj"
    if "weight.absmax" not in PARTS[method]:
        del tensors[f"{prefix}.weight"]
    for name, tensor in PARTS[method].items():
        tensors[f"{prefix}.{name}"] = tensor
    folder = rewritten(llama, tmp_path / "llm", tensors, None)
    codec = codec_of(llama)
    for load in (
        lambda: load_llm(str(folder)),
        lambda: trim_llm(str(folder), codec, tmp_path / "out"),
    ):
        with pytest.raises(
            UserError, match=rf"{prefix}.*part of weights quantised with {method}"
        ):
            load()
    assert not (tmp_path / "out").exists()


def test_an_fp8_weight_without_scales_raises_an_error(llama, tmp_path):
    folder = fp8(llama, tmp_path / "fp8", (16, 16))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"layers\.0\.mlp\.up_proj\.weight of .*: it is torch\.float8_e4m3fn without",
    ):
        load_llm(str(folder))


def test_fp8_scales_of_another_block_size_raise_an_error(llama, tmp_path):
    folder = fp8(llama, tmp_path / "fp8", (16, 16))
    path = folder / "config.json"
    path.write_text(path.read_text().replace("[16, 16]", "[8, 8]"))
    codec = codec_of(folder)
    for load in (
        lambda: load_llm(str(folder)),
        lambda: trim_llm(str(folder), codec, tmp_path / "out"),
    ):
        with pytest.raises(
            UserError, match=r"Cannot read .*proj\.weight .* scales .* do not fit a weight"
        ):
            load()
    assert not (tmp_path / "out").exists()


# --- unexpected and missing tensors


@pytest.mark.parametrize(
    "key", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_an_unexpected_tensor_raises_an_error(llama, tmp_path, key):
    """For example, config.json has fewer layers than the weights, or another attention."""
    tensors = load_file(llama / "model.safetensors") | {key: torch.ones(32)}
    folder = rewritten(llama, tmp_path / "llm", tensors, None)
    codec = codec_of(folder)
    for load in (
        lambda: load_llm(str(folder)),
        lambda: trim_llm(str(folder), codec, tmp_path / "out"),
    ):
        with pytest.raises(
            UserError, match=rf"1 of its tensors belong to no part .*\({key} for example\)"
        ):
            load()
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_raises_an_error_before_trimming(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    folder = rewritten(llama, tmp_path / "llm", tensors, None)
    with pytest.raises(UserError, match=r"lacks 1 of its tensors \(model\.norm\.weight"):
        trim_llm(str(folder), codec_of(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight", "v_head.summary.bias"],
)
def test_optional_tensors_are_ignored(llama, tmp_path, key):
    tensors = load_file(llama / "model.safetensors") | {key: torch.ones(4)}
    folder = rewritten(llama, tmp_path / "llm", tensors, None)
    load_llm(str(folder))
    trim_llm(str(folder), codec_of(folder), tmp_path / "out")
    assert key not in load_file(tmp_path / "out" / "model.safetensors")
