"""The pretrained LLM: loaded by `from_pretrained` from a hub id or folder, its vocabulary trimmed offline."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from flallm_ds.data.text import TextCodec
from flallm_ds.errors import UserError

# What transformers raises for a folder or hub id that does not hold a model it can load.
_LOAD_ERRORS = (OSError, ValueError, KeyError, SafetensorError)


def load_llm(name: str, dropout: float | None = None, attention_dropout: float | None = None) -> Any:
    """The encoder-decoder model `name` in fp32; dropouts replace its config's where given.

    Under ZeRO-3 (an `HfDeepSpeedConfig` is alive) rank 0 reads the file and no rank holds a whole copy.
    Raises UserError where there is none or it is no encoder-decoder.
    """
    given = {"dropout": dropout, "attention_dropout": attention_dropout}
    try:
        config = AutoConfig.from_pretrained(name)
        for field, value in given.items():
            if value is not None and hasattr(config, field):
                setattr(config, field, value)
        model = AutoModelForSeq2SeqLM.from_pretrained(name, config=config, dtype=torch.float32)
    except _LOAD_ERRORS as error:
        raise UserError(
            f"the LLM {name} must load as an encoder-decoder model, but did not: "
            f"{str(error).splitlines()[0]} Check --llm.name."
        ) from error
    for stored in (model.config, model.generation_config):
        for field in ("forced_bos_token_id", "forced_eos_token_id"):
            if getattr(stored, field, None) is not None:
                setattr(
                    stored, field, None
                )  # our decoder starts with the language, and sentences end themselves
    return model


def trim_llm(name: str, codec: TextCodec, out: Path) -> None:
    """Write the model to `out` with the embedding rows of the codec's kept pieces alone, codec beside it.

    Run once on one rank, never under zero.Init. Source: FLa-LLM, section 4.1 (2,215 pieces on PHOENIX14T).
    """
    model = load_llm(name)
    kept = torch.from_numpy(codec.kept_ids)
    embedding = model.get_input_embeddings().weight.data[kept].clone()
    head = model.get_output_embeddings().weight.data[kept].clone()
    untied = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    bias = getattr(model, "final_logits_bias", None)
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    if untied:  # resizing ties what the config says is tied, although mT5's weights are not
        model.get_output_embeddings().weight = torch.nn.Parameter(head.clone())
    model.get_input_embeddings().weight.data.copy_(embedding)
    model.get_output_embeddings().weight.data.copy_(head)
    if bias is not None:
        model.final_logits_bias.copy_(bias[:, kept])
    for config in (model.config, model.generation_config):
        _renumber(config, codec)
    model.save_pretrained(out)
    codec.save(out)


def _renumber(config: Any, codec: TextCodec) -> None:
    """Write the trimmed ids of the specials into a config."""
    for field in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(config, field, None)
        if isinstance(value, int):
            setattr(config, field, codec.trimmed_id(value))
    config.decoder_start_token_id = codec.start_id
    config.eos_token_id = codec.eos_id
