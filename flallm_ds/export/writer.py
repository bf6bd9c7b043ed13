"""Write an export folder."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from flallm_ds.data.text.codec import TextCodec
from flallm_ds.export.format import CARD_FILE, LANGUAGE_MODEL, PLACES
from flallm_ds.export.model_card import model_card
from flallm_ds.export_folder import SETTINGS_FILE
from flallm_ds.models.llm.source import save_configs
from flallm_ds.models.llm.tuning import write_lora
from flallm_ds.models.weights import WeightsWriter


def write(
    folder: Path,
    settings: dict[str, Any],
    state: Iterable[tuple[str, torch.Tensor]],
    language_model: Any,
    codec: TextCodec,
) -> None:
    """Write an export to an empty folder.

    state: yields (name, tensor) of a `SignTranslator` with its feature extractor as
    `visual`, in any order. At most 2 GB for each file are in memory at a time.
    """
    lm_folder = folder / LANGUAGE_MODEL
    lm_folder.mkdir()
    adapters: list[tuple[str, torch.Tensor | None]] = []
    with ExitStack() as stack:
        writers: dict[str, WeightsWriter] = {}
        for name, tensor in state:
            prefix = next(prefix for prefix in PLACES if name.startswith(prefix))
            # With a base model, the state of the LLM contains adapter weights only.
            if settings["base"] and prefix == "language_model.":
                adapters.append((name.removeprefix(prefix), tensor))
                continue
            if prefix not in writers:
                place = folder / PLACES[prefix]
                writers[prefix] = stack.enter_context(
                    WeightsWriter(place.parent, place.name)
                )
            writers[prefix].add(name.removeprefix(prefix), tensor)
    if adapters:
        write_lora(lm_folder, adapters, language_model, settings["base"])
    save_configs(
        language_model, language_model.config, language_model.generation_config, lm_folder
    )
    codec.save(lm_folder)
    (folder / SETTINGS_FILE).write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    (folder / CARD_FILE).write_text(model_card(settings, codec), encoding="utf-8")
