# SPDX-License-Identifier: MIT
"""Errors that a program reports in one line; see `util.program.run_program` for their exit statuses."""


class UsageError(ValueError):
    """A flag, a path or a file cannot be used. One line: which, and what to do instead. Exit status 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, …). One line: where, and what is left. Exit status 1."""


class Stopped(Exception):
    """A run ends before it is finished, because it was asked to; its state is saved. One line: why, and where it was.

    status: the exit status, 128 + the number of the signal that asked for it, or 0 at the walltime.
    """

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status
