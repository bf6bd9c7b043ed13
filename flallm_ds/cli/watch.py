"""`flallm watch` and `metrics`: look at a run, while it trains or later."""

import shutil
import sys
import time
from pathlib import Path

from flallm_ds.errors import UserError
from flallm_ds.files import replace_file
from flallm_ds.terminal import shows_bars
from flallm_ds.training.records import as_csv, read_records

EVERY_S = 2.0  # between two looks at the files


def watch(run: Path, *, once: bool = False) -> None:
    """Show the state of a run until it ends: speed, ranks, alarms.

    Only reads files of the run folder, on any machine that sees it. Ctrl-C ends the view,
    not the run. On the screen of a terminal, on stderr; otherwise it prints one table.

    Example: flallm watch runs/mine_llm --once

    Options:
        once: print one table on stdout and end
    """
    # rich takes a moment to import: not for --help.
    from rich.console import Console
    from rich.live import Live

    from flallm_ds.watch.state import RunReader
    from flallm_ds.watch.table import view

    reader = RunReader(run)
    if once or not shows_bars():
        columns = shutil.get_terminal_size((120, 24)).columns
        plain = Console(
            file=sys.stdout, width=columns, color_system=None, markup=False, highlight=False
        )
        plain.print(view(reader.read(time.time())))
        return
    # terminal.prepare escapes the control characters of stdout.
    console = Console(stderr=True, markup=False, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            state = reader.read(time.time())
            live.update(view(state), refresh=True)
            if state.has_ended:
                return
            time.sleep(EVERY_S)


def metrics(run: Path, *, out: Path, kind: str = "train") -> None:
    """Write the steps or the scores of a run as a CSV table.

    Example: flallm metrics runs/mine_llm --out=steps.csv

    Options:
        out: the CSV file to write
        kind: train for the steps, probe for gradient norms, or a scored split
    """
    records = read_records(run)
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    if kind not in kinds:
        raise UserError(
            f"--kind must be one of the kinds in {run / 'metrics.jsonl'} "
            f"({', '.join(kinds) or 'none'}), got {kind}."
        )
    replace_file(out, as_csv(records, kind))
    print(f"written to {out}")
