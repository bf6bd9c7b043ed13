"""The FLOPs of a step, and the peaks of GPUs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
)

from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.training.flops import (
    StepFlops,
    frame_flops,
    language_flops,
    peak_flops,
    peak_of_name,
    token_flops,
)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name_or_not_at_all(name, peak) -> None:
    assert peak_of_name(name) == peak


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_trained_frozen_and_checkpointed_parameters_count_6_4_and_2_more() -> None:
    trained, frozen = nn.Linear(3, 5, bias=False), nn.Linear(3, 7, bias=False)
    frozen.requires_grad_(False)
    parameters = [*trained.parameters(), *frozen.parameters()]
    assert token_flops(parameters, again=False) == 6 * 15 + 4 * 21
    assert token_flops(parameters, again=True) == 8 * 15 + 6 * 21


def test_frames_are_measured_and_nothing_changes() -> None:
    extractor = FeatureExtractor(VisualEncoder(width=8)).train()
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    small, large = frame_flops(extractor, 28), frame_flops(extractor, 56)
    # The temporal module costs the same for each size; the backbone about four times.
    assert 2 * small < large < 4.5 * small
    after = extractor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert extractor.training and extractor.encoder.backbone.training


def test_a_convolution_is_measured_exactly() -> None:
    """2 FLOPs for each weight and output pixel."""

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)

        def forward(self, pixels_NCHW, num_frames_B):
            return self.conv(pixels_NCHW)

    assert frame_flops(Convolution(), 10) == 2 * (3 * 4 * 9) * 100  # type: ignore[arg-type]


def test_the_estimate_for_an_llm_is_what_a_forward_and_backward_pass_costs() -> None:
    """16 tokens of a width of 64: attention, which is left out, is a small part."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, vocab_size=100,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    llm = LlamaForCausalLM(config)
    embeddings = torch.randn(1, 16, 64, requires_grad=True)
    for frozen in (False, True):
        llm.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            llm(
                inputs_embeds=embeddings, attention_mask=torch.ones(1, 16)
            ).logits.sum().backward()
        estimate = language_flops(llm, again=False).of(0, 16)
        assert estimate == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_frames_pass_the_encoder_and_targets_the_decoder() -> None:
    config = MBartConfig(
        d_model=32, encoder_layers=3, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        vocab_size=1000, max_position_embeddings=64,
    )  # fmt: skip
    llm = MBartForConditionalGeneration(config)
    flops = language_flops(llm, again=False)
    encoder = sum(p.numel() for p in llm.get_encoder().layers.parameters())
    decoder = sum(p.numel() for p in llm.get_decoder().layers.parameters())
    # Norms and positions are a few more.
    assert flops.per_frame == pytest.approx(6 * encoder, rel=0.2)
    assert flops.per_target == pytest.approx(6 * (decoder + 32 * 1000), rel=0.2)


def test_a_step_is_the_sum_over_frames_and_targets() -> None:
    assert StepFlops(per_frame=3.0, per_target=5.0).of(10, 4) == 50
