"""The extraction benchmark waits for the device that it measures."""

import torch

from benchmarks import extraction


def test_a_numbered_gpu_is_waited_for_too(monkeypatch):
    """Otherwise the time would be that of handing the work over."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for device in ("cuda", "cuda:1", "cpu"):
        extraction.synchronise(device)
    assert waited == ["cuda", "cuda:1"]
