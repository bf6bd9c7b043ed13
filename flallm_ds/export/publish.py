"""Implement `flallm export`: write the best model of a run to a self-contained folder."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.data.text.codec import TextCodec
from flallm_ds.errors import UserError
from flallm_ds.export.model_card import model_card
from flallm_ds.files import locked, replace_folder
from flallm_ds.models.llm.load import LlmOptions
from flallm_ds.models.llm.source import clean_generation
from flallm_ds.models.llm.trim import untrim_llm
from flallm_ds.models.llm.tuning import merged
from flallm_ds.models.weights import named_state, write_weights

# Folder of the base model, if LoRA adapters are stored apart.
BASE = "base_model"


def publish(
    run: Path,
    out: Path,
    *,
    lora: Literal["merged", "apart"] = "merged",
    untrimmed: bool = False,
    llm_name: str = "",
    hub_code: bool = False,
) -> Path:
    """Write the best export of `run` to the new folder `out`, and return `out`.

    lora: merge LoRA adapters into the LLM, or store them apart in the format of peft, with
    the hub id or a copy of the base model.
    untrimmed: restore the full vocabulary of the LLM `llm_name`, by default that of the
    config.json of the run.
    hub_code: run code from the hub that belongs to the LLM.
    Raises UserError if an option does not fit the run, or if `out` cannot be written.
    """
    with ExitStack() as stack:
        try:
            lock = out.parent / f".{out.name}.lock"
            stack.enter_context(locked(lock, f"--out={out}", "name another folder"))
        except OSError as error:
            raise _unwritable(out, error) from error
        return _publish(run, out, lora, untrimmed, llm_name, hub_code)


def _unwritable(out: Path, error: Exception) -> UserError:
    return UserError(f"Cannot write to --out {out}: {error}.")


def _publish(
    run: Path,
    out: Path,
    lora: Literal["merged", "apart"],
    untrimmed: bool,
    llm_name: str,
    hub_code: bool,
) -> Path:
    source = export.find(run)
    settings = export.read_settings(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out must be a new or empty folder, got {out}. Give another --out."
        )
    codec = TextCodec.load(source / export.LANGUAGE_MODEL, hub_code)
    if lora == "apart":
        _check_apart(source, settings, untrimmed)
    if untrimmed:
        _check_untrimmed(source, settings, codec)
    name = _llm_of(run, llm_name) if untrimmed else ""
    settings = {**settings, "scores": settings["scores"] | export.evaluated(source)}

    def write(folder: Path) -> None:
        shutil.copytree(
            source,
            folder,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(export.EVALUATION),
        )
        found = settings
        if lora == "apart":
            found = _copy_base(source, folder, settings)
        elif settings["base"] is not None:
            found = _merge(source, folder, settings, hub_code)
        if untrimmed:
            _untrim(folder, name, codec, hub_code)
        for part in (folder / export.LANGUAGE_MODEL, folder / BASE):
            if part.is_dir():
                # An older export or the base model may have settings of a search that
                # loading the folder elsewhere would apply.
                clean_generation(part, hub_code)
        _describe(folder, found, hub_code)

    try:
        replace_folder(out, write)
    except (OSError, SafetensorError) as error:
        raise _unwritable(out, error) from error
    return out


def _check_apart(source: Path, settings: dict[str, Any], untrimmed: bool) -> None:
    """Raise UserError if LoRA adapters cannot be stored apart."""
    tune = settings["training"]["tune"]
    if settings["base"] is None or tune not in ("lora", "dora"):
        raise UserError(
            f"--lora must be merged if an export has no LoRA adapters, got apart for {source} "
            f"(llm.tune is {tune}). Leave --lora out."
        )
    if untrimmed:
        raise UserError(
            "--lora must be merged with --untrimmed, got apart. The adapter weights belong "
            "to the trimmed LLM."
        )


def _check_untrimmed(source: Path, settings: dict[str, Any], codec: TextCodec) -> None:
    """Raise UserError if the vocabulary of an export cannot be restored."""
    if settings["stage"] == "visual":
        raise UserError(
            f"Cannot restore the vocabulary of {source}: Light-T of stage visual never had "
            "more tokens. Leave --untrimmed out."
        )
    if len(codec.kept_ids) == len(codec.untrimmed().kept_ids):
        raise UserError(
            f"Cannot restore the vocabulary of {source}: it is not trimmed. Leave "
            "--untrimmed out."
        )


def _llm_of(run: Path, llm_name: str) -> str:
    """Return the name of the pretrained LLM of a run. llm_name: given by the user."""
    config = run / "config.json"
    if not llm_name and not config.is_file():
        raise UserError(
            f"--llm_name must be the LLM that was trimmed, got none, and {config} does not "
            "exist. Give --llm_name=HUB_ID_OR_FOLDER."
        )
    return llm_name or RunConfig.load(config).llm.name


def _merge(
    source: Path, folder: Path, settings: dict[str, Any], hub_code: bool
) -> dict[str, Any]:
    """Merge LoRA adapters into the LLM in fp32. Return the new settings."""
    llm = export.read_llm(source, settings, LlmOptions(hub_code=hub_code))
    lm_folder = folder / export.LANGUAGE_MODEL
    for old in lm_folder.glob("adapter_*"):
        old.unlink()
    write_weights(lm_folder, _present(merged(named_state(llm), llm)))
    # Merged weights are not quantized.
    return {**settings, "base": None, "bits": None}


def _present(
    tensors: Iterable[tuple[str, torch.Tensor | None]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that exist after merging."""
    for name, tensor in tensors:
        if tensor is not None:
            yield name, tensor


def _copy_base(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Copy the base model if it is a folder. Return the new settings.

    A base model from the hub stays a hub id.
    """
    base = export.base_llm(source, settings["base"])
    if not Path(base).is_dir():
        return settings
    shutil.copytree(base, folder / BASE)
    path = folder / export.LANGUAGE_MODEL / export.LORA_CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = BASE
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return {**settings, "base": f"./{BASE}"}


def _untrim(folder: Path, name: str, codec: TextCodec, hub_code: bool) -> None:
    """Replace the trimmed LLM by one with the full vocabulary of the LLM `name`."""
    trimmed = folder / "trimmed"
    (folder / export.LANGUAGE_MODEL).rename(trimmed)
    (folder / export.LANGUAGE_MODEL).mkdir()
    untrim_llm(trimmed, name, codec, folder / export.LANGUAGE_MODEL, hub_code)
    codec.untrimmed().save(folder / export.LANGUAGE_MODEL)
    shutil.rmtree(trimmed)


def _describe(folder: Path, settings: dict[str, Any], hub_code: bool) -> None:
    """Write flallm.json and the model card."""
    codec = TextCodec.load(folder / export.LANGUAGE_MODEL, hub_code)
    (folder / export.SETTINGS_FILE).write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    (folder / export.CARD_FILE).write_text(model_card(settings, codec), encoding="utf-8")
