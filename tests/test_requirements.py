"""The promised versions: each has a lower bound that can be tested."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from oldest_requirements import oldest_requirements  # noqa: E402


def test_every_requirement_has_a_lower_bound_to_test():
    pinned = dict(line.split("==") for line in oldest_requirements())
    assert {"transformers", "datasets", "accelerate", "huggingface_hub", "pytest"} <= set(pinned)


def test_a_requirement_without_a_bound_is_refused(tmp_path):
    (tmp_path / "setup.cfg").write_text("[options]\ninstall_requires = numpy\n[options.extras_require]\ndev =\n")
    with pytest.raises(ValueError, match="'numpy' names no lower bound"):
        oldest_requirements(tmp_path / "setup.cfg")
