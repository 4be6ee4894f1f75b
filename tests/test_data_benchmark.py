"""What the data room's benchmark measures."""

import mmap
import time

import numpy as np

from benchmarks.data import PeakMemory


def test_peak_memory_is_beyond_what_it_was():
    before = np.ones(25_000_000)  # 200 MB, held all along
    with PeakMemory() as memory:
        # A mapping of its own: an allocator may hand out pages that earlier tests freed, which are no new memory.
        inside = mmap.mmap(-1, 80_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(inside, np.uint8)[:] = 1
        time.sleep(0.3)
    assert before.nbytes + len(inside) == 280e6 and 70e6 < memory.peak < 120e6
