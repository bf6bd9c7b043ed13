"""Ask a run to stop between two steps of training or of scoring."""

import atexit
import os
import signal
import threading
import time
from types import FrameType

from flallm_ds.command import process_rank

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Two signals within this time count as one Ctrl-C: the terminal sends it to all ranks, and
# torchrun sends it to them again.
TWICE_S = 0.3


class StopRequest:
    """Becomes true after a signal or the end of the launcher; ranks agree on it at the next
    step.

    SIGTERM and SIGUSR1 count at any time. Before `begin`, when there is nothing to save,
    Ctrl-C and a lost terminal (SIGHUP) end the command at once. A second Ctrl-C always
    does. Signals that are ignored, as SIGHUP is under nohup, stay ignored.
    """

    def __init__(self) -> None:
        self._asked = self._begun = False
        self._ended_by: int | None = None  # the signal that came before `begin`
        self._interrupted_at = -1.0  # the first Ctrl-C, by the monotonic clock
        # The deepspeed launcher forwards no signals. When it ends, the parent changes.
        self._parent = os.getppid()
        # A thread receives the second Ctrl-C, because Python runs no handler while the main
        # thread waits for other ranks.
        # The interpreter writes the number of each signal to this pipe, from C.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._watcher.start()
        # A thread that prints while Python shuts down would hold the lock of stdout, which
        # is a fatal error.
        atexit.register(self._end_watcher)

    def begin(self) -> None:
        """Let signals stop the run at its next step from now on, because there is work to
        save.

        Raises KeyboardInterrupt for an earlier Ctrl-C.
        """
        # Python ignores an exception in __del__, so the one of `_ask` may be lost.
        if self._ended_by is not None:
            raise KeyboardInterrupt(self._ended_by)
        self._begun = True

    def __bool__(self) -> bool:
        return self._asked or os.getppid() != self._parent

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if number in (signal.SIGINT, signal.SIGHUP) and not self._begun:
            self._ended_by = number
            raise KeyboardInterrupt(number)
        self._asked = True

    def _watch(self, reader: int) -> None:
        """Read the number of each signal from the pipe until it is closed, in the thread."""
        while numbers := os.read(reader, 1):
            self._hear(numbers[0])

    def _end_watcher(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._watcher.join()

    def _hear(self, number: int) -> None:
        """Print a line at the first Ctrl-C, and end the process at the second one."""
        if number != signal.SIGINT:
            return
        # All ranks get Ctrl-C; one of them prints.
        is_main = process_rank() == 0
        if self._interrupted_at < 0:
            self._interrupted_at = time.monotonic()
            if self._begun and is_main:
                print(
                    "stopping after this step, which is saved; press Ctrl-C again to end at "
                    "once.",
                    flush=True,
                )
        elif time.monotonic() - self._interrupted_at > TWICE_S:
            if is_main:
                print("stopped at once; everything saved before is kept.", flush=True)
            # Not sys.exit: the main thread may wait for another rank.
            os._exit(128 + number)
