"""Commands that must end before torch, transformers or deepspeed is imported."""

import os
import subprocess
import sys

from tests.helpers.paths import ROOT

# At its exit, the process prints the slow packages that it has imported.
SCRIPT = """
import atexit, sys

def report():
    slow = {"torch", "transformers", "deepspeed"}.intersection(sys.modules)
    print("imported", ",".join(sorted(slow)))

atexit.register(report)
sys.argv[0] = "flallm"
from flallm_ds.cli import run
run()
"""


def flallm(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `flallm ARGUMENTS`; fails if the process imported a slow package."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    *output, imported = done.stdout.splitlines(keepends=True)
    assert imported == "imported \n", done.stdout + done.stderr
    done.stdout = "".join(output)
    return done
