"""Activation checkpointing gives the same losses, gradients and statistics in less
memory."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    MBartConfig,
    MBartForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
)

from flallm_ds.errors import UserError
from flallm_ds.models.checkpointing import checkpoint_llm, checkpoint_stages, stages_of
from flallm_ds.models.visual_encoder import VisualEncoder


def kept_bytes(
    forward: Callable[[], torch.Tensor], module: nn.Module
) -> tuple[torch.Tensor, int]:
    """Return (the result, bytes that autograd keeps for the backward pass).

    The parameters and buffers of the module do not count.
    """
    own = set()
    for tensor in (*module.parameters(), *module.buffers()):
        own.add(tensor.untyped_storage().data_ptr())
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for storage in storages.values())


def two_copies(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    first, second = build(), build()
    second.load_state_dict(first.state_dict())
    return first.train(), second.train()


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    for (name, tensor), other in zip(first.named_buffers(), second.buffers(), strict=True):
        assert torch.equal(tensor, other), name
    for (name, parameter), other in zip(
        first.named_parameters(), second.parameters(), strict=True
    ):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name
            )


def resnet() -> ResNetModel:
    return ResNetModel(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 32, 64],
            depths=[2] * 4,
            layer_type="basic",
        )
    )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_a_checkpointed_stage_updates_its_statistics_once_a_batch(
    momentum: float | None,
) -> None:
    """Momentum None averages the statistics over the micro-batches of a step."""
    plain, checkpointed = two_copies(resnet)
    checkpoint_stages(checkpointed)
    for model in (plain, checkpointed):
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
    for _ in range(2):
        pixels = torch.randn(6, 3, 32, 32)
        losses = []
        for model in (plain, checkpointed):
            loss = model(pixels).pooler_output.pow(2).sum()
            loss.backward()
            losses.append(loss)
        assert torch.equal(*losses)
    assert_same_state(plain, checkpointed)
    for module in checkpointed.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 2
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()


def test_a_checkpointed_backbone_keeps_less_memory_and_gives_the_same_features() -> None:
    plain, checkpointed = two_copies(resnet)
    checkpoint_stages(checkpointed)
    pixels = torch.randn(6, 3, 64, 64)
    _, much = kept_bytes(lambda: plain(pixels).pooler_output.sum(), plain)
    _, little = kept_bytes(lambda: checkpointed(pixels).pooler_output.sum(), checkpointed)
    assert little < 0.6 * much
    with torch.no_grad():
        expected = plain.eval()(pixels).pooler_output
        # Both have updated their statistics with one batch.
        assert torch.equal(checkpointed.eval()(pixels).pooler_output, expected)


@pytest.mark.parametrize(
    ("build", "stages"),
    [
        (resnet, 4),
        (
            lambda: ConvNextModel(
                ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1])
            ),
            4,
        ),
        (
            lambda: Dinov2Model(
                Dinov2Config(
                    hidden_size=16,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=28,
                )
            ),
            3,
        ),
        (
            lambda: SwinModel(
                SwinConfig(
                    embed_dim=8,
                    depths=[1, 1],
                    num_heads=[1, 2],
                    window_size=2,
                    image_size=32,
                )
            ),
            2,
        ),
    ],
)
def test_the_stages_of_other_backbones_are_found(
    build: Callable[[], nn.Module], stages: int
) -> None:
    plain, checkpointed = two_copies(build)
    assert len(stages_of(plain)) == stages
    checkpoint_stages(checkpointed)
    pixels = torch.randn(2, 3, 28 if stages == 3 else 32, 28 if stages == 3 else 32)
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(pixels).last_hidden_state.pow(2).sum().backward()
    assert_same_state(plain, checkpointed)


def test_a_network_without_stages_raises_an_error() -> None:
    with pytest.raises(ValueError, match="Sequential must have a list of stages"):
        checkpoint_stages(nn.Sequential(nn.Linear(2, 2)))


def mbart() -> MBartForConditionalGeneration:
    return MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.3, attention_dropout=0.1,
        )
    )  # fmt: skip


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, attention_dropout=0.1,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [mbart, qwen3])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpointed_llm_gives_the_same_loss_and_gradients_with_dropout(
    build: Callable[[], nn.Module], frozen: bool
) -> None:
    """If the LLM is frozen, only the modules before it are trained: the embeddings here."""
    plain, checkpointed = two_copies(build)
    checkpoint_llm(checkpointed)
    embeddings = torch.randn(3, 12, 32, requires_grad=True)
    gradients, kept, losses = [], [], []
    for model in (plain, checkpointed):
        model.requires_grad_(not frozen)
        torch.manual_seed(5)
        decoder = {}
        if build is mbart:
            decoder["decoder_input_ids"] = torch.arange(30).view(3, 10)
        loss, size = kept_bytes(
            lambda model=model, decoder=decoder: (
                model(inputs_embeds=embeddings, **decoder).logits.pow(2).sum()
            ),
            model,
        )
        embeddings.grad = None
        loss.backward()
        losses.append(loss)
        gradients.append(embeddings.grad.clone())
        kept.append(size)
    assert torch.equal(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert_same_state(plain, checkpointed)
    assert kept[1] < 0.5 * kept[0]


def test_an_llm_that_cannot_be_checkpointed_raises_an_error() -> None:
    model = qwen3()
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="must be false for a qwen3 model"):
        checkpoint_llm(model)


# With 32 px the feature map of the last stage is 1 x 1.
@pytest.mark.parametrize("pixels", [32, 64])
def test_a_micro_batch_of_one_clip_of_one_frame_trains_the_visual_encoder(
    pixels: int,
) -> None:
    encoder = VisualEncoder(width=8)
    encoder.train()
    frame = torch.randn(1, 3, pixels, pixels)
    features = encoder(frame, torch.tensor([1]))
    assert features.shape == (1, encoder.feature_width)
    features.sum().backward()
    for name, buffer in encoder.named_buffers():
        assert torch.isfinite(buffer).all(), name
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    several = encoder(torch.randn(3, 3, pixels, pixels), torch.tensor([1, 2]))
    assert several.shape[0] == 3 and several.std() > 0
    encoder.eval()
    assert encoder(frame, torch.tensor([1])).shape == (1, encoder.feature_width)
