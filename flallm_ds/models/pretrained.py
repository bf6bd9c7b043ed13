"""Check a pretrained model before it is loaded: a local folder or a hub id.

For many wrong names transformers only says that some file is missing. These checks raise a
UserError that names the cause.
"""

import json
import pickle
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
# Errors of requests to the hub: no network, no such name, no access. The second class is
# the base class of the errors of huggingface_hub's HTTP client, which depends on the
# version.
HUB_ERRORS: Any = (OSError, HfHubHTTPError.__mro__[1], HFValidationError)
# What the libraries raise for files of weights that are damaged or of another model.
UNREADABLE = (RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError)
STANDIN = "Name a folder that holds one, or make a small one with flallm standin_llm."


@dataclass(frozen=True)
class _Kind:
    """The words for a kind of model in error messages."""

    option: str  # that names the model
    what: str
    without: str  # the remedy if there is no such model
    merged: str  # how an adapter is merged into its base model


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
# NAME or OWNER/NAME
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# A URL, and the hub id in a URL of a hub.
_URL = re.compile(r"https?://(?:[^/]+/([\w.-]+/[\w.-]+))?")
# The first bytes of a git-lfs pointer, and the size that a pointer never exceeds.
_LFS = b"version https://git-lfs"
_LFS_BYTES = 1024
# Endings of the files of a config and a tokenizer. Other files may not be needed.
_TEXT_FILES = (".json", ".model", ".txt")
_ADAPTER = "adapter_config.json"


def check_llm_source(name: str) -> None:
    """Raise UserError with the cause if `name` is not a folder or hub id of an LLM.

    For a folder, checks the names and sizes of the files; for a hub id, whether the hub has
    the model. `check_weights` checks the weights of a folder.
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
            f"llm.name must be a hub id or a folder with an LLM, got {name}: there is nothing "
            f"at this path.{_hub_id_hint(name)} flallm standin_llm makes a small LLM for "
            "machines without a hub."
        )


def check_backbone_source(name: str, pretrained: bool = True) -> None:
    """Raise UserError with the cause if a folder, file or URL is not a backbone.

    pretrained: check the weights as well; else only the config.
    """
    path = Path(name)
    if path.is_dir():
        _check_folder(path, _BACKBONE)
        for file in sorted(path.iterdir()):
            if pretrained and file.suffix in (".safetensors", ".bin", ".pth"):
                _check_weight_file(file)
    elif path.suffix == ".gguf":
        raise _gguf(path)
    elif path.is_file():
        check_no_lfs_pointer(path)
        if path.suffix != ".pth" and (path.parent / "config.json").is_file():
            raise UserError(
                "visual.weights must be a hub id, a folder or a .pth file, got the file "
                f"{path}. Name its folder: {path.parent}."
            )
    elif _URL.match(name):
        raise UserError(
            "visual.weights must be a hub id, a folder or a .pth file, got the URL "
            f"{name}.{_hub_id_hint(name)} Or download the file and give its path."
        )


def _hub_id_hint(name: str) -> str:
    """Return a sentence with the hub id in a URL; an empty string without one."""
    url = _URL.match(name)
    if url is None or url[1] is None:
        return ""
    return f" Give {url[1]}."


def _refuse_file(path: Path) -> None:
    """Raise UserError for a file as the name of an LLM."""
    if path.suffix == ".gguf":
        raise _gguf(path)
    holds = f": {path.parent}" if (path.parent / "config.json").is_file() else ""
    raise UserError(
        f"llm.name must be a hub id or a folder with an LLM, got the file {path}. Name its "
        f"folder{holds}."
    )


def _gguf(path: Path) -> UserError:
    """Return the error for a GGUF file."""
    return UserError(
        f"Cannot train {path}: GGUF files hold quantised weights for inference. Name the "
        "model that it was made from, in the safetensors format."
    )


def _check_folder(folder: Path, kind: _Kind) -> None:
    """Raise UserError with the cause if a folder holds no model of this kind."""
    # Hidden files, such as .gitattributes, do not count.
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if not files:
        raise UserError(
            f"Cannot load the {kind.what} {folder}: the folder is empty. Check "
            f"--{kind.option}. {kind.without}"
        )
    for path in files:
        if path.suffix in _TEXT_FILES:
            check_no_lfs_pointer(path)
    # Some tools write a config.json next to an adapter, so look for it first.
    if (folder / _ADAPTER).is_file():
        raise _adapter(str(folder), folder / _ADAPTER, kind)
    if (folder / "config.json").is_file():
        return

    # No config: find out what the folder holds instead.
    for path in files:
        if path.suffix == ".gguf":
            raise _gguf(path)
    deeper = _models_below(folder)
    # The folder of a model in the hub's cache holds its files two levels below.
    cached = re.fullmatch(r"models--(.+?)--(.+)", folder.name)
    if cached:
        hint = f"This is a folder of the hub's cache: give {cached[1]}/{cached[2]}"
        hint += f", or the folder {deeper[0]}." if deeper else "."
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
    """Return the folders with a config.json, up to three levels below `folder`."""
    found = []
    for depth in (1, 2, 3):
        for config in folder.glob("*/" * depth + "config.json"):
            found.append(config.parent)
    return found


def _adapter(name: str, config: Path, kind: _Kind) -> UserError:
    """Return the error for an adapter alone. config: its adapter_config.json."""
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, RecursionError, AttributeError):
        base = None
    return UserError(
        f"{kind.option} must be a complete {kind.what}, got {name}, which holds an adapter "
        f"(such as LoRA) of {base or 'another model'}. Name {base or 'that model'}, or merge "
        f"the two {kind.merged} and name the folder of the result."
    )


def check_no_lfs_pointer(path: Path) -> None:
    """Raise UserError for a git-lfs pointer: git writes it if git-lfs is not installed."""
    # Only small files are opened.
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
    """Raise UserError with the cause if a hub id is neither cached nor available.

    Sends one request without retries; transformers would retry it for half a minute.
    """
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        read_cache_alone_if_unreachable(name)
        return
    if is_offline_mode():
        reason = "HF_HUB_OFFLINE is set."
    else:
        try:
            if file_exists(name, "config.json"):
                return
            # An adapter on the hub has no config.json.
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
                f"llm.name must be a folder or the hub id of an LLM, got {name}: there is no "
                "such folder, and the hub has no such model with a config.json, or you have "
                "no access. Check the name, or run hf auth login."
            )
    raise UserError(
        f"llm.name must be a folder or an available hub id, got {name}: there is no such "
        f"folder, the hub's cache does not hold the model, and {reason} {STANDIN}"
    )


def read_cache_alone_if_unreachable(name: str) -> None:
    """Make the libraries use the cached files of `name` alone if the hub does not answer.

    They would retry a request for each file, which takes minutes for one model. For the
    rest of the process they behave as with HF_HUB_OFFLINE=1.
    """
    if is_offline_mode():
        return
    try:
        file_exists(name, "config.json")
    except HfHubHTTPError:  # the hub has answered
        pass
    except HUB_ERRORS:
        constants.HF_HUB_OFFLINE = True


def check_weights(name: str, section: str = "llm") -> None:
    """Raise UserError if the weights of a folder are missing, truncated or damaged.

    section: of the options; its `pretrained=false` is a remedy. Empty for a model that
    cannot have random weights. A hub id is not checked: its weights are downloaded when
    they are read.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    # transformers reads the first of these files that exists.
    found = next((file for file in CHECKPOINT_FILES if (folder / file).is_file()), None)
    if found is None:
        raise _no_weights(folder, section)
    # Several files have an index, which names them.
    parts = [found]
    if found.endswith(".json"):
        try:
            index = json.loads((folder / found).read_text(encoding="utf-8"))
            parts = sorted(set(index["weight_map"].values()))
        except (
            OSError,
            ValueError,
            RecursionError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise UserError(
                f"Cannot read {folder / found}: it is not an index of weights ({error}). "
                "Fetch it again."
            ) from error
    for part in parts:
        _check_weight_file(folder / part)


def _no_weights(folder: Path, section: str) -> UserError:
    """Return the error for a folder without weights in a format that can be read."""
    got = "none"
    for path in sorted(folder.iterdir()):
        if path.suffix in (".h5", ".msgpack", ".pth", ".gguf"):
            got = f"only {path.name}, which is of another format"
            break
    remedy = "Fetch the model again"
    if section:
        remedy += f", or give --{section}.pretrained=false for random weights"
    return UserError(
        f"The folder {folder} must hold weights (model.safetensors or "
        f"pytorch_model.bin), got {got}. {remedy}."
    )


def _check_weight_file(path: Path) -> None:
    """Raise UserError if a file of weights is missing, a pointer, truncated or damaged."""
    if not path.is_file():
        raise UserError(
            f"Cannot read {path}: there is no such file. Fetch the model again."
        )
    check_no_lfs_pointer(path)
    if path.suffix != ".safetensors":
        return
    # The header of a safetensors file says how long the file must be.
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Cannot load the weights {path}: the file is truncated or damaged "
            f"({first_line(error)}). Fetch it again."
        ) from error


def unreadable(weights: str, error: Exception) -> UserError:
    """Return the error for weights that cannot be read. error: one of UNREADABLE."""
    reason = f"{first_line(error).rstrip('.')}. Fetch the model again."
    pickled = isinstance(error, pickle.UnpicklingError)
    if pickled or "Weights only load failed" in str(error):
        reason = (
            "the pickled weights (.bin) are damaged, or hold more than tensors, which could "
            "run code. Fetch the safetensors files of the model."
        )
    return UserError(f"Cannot load the weights {weights}: {reason}")


def first_line(error: BaseException) -> str:
    """Return the first line of the message that is not empty, or the name of the class."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
