# SPDX-License-Identifier: MIT
"""Errors that every program reports in one line, and how values are quoted in such a line."""


class InputError(ValueError):
    """Input from the user cannot be used. One line: what, and the remedy. Exit status 2.

    Its only argument is that line, so that it can be pickled between processes.
    """


class UsageError(InputError):
    """A flag, a path or a checkpoint cannot be used."""


class DataError(InputError):
    """Input data cannot be used: which file (and line)."""


class TrainingError(RuntimeError):
    """Training cannot continue (a loss that is not finite, …). One line: where, and what is saved. Exit status 1."""


class Stopped(Exception):
    """A run ends early because it was asked to; its state is saved. One line: why, and where in the run.

    status: the exit status, 128 + the number of the signal that asked for it, or 0 at the walltime. on_all_ranks:
    whether all ranks have agreed to end; otherwise this rank ends alone.
    """

    def __init__(self, message, status, on_all_ranks=True):
        super().__init__(message)
        self.status, self.on_all_ranks = status, on_all_ranks


class Interrupted(BaseException):
    """A signal has waited too long for a batch; the step of that batch does not take place."""


def data_error(problem, found, remedy):
    """A DataError about many places: `problem` (with their count), the first five of `found`, and `remedy`."""
    return DataError(" ".join(f"{problem}: {first_few(found)}; {remedy}".splitlines()))


def first_few(found):
    """The first five of a list, for a message: "a, b, c, d, e, and 3 more"."""
    return ", ".join(found[:5]) + (f", and {len(found) - 5} more" if len(found) > 5 else "")


def quoted(value, most=80):
    """A value from a file for a one-line message: escaped, and cut to `most` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason_of(error):
    """The message of an exception in one line. From a loader process it follows that process's traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and "Traceback (most recent call last)" in str(error):
        return lines[-1].strip().removeprefix(f"{type(error).__module__}.").removeprefix(f"{type(error).__name__}: ")
    return lines[0].strip()
