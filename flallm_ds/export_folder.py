"""Where the export of a run is; needs no torch, so that a wrong name is refused at once."""

import re
from pathlib import Path

from flallm_ds.errors import UserError

SETTINGS_FILE = "flallm.json"  # every export folder has one
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # USER/NAME


def find_export(folder: str | Path) -> Path:
    """Return the export folder itself, or `best` of a run folder.

    Raises UserError where there is neither.
    """
    found = _export_at(folder)
    if found is None:
        raise UserError(
            f"Cannot find an export in {Path(folder)}: neither {SETTINGS_FILE} nor "
            f"best/{SETTINGS_FILE} exists. Give an export folder or the folder of a trained "
            "run."
        )
    return found


def find_stage_1(visual_run: str) -> Path:
    """Return the export that stage llm starts from. Raises UserError where there is none."""
    found = _export_at(visual_run)
    if found is None:
        raise UserError(
            f"Cannot start stage llm without a result of stage visual in {visual_run}: "
            f"neither {SETTINGS_FILE} nor best/{SETTINGS_FILE} exists. Make it with: "
            f"deepspeed launch/train.py --stage visual --run={visual_run}"
        )
    return found


def _export_at(folder: str | Path) -> Path | None:
    for candidate in (Path(folder), Path(folder) / "best"):
        if (candidate / SETTINGS_FILE).is_file():
            return candidate
    return None
