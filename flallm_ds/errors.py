"""Define the exceptions that users see, and their exit codes.

Each message says what is wrong, where, and what to do.
"""

import errno


class UserError(Exception):
    """An error that the user can fix. All ranks raise it, and only rank 0 prints it."""

    exit_code = 2


class RankError(UserError):
    """An error on a single rank (a damaged clip, a full disk), which that rank prints."""

    exit_code = 3


class SharedRankError(UserError):
    """A RankError that all ranks have heard of: all raise it, and only rank 0 prints it."""

    exit_code = RankError.exit_code


class Preempted(Exception):
    """The run received a stop signal and saved its state. Start it again to resume it."""

    exit_code = 75


def require(holds: bool, sentence: str) -> None:
    """Raise UserError with this sentence if a condition is false."""
    if not holds:
        raise UserError(sentence)


def file_problem(error: OSError) -> str:
    """Return an error message about a file that cannot be read or written."""
    place = f" {error.filename}" if error.filename is not None else " a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "Free some space and run the same command again."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Give a path that you may read and write."
    else:
        advice = "Fix this and run the same command again."
    return f"Cannot read or write{place}: {error.strerror or error}. {advice}"
