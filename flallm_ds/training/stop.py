"""How a run is asked to stop between two steps of training or of scoring."""

import os
import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or the launcher's death; ranks agree on it at the next step."""

    def __init__(self) -> None:
        self._asked = False
        self._parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked or os.getppid() != self._parent
