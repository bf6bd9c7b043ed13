"""Record the initial weights of a new run in weights.json: files, digests, revision.

config.json has only the names. The files of a folder may change later, and a hub id may
name another revision; the digests identify the weights.
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
# Files next to the weights: configs, tokenizers, and code of the model.
_SMALL = (".json", ".model", ".py", ".txt")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".npz")


def record_weights(config: RunConfig, folder: Path, world: World) -> None:
    """Write weights.json on rank 0, at the first start of a run.

    Every file is read to compute its digest: about 1 s per GB on one core, or as long as
    the disk takes. Raises UserError on every rank if a file cannot be read.
    """

    def write() -> None:
        # A run with checkpoints but without weights.json is of an older version. Its files
        # may have changed since its first start.
        if (folder / FILE).is_file() or (folder / "checkpoints").is_dir():
            return
        try:
            content = json.dumps(loaded(config), indent=2, ensure_ascii=False)
            replace_file(folder / FILE, content + "\n")
        except OSError as error:
            raise UserError(
                f"Cannot write {folder / FILE}: {error}. Check the files of the model and "
                "the disk, then run the same command again."
            ) from error

    main_first(write, world)


def read_weights(folder: Path) -> dict[str, Any]:
    """Return the content of weights.json without the paths of this machine, for an export.

    Empty if there is no such file.
    """
    if not (folder / FILE).is_file():
        return {}
    found: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return {option: _without_folders(entry) for option, entry in found.items()}


def _without_folders(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry without its path, and with the last part of a name that is a path."""
    name = entry["name"]
    if name.startswith("/"):
        name = Path(name).name
    public = entry | {"name": name}
    public.pop("path", None)
    return public


def loaded(config: RunConfig) -> dict[str, Any]:
    """Return name, path, revision and files of the weights that each option names.

    The options are visual.weights or visual_run, and llm.name. revision: the commit of a
    model of the hub, otherwise None. files: with size and sha256; no weights if they are
    random. Raises OSError if a file cannot be read.
    """
    # The visual weights come from a stage-1 result, or from visual.weights.
    visual = config.visual
    found = {}
    if config.stage == "llm" and config.visual_run != "none":
        files = _export_files(export.find(config.visual_run))
        found["visual_run"] = _entry(config.visual_run, files, None)
    else:
        files, revision = _backbone_files(visual.weights, visual.pretrained)
        found["visual.weights"] = _entry(visual.weights, files, revision)
    # Stage visual reads only the tokenizer.
    with_weights = config.llm.pretrained and config.stage != "visual"
    files, revision = _model_files(config.llm.name, with_weights)
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
    """Return the files of a stage-1 export that stage llm reads."""
    names = (export.SETTINGS_FILE, export.VISUAL_FILE, export.FEATURES_FILE)
    return list(filter(Path.is_file, map(folder.joinpath, names)))


def _backbone_files(weights: str, pretrained: bool) -> tuple[list[Path], str | None]:
    """Return the files of a backbone, and the commit of a model of the hub."""
    if weights == "none":
        return [], None
    # timm/NAME@FILE: an architecture of timm with the weights in FILE.
    name, file = weights, ""
    if weights.startswith(TIMM):
        name, _, file = weights.partition("@")
    if not file and Path(weights).is_file():
        file = weights
    if file:
        return [Path(file)] if pretrained else [], None
    return _model_files(hub_id(name), pretrained)


def _model_files(name: str, with_weights: bool) -> tuple[list[Path], str | None]:
    """Return the files of a model, and the commit of a model of the hub.

    name: a folder or a hub id. with_weights: whether the run reads the weights.
    """
    folder, revision = Path(name), None
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            # The cache of the hub names the folder of a snapshot after its commit.
            folder = Path(cached).parent
            revision = folder.name
    files = _with_suffix(folder, _SMALL)
    if with_weights:
        try:
            files += checkpoint_files(str(folder))
        except OSError:
            # Some models of timm have other file names than those of transformers.
            files += _with_suffix(folder, _WEIGHTS)
    return files, revision


def _with_suffix(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a folder that have one of these suffixes."""
    # Not iterdir, which fails if the folder is absent.
    files = filter(Path.is_file, folder.glob("*"))
    return [path for path in files if path.suffix in suffixes]
