# SPDX-License-Identifier: MIT
"""Atomic writing, checksums, free space, and folders that one run at a time fills."""

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import DataError, UsageError
from common.files import (
    atomic_path,
    check_room,
    claimed,
    save_array,
    sha256_of,
    write_atomically,
    write_csv,
    write_json,
    write_text,
)
from common.lock import LOCK
from common.workers import Workers
from tests.helpers import ROOT

# ---- Atomic writing ------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(OSError) as found, atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")  # as file.write() does
    assert found.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


def test_an_array_that_is_written_in_part_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as found, atomic_path(tmp_path / "file"):
        raise OSError("1884160 requested and 1441792 written")  # as ndarray.tofile does
    assert found.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "write, content",
    [
        (lambda path: write_csv(path, ("a", "b"), [(1, "x,y")]), b'a,b\n1,"x,y"\n'),
        (lambda path: write_csv(path, None, [(2,)]), b"2\n"),
        (lambda path: write_json(path, {"a": [1]}), b'{\n "a": [\n  1\n ]\n}\n'),
        (lambda path: write_text(path, "ä\n"), b"\xc3\xa4\n"),
        (lambda path: write_atomically(path, lambda file: file.write(b"\0")), b"\0"),
    ],
    ids=["csv", "csv without header", "json", "text", "bytes"],
)
def test_a_file_replaces_the_one_before(tmp_path, write, content):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["file"]


def test_an_array_is_read_back(tmp_path):
    save_array(tmp_path / "a.npy", np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_two_processes_write_to_temporary_files_of_their_own(tmp_path):
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("first")
        code = "import sys; from common.files import write_text; write_text(sys.argv[1], 'second')"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], cwd=ROOT, check=True)
        assert (tmp_path / "file").read_text() == "second" and temporary.read_text() == "first"
    assert (tmp_path / "file").read_text() == "first"


def test_checksum_is_that_of_the_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_room_is_counted_by_file_system(tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.shutil.disk_usage", lambda path: SimpleNamespace(free=10 * 10**9))
    check_room([("--work", tmp_path / "new" / "a", 4 * 10**9), ("--out", tmp_path, 5 * 10**9)])
    with pytest.raises(DataError, match=r"--work .*new/a and --out .*about 10.0 GB are needed, and 10.0 GB are free"):
        check_room([("--work", tmp_path / "new" / "a", 5 * 10**9), ("--out", tmp_path, 5 * 10**9)])


# ---- Folders -------------------------------------------------------------------------------------


def fill(out, record, last="done", **options):
    """Whether a folder was complete already; completes it."""
    with claimed(Workers(), out, record, last, **options) as complete:
        if not complete:
            save_array(out / "done", [1])
        return complete


def test_a_folder_is_filled_once_and_by_one_set_of_parameters(tmp_path):
    out = tmp_path / "deep" / "out"
    assert not fill(out, {"seed": 1})
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert before.keys() == {"simulation.json", "done"}
    assert fill(out, {"seed": 1})
    with pytest.raises(
        DataError, match="--out .*other parameters .*simulation.json.*choose another --out, or remove it"
    ):
        fill(out, {"seed": 2})
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_unfinished_folder_is_continued_and_cleared_of_what_a_killed_run_left(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), claimed(Workers(), out, {"seed": 1}, "done"):
        (out / "part").mkdir()
        raise KeyboardInterrupt
    (out / LOCK).write_text("elsewhere pid 1\n")
    (out / "part" / ".image.tif.4711.tmp").write_text("half")
    assert not fill(out, {"seed": 1})
    assert sorted(path.name for path in out.rglob("*")) == ["done", "part", "simulation.json"]


def test_a_folder_with_nothing_but_half_a_record_is_begun(tmp_path):
    (tmp_path / ".simulation.json.4711.tmp").write_text("{")
    (tmp_path / LOCK).touch()
    assert not fill(tmp_path, {"seed": 1})


def test_other_content_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="--store .* is not empty and does not hold output of this program"):
        fill(tmp_path, {"seed": 1}, flag="--store")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        fill(tmp_path / "file", {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.txt"]


def test_two_runs_do_not_fill_one_folder(tmp_path):
    with claimed(Workers(), tmp_path, {"seed": 1}, "done"):
        with pytest.raises(UsageError, match=r"--out .* is in use by another run \(\S+ pid \d+\); wait for it"):
            fill(tmp_path, {"seed": 1})
    assert not fill(tmp_path, {"seed": 1})


def test_json_is_compared_as_json(tmp_path):
    assert not fill(tmp_path, {"sizes": (1, 2)})
    assert fill(tmp_path, {"sizes": [1, 2]})
    write_json(tmp_path / "simulation.json", {"sizes": [1, 3]})
    with pytest.raises(DataError, match="other parameters"):
        fill(tmp_path, {"sizes": [1, 2]})
