"""Draws the state of a run as tables for a terminal."""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flallm_ds.terminal import clock
from flallm_ds.training.heartbeats import ENDED, Heartbeat
from flallm_ds.watch.alarms import alarms, mean_loss
from flallm_ds.watch.state import RunState

MOST_RANKS = 16  # with a row each; of more ranks, a row shows a machine
MOST_ROWS = 24


def view(state: RunState) -> RenderableType:
    """Return the tables of a run: its state, its ranks or machines, its alarms."""
    parts: list[RenderableType] = [_overview(state)]
    if state.beats:
        parts.append(_ranks(state))
    for sentence in alarms(state):
        parts.append(Text(f"ALARM  {sentence}", style="bold red"))
    return Group(*parts)


def phase(state: RunState) -> str:
    """Return what the run does, in a few words."""
    if not state.beats:
        return "starting" if state.started else "not started"
    if all(beat.phase == ENDED for beat in state.beats):
        return "ended"
    if state.has_ended:
        seen = max(beat.written for beat in state.beats)
        return f"no sign since {time.strftime('%F %T', time.localtime(seen))}"
    return _phases(state.beats)


def _phases(beats: Iterable[Heartbeat]) -> str:
    """Return the phases of ranks, the most frequent first."""
    counts = Counter(beat.phase for beat in beats)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def _overview(state: RunState) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("run", f"{state.run}  stage {state.config.stage}")
    hosts = {beat.host for beat in state.beats}
    where = f", {len(state.beats)} ranks on {len(hosts)} machines" if state.beats else ""
    table.add_row("state", phase(state) + where)
    if state.recent:
        for name, value in _of_steps(state):
            table.add_row(name, value)
    table.add_row("BLEU-4", _scores(state))
    table.add_row("checkpoint", _checkpoint(state))
    table.add_row("log", state.last_line)
    return table


def _of_steps(state: RunState) -> list[tuple[str, str]]:
    """Return the rows about the recent steps."""
    steps, last = state.recent, state.recent[-1]
    seconds = sum(step["seconds"] for step in steps)

    def per_second(name: str) -> str:
        # A run folder of an older version lacks some fields.
        return f"{sum(step.get(name, 0) for step in steps) / seconds:,.0f}"

    epochs = state.config.train.epochs
    speed = f"{per_second('frames')} frames/s  {per_second('tokens')} tokens/s"
    if "mfu" in last:
        used = sum(step.get("mfu", 0.0) * step["seconds"] for step in steps)
        speed += f"  MFU {100 * used / seconds:.1f} %"
    waiting = 100 * sum(step["waiting_s"] for step in steps) / seconds
    place = f"epoch {last['epoch'] + 1}/{epochs}  step {last['step']}"
    if "num_steps" in last:
        place += f"/{last['num_steps']}"
    rows = [
        ("position", f"{place}  ({last['global_step']:,} in all)"),
        ("loss", f"{mean_loss(steps):.3f}, mean of {len(steps)} steps"),
        ("speed", speed),
        ("waiting", f"{waiting:.1f} % of the time, for data"),
        ("memory", _memory(last)),
    ]
    if state.is_running and "left_s" in last:
        rows.append(("left", clock(last["left_s"])))
    return rows


def _memory(step: dict[str, Any]) -> str:
    parts = []
    for name in ("device", "host"):
        if f"{name}_gb" in step:
            parts.append(f"{name} {step[f'{name}_gb']:.1f} GB")
    return ", ".join(parts) + " (peak of the fullest)" if parts else "unknown"


def _scores(state: RunState) -> str:
    best, last = state.best, state.last_score
    if best is None or last is None:
        return "not scored yet"
    return (
        f"{state.config.eval.split} best {best['bleu4']:.2f} after epoch {best['epoch']}, "
        f"last {last['bleu4']:.2f} after epoch {last['epoch']}"
    )


def _checkpoint(state: RunState) -> str:
    free = f"disk {state.disk_free / 1e9:,.0f} GB free"
    saved = state.checkpoint
    if saved is None:
        return f"none yet; {free}"
    return (
        f"{saved.name}, {clock(state.now - saved.saved)} ago, {saved.num_bytes / 1e9:.2f} "
        f"GB; {free}"
    )


def _ranks(state: RunState) -> Table:
    """Return a table of ranks, or of machines if there are many, the slowest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    by_rank = len(state.beats) <= MOST_RANKS
    for title in ("rank" if by_rank else "ranks", "machine", "phase"):
        table.add_column(title, no_wrap=title != "phase")
    for title in ("step", "since", "own s/step", "waiting s"):
        table.add_column(title, justify="right", no_wrap=True)
    groups: dict[object, list[Heartbeat]] = {}
    for beat in state.beats:
        groups.setdefault(beat.rank if by_rank else beat.host, []).append(beat)
    rows = sorted(groups.values(), key=lambda g: -max(beat.own_s for beat in g))
    silent = {beat.rank for beat in state.silent}
    for beats in rows[:MOST_ROWS]:
        slowest = max(beats, key=lambda beat: beat.own_s)
        name = str(slowest.rank) if by_rank else f"{len(beats)}, slowest {slowest.rank}"
        is_silent = bool(silent.intersection(beat.rank for beat in beats))
        table.add_row(
            name,
            slowest.host,
            _phases(beats) + (" (silent)" if is_silent else ""),
            str(min(beat.step for beat in beats)),
            clock(max(0.0, state.now - min(beat.since for beat in beats))),
            f"{slowest.own_s:.2f}",
            f"{slowest.waited_s:.2f}",
            style="red" if is_silent else None,
        )
    if len(rows) > MOST_ROWS:
        table.add_row("", f"and {len(rows) - MOST_ROWS} more")
    return table
