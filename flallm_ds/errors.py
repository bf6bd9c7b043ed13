"""The exceptions that users see: each is one sentence that says what must hold, what came, and what to do."""


class UserError(Exception):
    """Wrong input. Every rank finds the same error, so rank 0 alone prints it; the exit code is 2."""

    exit_code = 2


class RankError(UserError):
    """A fault that one rank alone may meet (a broken clip, a full disk): that rank prints it."""

    exit_code = 3


class Preempted(Exception):
    """The run was asked to stop, has saved its state, and wants to be started again (exit code 75)."""

    exit_code = 75
