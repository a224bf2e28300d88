# SPDX-License-Identifier: MIT
"""The error that bad input data raises, everywhere in this package."""


class DataError(ValueError):
    """Input data that cannot be used. The message is one line: what is wrong, in which file (and line), what to do.

    Built from that one string, so that it survives the pickling between DataLoader workers and the trainer.
    """


def data_error(problem, found, remedy):
    """DataError about many places at once: `problem` (with its count), the first five of `found`, and `remedy`."""
    shown = ", ".join(found[:5]) + (f", and {len(found) - 5} more" if len(found) > 5 else "")
    return DataError(" ".join(f"{problem}: {shown}; {remedy}".splitlines()))


def quoted(value):
    """A value from a file as it can stand in a one-line message: escaped, and cut when it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
