"""Worker processes of the simulator and the builder: how many, and one thread of linear algebra in each."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

from .screen import ScreenError


def usable_cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_queue():
    """A queue that the processes of :func:`process_pool` can inherit."""
    return get_context("spawn").Queue()


def _begin(initializer, initargs) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if initializer is not None:
        initializer(*initargs)


@contextmanager
def process_pool(workers: int, initializer=None, initargs=()):
    """A pool of spawned processes; what has not begun is cancelled at the end. Ctrl-C ends them without a word.

    Raises
    ------
    ScreenError
        A process was killed, or could not start: spawned ones read the file of the command, and a script that is not
        guarded would begin its work again in each.

    Notes
    -----
    A BLAS that starts threads in every process has them fight for the same cores: measured, a build of the `demo`
    screen on 2 cores took 48 s instead of 9.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (initializer, initargs))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ScreenError(
            "a worker process ended before its work was done: if it was killed for memory, give fewer --workers; in a "
            'script, guard the call with if __name__ == "__main__"'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
