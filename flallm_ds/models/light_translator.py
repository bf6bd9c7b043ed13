"""Light-T: the small, randomly initialised translator of stage 1, in four sizes."""

import math
from dataclasses import dataclass

import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from flallm_ds.data.text.codec import TextCodec


@dataclass(frozen=True)
class Size:
    """Numbers of layers and heads, and widths, of Light-T."""

    layers: int  # of the encoder and of the decoder
    heads: int
    width: int
    ffn: int


# FLa-LLM, Table 7. With a vocabulary of about 2,430 entries they have 3.61 M, 18.25 M,
# 25.61 M and 124.66 M parameters.
SIZES = {
    "tiny": Size(1, 4, 256, 1024),
    "small": Size(2, 4, 512, 2048),
    "base": Size(3, 8, 512, 2048),
    "large": Size(4, 8, 1024, 4096),
}


def build_light_translator(
    size: str, codec: TextCodec, dropout: float
) -> MBartForConditionalGeneration:
    """Build Light-T with random weights, learned positions and a head that is not tied.

    size: a key of SIZES. dropout: also of the attention weights.
    """
    s = SIZES[size]
    config = MBartConfig(
        vocab_size=codec.vocab_size,
        d_model=s.width,
        encoder_layers=s.layers,
        decoder_layers=s.layers,
        encoder_attention_heads=s.heads,
        decoder_attention_heads=s.heads,
        encoder_ffn_dim=s.ffn,
        decoder_ffn_dim=s.ffn,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=0.0,
        max_position_embeddings=1024,
        scale_embedding=False,
        tie_word_embeddings=False,
        pad_token_id=codec.pad_id,
        bos_token_id=codec.eos_id,
        eos_token_id=codec.eos_id,
        # The search is always given its start, by TextCodec.wording.
        decoder_start_token_id=codec.eos_id,
        forced_eos_token_id=None,
    )
    return light_translator_from_config(config)


def light_translator_from_config(config: MBartConfig) -> MBartForConditionalGeneration:
    """Build Light-T from the config.json of an export, with random weights."""
    model = MBartForConditionalGeneration(config)
    # Learned positions that start as sinusoids. Visual tokens have unit size: next to them
    # mBART's initial positions (0.02) have no effect for thousands of steps.
    positions = model.model.encoder.embed_positions.weight
    with torch.no_grad():
        positions.copy_(0.5 * sines_then_cosines(*positions.shape))
    # The encoder reads visual tokens: the decoder's word embedding is the only one.
    model.model.shared = model.model.decoder.embed_tokens
    model.model.encoder.embed_tokens = model.model.decoder.embed_tokens
    return model


def sines_then_cosines(length: int, width: int) -> torch.Tensor:
    """Return (length, width): all sines by falling frequency, then all cosines.

    Source: Vaswani et al. 2017, section 3.5. In models/llm/standin.py sines and cosines
    alternate, and frequencies are rounded in another way.
    """
    # One frequency for each pair of a sine and a cosine.
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)
    angle = torch.arange(length).unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
