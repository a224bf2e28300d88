# SPDX-License-Identifier: MIT
"""Batches made by threads of this process, a few ahead of training: for data that needs copying and no computing."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor


class BatchStream:
    """What a DataLoader is to samples, for a source that gives whole batches.

    batch_sampler: yields lists of ids. fetch(ids) runs in one of `threads` threads, up to two batches ahead for each, or
    in the caller's if there are none; finish(fetched) runs in the caller's thread, in order, and makes the batch.
    """

    def __init__(self, batch_sampler, fetch, finish, threads):
        self.batch_sampler, self.fetch, self.finish, self.threads = batch_sampler, fetch, finish, threads

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
            pool.shutdown(cancel_futures=True)

    def _finished(self, ids, fetched):
        return self.finish(ids, fetched.result())
