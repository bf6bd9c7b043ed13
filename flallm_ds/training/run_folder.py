"""The run folder: what a run was, what it measured, and where it goes on.

config.json  versions.json  metrics.jsonl  hypotheses.jsonl  log.txt  tensorboard/  checkpoints/
tokenizer/  best/ (an export)  evaluation/  .lock (while a job is at work)
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
from flallm_ds.config import FREE_TO_CHANGE, RunConfig
from flallm_ds.dist import World, locked_by_main, main_first
from flallm_ds.errors import UserError, file_problem
from flallm_ds.files import partial_of, replace_file
from flallm_ds.metrics.columns import has_scores
from flallm_ds.terminal import one_line
from flallm_ds.training.provenance import VERSIONS, record_start
from flallm_ds.training.run_log import LOG
from flallm_ds.training.weights_record import FILE as WEIGHTS

LOCK = ".lock"
EVENTS = "tensorboard"
# What is there before the first step.
BUILT = ("config.json", VERSIONS, WEIGHTS, LOG, "tokenizer", "llm_trimmed")
SHOWN = 5  # hypotheses at each scoring


@contextmanager
def locked_run(config: RunConfig, world: World) -> Iterator[None]:
    """No other job may read or write the run's folder as its own meanwhile.

    Raises UserError on every rank where one does, or where the folder holds something
    else.
    """
    folder = Path(config.run)
    main_first(lambda: _check_free(folder), world)
    with locked_by_main(
        folder / LOCK, f"Run folder {folder}", "use another --run=FOLDER", world
    ):
        yield


@contextmanager
def run_folder(config: RunConfig, world: World) -> Iterator[Path]:
    """`open_run_folder` on all ranks while a run is built; a refused one leaves nothing new."""
    path = Path(config.run)
    # A new one is empty, or it is refused at once.
    is_new = world.is_main and not (path / "config.json").is_file()
    was_there = path.exists()
    folder = main_first(lambda: open_run_folder(config), world)
    try:
        record_start(folder, world)
        yield folder
    except BaseException:  # Ctrl-C, too
        if is_new:
            _remove_built(path)
            if not was_there:
                with suppress(OSError):
                    path.rmdir()
        raise


def _remove_built(folder: Path) -> None:
    """Remove what building a run makes, also where it was cut off, and nothing else."""
    for name in BUILT:
        for path in (folder / name, partial_of(folder / name)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def open_run_folder(config: RunConfig) -> Path:
    """Make the folder of a new run, or check that an existing one is of this very run.

    Raises UserError where the folder is not empty and not a run's, or an option that
    changes numbers differs.
    """
    folder = Path(config.run)
    path = folder / "config.json"
    if path.is_file():
        _check_same_run(config, RunConfig.load(path), folder)
        return folder
    _check_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, config.to_json())
    return folder


def _check_free(folder: Path) -> None:
    """Raise UserError where a folder is neither a run's nor empty.

    What a killed start leaves does not count.
    """
    config = folder / "config.json"
    if config.is_file() or not folder.exists():
        return
    left = {LOCK, LOG, partial_of(config).name}
    is_free = folder.is_dir() and all(path.name in left for path in folder.iterdir())
    if not is_free:
        raise UserError(
            f"run must name a new, an empty or a run's folder, but {folder} holds "
            "something else. Give another --run=FOLDER."
        )


def _check_same_run(now: RunConfig, before: RunConfig, folder: Path) -> None:
    mine, its = now.options(), before.options()
    for name, value in its.items():
        if name not in FREE_TO_CHANGE and mine[name] != value:
            raise UserError(
                f"{name} must be {value!r} as when the run in {folder} began, but is "
                f"{mine[name]!r}. Leave it, or start another run with --run=FOLDER."
            )


class Metrics:
    """What rank 0 records: metrics.jsonl, hypotheses.jsonl and TensorBoard events.

    A resume forgets what came after its checkpoint. A write that fails is kept in mind
    and raised by `check`, where all ranks hear of it.
    """

    def __init__(self, folder: Path, global_step: int, epoch: int) -> None:
        """Open the files, without what a resumed run makes again. Raises OSError.

        global_step: steps made. epoch: epochs that are done, with their scoring.
        """
        # Not at the top: slow to import, and rank 0 alone writes events.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.problem: OSError | None = None
        self._metrics = _continued(folder / "metrics.jsonl", global_step, epoch)
        self._hypotheses = _continued(folder / "hypotheses.jsonl", global_step, epoch)
        threading.excepthook = _without_events_thread
        self._events = SummaryWriter(str(folder / EVENTS), purge_step=global_step + 1)

    def write(self, kind: str, global_step: int, values: dict[str, Any]) -> None:
        def events() -> None:
            # TensorBoard draws numbers alone; metrics.jsonl has the texts, too.
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, global_step)

        self._append(self._metrics, {"kind": kind, "global_step": global_step, **values})
        self._try(EVENTS, events)

    def write_hypotheses(
        self, split: str, epoch: int, global_step: int, hypotheses: Sequence[Hypothesis]
    ) -> None:
        """Keep a few hypotheses of a scoring. epoch: the one that is scored, from 1."""
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
        """Wait until all is in the files."""
        self._try(EVENTS, self._events.flush)

    def close(self) -> None:
        for file in (self._metrics, self._hypotheses):
            self._try(file.name, file.close, in_any_case=True)
        self._try(EVENTS, self._events.close, in_any_case=True)

    def check(self) -> None:
        """Raise UserError where something could not be written."""
        if self.problem is not None:
            problem = file_problem(self.problem)
            raise UserError(
                f"The records in {self.folder} are not complete. {problem} The run resumes "
                "from its last checkpoint."
            )

    def _append(self, file: IO[str], record: dict[str, Any]) -> None:
        def append() -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        self._try(file.name, append)

    def _try(
        self, name: str, action: Callable[[], None], in_any_case: bool = False
    ) -> None:
        if self.problem is not None and not in_any_case:
            return  # a file with a gap would be worse than one that ends
        try:
            action()
        except OSError as error:
            error.filename = error.filename or str(self.folder / name)
            self.problem = self.problem or error


def shown(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The same few clips at each scoring, spread evenly over the keys in order."""
    by_key = sorted(hypotheses, key=lambda one: one.key)
    count = min(SHOWN, len(by_key))
    return [by_key[number * len(by_key) // count] for number in range(count)]


def _continued(path: Path, global_step: int, epoch: int) -> IO[str]:
    """A file of JSON lines, opened to append, without what a resumed run makes again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            # A kill may cut off the last line, also just its end.
            if line.endswith("\n") and _is_before(line, global_step, epoch):
                kept.append(line)
        if kept != lines:
            replace_file(path, "".join(kept))
    return path.open("a", encoding="utf-8")


def _is_before(line: str, global_step: int, epoch: int) -> bool:
    try:
        record = json.loads(line)
        if int(record["global_step"]) > global_step:
            return False
        # The steps of an epoch and its scoring have the same global_step: a checkpoint
        # between them lacks the scoring, which is done again.
        is_scoring = has_scores(record) or "hypothesis" in record
        return not is_scoring or bool(record["epoch"] <= epoch)
    except (ValueError, KeyError, TypeError):
        return False  # a line cut off by a kill


def _table(hypotheses: Sequence[Hypothesis]) -> str:
    """For TensorBoard, which reads Markdown."""
    lines = ["| clip | reference | hypothesis |", "|---|---|---|"]
    for one in hypotheses:
        cells = map(_cell, (one.key, one.reference, one.hypothesis))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text as one cell of a table, in which nothing is markup."""
    encodable = one_line(text).encode("utf-8", "backslashreplace").decode()
    return html.escape(encodable).replace("|", "&#124;")


def _without_events_thread(args: threading.ExceptHookArgs) -> None:
    """Print a thread's error, but not one of TensorBoard's.

    Its next write raises the error again, and there it is handled.
    """
    is_of_events = type(args.thread).__name__ == "_AsyncWriterThread"
    if not (is_of_events and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)
