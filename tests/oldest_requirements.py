"""Prints the oldest versions that setup.cfg promises, as pinned requirements for pip; torch is the Makefile's choice.

python tests/oldest_requirements.py > oldest.txt
"""

import configparser
import re
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.cfg"
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "copairs")


def oldest_requirements(path=SETUP):
    """`name==lowest` for every requirement of the package, and for what its tests need of the extras."""
    config = configparser.ConfigParser()
    config.read(path, encoding="utf-8")
    required = config["options"]["install_requires"].split()
    extra = config["options.extras_require"]["dev"].split()
    tools = [requirement for requirement in extra if re.match(r"[\w-]+", requirement)[0] in TEST_TOOLS]
    pinned = []
    for requirement in required + tools:
        name, bound, version = requirement.partition(">=")
        if not bound or "," in version:
            raise ValueError(f"{path}: {requirement!r} names no lower bound: write {name}>=VERSION.")
        if name != "torch":
            pinned.append(f"{name}=={version}")
    return pinned


if __name__ == "__main__":
    print("\n".join(oldest_requirements()))
