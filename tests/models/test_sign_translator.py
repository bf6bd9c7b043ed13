"""SignTranslator: losses, gradients and generation with Light-T and a decoder-only LLM."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import Instruction, Wording
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.light_translator import build_light_translator
from flallm_ds.models.sign_translator import Beam, SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder

WIDTH = 12


@pytest.fixture
def translator(codec):
    torch.manual_seed(0)
    light_t = build_light_translator("tiny", codec, dropout=0.1)
    with torch.no_grad():
        for parameter in light_t.parameters():
            parameter.mul_(4)  # far from uniform predictions
    return SignTranslator(None, Adapter(WIDTH, 256), light_t, codec).eval()


@pytest.fixture
def batch(codec):
    """Features of three clips of 7, 3 and 5 frames, the text around them, and the
    targets."""
    torch.manual_seed(1)
    ids = [codec.encode(t) for t in ("regen sonne wind morgen", "nebel", "wolken schnee")]
    target_ids_BL = torch.full((3, max(map(len, ids))), -100)
    for row, sentence in zip(target_ids_BL, ids, strict=True):
        row[: len(sentence)] = torch.tensor(sentence)
    return (
        torch.randn(15, WIDTH),
        torch.tensor([7, 3, 5]),
        [codec.for_light_t().wording("de")] * 3,
        target_ids_BL,
    )


def parts_of(batch):
    features_ND, num_frames_B, wordings, target_ids_BL = batch
    parts = []
    clips = features_ND.split(num_frames_B.tolist())
    for clip_ND, row_L in zip(clips, target_ids_BL, strict=True):
        target_ids_1L = row_L[row_L != -100][None]
        parts.append((clip_ND, torch.tensor([len(clip_ND)]), wordings[:1], target_ids_1L))
    return parts


def test_the_loss_is_the_smoothed_cross_entropy_of_each_next_token(translator, batch):
    """Expected value: for each clip and token, run the decoder on the tokens before it."""
    smoothing, expected = 0.2, 0.0
    with torch.no_grad():
        for features, _, wordings, ids in parts_of(batch):
            memory = translator.adapter(features)[None]
            fed = list(wordings[0].start)
            for target in ids[0].tolist():
                logits = translator.language_model(
                    inputs_embeds=memory, decoder_input_ids=torch.tensor([fed])
                ).logits[0, -1]
                log_p = logits.log_softmax(-1)
                expected -= (1 - smoothing) * log_p[target] + smoothing * log_p.mean()
                fed.append(target)
        loss = translator(*batch, smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_loss_of_a_batch_is_the_sum_of_its_clips(translator, batch):
    with torch.no_grad():
        alone = sum(translator(*part).item() for part in parts_of(batch))
        assert translator(*batch).item() == pytest.approx(alone, rel=1e-4)


def test_the_loss_depends_on_the_video(translator, batch):
    features_ND, *rest = batch
    with torch.no_grad():
        assert abs(translator(*batch) - translator(-features_ND, *rest)) > 1e-2


def test_a_dummy_clip_has_zero_loss_and_zero_gradients(translator, batch):
    features_ND, num_frames_B, wordings, _ = batch
    translator.adapter.requires_grad_(True)
    dummy = torch.full((1, 1), -100)
    loss = translator(features_ND[:7], num_frames_B[:1], wordings[:1], dummy, 0.2)
    loss.backward()
    assert loss.item() == 0.0
    gradients = [p.grad for p in translator.parameters() if p.grad is not None]
    assert gradients
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_dummy_clips_in_a_batch_do_not_change_its_loss(translator, batch):
    *rest, target_ids_BL = batch
    with_dummy = target_ids_BL.clone()
    with_dummy[1:] = -100
    with torch.no_grad():
        alone = translator(*parts_of(batch)[0]).item()
        assert translator(*rest, with_dummy).item() == pytest.approx(alone, rel=1e-4)


def test_generation_does_not_depend_on_the_batch(translator, batch, codec):
    beam = Beam(num_beams=2, max_new_tokens=8)
    together = translator.generate(*batch[:3], beam)
    best = [clip[0].ids for clip in together]
    for part, ids in zip(parts_of(batch), best, strict=True):
        assert translator.generate(*part[:3], beam)[0][0].ids == ids
    assert len(set(best)) == 3


def test_the_search_with_light_t_ignores_its_generation_config(translator, batch, codec):
    light_t = translator.language_model
    beam = Beam(num_beams=2, max_new_tokens=8)
    expected = translator.generate(*batch[:3], beam)
    light_t.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, min_length=7, forced_eos_token_id=5
    )
    assert translator.generate(*batch[:3], beam) != expected  # these have an effect
    again = SignTranslator(None, translator.adapter, light_t, codec).eval()
    assert again.generate(*batch[:3], beam) == expected


def test_generation_stops_after_max_new_tokens(translator, batch):
    beam = Beam(num_beams=1, max_new_tokens=3)
    ((said,),) = translator.generate(batch[0][:7], torch.tensor([7]), batch[2][:1], beam)
    assert len(said.ids) <= 3


def test_greedy_generation_picks_the_likeliest_next_token(translator, batch, codec):
    features, num_frames, wordings, _ = parts_of(batch)[0]
    ((said,),) = translator.generate(
        features, num_frames, wordings, Beam(num_beams=1, max_new_tokens=6)
    )
    with torch.no_grad():
        fed = torch.tensor([[*wordings[0].start, *said.ids[:-1]]])
        logits = translator.language_model(
            inputs_embeds=translator.adapter(features)[None], decoder_input_ids=fed
        ).logits[0]
    assert logits.argmax(-1).tolist() == list(said.ids)


def test_in_stage_1_gradients_reach_every_part_of_the_visual_encoder(codec):
    torch.manual_seed(0)
    visual = VisualEncoder(width=4)
    light_t = build_light_translator("tiny", codec, dropout=0.1)
    model = SignTranslator(
        visual, Adapter(visual.feature_width, 256), light_t, codec
    ).train()
    ids = torch.tensor([codec.encode("regen wind")] * 2)
    wordings = [codec.for_light_t().wording("de")] * 2
    model(torch.randn(5, 3, 32, 32), torch.tensor([2, 3]), wordings, ids, 0.2).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_the_adapter_multiplies_its_output_by_its_scale(batch):
    torch.manual_seed(0)
    plain = Adapter(WIDTH, 16)
    scaled = Adapter(WIDTH, 16, scale=4.0)
    scaled.load_state_dict(plain.state_dict())
    assert torch.allclose(scaled(batch[0]), 4 * plain(batch[0]))


def test_features_of_another_type_are_cast_to_that_of_the_adapter(translator, batch):
    """A bf16 engine with an fp32 encoder."""
    translator.bfloat16()
    features_ND, *rest = batch
    with torch.no_grad():
        assert translator(features_ND, *rest).dtype == torch.float32


def decoder_only(codec, seed=0):
    """Return (translator, codec) of a tiny Llama with a prompt around the visual tokens."""
    config = LlamaConfig(
        vocab_size=codec.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=codec.pad_id,
    )
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(4)
    instruction = Instruction(
        decoder_only=True, languages=("de",), prompt="regen {video} sonne wind"
    )
    prompting = TextCodec(codec.tokenizer, instruction, codec.kept_ids)
    return SignTranslator(None, Adapter(WIDTH, 32), llm, prompting).eval(), prompting


def test_the_loss_of_a_decoder_only_llm_counts_the_target_tokens_alone(codec, batch):
    """Expected value: for each target token, run the LLM on the prompt and the tokens
    before."""
    translator, codec = decoder_only(codec)
    wording = codec.wording("de")
    assert wording.before and wording.after and not wording.start
    features_ND, num_frames_B, _, target_ids_BL = batch
    expected = 0.0
    words = translator.language_model.get_input_embeddings()
    with torch.no_grad():
        for features, _, _, ids in parts_of(batch):
            video = translator.adapter(features)
            for place, target in enumerate(ids[0].tolist()):
                after = torch.tensor([*wording.after, *ids[0, :place].tolist()])
                before = torch.tensor(wording.before)
                fed = torch.cat([words(before), video, words(after)])[None]
                logits = translator.language_model(inputs_embeds=fed).logits[0, -1]
                expected -= logits.log_softmax(-1)[target]
        loss = translator(features_ND, num_frames_B, [wording] * 3, target_ids_BL)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_rank_without_clips_calls_the_embedding_as_well(codec, batch):
    """Even without text around the video: under ZeRO-3 all ranks gather the embedding."""
    translator, codec = decoder_only(codec)
    calls = []
    translator.language_model.get_input_embeddings().register_forward_hook(
        lambda *_: calls.append(1)
    )
    dummy = torch.full((1, 1), -100)
    loss = translator(batch[0][:1], torch.tensor([1]), [Wording()], dummy)
    assert len(calls) == 1 and loss.item() == 0


def test_an_llm_in_bf16_reads_an_fp32_adapter(codec, batch):
    translator, codec = decoder_only(codec)
    features_ND, num_frames_B, _, _ = batch
    translator.language_model.bfloat16()
    found = translator.generate(
        features_ND, num_frames_B, [codec.wording("de")] * 3, Beam(max_new_tokens=4)
    )
    assert all(clip[0].ids for clip in found)


def test_a_decoder_only_llm_generates_the_same_alone_and_in_a_batch(codec, batch):
    translator, codec = decoder_only(codec)
    features_ND, num_frames_B, _, _ = batch
    beam = Beam(num_beams=3, max_new_tokens=8, num_return=2)
    wordings = [codec.wording("de")] * 3
    together = translator.generate(features_ND, num_frames_B, wordings, beam)
    for part, (first, second) in zip(parts_of(batch), together, strict=True):
        ((first_alone, second_alone),) = translator.generate(*part[:2], wordings[:1], beam)
        assert (first.ids, second.ids) == (first_alone.ids, second_alone.ids)
        assert first.score >= second.score
        assert first.score == pytest.approx(first_alone.score, abs=1e-4)
        assert second.score == pytest.approx(second_alone.score, abs=1e-4)
    assert len({clip[0].ids for clip in together}) == 3
