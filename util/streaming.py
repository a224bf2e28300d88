# SPDX-License-Identifier: MIT
"""Batches made by threads of this process, a few ahead of training: for data that needs copying and no computing."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

from util.stopping import Stopping


class BatchStream:
    """What a DataLoader is to samples, for a source that gives whole batches.

    batch_sampler: yields lists of ids. fetch(ids) runs in one of `threads` threads, up to two batches ahead for each, or
    in the caller's if there are none; finish(fetched) runs in the caller's thread, in order, and makes the batch.
    timeout: seconds after which a batch that did not come is an error, as in a DataLoader.
    """

    def __init__(self, batch_sampler, fetch, finish, threads, timeout=None):
        self.batch_sampler, self.fetch, self.finish, self.threads, self.timeout = (
            batch_sampler,
            fetch,
            finish,
            threads,
            timeout,
        )

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        if self.threads == 0:
            for ids in self.batch_sampler:
                yield self.finish(ids, self.fetch(ids))
            return
        pool, ahead = ThreadPoolExecutor(self.threads, "batches"), deque()
        try:
            for ids in self.batch_sampler:
                ahead.append((ids, pool.submit(self.fetch, ids)))
                if len(ahead) > 2 * self.threads:
                    yield self._finished(*ahead.popleft())
            while ahead:
                yield self._finished(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a thread may wait for a file system that does not answer

    def _finished(self, ids, fetched):
        try:
            return self.finish(ids, fetched.result(self.timeout))
        except TimeoutError:
            raise RuntimeError(f"DataLoader timed out after {self.timeout:g} seconds") from None


class Watched:
    """A loader during whose waits signals are acted on (`Stopping.waiting_for_data`)."""

    def __init__(self, loader):
        self.loader, self.batch_sampler = loader, loader.batch_sampler

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        batches, end = iter(self.loader), object()
        while True:
            with Stopping.waiting_for_data():
                batch = next(batches, end)
            if batch is end:
                return
            yield batch
