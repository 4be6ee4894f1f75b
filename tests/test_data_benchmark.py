"""What the data room's benchmark measures."""

import time

import numpy as np

from benchmarks.data import PeakMemory


def test_peak_memory_is_beyond_what_it_was():
    before = np.ones(25_000_000)  # 200 MB, held all along
    with PeakMemory() as memory:
        inside = np.ones(10_000_000)
        time.sleep(0.3)
    assert before.nbytes + inside.nbytes == 280e6 and 70e6 < memory.peak < 120e6
