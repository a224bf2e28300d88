# SPDX-License-Identifier: MIT
"""Collective operations of the ranks of a program: failing together, and work on rank 0 for all ranks."""

import functools
from contextlib import contextmanager


class RankGroup:
    """The ranks of a program. One process alone is rank 0 of 1; subclasses that connect several override `gather`."""

    rank, world_size = 0, 1

    @property
    def is_main(self):
        return self.rank == 0

    def gather(self, value):
        """The picklable values of all ranks, in rank order, on every rank."""
        return [value]

    @contextmanager
    def together(self):
        """An exception in the block on any rank is raised on every rank when the block ends: that of the lowest rank.

        It carries `reported_by`, the rank it happened on, so that it is reported once.
        """
        failure = None
        try:
            yield
        except Exception as error:  # any exception, because the other ranks must not wait for this one
            failure = error
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return
        for rank, error in enumerate(self.gather(failure)):
            if error is not None:
                error.reported_by = rank
                raise error

    def on_main(self, work, *args, **kwargs):
        """Runs work(*args, **kwargs) on rank 0. Returns its result, or raises its exception, on every rank."""
        result = None
        with self.together():
            if self.is_main:
                result = work(*args, **kwargs)
        return self.gather(result)[0]


def on_main(method):
    """Decorates a method of an object with `ranks`: every rank calls it, rank 0 runs it; see `RankGroup.on_main`."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        return self.ranks.on_main(method, self, *args, **kwargs)

    return call
