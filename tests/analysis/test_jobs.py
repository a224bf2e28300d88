# SPDX-License-Identifier: MIT
"""The commands of a study: their order, what is left out, and how they end."""

import subprocess
import sys

import pytest

from analysis.jobs import Step, keep_record, run_jobs
from tests.helpers.dataset_fixtures import fails_with


def note(path, text, status=0):
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"
    return [sys.executable, "-c", code, str(path), text, str(status)]


def test_steps_run_in_order_and_what_is_there_is_not_done_again(tmp_path):
    log, done = tmp_path / "log", tmp_path / "log"
    run_jobs(
        [[Step(note(log, "a")), Step(note(log, "b"), str(done)), Step(note(log, "c"))], [], [Step(note(log, "d"))]], 1
    )
    assert log.read_text() in ("acd", "dac")
    run_jobs([[Step(note(tmp_path / f"job{n}", "x"))] for n in range(5)], 2)
    assert len(list(tmp_path.glob("job*"))) == 5


@pytest.mark.parametrize("end, status", [("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", 143)])
def test_one_that_fails_ends_the_others(tmp_path, end, status):
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    waiting = [sys.executable, "-c", "import sys; open(sys.argv[1])", str(fifo)]  # for a writer that never comes
    failing = [sys.executable, "-c", f"import os, sys; {end}"]
    with pytest.raises(SystemExit) as ended:
        run_jobs([[Step(waiting)], [Step(failing), Step(note(tmp_path / "later", ""))]], 2)
    assert ended.value.code == status and not (tmp_path / "later").exists()


def test_a_study_takes_more_entries_and_no_other_record(tmp_path):
    folder = tmp_path / "a" / "b"
    keep_record(folder, {"flags": ["x"]}, "arms", {"one": 1})
    keep_record(folder, {"flags": ["x"]}, "arms", {"two": 2})
    fails_with(lambda: keep_record(folder, {"flags": ["y"]}, "arms", {}), "other flags", "another folder")
    fails_with(lambda: keep_record(folder, {"flags": ["x"]}, "arms", {"one": 3}), "its arms one is 1")
    fails_with(lambda: keep_record(folder.parent, {}, "arms", {}), "holds no study")
