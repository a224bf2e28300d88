# SPDX-License-Identifier: MIT
"""Damaged and hostile files in the folder of a run: it goes on, and says what is lost, or is refused in one line."""

import os
import random
import shutil

import pytest

from common import lock
from tests.helpers.forked import Run, finish
from tests.helpers.resumed import differences
from tests.helpers.runs import is_refused

pytestmark = pytest.mark.slow

DEEP = b"[" * 100_000
ESCAPES = b"\x1b]0;pwn\x07\x1b[31mred\n"


def holding(content):
    """Damage: the file holds this; content may be made of what it held."""
    return lambda path: path.write_bytes(content(path.read_bytes()) if callable(content) else content)


def missing(path):
    path.unlink()


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent.parent / "elsewhere")


def file(path):
    shutil.rmtree(path)
    path.write_bytes(b"x")


RUN_JSON = [b'{"earlier": 5}', b"[1,2]", b'[["a",1]]', b'"ab"', DEEP, b"\xff\xfe{}", b"", bytes(500)]
RUN_JSON += [b'{"a": ' + b"9" * 5000 + b"}"]
LOG = [bytes(4096), b"\xff\xfe\x80 garbage\n", b'{"epoch": "x"}\n', b'{"epoch": null}\n', b"[]\n", DEEP + b"\n", b""]
LOG += [b'{"epoch": NaN}\n', b'{"epoch": -1}\n', b'{"epoch": true}\n', ESCAPES, lambda before: before[:-20]]
LOCKS = [b"\xff\xfe", bytes(30), b"  \n", b"A" * 10**6, ESCAPES]
CHECKPOINTS = [b"", lambda before: bytes(len(before)), lambda before: before[: len(before) // 2]]
SIDECARS = [b"\xff\xff", bytes(83), b""]
EVENTS = [b"", lambda before: bytes(len(before))]

# (file, damage, what of the continued run differs from one that was not stopped, what is said)
GOES_ON = [
    *(("run.json", holding(content), [], "run.json: ") for content in RUN_JSON),
    *(("log.txt", holding(content), ["log.txt"], "has no line for 1 finished epochs: 0") for content in LOG),
    ("log.txt", holding(lambda before: 2 * before), [], "1 epochs were logged twice"),
    *((".lock", holding(content), [], "taking over the lock") for content in LOCKS),
    *(("checkpoint.pth", holding(content), [], "trying the previous one") for content in CHECKPOINTS),
    ("checkpoint.pth", missing, [], "continuing"),
    *(("checkpoint.pth.sha256", holding(content), [], "trying the previous one") for content in SIDECARS),
    ("checkpoint.pth.sha256", missing, [], "continuing"),
    *(("tensorboard/*", holding(content), ["train_loss", "lr"], "what followed is lost") for content in EVENTS),
    ("tensorboard/*", holding(lambda before: before + bytes(99)), [], "damaged; TensorBoard shows its first"),
    (".checkpoint.pth.123.tmp", folder, [], "continuing"),
    (".checkpoint.pth.123.tmp", link, [], "continuing"),
]
OWN = "run.json log.txt checkpoint.pth checkpoint.pth.sha256 checkpoint_previous.pth checkpoint_1.pth".split()
REFUSED = [
    *((name, damage, f"{name} in it is not a plain file") for name in OWN for damage in (folder, pipe, link)),
    *((".lock", damage, ".lock: is not a plain file") for damage in (folder, pipe, link)),
    ("tensorboard", file, "--log_dir"),
]


@pytest.fixture(scope="module")
def begun(jobs, tmp_path_factory):
    """The folder of a pretraining that has done the first of two epochs."""
    place = tmp_path_factory.mktemp("begun")
    finish("main_pretrain", (jobs["main_pretrain"], "--output_dir", place / "run", "--stop_epoch 1"), place / "output")
    return place / "run"


def hurry():
    """In the process of a run: a lock file that is damaged is taken over after a moment."""
    lock.CREATION = 0.05


@pytest.fixture
def go_on(jobs, begun):
    """go_on(run, name, damage) → (status, stdout, stderr) of the program on a copy of `begun`, a file of which is damaged."""

    def go_on(run, name, damage):
        shutil.copytree(begun, run, symlinks=True)
        damage(next(iter(run.glob(name)), run / name))
        flags = (jobs["main_pretrain"], "--output_dir", run, "--resume auto")
        started = Run("main_pretrain", flags, run.parent / "output", hurt=(hurry,))
        status = started.wait(60)
        return status, started.text(), "".join(f"{line}\n" for line in started.lines())

    return go_on


def some(cases, campaign):
    """All cases in a campaign, else a tenth of them."""
    return cases if campaign else random.Random(0).sample(cases, len(cases) // 10)


def test_what_can_be_rebuilt_is_and_the_run_goes_on(whole, tmp_path, go_on, count, campaign):
    for number, (name, damage, lost, said) in enumerate(some(GOES_ON, campaign)):
        run = tmp_path / str(number) / "run"
        status, out, err = go_on(run, name, damage)
        good = status == 0 and said in out and err == "" and "\x1b" not in out
        found = differences(whole["main_pretrain"][0], run) if status == 0 else None
        good = good and found == lost and not (run.parent / "elsewhere").exists()
        assert count("damaged files of a run", good), (name, number, found, err, out[-3000:])


def test_the_rest_is_refused_in_one_line(tmp_path, go_on, begun, count, campaign):
    for number, (name, damage, said) in enumerate(some(REFUSED, campaign)):
        run = tmp_path / str(number) / "run"
        result = go_on(run, name, damage)
        good = is_refused(result, said) and not (run.parent / "elsewhere").exists()
        good = good and {path.name for path in run.iterdir()} >= {path.name for path in begun.iterdir()}
        assert count("damaged files of a run", good), (name, number, result)


def test_a_file_outside_that_a_link_leads_to_is_left_alone(tmp_path, go_on):
    def lead_out(path):
        (tmp_path / "elsewhere").write_text("mine\n")
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")

    assert go_on(tmp_path / "run", "log.txt", lead_out)[0] == 0
    assert (tmp_path / "elsewhere").read_text() == "mine\n"
