# SPDX-License-Identifier: MIT
"""Distributes the work of preparing data over MPI ranks, where a launcher started several, and processes on each."""

import logging
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

from common.command_line import positive_int
from common.console import setup_logging
from common.ending import PREPARATION, run_program
from common.errors import DataError
from common.launchers import LaunchError, OutsideSrun, detect_launch
from common.packages import how_to_install
from common.ranks import RankGroup

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5


class Workers(RankGroup):
    """The MPI ranks of a program, with `processes` on each. comm: mpi4py communicator; None for one rank."""

    def __init__(self, processes=1, comm=None):
        self.processes, self._comm = processes, comm
        if comm:
            self.rank, self.world_size = comm.Get_rank(), comm.Get_size()

    @classmethod
    def start(cls, processes):
        """The ranks that mpirun or srun started, or one rank. Raises DataError if MPI does not connect them."""
        try:
            launch = detect_launch()
        except OutsideSrun:  # the processes of one rank can use all cores of the job
            return cls(processes)
        except LaunchError as error:
            raise DataError(str(error)) from None
        if launch.world_size == 1 or launch.launcher == "torchrun":
            return cls(processes)
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise DataError(
                f"{launch.launcher} started several processes, and mpi4py, which connects them, cannot be loaded "
                f"({error}); {how_to_install('mpi4py')}, or start one process with --workers"
            ) from None
        size = MPI.COMM_WORLD.Get_size()
        if size != (launch.world_size or size) or launch.rank >= size:
            raise DataError(
                f"{launch.launcher} started {launch.world_size or 'several'} processes, and MPI connects {size} of "
                f"them; use the mpirun of the MPI that mpi4py is built for, or srun --mpi=pmix, or start one process "
                f"with --workers"
            )
        return cls(processes, MPI.COMM_WORLD if size > 1 else None)

    def gather(self, value):
        return self._comm.allgather(value) if self._comm else [value]

    def map(self, work, items, what):
        """[work(item) for item in items] on every rank, distributed over all processes.

        work, items and results must be picklable. what: the unit in progress lines ("folders"). Raises the first
        exception of any process on every rank; see `RankGroup.together`.
        """
        items = list(items)
        mine = items[self.rank :: self.world_size]
        with self.together():
            results = list(_with_progress(_in_processes(work, mine, self.processes), len(mine), what))
        parts = self.gather(results)
        return [parts[i % self.world_size][i // self.world_size] for i in range(len(items))]

    def abort(self):
        """Ends all ranks at once, after an error that the others do not know of."""
        if self._comm:
            self._comm.Abort(1)


def add_workers_flag(group):
    group.add_argument(
        "--workers",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        help="processes of each MPI rank; the output does not depend on it",
    )


def run_command(parser, work, argv=None):
    """A program that every rank runs: parses the flags and calls work(args, workers). Exits unless all goes well.

    Bad input, InputError or OSError, is one line and exit status 2; see `run_program`.
    """
    args = parser.parse_args(argv)
    with parser.input_errors():
        workers = Workers.start(args.workers)
    setup_logging(logging.INFO if workers.is_main else logging.WARNING)
    status = run_program(lambda: work(args, workers), parser.prog, PREPARATION, workers.abort)
    if status:
        sys.exit(status)


def _in_processes(work, items, processes):
    """The results of work(item), in order, computed in several processes if processes > 1."""
    processes = min(processes, len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    # Spawned, because forking is not safe under MPI and beside threads.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """Ends this worker with its parent. Otherwise it would wait for work for ever after the parent is killed."""

    def watch():
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _with_progress(results, count, what):
    start = logged = time.monotonic()
    for done, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if now - logged > SECONDS_BETWEEN_LINES or done == count:
            logged = now
            log.info(
                "%d/%d %s, %.0f s, ETA %.0f s", done, count, what, now - start, (now - start) * (count - done) / done
            )
