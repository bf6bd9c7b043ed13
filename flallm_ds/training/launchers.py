"""Find the launchers that this process belongs to, and whether they have ended.

The `deepspeed` command starts a node agent, which starts the ranks. Neither forwards a
signal, and nothing reaches a rank when one of them is killed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
RUNNER, AGENT = "deepspeed", "deepspeed.launcher.launch"
# Programs and Python modules. Other ancestors, such as a shell, may end before the run.
LAUNCHERS = frozenset(
    {
        RUNNER,
        "ds",
        "deepspeed.launcher.runner",
        AGENT,
        "torchrun",
        "torch.distributed.run",
        "torch.distributed.launch",
        "accelerate",
        "accelerate-launch",
        "mpirun",
        "mpiexec",
        "orted",
        "prted",
        "slurmstepd",
    }
)
# Options of Python whose value is the next word.
_WITH_VALUE = ("-X", "-W")


@dataclass(frozen=True)
class Launcher:
    """A launcher that was running. start_ticks: clock ticks since the machine started.

    A process id may be used again; the pair of both is unique.
    """

    name: str
    pid: int
    parent: int
    start_ticks: int

    def has_ended(self) -> bool:
        try:
            state, _, start_ticks = _status(self.pid)
        except OSError:
            return True
        # A killed process remains as a zombie until its parent has asked for its code.
        return start_ticks != self.start_ticks or state in "ZX"


def launchers_of(pid: int) -> list[Launcher]:
    """Return the launchers among the ancestors of a process, the nearest first."""
    found = []
    # An ancestor that ends meanwhile, or that is hidden (hidepid), ends the list.
    try:
        _, pid, _ = _status(pid)
        while pid > 0:
            _, parent, start_ticks = _status(pid)
            name = launcher_name(_command_line(pid))
            if name is not None:
                found.append(Launcher(name, pid, parent, start_ticks))
            pid = parent
    except OSError:
        pass
    # The command may have been killed while this process started, which takes seconds.
    if found and found[-1].name == AGENT and is_gone(found[-1].parent):
        found.append(Launcher(RUNNER, 0, 0, 0))  # no process has the id 0
    return found


def is_gone(pid: int) -> bool:
    """Whether a process that was the parent of another one has ended, or is ending.

    Process 1 adopts the children of a process that has ended.
    """
    try:
        # A process without a command line is ending: its memory is freed first, which can
        # take seconds, and only then are its children adopted.
        return pid == 1 or _command_line(pid) == [""]
    except OSError:
        return True


def launcher_name(words: Sequence[str]) -> str | None:
    """Return the name of the launcher that a command line runs, if it runs one."""
    # SLURM writes the step behind the name: `slurmstepd: [7.0]`.
    program, *rest = words
    name = Path(program.split(":")[0]).name
    if name.startswith("python"):
        name = _python_program(rest)
    return name if name in LAUNCHERS else None


def _python_program(words: list[str]) -> str:
    """Return the name of the script or module that Python runs; empty if there is none."""
    rest = iter(words)
    for word in rest:
        if word == "-m":
            return next(rest, "")
        if word in _WITH_VALUE:
            next(rest, None)
        elif not word.startswith("-"):
            return Path(word).name
    return ""


def _command_line(pid: int) -> list[str]:
    """Return the words of a command. Raises OSError if there is no such process."""
    words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    return words.rstrip("\0").split("\0")


def _status(pid: int) -> tuple[str, int, int]:
    """Return the state, the parent and the start of a process, in clock ticks.

    Raises OSError if there is no such process.
    """
    content = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    # The name, in parentheses, may contain any character.
    fields = content.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
