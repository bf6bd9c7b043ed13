"""Exports of small models that were not trained, written as the trainer writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.data.index import Index, load_index
from flallm_ds.data.storage.store import LocalStore
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.data.text.prompt import DECODER_ONLY_PROMPT, Instruction
from flallm_ds.models.adapters import Adapter
from flallm_ds.models.feature_extractor import FeatureExtractor
from flallm_ds.models.llm.load import LlmOptions, embedding_scale, llm_width, load_llm
from flallm_ds.models.llm.trim import trim_llm
from flallm_ds.models.llm.tuning import Tuning, tune
from flallm_ds.models.sign_translator import SignTranslator
from flallm_ds.models.visual_encoder import VisualEncoder
from flallm_ds.models.weights import named_state
from tests.helpers.llms import make_tiny_llm

ENCODER_DECODER, DECODER_ONLY = "encoder_decoder", "decoder_only"


def write_export(
    kind: str,
    corpus: Path,
    run: Path,
    tuning: str = "full",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """RUN/best of the stand-in LLM (German) or of a tiny Qwen3 (German and English), both
    trimmed.

    corpus: the tiny one. tuning: of RunConfig. dtype: of the engine. What training would
    have changed is drawn at random.
    """
    texts = list(load_index(corpus / "shards", "train").strings("text"))
    run.mkdir(parents=True)
    if kind == ENCODER_DECODER:
        name, instruction = corpus / "llm", Instruction(language="de_DE", languages=("de",))
    else:
        prompts = [
            DECODER_ONLY_PROMPT.format(
                sign_language=f"{language} Sign Language", language=language, video=""
            )
            for language in ("German", "English", "American")
        ]
        name = make_tiny_llm("qwen3", run / "llm", [*texts, *prompts])
        instruction = Instruction(decoder_only=True, languages=("de", "en"))
    codec = TextCodec.for_training_text(str(name), instruction, texts, trim=True)
    (run / "llm_trimmed").mkdir()
    trim_llm(str(name), codec, run / "llm_trimmed")
    options = {
        "llm.name": name, "llm.tune": tuning, "visual.width": 4, "data.frame_size": 40, "data.crop_size": 32,
        "visual.chunk_frames": 3, "eval.max_new_tokens": 12,
    }  # fmt: skip
    config = RunConfig(stage="llm", run=str(run), visual_run="v")
    config = config.with_overrides(
        {option: str(value) for option, value in options.items()}
    )
    (run / "config.json").write_text(config.to_json(), encoding="utf-8")
    torch.manual_seed(0)
    llm = load_llm(str(run / "llm_trimmed"), LlmOptions())
    tune(llm, Tuning(config.llm.tune))
    extractor = FeatureExtractor(VisualEncoder(width=4)).eval()
    adapter = Adapter(extractor.feature_width, llm_width(llm), embedding_scale(llm))
    model = SignTranslator(extractor, adapter, llm, codec).eval()
    _change(model, [i for text in texts[:20] for i in codec.encode(text)[:-1]])
    model.adapter.to(dtype)
    llm.to(dtype)
    folder = run / "best"
    folder.mkdir()
    settings = settings_of(config, extractor)
    state = named_state(model)
    if settings["base"]:
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        state = (
            (n, t) for n, t in state if n in trained or not n.startswith("language_model.")
        )
    export.write(folder, settings, state, llm, codec)
    return folder


def settings_of(config: RunConfig, extractor: FeatureExtractor) -> dict[str, Any]:
    arrays = {
        "height": np.array([79]),
        "width": np.array([64]),
        "num_frames": np.array([20]),
        "fps": np.array([12.5]),
    }
    index = Index(
        LocalStore("shards"), "toy", "train", "ab", (), arrays, options={"fps": 12.5}
    )
    dev = {
        "bleu1": 4.5, "bleu2": 3.5, "bleu3": 2.5, "bleu4": 1.5, "rouge_l": 5.0, "chrf": 6.0,
        "bleu_signature": "nrefs:1|tok:13a",
    }  # fmt: skip
    return export.settings_of(
        config,
        index,
        {"dev": dev, "epoch": 3},
        extractor.settings(),
        extractor.encoder.settings(),
    )


@torch.no_grad()
def _change(model: SignTranslator, words: list[int]) -> None:
    """As if trained: numbers that no new model has, louder visual tokens, louder tokens
    of real words."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
        if name.startswith("adapter."):
            parameter.mul_(3)
    heads = {
        llm.weight
        for llm in (
            model.language_model.get_input_embeddings(),
            model.language_model.lm_head,
        )
    }
    for head in heads:
        if head.requires_grad:
            head[sorted(set(words))] *= 4
