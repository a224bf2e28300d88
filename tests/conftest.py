# SPDX-License-Identifier: MIT
"""What several test files need: a small simulated dataset, the main programs run as a user runs them, counts of faults."""

import logging
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.resumed import jobs, whole  # noqa: F401 (fixtures)
from tests.helpers.runs import argv

COUNTS = {}  # what was tried → [times it went as it must, times it was tried]


def pytest_addoption(parser):
    parser.addoption(
        "--campaign",
        action="store_true",
        help="inject faults by the hundred, as for the table in docs/RELIABILITY.md, "
        "and not only the few of a usual run",
    )


def pytest_sessionfinish(session):
    """Of several test processes, each hands its counts to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = COUNTS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for what, numbers in getattr(node, "workeroutput", {}).get("counts", {}).items():
        COUNTS[what] = [have + more for have, more in zip(COUNTS.get(what, [0, 0]), numbers)]


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.section("faults injected")
        for what, (good, tried) in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{what}: {good} of {tried}")


@pytest.fixture(scope="session")
def campaign(request):
    """Whether faults are to be injected by the hundred."""
    return request.config.getoption("--campaign")


@pytest.fixture(scope="session")
def count():
    """count(what, good): note that something was tried, and whether it went as it must, for the summary. Returns good."""

    def note(what, good):
        entry = COUNTS.setdefault(what, [0, 0])
        entry[0] += bool(good)
        entry[1] += 1
        return good

    return note


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """A folder with 48 simulated patches in the BigEarthNet v2 layout, all in split train or val."""
    folder = tmp_path_factory.mktemp("simulated") / "scenes"
    subprocess.run(
        argv(sys.executable, "-m sarwmix.simulate --out", folder, "--patches 48 --seed 1 --test_fraction 0"),
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return folder


@pytest.fixture
def program(monkeypatch, capsys):
    """program(module, *flags) → (exit status, stdout, stderr), run in this process."""
    from common.ending import run_program

    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv(flags)])
        capsys.readouterr()
        handlers, on_sigterm = logging.getLogger().handlers[:], signal.getsignal(signal.SIGTERM)
        try:
            status = run_program(module.main)
        except SystemExit as end:
            status = end.code
        finally:
            logging.getLogger().handlers[:] = handlers
            signal.signal(signal.SIGTERM, on_sigterm)
        return status, *capsys.readouterr()

    return run
