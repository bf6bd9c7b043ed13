"""What a user should look at in a run, as sentences."""

import math
from collections.abc import Sequence

from flallm_ds.terminal import clock
from flallm_ds.watch.state import RECENT, RunState

WAITING_SHARE = 0.1  # of the time of steps
RISE = 1.1  # of the mean loss of RECENT steps over that of the RECENT steps before
LEAST_FREE = 10**9  # bytes, before the first checkpoint shows what is needed
SHOWN = 3  # ranks that one sentence names


def alarms(state: RunState) -> list[str]:
    """Return the alarms of a run; empty if all is well."""
    found = []
    if state.is_running:
        found += _of_ranks(state) + _of_checkpoints(state)
    return found + _of_steps(state) + _of_disk(state)


def _of_ranks(state: RunState) -> list[str]:
    if state.silent:
        return [f"rank silent: {named(state, [b.rank for b in state.silent])}"]
    newest = max(beat.since for beat in state.beats)
    idle = state.now - newest
    if idle > state.config.train.stall_warn_s:
        everyone = [beat.rank for beat in state.beats]
        return [f"no progress for {clock(idle)}: {named(state, everyone)}"]
    return []


def named(state: RunState, ranks: Sequence[int]) -> str:
    """Return what these ranks do; a few of them by name."""
    beats = [beat for beat in state.beats if beat.rank in set(ranks)]
    said = [beat.describe(state.now) for beat in beats[:SHOWN]]
    if len(beats) > SHOWN:
        said.append(f"and {len(beats) - SHOWN} more ranks")
    return "; ".join(said)


def _of_checkpoints(state: RunState) -> list[str]:
    minutes = state.config.train.save_every_minutes
    saved = max(state.started, state.checkpoint.saved if state.checkpoint else 0.0)
    age = state.now - saved
    # Twice: a save waits for the end of a step, and takes a while.
    if not minutes or not saved or age < 2 * 60 * minutes:
        return []
    return [f"last checkpoint {clock(age)} ago; train.save_every_minutes is {minutes:g}"]


def _of_steps(state: RunState) -> list[str]:
    if not state.recent:
        return []
    found = []
    last = state.recent[-1]
    seconds = sum(step["seconds"] for step in state.recent)
    share = sum(step["waiting_s"] for step in state.recent) / seconds
    if share > WAITING_SHARE:
        found.append(f"{100 * share:.0f} % of the time is waiting for data")
    if last.get("broken_clips"):
        found.append(f"{last['broken_clips']} broken clips; log.txt names them")
    if not math.isfinite(last["loss"]):
        found.append(f"the loss is {last['loss']}")
    earlier = state.steps[:-RECENT]
    if len(earlier) == RECENT and mean_loss(state.recent) > RISE * mean_loss(earlier):
        found.append(
            f"the loss is rising: {mean_loss(earlier):.3f}, then "
            f"{mean_loss(state.recent):.3f}, over {RECENT} steps each"
        )
    return found


def mean_loss(steps: Sequence[dict[str, float]]) -> float:
    """Return the mean loss of some steps."""
    return sum(step["loss"] for step in steps) / len(steps)


def _of_disk(state: RunState) -> list[str]:
    # A checkpoint is complete before an older one is removed.
    needed = 2 * state.checkpoint.num_bytes if state.checkpoint else LEAST_FREE
    if state.disk_free >= needed:
        return []
    return [f"disk nearly full: {state.disk_free / 1e9:.1f} GB free for {state.run}"]
