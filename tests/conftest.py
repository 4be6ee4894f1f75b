"""Fixtures that several rooms' tests share: one tiny simulated screen, raw and built."""

import os
import tempfile

import pytest

# No test may wait for a network, nor read or leave anything in the user's caches. Set before any library is imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
_HOME = tempfile.TemporaryDirectory(prefix="wsdino-tests-")
os.environ["HF_HOME"] = _HOME.name


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


@pytest.fixture(scope="session")
def random_run(tiny_screen, tmp_path_factory):
    """A run folder of that screen with random networks, for tests of extraction, which work on copies."""
    from extraction_run import make_run

    return make_run(tmp_path_factory.mktemp("extraction") / "run", tiny_screen)
