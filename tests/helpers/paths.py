"""Paths of the checkout, the scripts that run under a launcher, the real samples."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RANKS = ROOT / "tests" / "ranks"
SHARED = Path(os.environ.get("FLALLM_SHARED", ROOT.parent / "shared"))
