"""Records what happens in a few steps, for train.profile.

RUN/profile/steps-10-14.pt.trace.json  a trace of these steps of rank 0, by torch.profiler
RUN/profile/flops.txt, comms.json      FLOPs of each module, and the time and size of each
                                       kind of collective, in the step after them

The two files of the next step are measured by DeepSpeed. It waits for the device at each
module and each collective, which would spoil the trace.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flallm_ds.dist import World
from flallm_ds.errors import file_problem
from flallm_ds.files import move, partial_of, write_json
from flallm_ds.training.engine import Engine

FOLDER = "profile"
COMMS = "comms.json"


class StepProfiler:
    """`with profiler.step(number):` around each step, numbered over the whole run from 1.

    steps: those to trace; empty for none. Every rank must use it alike.
    """

    def __init__(self, steps: range, run: Path, engine: Engine, world: World) -> None:
        self.steps, self.folder = steps, run / FOLDER
        self.engine, self.world = engine, world
        self._trace: Any = None  # while steps are traced

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace or measure the block if it is one of the steps."""
        measured = bool(self.steps) and number == self.steps.stop
        if self.steps and number == self.steps.start and self.world.is_main:
            self._trace = torch.profiler.profile()
            self._trace.start()
        if measured:
            self.engine.log_collectives(True)
        with torch.profiler.record_function(f"step {number}"):
            yield
        if measured:
            collectives = self.engine.log_collectives(False)
            if self.world.is_main:
                _try(lambda: write_json(self.folder / COMMS, collectives), self.folder)
        if self.steps and number == self.steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if one is being recorded."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        trace.stop()
        # The plugin of TensorBoard wants this ending.
        name = f"steps-{self.steps.start}-{self.steps[-1]}.pt.trace.json"

        def write() -> None:
            partial = partial_of(self.folder / name)
            trace.export_chrome_trace(str(partial))
            move(partial, self.folder / name)

        _try(write, self.folder)


def _try(write: Callable[[], None], folder: Path) -> None:
    """Write a file of a folder; a full disk ends no run for the sake of a profile."""
    try:
        folder.mkdir(exist_ok=True)
        write()
    except OSError as error:
        print(f"warning: no profile in {folder}: {file_problem(error)}", flush=True)
