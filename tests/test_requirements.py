"""The promised versions: each has a lower bound that can be tested, and what is older or missing is named at start."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

import modeling_wsdino

sys.path.insert(0, str(Path(__file__).parent))
from oldest_requirements import oldest_requirements  # noqa: E402

ROOT = Path(__file__).parents[1]


def test_every_requirement_has_a_lower_bound_to_test():
    pinned = dict(line.split("==") for line in oldest_requirements())
    assert {"transformers", "datasets", "accelerate", "huggingface_hub", "pytest"} <= set(pinned)


def test_a_requirement_without_a_bound_is_refused(tmp_path):
    (tmp_path / "setup.cfg").write_text("[options]\ninstall_requires = numpy\n[options.extras_require]\ndev =\n")
    with pytest.raises(ValueError, match="'numpy' names no lower bound"):
        oldest_requirements(tmp_path / "setup.cfg")


@pytest.mark.parametrize("requirement", ["numpy>=999", "no_such_package_at_all>=1"])
def test_what_is_too_old_or_missing_is_named(monkeypatch, requirement):
    monkeypatch.setattr(
        modeling_wsdino, "requires", lambda name: ["torch>=1", 'absent>=9; extra == "dev"', requirement]
    )
    with pytest.raises(ImportError, match=requirement) as raised:
        modeling_wsdino.check_requirements()
    assert f"pip install '{requirement}'" in str(raised.value)


def test_a_command_names_an_old_package_before_anything_fails(tmp_path):
    """An older transformers lies first on the path, as far as its metadata say."""
    try:
        bound = next(line for line in requires("wsdino") if line.startswith("transformers"))
    except PackageNotFoundError:
        pytest.skip("the project is not installed, so it has no metadata")
    (tmp_path / "transformers-5.0.0.dist-info").mkdir()
    (tmp_path / "transformers-5.0.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.0.0\n")
    done = subprocess.run(
        [sys.executable, "train_accelerate.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert bound in done.stderr and "5.0.0" in done.stderr and "pip install" in done.stderr.splitlines()[-1]
