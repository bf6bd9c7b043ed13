"""Which visual tokens a translator attended to when it wrote each token of a sentence.

S visual tokens of one clip, L tokens of its sentence, H heads, Q queries, K keys.
"""

from collections.abc import Sequence
from typing import Any

import torch

from flallm_ds.data.text.prompt import Wording
from flallm_ds.models.sign_translator import SignTranslator

# The last layers are nearest to the choice of a token; the first ones attend more widely.
NUM_LAYERS = 2


@torch.no_grad()
def visual_attention(
    model: SignTranslator,
    features_SD: torch.Tensor,
    wording: Wording,
    target_ids: Sequence[int],
) -> torch.Tensor | None:
    """Return attention_LS of each token of a sentence to each visual token of one clip.

    It is the mean over the heads of the last `NUM_LAYERS` layers while the model reads the
    sentence: the cross-attention of an encoder-decoder, the self-attention of a
    decoder-only LLM. A row sums to at most 1; the rest is attention to text. None if the
    LLM has no attention of this kind, as a state-space model.
    """
    llm = model.language_model
    implementation = llm.config._attn_implementation
    # The other implementations do not compute the weights of the attention.
    llm.set_attn_implementation("eager")
    try:
        read = _self_attention if model.decoder_only else _cross_attention
        layers_HLS = read(model, features_SD, wording, target_ids)
    finally:
        llm.set_attn_implementation(implementation)
    if not layers_HLS:
        return None
    begin = len(wording.before)
    visual = slice(begin, begin + len(features_SD))
    chosen = [layer_HLS.float().mean(0)[:, visual] for layer_HLS in layers_HLS]
    return torch.stack(chosen[-NUM_LAYERS:]).mean(0)


def _cross_attention(
    model: SignTranslator,
    features_SD: torch.Tensor,
    wording: Wording,
    target_ids: Sequence[int],
) -> list[torch.Tensor]:
    """Return (H, L, input) of each layer of the decoder."""
    num_frames_1 = torch.tensor([len(features_SD)])
    embeds_1SE, mask_1S = model.source(features_SD, num_frames_1, [wording], [()], "right")
    # The last start token predicts the first token of the sentence.
    read = [*wording.start, *target_ids[:-1]]
    out = model.language_model(
        inputs_embeds=embeds_1SE,
        attention_mask=mask_1S,
        decoder_input_ids=torch.tensor([read], device=embeds_1SE.device),
        use_cache=False,
        output_attentions=True,
    )
    shape = len(read), embeds_1SE.shape[1]
    return _last_queries(out.get("cross_attentions"), shape, len(target_ids))


def _self_attention(
    model: SignTranslator,
    features_SD: torch.Tensor,
    wording: Wording,
    target_ids: Sequence[int],
) -> list[torch.Tensor]:
    """Return (H, L, input) of each layer of a decoder-only LLM."""
    num_frames_1 = torch.tensor([len(features_SD)])
    embeds_1SE, mask_1S = model.source(
        features_SD, num_frames_1, [wording], [target_ids[:-1]], "right"
    )
    out = model.language_model(
        inputs_embeds=embeds_1SE,
        attention_mask=mask_1S,
        use_cache=False,
        output_attentions=True,
    )
    length = embeds_1SE.shape[1]
    return _last_queries(out.get("attentions"), (length, length), len(target_ids))


def _last_queries(layers: Any, shape: tuple[int, int], num: int) -> list[torch.Tensor]:
    """Return the last `num` queries of each layer whose attention has this shape (Q, K)."""
    found = []
    # An LLM with layers of several kinds has None, or another shape, for some of them.
    for layer_1HQK in layers or ():
        if isinstance(layer_1HQK, torch.Tensor) and layer_1HQK.shape[2:] == shape:
            found.append(layer_1HQK[0, :, -num:])
    return found
