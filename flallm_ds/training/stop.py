"""How a run is asked to stop between two steps of training or of scoring."""

import atexit
import os
import signal
import threading
import time
from types import FrameType

from flallm_ds.command import process_rank

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# torchrun passes Ctrl-C on to ranks that the terminal has sent it to already
TWICE_S = 0.3


class StopRequest:
    """Set by a signal or the launcher's death; ranks agree on it at the next step.

    SIGTERM and SIGUSR1 count at any time. Ctrl-C and a lost terminal (SIGHUP) end a
    command at once while there is nothing to save, that is before `begin`; a second
    Ctrl-C always does. What is ignored, as SIGHUP under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self._asked = self._begun = False
        self._ended_by: int | None = None  # the signal that came before `begin`
        self._interrupted_at = -1.0  # by the monotonic clock; not yet
        self._parent = os.getppid()
        # A thread hears the second Ctrl-C: handlers wait while the main thread waits for
        # other ranks.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        self._watcher.start()
        # A thread that prints while Python is taken down would hold the lock of stdout,
        # which is fatal.
        atexit.register(self._end_watcher)

    def begin(self) -> None:
        """From now on there is something to save."""
        # raised within a library's __del__, which Python ignores
        if self._ended_by is not None:
            raise KeyboardInterrupt(self._ended_by)
        self._begun = True

    def __bool__(self) -> bool:
        return self._asked or os.getppid() != self._parent

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGINT, signal.SIGHUP) and not self._begun:
            self._ended_by = number
            raise KeyboardInterrupt(number)
        self._asked = True

    def _watch(self, reader: int) -> None:
        while numbers := os.read(reader, 1):
            self._hear(numbers[0])

    def _end_watcher(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._watcher.join()

    def _hear(self, number: int) -> None:
        if number != signal.SIGINT:
            return
        is_main = process_rank() == 0
        if self._interrupted_at < 0:
            self._interrupted_at = time.monotonic()
            if self._begun and is_main:
                print(
                    "stopping: this step is finished and saved; Ctrl-C again ends at once.",
                    flush=True,
                )
        elif time.monotonic() - self._interrupted_at > TWICE_S:
            if is_main:
                print("stopped at once; what was saved before counts.", flush=True)
            os._exit(128 + number)
