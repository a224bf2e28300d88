# SPDX-License-Identifier: MIT
"""Errors that every program reports in one line, and the formatting of values in such a line."""


class InputError(ValueError):
    """Input from the user cannot be used. The message is one line with the remedy; the exit status is 2.

    The message is the only argument, so that the error can be pickled between processes.
    """


class UsageError(InputError):
    """A flag, a path or a checkpoint cannot be used."""


class DataError(InputError):
    """Input data cannot be used. The message names the file (and line)."""


class TrainingError(RuntimeError):
    """Training cannot continue (a loss is not finite, …). The message is one line; the exit status is 1."""


class Stopped(Exception):
    """A run ends early on request, and its state is saved. The message is one line with the reason.

    status: the exit status: 128 + the number of the signal, or 0 at the walltime. on_all_ranks: whether all ranks end
    together; otherwise this rank ends alone.
    """

    def __init__(self, message, status, on_all_ranks=True):
        super().__init__(message)
        self.status, self.on_all_ranks = status, on_all_ranks


class Interrupted(BaseException):
    """A signal arrived during a long wait for a batch. The step of that batch is not run."""


def listed(names, most=5):
    """The first names, and the number of the others: "a, b, c, d, e, and 2 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def data_error(problem, found, remedy):
    """A DataError about many places: `problem` (with their count), the first five of `found`, and `remedy`."""
    return DataError(" ".join(f"{problem}: {listed(found)}; {remedy}".splitlines()))


def printable(text):
    """A text of one or several lines in which what could steer a terminal, or cannot be written, is spelled out."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def quoted(value, most=80):
    """The repr of a value from a file, cut to `most` characters, for a one-line message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason_of(error):
    """The message of an exception in one line. In an error of a loader process it follows the traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and "Traceback (most recent call last)" in str(error):
        return lines[-1].strip().removeprefix(f"{type(error).__module__}.").removeprefix(f"{type(error).__name__}: ")
    return lines[0].strip()
