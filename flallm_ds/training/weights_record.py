"""What a new run really began with, in `weights.json`: files, digests, the hub's revision.

config.json says what was asked for. A folder's files may change later, and a hub id names
another revision tomorrow; the digests do not.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from flallm_ds import export
from flallm_ds.config import RunConfig
from flallm_ds.dist import World, main_first
from flallm_ds.errors import UserError
from flallm_ds.files import file_sha256, replace_file
from flallm_ds.models.backbones.build import hub_id
from flallm_ds.models.backbones.from_timm import TIMM
from flallm_ds.models.llm.stored import checkpoint_files

FILE = "weights.json"
# Next to the weights: configs, tokenizers, and code that came with a model.
_SMALL = (".json", ".model", ".py", ".txt")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".npz")


def record_weights(config: RunConfig, folder: Path, world: World) -> None:
    """Write weights.json on rank 0, once.

    Raises UserError on every rank where a file cannot be read. Every file is read once to
    digest it: about 1 s a GB on one core, or as long as the disk takes. A run that was
    begun before there was such a file goes on without.
    """

    def write() -> None:
        if (folder / FILE).is_file() or (folder / "checkpoints").is_dir():
            return
        try:
            content = json.dumps(loaded(config), indent=2, ensure_ascii=False)
            replace_file(folder / FILE, content + "\n")
        except OSError as error:
            raise UserError(
                f"{folder / FILE} must be written, but was not ({error}). Check the "
                "model's files and the disk, then give the same command again."
            ) from error

    main_first(write, world)


def read_weights(folder: Path) -> dict[str, Any]:
    """What `record_weights` wrote, without the paths of this machine: for an export.

    Empty where it wrote nothing.
    """
    if not (folder / FILE).is_file():
        return {}
    found: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return {option: _without_folders(entry) for option, entry in found.items()}


def _without_folders(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as others may see it: an absolute path is cut to its last part."""
    name = entry["name"]
    if name.startswith("/"):
        name = Path(name).name
    public = entry | {"name": name}
    public.pop("path", None)
    return public


def loaded(config: RunConfig) -> dict[str, Any]:
    """By option (visual.weights, visual_run, llm.name): name, place, revision and files.

    revision: the commit of a hub's model, else none. files: with size and sha256; without
    the weights where they are random.
    """
    visual = config.visual
    found = {}
    if config.stage == "llm" and config.visual_run != "none":
        files = _export_files(export.find(config.visual_run))
        found["visual_run"] = _entry(config.visual_run, files, None)
    else:
        files, revision = _backbone_files(visual.weights, visual.pretrained)
        found["visual.weights"] = _entry(visual.weights, files, revision)
    # stage 1 takes the tokenizer alone
    whole = config.llm.pretrained and config.stage != "visual"
    files, revision = _model_files(config.llm.name, whole)
    return found | {"llm.name": _entry(config.llm.name, files, revision)}


def _entry(name: str, files: Iterable[Path], revision: str | None) -> dict[str, Any]:
    entries = []
    folder = None
    for file in sorted(set(files)):
        size, digest = file.stat().st_size, file_sha256(file)
        entries.append({"file": file.name, "bytes": size, "sha256": digest})
        folder = folder or str(file.parent.absolute())
    return {"name": name, "path": folder, "revision": revision, "files": entries}


def _export_files(folder: Path) -> list[Path]:
    """What stage 2 reads of stage 1."""
    names = (export.SETTINGS_FILE, export.VISUAL_FILE, export.FEATURES_FILE)
    return list(filter(Path.is_file, map(folder.joinpath, names)))


def _backbone_files(weights: str, pretrained: bool) -> tuple[list[Path], str | None]:
    if weights == "none":
        return [], None
    # timm/NAME@FILE names the weights of an architecture of timm.
    name, file = weights, ""
    if weights.startswith(TIMM):
        name, _, file = weights.partition("@")
    if not file and Path(weights).is_file():
        file = weights
    if file:
        return [Path(file)] if pretrained else [], None
    return _model_files(hub_id(name), pretrained)


def _model_files(name: str, with_weights: bool) -> tuple[list[Path], str | None]:
    """(the files that were read of a hub's model or a folder, the hub's commit)."""
    folder, revision = Path(name), None
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            # The hub's cache names the folder of a snapshot after its commit.
            folder = Path(cached).parent
            revision = folder.name
    files = _with_suffix(folder, _SMALL)
    if with_weights:
        try:
            files += checkpoint_files(str(folder))
        except OSError:  # under another name, as some of timm's are
            files += _with_suffix(folder, _WEIGHTS)
    return files, revision


def _with_suffix(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a folder that have one of these suffixes."""
    # Not iterdir: the folder may be absent.
    files = filter(Path.is_file, folder.glob("*"))
    return [path for path in files if path.suffix in suffixes]
