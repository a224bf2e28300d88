# SPDX-License-Identifier: MIT
"""What the command lines of all programs share."""

import argparse
import difflib
import sys


class FlagParser(argparse.ArgumentParser):
    """Argument parser without abbreviations that names the nearest flag where one is unknown."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Unknown flags are refused before the others are parsed: argparse would first miss the required one that was misspelt."""
        words = list(sys.argv[1:] if args is None else args)
        unknown = [
            self._with_nearest(word)
            for word in words[: words.index("--") if "--" in words else None]
            if self._is_unknown(word)
        ]
        if unknown and not {"-h", "--help"} & set(words):
            self.error(f"unrecognized arguments: {', '.join(unknown)}")
        return super().parse_known_args(words, namespace)

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
