# SPDX-License-Identifier: MIT
"""The command line of all programs: flags, the ranges of their values, and errors in one line with exit status 2."""

import argparse
import difflib
import math
import re
import sys
from contextlib import contextmanager
from pathlib import Path

from common.errors import InputError, printable
from common.launchers import launched_rank

VAST = 2**53  # bounds from here on are not worth naming


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

    def shown(self):
        """The bounds for help, without those that nobody reaches."""
        return " and ".join(words for words, _, bound in self.bounds if bound < VAST)

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

# Names of flags and of values in other programs, without punctuation, and what they are called here. A name counts only
# where a parser, or the flag, has it.
FLAGS_ELSEWHERE = {
    "accumulategradbatches": ("accum_iter",),
    "accumulationsteps": ("accum_iter",),
    "arch": ("model",),
    "backbone": ("model",),
    "bs": ("batch_size",),
    "checkpoint": ("finetune", "resume"),
    "checkpointpath": ("finetune", "resume"),
    "ckpt": ("finetune", "resume"),
    "ckptpath": ("finetune", "resume"),
    "data": ("data_path",),
    "datadir": ("data_path",),
    "dataroot": ("data_path",),
    "datasetdir": ("data_path",),
    "datasetpath": ("data_path",),
    "evalonly": ("eval",),
    "evaluate": ("eval",),
    "fp16": ("amp",),
    "gpu": ("device",),
    "gradientaccumulationsteps": ("accum_iter",),
    "imagesize": ("input_size", "size"),
    "imgsize": ("input_size", "size"),
    "learningrate": ("lr",),
    "maskingratio": ("mask_ratio",),
    "mixedprecision": ("amp",),
    "numclasses": ("nb_classes",),
    "out": ("output_dir", "output"),
    "outdir": ("output_dir", "output", "out"),
    "output": ("output_dir", "out"),
    "outputdir": ("output", "out"),
    "outputpath": ("output_dir", "output", "out"),
    "precision": ("amp",),
    "pretrained": ("finetune",),
    "pretrainedpath": ("finetune",),
    "root": ("data_path",),
    "savedir": ("output_dir",),
    "warmup": ("warmup_epochs",),
    "wd": ("weight_decay",),
    "weights": ("finetune",),
    "workers": ("num_workers",),
    "numworkers": ("workers",),
}
VALUES_ELSEWHERE = {
    "ben": ("benv2", "benv1"),
    "bfloat16": ("bf16",),
    "bigearthnet": ("benv2", "benv1"),
    "bigearthnets1": ("benv2", "benv1"),
    "bigearthnetv1": ("benv1",),
    "bigearthnetv2": ("benv2",),
    "custom": ("chips",),
    "float16": ("fp16",),
    "float32": ("off",),
    "fp32": ("off",),
    "geotiff": ("chips",),
    "half": ("fp16",),
    "images": ("chips",),
    "reben": ("benv2",),
    "segmentation": ("masks",),
    "sen12": ("sen12flood",),
    "tiles": ("chips",),
    "validation": ("val",),
}
NUMBERS_OF_GPUS = ("gpus", "ngpus", "numgpus", "nproc", "nprocpernode", "devices", "numprocesses")

DEFAULT_IN_HELP = re.compile(r"[(;] ?default: [^()]*\)$")  # at the end of a help text


class _Help(argparse.HelpFormatter):
    """Appends each flag's range and default, unless its help names the default or there is none worth naming.

    Calls numbers N and X, paths PATH. Keeps line breaks in texts that have some, such as examples. Shortens a usage of
    more than three lines to the flags that are required.
    """

    def _get_help_string(self, action):
        text, default = action.help, action.default
        values = default if isinstance(default, (list, tuple)) else [] if default is None else [default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        if isinstance(default, bool) or default == argparse.SUPPRESS or "default" in text:
            shown = ""
        notes = [action.type.shown()] if isinstance(action.type, Range) else []
        notes += [f"default: {shown}".replace("%", "%%")] if shown else []
        notes = [note for note in notes if note]
        if not notes:
            return text
        joined = "; ".join(notes)
        return f"{text[:-1]}; {joined})" if DEFAULT_IN_HELP.search(text) else f"{text} ({joined})"

    def _get_default_metavar_for_optional(self, action):
        kind = action.type.kind if isinstance(action.type, Range) else action.type
        return {int: "N", float: "X", Path: "PATH"}.get(kind, action.dest.upper())

    def _format_action_invocation(self, action):
        """Without spellings that differ from an earlier one only in dashes."""
        spellings = action.option_strings
        action.option_strings = list({name.replace("-", "_"): name for name in reversed(spellings)}.values())[::-1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings

    def _fill_text(self, text, width, indent):
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _format_usage(self, usage, actions, groups, prefix):
        text = super()._format_usage(usage, actions, groups, prefix)
        if usage or text.rstrip().count("\n") < 3:
            return text
        choices = [group for group in groups if group.required]
        needed = {id(action) for group in choices for action in group._group_actions}
        short = [a for a in actions if a.required or not a.option_strings or id(a) in needed]
        whole, self._prog = self._prog, f"{self._prog} [flags]"
        try:
            return super()._format_usage(None, short, choices, prefix)
        finally:
            self._prog = whole


class Parser(argparse.ArgumentParser):
    """Argument parser without abbreviations, which names the nearest flag or choice where one is unknown.

    Errors are one line, from rank 0 only, and exit status 2. module: of a program that is started with `python -m`.
    usage: what follows the name of the program, instead of a list of its flags. examples: lines of --help.
    """

    def __init__(self, description, module=None, usage=None, examples=None):
        super().__init__(
            prog=f"python -m {module}" if module else None,
            usage=usage and f"%(prog)s {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: _Help(prog, max_help_position=30, width=118),
        )
        self.register("type", float, finite)
        self.register("type", int, integer)
        self.examples = examples
        if examples:  # a group without flags, before all others
            self.add_argument_group("examples", examples)
            self._action_groups.insert(0, self._action_groups.pop())

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

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        choices, name = list(map(str, action.choices)), next(iter(action.option_strings), action.dest)
        nearest = _nearest_choice(str(value), choices)
        meant = f" (did you mean {' or '.join(nearest)}?)" if nearest else ""
        raise argparse.ArgumentError(None, f"{name} {value}: is not a choice{meant}; choose from {', '.join(choices)}")

    def _with_nearest(self, word):
        name, known = word.partition("=")[0], self._option_string_actions
        plain = _plain(name)
        if plain in NUMBERS_OF_GPUS and "--dist_url" in known:
            return f"{name} (for N GPUs, start the program with: torchrun --nproc_per_node N {self.prog})"
        nearest = [f"--{flag}" for flag in FLAGS_ELSEWHERE.get(plain, ()) if f"--{flag}" in known]
        nearest = nearest or difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_"), known, 1)
        return f"{name} (did you mean {' or '.join(nearest)}?)" if nearest else word


def _plain(name):
    """A name in lower case, without punctuation."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _nearest_choice(value, choices):
    """The choices that a value may stand for: by its name elsewhere, as a part of a choice, or misspelt."""
    plain = _plain(value)
    named = [choice for choice in VALUES_ELSEWHERE.get(plain, ()) if choice in choices]
    parts = [choice for choice in choices if plain and plain in _plain(choice)]
    return named or parts or difflib.get_close_matches(value.lower(), choices, 1)


def _is_number(word):
    try:
        return float(word) is not None
    except ValueError:
        return False
