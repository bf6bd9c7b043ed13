"""Download exports from the Hugging Face hub and upload them."""

from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download

from flallm_ds import export
from flallm_ds.errors import UserError
from flallm_ds.export_folder import HUB_ID
from flallm_ds.models.pretrained import HUB_ERRORS, first_line


def folder_of(model: str | Path) -> Path:
    """Return the export in a folder, in a run folder, or of USER/NAME on the hub.

    A model of the hub is downloaded to the cache of its client. Raises UserError if there
    is no export.
    """
    if Path(model).exists() or not HUB_ID.fullmatch(str(model)):
        return export.find(model)
    try:
        return export.find(snapshot_download(str(model)))
    except HUB_ERRORS as error:
        raise UserError(
            f"Cannot find an export {model}: it is not a folder, and the hub has no such "
            f"model or is not available ({first_line(error)}). Check the name and the network."
        ) from error


def push(model: Path, repo: str, private: bool) -> str:
    """Upload an export to USER/NAME on the hub and return its address.

    Raises UserError if the export is not complete or the upload fails.
    """
    folder = export.find(model)
    base = export.read_settings(folder)["base"]
    if base is not None and (base.startswith("..") or Path(base).is_absolute()):
        raise UserError(
            f"Cannot push {folder}: it needs the base model {base} on this machine. Make a "
            "complete folder with flallm export, and push that."
        )
    if not HUB_ID.fullmatch(repo):
        raise UserError(f"--repo must be USER/NAME, got {repo!r}.")
    if get_token() is None:
        raise UserError(
            "Cannot push to the hub: no token is set. Run hf auth login, or set HF_TOKEN."
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
            f"Cannot push {folder} to {repo}: the hub is not available or refuses it "
            f"({first_line(error)}). Check the token and the network."
        ) from error
