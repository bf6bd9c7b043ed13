"""SignTranslator: from frames or visual features to sentences, by a language model.

B clips, N packed frames, S input tokens (visual tokens and the text around them), L target
tokens, P start tokens, M text tokens around the visual tokens of a batch, D visual width, E
language width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Wording
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.lengths import pad_parts
from flallm_ds.models.llm.source import ids_alone
from flallm_ds.models.llm.word_scale import own_scale, probe_of, word_scale
from flallm_ds.models.loss import Head, LossKind, token_loss


@dataclass(frozen=True)
class Beam:
    """The settings of a beam search."""

    num_beams: int = 5
    length_penalty: float = 1.0
    max_new_tokens: int = 100
    # hypotheses of each clip, at most num_beams
    num_return: int = 1


@dataclass(frozen=True)
class Candidate:
    """One hypothesis.

    ids: without start tokens, up to the end of sentence if there is one.
    """

    ids: tuple[int, ...]
    # Log probability / length ** length_penalty; None if one hypothesis is returned.
    score: float | None = None


class SignTranslator(nn.Module):
    """The modules that a stage trains: [visual encoder,] adapter and language model.

    visual: a visual encoder that is trained as well; None if the encoder is frozen, and its
    features are the inputs. language_model: Light-T or an LLM. loss: see models/loss.py.
    """

    def __init__(
        self,
        visual: nn.Module | None,
        adapter: Adapter,
        language_model: Any,
        codec: TextCodec,
        loss: LossKind = "auto",
    ) -> None:
        super().__init__()
        self.visual = visual
        self.adapter = adapter
        self.language_model = language_model
        # Keep only the ids: other settings would change every search and go into exports.
        language_model.generation_config = ids_alone(language_model.generation_config)
        self.decoder_only = not language_model.config.is_encoder_decoder
        self.pad_id, self.eos_id = codec.pad_id, codec.eos_id
        self.loss = loss
        self._head = Head.of(language_model)
        # The text around visual tokens is passed as embeddings. An LLM may scale embedded
        # text outside its embedding module; this factor does the same.
        own = own_scale(language_model.get_input_embeddings())
        self._words_scale = word_scale(probe_of(language_model)) / own

    def visual_tokens(
        self, inputs: torch.Tensor, num_frames_B: torch.Tensor
    ) -> torch.Tensor:
        """Return tokens_NE, the embeddings of the visual tokens.

        inputs: pixels_NCHW if the translator has a visual encoder, else features_ND.
        """
        features_ND = inputs
        if self.visual is not None:
            features_ND = self.visual(inputs, num_frames_B)
        # Types may differ: an fp32 encoder with a bf16 engine, or an fp32 adapter with a
        # bf16 LLM.
        autocast = torch.is_autocast_enabled(features_ND.device.type)
        if not autocast:
            features_ND = features_ND.to(next(self.adapter.parameters()).dtype)
        tokens_NE: torch.Tensor = self.adapter(features_ND)
        if not autocast:
            tokens_NE = tokens_NE.to(self.language_model.dtype)
        return tokens_NE

    def source(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        wordings: Sequence[Wording],
        targets: Sequence[Sequence[int]],
        side: Literal["left", "right"],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (embeddings_BSE, mask_BS) of the input.

        The input of a clip is: text before, visual tokens, text after, target. side: where
        shorter clips are padded.
        """
        tokens_NE = self.visual_tokens(inputs, num_frames_B)
        videos = torch.split(tokens_NE, num_frames_B.tolist())

        # Two parts of text for each clip: before its visual tokens, and after them.
        parts: list[Sequence[int]] = []
        for wording, target in zip(wordings, targets, strict=True):
            parts += [wording.before, (*wording.after, *target)]
        ids = list(chain.from_iterable(parts))
        # Without text an encoder-decoder needs no embedding. A decoder-only LLM calls it
        # anyway, because a rank without clips must call it as the others do.
        if not ids and not self.decoder_only:
            return pad_parts(videos, side)

        # One call of the embedding for the whole batch: under ZeRO-3 each call is a gather.
        ids_M = torch.tensor(ids, dtype=torch.long, device=tokens_NE.device)
        words_ME = self.language_model.get_input_embeddings()(ids_M)
        if self._words_scale != 1.0:
            words_ME = words_ME * self._words_scale

        # Put the two parts of each clip around its visual tokens.
        words = torch.split(words_ME, list(map(len, parts)))
        rows = []
        for before, video, after in zip(words[::2], videos, words[1::2], strict=True):
            rows.append(torch.cat([before, video, after]))
        return pad_parts(rows, side)

    def forward(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        wordings: Sequence[Wording],
        target_ids_BL: torch.Tensor,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Return the cross entropy summed over the target tokens (ids other than -100).

        inputs: as of `visual_tokens`. wordings: the text around each clip.
        """
        states = self._encoder_decoder_states
        if self.decoder_only:
            states = self._decoder_only_states
        states_NE = states(inputs, num_frames_B, wordings, target_ids_BL)
        targets_N = target_ids_BL[target_ids_BL != -100]
        # The states are logits already.
        if self._head is None:
            logits_NV = states_NE.float()
            return F.cross_entropy(
                logits_NV, targets_N, label_smoothing=label_smoothing, reduction="sum"
            )
        return token_loss(self._head, states_NE, targets_N, label_smoothing, self.loss)

    def _decoder_only_states(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        wordings: Sequence[Wording],
        target_ids_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Return the states that predict the target tokens, packed.

        They are logits if the head of the LLM is not of a verified type.
        """
        # The LLM reads each target without its last token, and predicts all tokens of it.
        targets, read = [], []
        for row in target_ids_BL.tolist():
            target = [i for i in row if i != -100]
            targets.append(target)
            read.append(target[:-1])
        embeddings_BSE, mask_BS = self.source(inputs, num_frames_B, wordings, read, "right")
        llm = self.language_model
        module = llm if self._head is None else llm.get_decoder()
        out = module(inputs_embeds=embeddings_BSE, attention_mask=mask_BS, use_cache=False)
        states_BSE = out.logits if self._head is None else out.last_hidden_state

        # The last n states of a clip predict its n target tokens.
        parts = []
        ends = mask_BS.sum(1).tolist()
        for row_SE, end, target in zip(states_BSE, ends, targets, strict=True):
            parts.append(row_SE[end - len(target) : end])
        return torch.cat(parts)

    def _encoder_decoder_states(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        wordings: Sequence[Wording],
        target_ids_BL: torch.Tensor,
    ) -> torch.Tensor:
        """Return the states that predict the target tokens, as `_decoder_only_states`."""
        no_targets: list[Sequence[int]] = [()] * len(wordings)
        embeddings_BSE, mask_BS = self.source(
            inputs, num_frames_B, wordings, no_targets, "right"
        )

        # The decoder reads the start tokens and each target without its last token.
        start_BP = _start_ids(wordings, target_ids_BL.device)
        # Targets are padded with -100, and the embedding has no such row.
        read_BL = target_ids_BL[:, :-1]
        read_BL = read_BL.masked_fill(read_BL == -100, self.pad_id)
        decoder_ids_BL = torch.cat([start_BP, read_BL], 1)

        llm = self.language_model
        if self._head is None:
            states_BLE = llm(
                inputs_embeds=embeddings_BSE,
                attention_mask=mask_BS,
                decoder_input_ids=decoder_ids_BL,
                use_cache=False,
            ).logits
        else:
            encoded = llm.get_encoder()(
                inputs_embeds=embeddings_BSE, attention_mask=mask_BS
            )
            memory_BSE = encoded.last_hidden_state
            states_BLE = llm.get_decoder()(
                input_ids=decoder_ids_BL,
                encoder_hidden_states=memory_BSE,
                encoder_attention_mask=mask_BS,
                use_cache=False,
            ).last_hidden_state

        # The last start token predicts the first target token.
        predicting_BLE = states_BLE[:, start_BP.shape[1] - 1 :]
        states_NE: torch.Tensor = predicting_BLE[target_ids_BL != -100]
        return states_NE

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor,
        num_frames_B: torch.Tensor,
        wordings: Sequence[Wording],
        beam: Beam,
        synced: bool = False,
        streamer: Any = None,
    ) -> list[list[Candidate]]:
        """Return `beam.num_return` hypotheses of each clip, best first.

        synced: all ranks generate until the last one has finished, as the gathers of ZeRO-3
        require. streamer: a streamer of transformers, which gets the start and each token
        of a single clip if num_beams is 1.
        """
        # A decoder-only LLM continues its input, so the padding is on the left.
        no_targets: list[Sequence[int]] = [()] * len(wordings)
        side: Literal["left", "right"] = "left" if self.decoder_only else "right"
        embeddings_BSE, mask_BS = self.source(
            inputs, num_frames_B, wordings, no_targets, side
        )
        start: dict[str, Any] = {}
        num_start = 0
        if not self.decoder_only:
            start_BP = _start_ids(wordings, mask_BS.device)
            num_start = start_BP.shape[1]
            first_B = start_BP[:, 0].tolist()
            start = {"decoder_input_ids": start_BP, "decoder_start_token_id": first_B}
        # Beam search has no scores for a single beam, and one hypothesis needs none.
        scored = beam.num_return > 1
        found = self.language_model.generate(
            inputs_embeds=embeddings_BSE,
            attention_mask=mask_BS,
            num_beams=beam.num_beams,
            num_return_sequences=beam.num_return,
            length_penalty=beam.length_penalty,
            max_new_tokens=beam.max_new_tokens,
            do_sample=False,
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
            synced_gpus=synced,
            streamer=streamer,
            return_dict_in_generate=True,
            output_scores=scored,
            **start,
        )
        # The rows are num_return hypotheses of the first clip, then of the next one.
        scores: list[float | None] = [None] * len(found.sequences)
        if scored:
            scores = found.sequences_scores.tolist()
        candidates = []
        for ids, score in zip(found.sequences.tolist(), scores, strict=True):
            candidates.append(Candidate(self._until_end(ids[num_start:]), score))
        starts = range(0, len(candidates), beam.num_return)
        return [candidates[i : i + beam.num_return] for i in starts]

    def _until_end(self, ids: list[int]) -> tuple[int, ...]:
        """Return the ids up to the first end of sentence; all ids if there is none."""
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        return tuple(ids)


def _start_ids(wordings: Sequence[Wording], device: torch.device) -> torch.Tensor:
    """Return start_BP, the first decoder tokens of each clip."""
    starts = [wording.start for wording in wordings]
    return torch.tensor(starts, dtype=torch.long, device=device)
