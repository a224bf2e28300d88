# SPDX-License-Identifier: MIT
"""Errors that every program reports in one line, and how values are quoted in such a line."""


class InputError(ValueError):
    """Something that the user gave cannot be used. One line: what, and the remedy. Exit status 2.

    Built from that one string, so that it survives the pickling between processes.
    """


class UsageError(InputError):
    """A flag, a path or a checkpoint cannot be used."""


class DataError(InputError):
    """Input data cannot be used: which file (and line)."""


class TrainingError(RuntimeError):
    """Training cannot go on (a loss that is not finite, …). One line: where, and what is left. Exit status 1."""


class Stopped(Exception):
    """A run ends before it is finished, because it was asked to; its state is saved. One line: why, and where it was.

    status: the exit status, 128 + the number of the signal that asked for it, or 0 at the walltime. on_all_ranks: whether
    all ranks have agreed to it; else this one alone ends, and the others find it gone.
    """

    def __init__(self, message, status, on_all_ranks=True):
        super().__init__(message)
        self.status, self.on_all_ranks = status, on_all_ranks


class Interrupted(BaseException):
    """A signal has waited too long for a batch to come: the step that the batch was for does not take place."""


def data_error(problem, found, remedy):
    """DataError about many places at once: `problem` (with its count), the first five of `found`, and `remedy`."""
    shown = ", ".join(found[:5]) + (f", and {len(found) - 5} more" if len(found) > 5 else "")
    return DataError(" ".join(f"{problem}: {shown}; {remedy}".splitlines()))


def quoted(value):
    """A value from a file as it can stand in a one-line message: escaped, and cut when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def reason_of(error):
    """What an exception says, in one line. One raised in a loader process arrives with that process's traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and "Traceback (most recent call last)" in str(error):
        return lines[-1].strip().removeprefix(f"{type(error).__module__}.").removeprefix(f"{type(error).__name__}: ")
    return lines[0].strip()
