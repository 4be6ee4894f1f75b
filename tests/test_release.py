"""The networks released in the repository: complete, small, and usable offline right after a clone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modeling_wsdino.build_repository import SHIPPED_FILES

ROOT = Path(__file__).parents[1]
RELEASED = sorted(path.parent for path in (ROOT / "release").glob("*/config.json"))
MEGABYTES = 8

# In a process of its own, outside the checkout and without its packages.
USE = """
import json, sys
import numpy as np
from transformers import pipeline
sys.path = [place for place in sys.path if place not in ("", sys.argv[1])]
for name in ("wsdino", "modeling_wsdino"):
    sys.modules[name] = None
extract = pipeline("feature-extraction", model=sys.argv[2], trust_remote_code=True)
channels = len(extract.model.config.channel_names)
cell = np.random.default_rng(0).integers(300, 9000, (channels, 68, 68)).astype(np.uint16)
print(json.dumps([len(extract(cell if channels > 1 else cell[0])), channels]))
"""


@pytest.mark.parametrize("folder", RELEASED, ids=lambda path: path.name)
def test_a_released_repository_is_complete_and_small(folder):
    for name in SHIPPED_FILES:
        now = (ROOT / "modeling_wsdino" / name).read_text()
        assert (folder / name).read_text() == now, f"release {folder.name} again: {name} has changed"
    towers = len(json.loads((folder / "config.json").read_text())["channel_names"])
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < towers * MEGABYTES * 2**20
    card = (folder / "README.md").read_text()
    assert "license:" in card
    if "simulated" in folder.name:
        assert "simulated" in card.lower()


@pytest.mark.slow
@pytest.mark.parametrize("folder", RELEASED, ids=lambda path: path.name)
def test_a_released_repository_works_offline_without_the_package(folder, tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(ROOT), str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    width, channels = json.loads(done.stdout.splitlines()[-1])
    assert width == channels * json.loads((folder / "config.json").read_text())["hidden_size"]


def test_the_starts_of_the_demo_are_released():
    names = {path.name for path in RELEASED}
    assert {f"wsdino-simulated-start-{channel}" for channel in ("dna", "tubulin", "actin")} <= names
    assert np.all([path.stat().st_size < 2 * 2**20 for path in ROOT.glob("release/*-dna/model.safetensors")])
