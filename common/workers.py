# SPDX-License-Identifier: MIT
"""Who does the work of generating and preparing data: MPI ranks, where a launcher started some, with processes on each."""

import logging
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

from common.errors import DataError
from common.launchers import LaunchError, OutsideSrun, detect_launch

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5


class Crew:
    """All processes of a program. workers: processes of each rank. comm: mpi4py communicator, or None for one process alone."""

    def __init__(self, workers=1, comm=None):
        self.workers, self._comm = workers, comm
        self.rank, self.size = (comm.Get_rank(), comm.Get_size()) if comm else (0, 1)

    @classmethod
    def start(cls, workers):
        """The ranks that mpirun or srun started, or this process alone. Raises DataError where MPI does not connect them."""
        try:
            launch = detect_launch()
        except OutsideSrun:  # the processes of one program can use all cores of the job
            return cls(workers)
        except LaunchError as error:
            raise DataError(str(error)) from None
        if launch.world_size == 1 or launch.launcher == "torchrun":
            return cls(workers)
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise DataError(
                f"{launch.launcher} started several processes, and mpi4py, which connects them, cannot be loaded ({error}); "
                f"install it as INSTALL.md says, or start one process with --workers"
            ) from None
        size = MPI.COMM_WORLD.Get_size()
        if size != (launch.world_size or size) or launch.rank >= size:
            raise DataError(
                f"{launch.launcher} started {launch.world_size or 'several'} processes, and MPI connects {size} of them; use the "
                f"mpirun of the MPI that mpi4py is built for, or srun --mpi=pmix, or start one process with --workers"
            )
        return cls(workers, MPI.COMM_WORLD if size > 1 else None)

    @property
    def is_main(self):
        return self.rank == 0

    def map(self, work, items, what):
        """[work(item) for item in items], on every rank; spread over the ranks, and over the processes of each.

        work, items and results must be picklable. what: of which progress is reported ("folders"). Whatever is raised
        anywhere is raised everywhere, carrying `reported_by`, the rank it happened on.
        """
        items = list(items)
        mine = items[self.rank :: self.size]
        parts = self._together(lambda: list(_with_progress(_in_processes(work, mine, self.workers), len(mine), what)))
        return [parts[i % self.size][i // self.size] for i in range(len(items))]

    def on_main(self, work):
        """work() on rank 0; its result, or what it raises, on every rank."""
        return self._together(lambda: work() if self.is_main else None)[0]

    def abort(self):
        """End all ranks at once, after an error that the others do not know of."""
        if self._comm:
            self._comm.Abort(1)

    def _together(self, work):
        """The results of work() on all ranks, in their order; the first failure is raised on all."""
        if self._comm is None:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            failure = error
        answers = self._comm.allgather((result, failure))
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                error.reported_by = rank
                raise error
        return [answer for answer, _ in answers]


def _in_processes(work, items, workers):
    """Results of `work` for every item, in order; computed in several processes if workers > 1."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    # Spawned, as forking is not safe under MPI and beside threads.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """A worker whose parent was killed would wait for work for ever."""

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
