"""Fixtures that several rooms' tests share: one tiny simulated screen, raw and built."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory):
    """Folder of a tiny simulated screen in the official layout: two CSVs and TIFFs."""
    from dataset_scripts import simulate_screen

    folder = tmp_path_factory.mktemp("screen") / "raw"
    simulate_screen(folder, size="tiny", seed=0)
    return folder


@pytest.fixture(scope="session")
def tiny_screen(tiny_raw):
    """The same screen built into a dataset folder."""
    from dataset_scripts import build_dataset

    folder = tiny_raw.with_name("built")
    build_dataset(tiny_raw, folder)
    return folder
