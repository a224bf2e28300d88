# SPDX-License-Identifier: MIT
"""Errors that a program reports in one line; see `util.program.run_program` for their exit statuses."""


class UsageError(ValueError):
    """A flag, a path or a file cannot be used. One line: which, and what to do instead. Exit status 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, …). One line: where, and what is left. Exit status 1."""
