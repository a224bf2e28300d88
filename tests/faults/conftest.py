# SPDX-License-Identifier: MIT
"""Whole inputs, the programs run on them, and the check that one which is damaged is refused."""

import fcntl
import functools
import shutil
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest

import main_finetune
import main_pretrain
from tests.helpers.damage import kept
from tests.helpers.inputs import BASES, USES
from tests.helpers.runs import argv, is_refused

RECORDS = {"step.json", "pairs.csv"}  # of a step that was begun; it is continued when its input is mended


@pytest.fixture(scope="session")
def mounting_alone(tmp_path_factory):
    """mounting_alone() → a context that one test process at a time is in.

    A new namespace holds on to all file systems that are mounted, so that one of them cannot be unmounted.
    """

    @contextmanager
    def alone():
        with open(tmp_path_factory.getbasetemp().parent / "mounts.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return alone


@pytest.fixture
def start(program, capsys):
    """start((program, *flags), **places) → (exit status, stdout, stderr); what a program lets through is a traceback there."""

    def run(use, **places):
        module, *flags = use
        flags = [word.format(**places) for word in argv(flags)]
        try:
            if module in (main_pretrain, main_finetune):
                return program(module, flags)
            capsys.readouterr()
            status = 0
            try:
                module.main(flags)
            except SystemExit as end:
                status = end.code
            return status, *capsys.readouterr()
        except Exception:
            return None, "", traceback.format_exc()

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(name): the folder of a whole input, written when it is first asked for."""
    made = {}

    def written(name):
        writer = BASES[name][0]
        key = (writer.func, *writer.keywords.items()) if isinstance(writer, functools.partial) else writer
        if key not in made:
            folder = tmp_path_factory.mktemp("whole") / "data"
            writer(folder)  # may skip the test
            made[key] = folder
        return made[key]

    return written


@pytest.fixture
def check_refused(base, start, tmp_path, count, recwarn):
    """check_refused(input, use, (place, damage, *words)): of a copy of the input a place is damaged; a program that uses it
    says so in one line that holds the words, and leaves nothing. place: a path in the input, or a function that finds it.
    """

    def check(name, use, case):
        place, damage, *said = case
        shutil.copytree(base(name), tmp_path / "data")
        damage(place(tmp_path / "data") if callable(place) else tmp_path / "data" / place)
        broken = kept(tmp_path)
        result = start(USES[use], data=tmp_path / "data", out=tmp_path / "run")
        now = kept(tmp_path)
        left = {path for path in now if broken.get(path) != now[path] and Path(path).name not in RECORDS}
        good = is_refused(result, *said) and not left and broken.keys() <= now.keys()
        warned = [str(warning.message) for warning in recwarn]  # warnings would be lines of stderr, too
        assert count("corrupted inputs answered with one line", good and not warned), (result, left, warned)

    return check
