# SPDX-License-Identifier: MIT
"""The command line of all programs: flags, the ranges of their values, and errors in one line with exit status 2."""

import argparse
import difflib
import math
import sys
from contextlib import contextmanager

from common.errors import InputError, printable
from common.launchers import launched_rank


class Range:
    """An argparse type: a finite number within bounds, which `--help` and error messages show."""

    def __init__(self, kind, at_least=None, above=None, at_most=None, below=None, multiple_of=None):
        self.kind = kind
        self.bounds = [
            (f"{words} {bound:g}", holds, bound)
            for words, bound, holds in (
                ("at least", at_least, lambda value, bound: value >= bound),
                ("above", above, lambda value, bound: value > bound),
                ("at most", at_most, lambda value, bound: value <= bound),
                ("below", below, lambda value, bound: value < bound),
                ("a multiple of", multiple_of, lambda value, bound: value % bound == 0),
            )
            if bound is not None
        ]

    def __str__(self):
        return " and ".join(words for words, _, _ in self.bounds)

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{'a whole' if self.kind is int else 'a'} number is needed") from None
        if self.kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError("a finite number is needed")
        if not all(holds(value, bound) for _, holds, bound in self.bounds):
            raise argparse.ArgumentTypeError(f"must be {self}")
        return value


finite = Range(float)
integer = Range(int)
count = Range(int, at_least=0)
positive_int = Range(int, at_least=1)
positive = Range(float, above=0)
non_negative = Range(float, at_least=0)
share = Range(float, at_least=0, at_most=1)
positive_share = Range(float, above=0, at_most=1)
rate = Range(float, at_least=0, below=1)
seed = Range(int, at_least=0, below=2**63)  # of PyTorch's generators, as int64


class _Help(argparse.HelpFormatter):
    """Appends each flag's range and default, unless its help names the default or there is none worth naming."""

    def _get_help_string(self, action):
        notes = [str(action.type)] if isinstance(action.type, Range) and action.type.bounds else []
        if action.default not in (None, False, "", argparse.SUPPRESS) and "default" not in action.help:
            notes.append("default: %(default)s")
        return action.help + (f" ({'; '.join(notes)})" if notes else "")


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations, which names the nearest flag where one is unknown.

    Errors are one line, from rank 0 only, and exit status 2. module: of a program that is started with `python -m`.
    """

    def __init__(self, description, module=None):
        super().__init__(
            prog=f"python -m {module}" if module else None,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: _Help(prog, max_help_position=30, width=118),
        )
        self.register("type", float, finite)
        self.register("type", int, integer)

    def parse_checked(self, argv, check):
        """Parses the flags. check(flags) raises InputError for those that contradict each other.

        Returns what `check` returns, and the flags if that is None.
        """
        flags = self.parse_args(argv)
        with self.input_errors():
            return check(flags) or flags

    @contextmanager
    def input_errors(self):
        """Reports an InputError in the block in one line, with exit status 2."""
        try:
            yield
        except InputError as error:
            self.error(str(error))

    def parse_known_args(self, args=None, namespace=None):
        """Refuses unknown flags first: argparse would report a misspelt required flag as missing."""
        words = list(sys.argv[1:] if args is None else args)
        flags = words[: words.index("--") if "--" in words else None]
        unknown = [self._with_nearest(word) for word in flags if self._is_unknown(word)]
        if unknown and not {"-h", "--help"} & set(words):
            self.error(f"unrecognized arguments: {', '.join(unknown)}")
        return super().parse_known_args(words, namespace)

    def error(self, message):
        if launched_rank() == 0:
            sys.stderr.write(f"{self.prog}: error: {printable(' '.join(message.split()))}\n")
            sys.stderr.flush()
        sys.exit(2)

    def _get_value(self, action, arg_string):
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            name = next(iter(action.option_strings), action.dest)
            raise argparse.ArgumentError(None, f"{name} {arg_string}: {error.message}") from None

    def _is_unknown(self, word):
        """Whether this looks like a flag and is none; argparse takes words with a space for values."""
        return (
            len(word) > 1
            and word[0] == "-"
            and " " not in word
            and word.partition("=")[0] not in self._option_string_actions
            and not _is_number(word)
        )

    def _with_nearest(self, word):
        name = word.partition("=")[0]
        nearest = difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_"), self._option_string_actions, 1)
        return f"{name} (did you mean {nearest[0]}?)" if nearest else word


def _is_number(word):
    try:
        return float(word) is not None
    except ValueError:
        return False
