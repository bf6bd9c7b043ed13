"""The exceptions that users see: each is one sentence that says what must hold, what
came, and what to do."""

import errno


class UserError(Exception):
    """Wrong input. Every rank finds the same error, so rank 0 alone prints it; the exit
    code is 2."""

    exit_code = 2


class RankError(UserError):
    """A fault that one rank alone may meet (a broken clip, a full disk): that rank prints it."""

    exit_code = 3


class Preempted(Exception):
    """The run was asked to stop, has saved its state, and wants to be started again (exit
    code 75)."""

    exit_code = 75


def require(holds: bool, sentence: str) -> None:
    """Raise UserError with this sentence where a condition does not hold."""
    if not holds:
        raise UserError(sentence)


def file_problem(error: OSError) -> str:
    """One sentence for a user about a file that cannot be read or written."""
    place = f" {error.filename}" if error.filename is not None else " a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "Free some space and run the same command again."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Give a place that you may read and write."
    else:
        advice = "Mend that and run the same command again."
    return f"Cannot read or write{place}: {error.strerror or error}. {advice}"
