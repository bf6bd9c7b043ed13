"""Ask a run to stop between two steps of training or of scoring."""

import atexit
import os
import select
import signal
import threading
import time
from types import FrameType

from flallm_ds.errors import Preempted
from flallm_ds.process import process_rank
from flallm_ds.training.launchers import launchers_of

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Two signals within this time count as one Ctrl-C: the terminal sends it to all ranks, and
# torchrun sends it to them again.
TWICE_S = 0.3
# How often a thread looks whether the launchers of this process are running.
LOOK_EVERY_S = 1.0


class StopRequest:
    """Becomes true after a signal or the end of the launcher; ranks agree on it at the next
    step.

    SIGTERM and SIGUSR1 count at any time. Before `begin`, when there is nothing to save,
    Ctrl-C, a lost terminal (SIGHUP) and the end of a launcher end the command at once. A
    second Ctrl-C always does. Signals that are ignored, as SIGHUP is under nohup, stay
    ignored.
    """

    def __init__(self) -> None:
        self._asked = self._begun = False
        self._ended_by: int | None = None  # the signal that came before `begin`
        self._interrupted_at = -1.0  # the first Ctrl-C, by the monotonic clock
        # The deepspeed launcher forwards no signals: a thread looks whether it has ended.
        self._launchers = launchers_of(os.getpid())
        self._is_orphan = False
        # The same thread receives the second Ctrl-C, because Python runs no handler while the main
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
        return self._asked

    def is_orphan(self) -> bool:
        """Whether a launcher has ended, so that nobody would end this process."""
        return self._is_orphan

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if number in (signal.SIGINT, signal.SIGHUP) and not self._begun:
            self._ended_by = number
            raise KeyboardInterrupt(number)
        self._asked = True

    def _watch(self, reader: int) -> None:
        """Read the number of each signal from the pipe until it is closed, and look for the
        launchers, in the thread."""
        pipe = select.poll()
        pipe.register(reader, select.POLLIN)
        while True:
            if pipe.poll(1000 * LOOK_EVERY_S):
                numbers = os.read(reader, 1)
                if not numbers:
                    return
                self._hear(numbers[0])
            elif not self._is_orphan:
                self._look_for_launchers()

    def _look_for_launchers(self) -> None:
        """Ask for a stop once a launcher has ended; before `begin`, end the process."""
        ended = [launcher for launcher in self._launchers if launcher.has_ended()]
        if not ended:
            return
        # After a Ctrl-C, which ends the launcher as well, the run is stopping already.
        if not self._asked:
            then = "stopping after this step, which is saved" if self._begun else "stopped"
            _say(f"the launcher {ended[0].name} has ended; {then}.")
        self._asked = self._is_orphan = True
        if not self._begun:
            # Not sys.exit: the main thread may wait for another rank.
            os._exit(Preempted.exit_code)

    def _end_watcher(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._writer)
        self._watcher.join()

    def _hear(self, number: int) -> None:
        """Print a line at the first Ctrl-C, and end the process at the second one."""
        if number != signal.SIGINT:
            return
        if self._interrupted_at < 0:
            self._interrupted_at = time.monotonic()
            if self._begun:
                _say(
                    "stopping after this step, which is saved; press Ctrl-C again to end at "
                    "once."
                )
        elif time.monotonic() - self._interrupted_at > TWICE_S:
            _say("stopped at once; everything saved before is kept.")
            # Not sys.exit: the main thread may wait for another rank.
            os._exit(128 + number)


def _say(sentence: str) -> None:
    """Print a line on rank 0 alone: Ctrl-C and the end of a launcher reach all ranks."""
    if process_rank() == 0:
        print(sentence, flush=True)
