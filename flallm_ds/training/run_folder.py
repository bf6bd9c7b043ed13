"""Open the folder of a run, lock it, and record metrics and hypotheses in it.

config.json  versions.json  metrics.jsonl  hypotheses.jsonl  log.txt  tensorboard/  checkpoints/
tokenizer/  best/ (an export)  evaluation/  .lock (during a job)  code/ and slurm/ (of
`flallm submit`)
"""

import html
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from flallm_ds.batch import Hypothesis
from flallm_ds.config import RunConfig
from flallm_ds.dist import World, locked_by_main, main_first
from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import partial_of, replace_file
from flallm_ds.metrics.columns import has_scores
from flallm_ds.run_check import CONFIG, LOCK, LOG, check_free, open_run_folder
from flallm_ds.terminal import one_line
from flallm_ds.training.provenance import VERSIONS, record_start
from flallm_ds.training.records import METRICS
from flallm_ds.training.trackers import Trackers
from flallm_ds.training.weights_record import FILE as WEIGHTS

EVENTS = "tensorboard"
# Files and folders that are created before the first step.
BUILT = (CONFIG, VERSIONS, WEIGHTS, LOG, "tokenizer", "llm_trimmed")
SHOWN = 5  # number of hypotheses that are recorded at each scoring


@contextmanager
def locked_run(config: RunConfig, world: World) -> Iterator[None]:
    """Lock the folder of a run against other jobs while the block runs.

    Raises UserError on every rank if another job has locked it, or if the folder has other
    content.
    """
    folder = Path(config.run)
    # Check first: locking would create a file in a folder that is not a run's.
    main_first(lambda: check_free(folder), world)
    with locked_by_main(
        folder / LOCK, f"Run folder {folder}", "use another --run=FOLDER", world
    ):
        yield


@contextmanager
def run_folder(config: RunConfig, world: World) -> Iterator[Path]:
    """Open the folder of a run on all ranks for a block that builds the run.

    If the block fails, the files that a new run has created are removed. Raises UserError
    on every rank, as `open_run_folder` does.
    """
    path = Path(config.run)
    # A folder without config.json is empty, or `open_run_folder` raises an error.
    is_new = world.is_main and not (path / CONFIG).is_file()
    was_there = path.exists()
    folder = main_first(lambda: open_run_folder(config), world)
    try:
        record_start(folder, world)
        yield folder
    except BaseException:  # Ctrl-C, too
        if is_new:
            _remove_built(path)
            # The folder stays if it is not empty: the log of this start may be in it.
            if not was_there:
                with suppress(OSError):
                    path.rmdir()
        raise


def _remove_built(folder: Path) -> None:
    """Remove what the building of a run creates, complete or not, and nothing else."""
    # Other files in the folder belong to the user.
    for name in BUILT:
        for path in (folder / name, partial_of(folder / name)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class Metrics:
    """Writes metrics.jsonl, hypotheses.jsonl and TensorBoard events, on rank 0.

    A resumed run drops the records that are newer than its checkpoint. An error of a write
    is kept until `check` raises it, so that all ranks can get it.
    """

    def __init__(
        self,
        folder: Path,
        global_step: int,
        epoch: int,
        trackers: Trackers | None = None,
    ) -> None:
        """Open the files, and drop the records that a resumed run writes again.

        global_step: steps done. epoch: epochs done, with their scoring. trackers: get the
        numbers, too. Raises OSError.
        """
        # Imported here because it is slow, and only rank 0 writes events.
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._trackers = folder, trackers
        self.problem: OSError | None = None
        self._metrics = _continued(folder / METRICS, global_step, epoch)
        self._hypotheses = _continued(folder / "hypotheses.jsonl", global_step, epoch)
        # TensorBoard writes in a thread. `_try` reports the errors of that thread.
        threading.excepthook = _without_events_thread
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=global_step + 1)

    def write(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        """Append a record of a step or of a scoring. kind: "train", or the scored split."""

        # Trackers plot numbers only; metrics.jsonl also has the texts.
        numbers = {}
        for name, value in values.items():
            if isinstance(value, int | float):
                numbers[f"{kind}/{name}"] = value

        def events() -> None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, global_step)

        self._append(self._metrics, {"kind": kind, "global_step": global_step, **values})
        self._try(EVENTS, events)
        if self._trackers is not None:
            self._trackers.write(global_step, numbers)

    def write_hypotheses(
        self, split: str, epoch: int, global_step: int, hypotheses: Sequence[Hypothesis]
    ) -> None:
        """Append hypotheses of a scoring. epoch: the scored epoch, from 1."""
        for one in hypotheses:
            record = {
                "kind": split,
                "global_step": global_step,
                "epoch": epoch,
                "key": one.key,
                "hypothesis": one.hypothesis,
                "reference": one.reference,
            }
            self._append(self._hypotheses, record)
        table = _table(hypotheses)
        self._try(
            EVENTS, lambda: self._events.add_text(f"{split}/hypotheses", table, global_step)
        )

    def flush(self) -> None:
        """Wait until all events are in their file."""
        self._try(EVENTS, self._events.flush)

    def close(self) -> None:
        """Close the files, also after an error."""
        for file in (self._metrics, self._hypotheses):
            self._try(file.name, file.close, in_any_case=True)
        self._try(EVENTS, self._events.close, in_any_case=True)
        if self._trackers is not None:
            self._trackers.close()

    def check(self) -> None:
        """Raise UserError if a record could not be written."""
        if self.problem is not None:
            raise UserError(
                f"{file_problem(self.problem)} The records in {self.folder} are "
                "incomplete; the run resumes from its last checkpoint."
            )

    def _append(self, file: IO[str], record: dict[str, Any]) -> None:
        def append() -> None:
            # Flush each line, so that a kill loses at most the last one.
            file.write(json.dumps(record) + "\n")
            file.flush()

        self._try(file.name, append)

    def _try(
        self, name: str, action: Callable[[], None], in_any_case: bool = False
    ) -> None:
        """Call `action` and keep its OSError, unless there was an error before."""
        # A file with a gap would be worse than one that ends early.
        if self.problem is not None and not in_any_case:
            return
        try:
            action()
        except OSError as error:
            error.filename = error.filename or str(self.folder / name)
            self.problem = self.problem or error


def shown(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Return a few hypotheses, of the same clips at each scoring.

    The clips are spread evenly over the sorted keys.
    """
    by_key = sorted(hypotheses, key=lambda one: one.key)
    count = min(SHOWN, len(by_key))
    return [by_key[number * len(by_key) // count] for number in range(count)]


def _continued(path: Path, global_step: int, epoch: int) -> IO[str]:
    """Open a file of JSON lines to append; first drop the lines that a resumed run writes
    again.

    global_step, epoch: as for `Metrics`. Raises OSError.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            # A kill may cut off the last line, or only the newline after it.
            if line.endswith("\n") and _is_before(line, global_step, epoch):
                kept.append(line)
        if kept != lines:
            replace_file(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _is_before(line: str, global_step: int, epoch: int) -> bool:
    """Return whether the checkpoint of this step and epoch includes a record."""
    try:
        record = json.loads(line)
        if int(record["global_step"]) > global_step:
            return False
        # The last step of an epoch and its scoring have the same global_step. A checkpoint
        # that was saved between them does not include the scoring.
        is_scoring = has_scores(record) or "hypothesis" in record
        return not is_scoring or bool(record["epoch"] <= epoch)
    except (ValueError, KeyError, TypeError):
        return False  # a line that a kill has cut off


def _table(hypotheses: Sequence[Hypothesis]) -> str:
    """Return a table of hypotheses in Markdown, which TensorBoard renders."""
    lines = ["| clip | reference | hypothesis |", "|---|---|---|"]
    for one in hypotheses:
        cells = map(_cell, (one.key, one.reference, one.hypothesis))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, with its markup escaped."""
    # A lone surrogate cannot be encoded as UTF-8.
    encodable = one_line(text).encode("utf-8", "backslashreplace").decode()
    return html.escape(encodable).replace("|", "&#124;")


def _without_events_thread(args: threading.ExceptHookArgs) -> None:
    """Print the error of a thread, except for an OSError of the writer of TensorBoard.

    The next write of TensorBoard raises that error again, and `Metrics` handles it.
    """
    is_of_events = type(args.thread).__name__ == "_AsyncWriterThread"
    if not (is_of_events and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)
