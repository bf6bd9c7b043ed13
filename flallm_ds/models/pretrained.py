"""What a user names as pretrained: a folder or a hub id, looked at before it is loaded.

transformers says of many wrong ones only that some file is missing. Here each gets the
sentence of its cause.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, file_exists, try_to_load_from_cache
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from flallm_ds.errors import UserError

CHECKPOINT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What goes wrong between here and the hub: no network, no such name, no right to it. The
# second is the base of whichever HTTP client this version of it uses.
HUB_ERRORS: Any = (OSError, HfHubHTTPError.__mro__[1], HFValidationError)
STANDIN = "Name a folder that holds one, or make a small one with flallm standin_llm."


@dataclass(frozen=True)
class _Kind:
    """What a model is for, in messages. merged: of an adapter and its base."""

    option: str
    what: str
    without: str
    merged: str


_LLM = _Kind(
    "llm.name",
    "LLM",
    STANDIN,
    "(peft's merge_and_unload; flallm export for an export of ours)",
)
_BACKBONE = _Kind(
    "visual.weights",
    "image encoder",
    "Name a folder that holds one, or give --visual.weights=none for random weights.",
    "(peft's merge_and_unload)",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ADDRESS = re.compile(r"https?://(?:[^/]+/([\w.-]+/[\w.-]+))?")
_LFS = b"version https://git-lfs"
_LFS_BYTES = 1024  # a pointer is smaller than that
# of config and tokenizer; other files may be of no use here
_TEXT_FILES = (".json", ".model", ".txt")
_ADAPTER = "adapter_config.json"


def check_llm_source(name: str) -> None:
    """Raise UserError with the cause where `name` is no folder or hub id of an LLM that
    could be loaded.

    Of a folder the names and sizes of the files are looked at, and the headers of
    safetensors files; of a hub id, whether the hub has it. Weights may be missing: see
    `check_weights`.
    """
    path = Path(name)
    if path.is_dir():
        _check_folder(path, _LLM)
    elif path.exists():
        _refuse_file(path)
    elif _HUB_ID.fullmatch(name):
        _check_hub(name)
    else:
        raise UserError(
            "llm.name must be a hub id or a folder with an LLM, but there is nothing at "
            f"{name}.{_named_as(name)} flallm standin_llm makes a small one for machines "
            "without a hub."
        )


def check_backbone_source(name: str, pretrained: bool = True) -> None:
    """Raise UserError with the cause where a folder, file or address is no backbone that
    could be loaded.

    pretrained: whether its weights are wanted; else only a config is.
    """
    path = Path(name)
    if path.is_dir():
        _check_folder(path, _BACKBONE)
        for weights in sorted(path.iterdir()) if pretrained else ():
            if weights.suffix in (".safetensors", ".bin", ".pth"):
                _check_part(weights)
    elif path.suffix == ".gguf":
        raise _gguf(path)
    elif path.is_file():
        must_be_no_pointer(path)
        if path.suffix != ".pth" and (path.parent / "config.json").is_file():
            raise UserError(
                "visual.weights must be a hub id, a folder or a .pth file, got the file "
                f"{path}. Name its folder: {path.parent}."
            )
    elif _ADDRESS.match(name):
        raise UserError(
            "visual.weights must be a hub id, a folder or a .pth file, got the address "
            f"{name}.{_named_as(name)} Or fetch it, and name the file."
        )


def _named_as(name: str) -> str:
    address = _ADDRESS.match(name)
    return f" Name it as {address[1]}." if address and address[1] else ""


def _refuse_file(path: Path) -> None:
    if path.suffix == ".gguf":
        raise _gguf(path)
    holds = f": {path.parent}" if (path.parent / "config.json").is_file() else ""
    raise UserError(
        f"llm.name must be a hub id or a folder with an LLM, got the file {path}. Name its "
        f"folder{holds}."
    )


def _gguf(path: Path) -> UserError:
    return UserError(
        f"Cannot train {path}: GGUF files hold quantised weights for inference. Name the "
        "model that it was made from, in the safetensors format."
    )


def _check_folder(folder: Path, kind: _Kind) -> None:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not files:
        raise UserError(
            f"The {kind.what} {folder} must load, but did not: the folder is empty. Check "
            f"--{kind.option}. {kind.without}"
        )
    for path in files:
        if path.suffix in _TEXT_FILES:
            must_be_no_pointer(path)
    if (folder / _ADAPTER).is_file():
        raise _adapter(str(folder), folder / _ADAPTER, kind)
    if (folder / "config.json").is_file():
        return
    for path in files:
        if path.suffix == ".gguf":
            raise _gguf(path)
    deeper = _models_below(folder)
    cached = re.fullmatch(r"models--(.+?)--(.+)", folder.name)
    if cached:
        hint = f"This is the hub's cache: name {cached[1]}/{cached[2]}"
        hint += f", or its folder {deeper[0]}." if deeper else "."
    elif deeper:
        hint = f"Did you mean {deeper[0]}?"
    else:
        hint = kind.without
    held = ", ".join(path.name for path in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    raise UserError(
        f"The folder {folder} must hold the config.json of an {kind.what}, got "
        f"{held}{more}. {hint}"
    )


def _models_below(folder: Path) -> list[Path]:
    """Return the folders with a config.json up to three levels below."""
    found = []
    for depth in (1, 2, 3):
        for config in folder.glob("*/" * depth + "config.json"):
            found.append(config.parent)
    return found


def _adapter(name: str, config: Path, kind: _Kind) -> UserError:
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return UserError(
        f"{kind.option} must be a whole {kind.what}, but {name} holds an adapter (LoRA or "
        f"the like) of {base or 'another model'}. Name {base or 'that model'}, or merge "
        f"the two {kind.merged} and name the folder of the result."
    )


def must_be_no_pointer(path: Path) -> None:
    """Raise UserError for a git-lfs pointer, which git leaves where git-lfs is missing."""
    if not path.is_file() or path.stat().st_size > _LFS_BYTES:
        return
    with path.open("rb") as file:
        if file.read(len(_LFS)) != _LFS:
            return
    raise UserError(
        f"Cannot read {path}: it is a git-lfs pointer of {path.stat().st_size} bytes, not "
        f"the file itself. Run git lfs pull in {path.parent}."
    )


def _check_hub(name: str) -> None:
    """One request without repetitions; transformers would repeat it for half a minute."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        read_cache_alone_if_unreachable(name)
        return
    if is_offline_mode():
        reason = "HF_HUB_OFFLINE is set."
    else:
        try:
            if file_exists(name, "config.json"):
                return
            if file_exists(name, _ADAPTER):
                raise _adapter(name, Path(cached_file(name, _ADAPTER)), _LLM)
        except GatedRepoError as error:
            raise UserError(
                f"Cannot read {name} on the hub: its owner gives access on request. Ask "
                f"for it at https://huggingface.co/{name}, then run hf auth login."
            ) from error
        except HUB_ERRORS as error:
            reason = f"the hub cannot be reached ({first_line(error)})."
        else:
            raise UserError(
                f"llm.name must be a folder or the hub id of an LLM, but {name} is no "
                "folder here, and the hub has no such model with a config.json, or not for "
                "you. Check the name, or run hf auth login."
            )
    raise UserError(
        f"llm.name must be within reach, but {name} is no folder here and is not in the "
        f"hub's cache, and {reason} {STANDIN}"
    )


def read_cache_alone_if_unreachable(name: str) -> None:
    """Keep the libraries from asking a hub that does not answer for files of `name` that
    are cached.

    They would repeat the request for each file: minutes for one model. For the rest of
    the process they behave as under HF_HUB_OFFLINE=1.
    """
    if is_offline_mode():
        return
    try:
        file_exists(name, "config.json")
    except HfHubHTTPError:  # it answered
        pass
    except HUB_ERRORS:
        constants.HF_HUB_OFFLINE = True


def check_weights(name: str, section: str = "llm") -> None:
    """Raise UserError where a folder has no weights, or files of them that are missing or
    cut off.

    section: of the options, whose `pretrained` does without them. Of a hub id nothing is
    asked: its weights are downloaded when they are read.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    found = next((file for file in CHECKPOINT_FILES if (folder / file).is_file()), None)
    if found is None:
        raise _no_weights(folder, section)
    parts = [found]
    if found.endswith(".json"):
        try:
            index = json.loads((folder / found).read_text(encoding="utf-8"))
            parts = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"Cannot read {folder / found}: it is no index of weights ({error}). Fetch "
                "it again."
            ) from error
    for part in parts:
        _check_part(folder / part)


def _no_weights(folder: Path, section: str) -> UserError:
    got = "none"
    for path in sorted(folder.iterdir()):
        if path.suffix in (".h5", ".msgpack", ".pth", ".gguf"):
            got = f"only {path.name}, which is of another format"
            break
    return UserError(
        f"The folder {folder} must hold weights (model.safetensors or "
        f"pytorch_model.bin), got {got}. Fetch the model again, or give "
        f"--{section}.pretrained=false for random weights."
    )


def _check_part(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"Cannot read {path}: there is no such file. Fetch the model again."
        )
    must_be_no_pointer(path)
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The weights {path} must load, but did not: the file is cut off or damaged "
            f"({first_line(error)}). Fetch it again."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of a message that is not empty, or the name of the exception."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
