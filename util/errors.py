# SPDX-License-Identifier: MIT
"""Errors that a program reports in one line; see `util.ending.run_program` for their exit statuses."""


class UsageError(ValueError):
    """A flag, a path or a file cannot be used. One line: which, and what to do instead. Exit status 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, …). One line: where, and what is left. Exit status 1."""


class Stopped(Exception):
    """A run ends before it is finished, because it was asked to; its state is saved. One line: why, and where it was.

    status: the exit status, 128 + the number of the signal that asked for it, or 0 at the walltime. on_all_ranks: whether all
    ranks have agreed to it; else this one alone ends, and the others find it gone.
    """

    def __init__(self, message, status, on_all_ranks=True):
        super().__init__(message)
        self.status, self.on_all_ranks = status, on_all_ranks


class Interrupted(BaseException):
    """A signal has waited too long for a batch to come: the step that the batch was for does not take place."""


def reason_of(error):
    """What an exception says, in one line. One raised in a loader process arrives with that process's traceback before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and "Traceback (most recent call last)" in str(error):
        return lines[-1].strip().removeprefix(f"{type(error).__module__}.").removeprefix(f"{type(error).__name__}: ")
    return lines[0].strip()
