"""Worker processes of the simulator and the builder: how many, and one thread of linear algebra in each."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import numpy  # noqa: F401  # loads the BLAS whose threads are limited below
from threadpoolctl import threadpool_limits

from wsdino.errors import UserError


def usable_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """Let Ctrl-C end a worker silently, and leave it one thread: the other cores have workers of their own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threadpool_limits(1)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes; what has not begun is cancelled at the end.

    Raises
    ------
    UserError
        A process was killed, or could not start: spawned ones read the file of the command, and a script that is not
        guarded would begin its work again in each.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended before its work was done: if it was killed for memory, give fewer --workers; in a "
            'script, guard the call with if __name__ == "__main__"'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
