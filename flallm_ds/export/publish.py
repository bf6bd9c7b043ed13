"""`flallm export`: from a run's best model to a folder that needs nothing of the run any more."""

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

BASE = "base_model"  # the copy of the LLM that additions kept apart belong to


def publish(
    run: Path,
    out: Path,
    *,
    lora: Literal["merged", "apart"] = "merged",
    untrimmed: bool = False,
    llm_name: str = "",
    hub_code: bool = False,
) -> Path:
    """Write the best export of `run` to the new folder `out`, and return that.

    lora: LoRA adapters merged into the LLM, or apart in peft's layout beside the hub
    id or a copy of the LLM. untrimmed: with all rows of the vocabulary, from the LLM
    `llm_name` (default: the one in the run's config.json). hub_code: run code that comes
    with the LLM. Raises UserError for what the run has not got.
    """
    with ExitStack() as stack:
        try:
            lock = out.parent / f".{out.name}.lock"
            stack.enter_context(locked(lock, f"--out={out}", "name another folder"))
        except OSError as error:
            raise _unwritable(out, error) from error
        return _publish(run, out, lora, untrimmed, llm_name, hub_code)


def _unwritable(out: Path, error: Exception) -> UserError:
    return UserError(f"--out must be where files can be written, but {out}: {error}.")


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
            f"--out must name a new or an empty folder, but {out} holds something."
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
                # of an older export, or as the base LLM's hub has it
                clean_generation(part, hub_code)
        _describe(folder, found, hub_code)

    try:
        replace_folder(out, write)
    except (OSError, SafetensorError) as error:
        raise _unwritable(out, error) from error
    return out


def _check_apart(source: Path, settings: dict[str, Any], untrimmed: bool) -> None:
    if settings["base"] is None or settings["training"]["tune"] not in ("lora", "dora"):
        raise UserError(
            f"--lora=apart must be asked of an LLM with low-rank additions, but {source} "
            f"has none (tuned: {settings['training']['tune']}). Leave --lora."
        )
    if untrimmed:
        raise UserError(
            "--untrimmed must go with --lora=merged, because additions are to the trimmed "
            "LLM."
        )


def _check_untrimmed(source: Path, settings: dict[str, Any], codec: TextCodec) -> None:
    if settings["stage"] == "visual":
        raise UserError(
            f"--untrimmed must be asked of an LLM, but {source} is of stage visual, whose "
            "Light-T never had more pieces."
        )
    if len(codec.kept_ids) == len(codec.untrimmed().kept_ids):
        raise UserError(
            f"--untrimmed must be asked of a trimmed LLM, but {source} has all pieces. "
            "Leave it."
        )


def _llm_of(run: Path, llm_name: str) -> str:
    """The LLM that a run began with."""
    config = run / "config.json"
    if not llm_name and not config.is_file():
        raise UserError(
            f"--llm_name must say which LLM was trimmed, where {run} is no run folder."
        )
    return llm_name or RunConfig.load(config).llm.name


def _merge(
    source: Path, folder: Path, settings: dict[str, Any], hub_code: bool
) -> dict[str, Any]:
    """Merge the LoRA adapters into the LLM, in fp32."""
    llm = export.read_llm(source, settings, LlmOptions(hub_code=hub_code))
    lm_folder = folder / export.LANGUAGE_MODEL
    for old in lm_folder.glob("adapter_*"):
        old.unlink()
    write_weights(lm_folder, _present(merged(named_state(llm), llm)))
    # merged weights are no quantized ones
    return {**settings, "base": None, "bits": None}


def _present(
    tensors: Iterable[tuple[str, torch.Tensor | None]],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if tensor is not None:
            yield name, tensor


def _copy_base(source: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A hub's LLM stays a name; a folder's is copied."""
    base = export.base_llm(source, settings["base"])
    if not Path(base).is_dir():
        return settings
    shutil.copytree(base, folder / BASE)
    path = folder / export.LANGUAGE_MODEL / export.ADDITIONS
    content = json.loads(path.read_text(encoding="utf-8"))
    content["base_model_name_or_path"] = BASE
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return {**settings, "base": f"./{BASE}"}


def _untrim(folder: Path, name: str, codec: TextCodec, hub_code: bool) -> None:
    trimmed = folder / "trimmed"
    (folder / export.LANGUAGE_MODEL).rename(trimmed)
    (folder / export.LANGUAGE_MODEL).mkdir()
    untrim_llm(trimmed, name, codec, folder / export.LANGUAGE_MODEL, hub_code)
    codec.untrimmed().save(folder / export.LANGUAGE_MODEL)
    shutil.rmtree(trimmed)


def _describe(folder: Path, settings: dict[str, Any], hub_code: bool) -> None:
    codec = TextCodec.load(folder / export.LANGUAGE_MODEL, hub_code)
    (folder / export.SETTINGS_FILE).write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )
    (folder / export.CARD_FILE).write_text(model_card(settings, codec), encoding="utf-8")
