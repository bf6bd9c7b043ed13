"""From frames or visual features to a sentence: [visual encoder ->] adapter -> encoder-decoder model.

B clips, N packed frames, S visual tokens, L text tokens, D visual width, E language width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from flallm_ds.models.adapters import Adapter
from flallm_ds.models.lengths import pad_packed
from flallm_ds.models.visual_encoder import VisualEncoder


@dataclass(frozen=True)
class Beam:
    """How sentences are searched for."""

    num_beams: int = 5
    length_penalty: float = 1.0
    max_new_tokens: int = 100


class SignTranslator(nn.Module):
    """What is trained in a stage.

    visual: trained with the rest in stage 1; None in stage 2, whose frozen encoder stays outside and whose
    inputs are its features. start_id: the decoder's first token, the target language's id.
    """

    def __init__(
        self, visual: VisualEncoder | None, adapter: Adapter, language_model: Any, start_id: int
    ) -> None:
        super().__init__()
        self.visual = visual
        self.adapter = adapter
        self.language_model = language_model
        self.start_id = start_id

    def memory(self, inputs: torch.Tensor, num_frames_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(memory_BSE, mask_BS): what stands in place of the language model's source words.

        inputs: pixels_NCHW where the visual encoder is inside, features_ND where it is not.
        """
        features_ND = self.visual(inputs, num_frames_B) if self.visual is not None else inputs
        if not torch.is_autocast_enabled(features_ND.device.type):
            features_ND = features_ND.to(
                next(self.adapter.parameters()).dtype
            )  # a bf16 engine, an fp32 encoder
        return pad_packed(self.adapter(features_ND), num_frames_B)

    def forward(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        target_ids_BL: torch.Tensor,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Cross entropy summed over the target tokens (those that are not -100)."""
        memory_BSE, mask_BS = self.memory(inputs, num_frames_B)
        start_B1 = target_ids_BL.new_full((len(target_ids_BL), 1), self.start_id)
        pad_id = self.language_model.config.pad_token_id
        shifted_BL = torch.cat(
            [start_B1, target_ids_BL[:, :-1].masked_fill(target_ids_BL[:, :-1] == -100, pad_id)], 1
        )
        logits_BLV = self.language_model(
            inputs_embeds=memory_BSE, attention_mask=mask_BS, decoder_input_ids=shifted_BL, use_cache=False
        ).logits
        return F.cross_entropy(
            logits_BLV.flatten(0, 1).float(),
            target_ids_BL.flatten(),
            ignore_index=-100,
            label_smoothing=label_smoothing,
            reduction="sum",
        )

    @torch.no_grad()
    def generate(
        self, inputs: torch.Tensor, num_frames_B: torch.Tensor, beam: Beam, synced: bool = False
    ) -> list[list[int]]:
        """Token ids of the best hypothesis of each clip, specials included.

        synced: all ranks keep generating until the last is done, as ZeRO-3's gathers need.
        """
        memory_BSE, mask_BS = self.memory(inputs, num_frames_B)
        ids = self.language_model.generate(
            inputs_embeds=memory_BSE,
            attention_mask=mask_BS,
            decoder_start_token_id=self.start_id,
            num_beams=beam.num_beams,
            length_penalty=beam.length_penalty,
            max_new_tokens=beam.max_new_tokens,
            do_sample=False,
            synced_gpus=synced,
        )
        return list(ids.tolist())
