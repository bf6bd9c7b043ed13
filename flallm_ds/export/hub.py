"""Exports to and from the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download

from flallm_ds import export
from flallm_ds.errors import UserError
from flallm_ds.models.pretrained import HUB_ERRORS, first_line

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def folder_of(model: str | Path) -> Path:
    """The export in a folder, in a run folder, or of USER/NAME on the hub (cached by its client).

    Raises UserError where there is none.
    """
    if Path(model).exists() or not _HUB_ID.fullmatch(str(model)):
        return export.find(model)
    try:
        return export.find(snapshot_download(str(model)))
    except HUB_ERRORS as error:
        raise UserError(
            f"{model} must be a folder with an export, or an export on the hub that can be "
            f"reached, but is neither: {first_line(error)}"
        ) from error


def push(model: Path, repo: str, private: bool) -> str:
    """Upload an export to USER/NAME and return its address. Raises UserError where that
    cannot be done."""
    folder = export.find(model)
    base = export.read_settings(folder)["base"]
    if base is not None and (base.startswith("..") or Path(base).is_absolute()):
        raise UserError(
            f"what is pushed must need nothing else of this machine, but {folder} adds to "
            f"the LLM {base}. Make a whole folder with flallm export, and push that."
        )
    if not _HUB_ID.fullmatch(repo):
        raise UserError(f"--repo must be USER/NAME, but is {repo!r}.")
    if get_token() is None:
        raise UserError(
            "a token of the hub must be there before something is pushed, but there is "
            "none. Run hf auth login, or set HF_TOKEN."
        )
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                ignore_patterns=[f"{export.EVALUATION}/**"],
            ).repo_url
        )
    except HUB_ERRORS as error:
        raise UserError(
            f"{folder} must go to {repo}, but the hub cannot be reached or refuses it: "
            f"{first_line(error)}"
        ) from error
