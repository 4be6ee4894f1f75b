"""The small simulated screen that training takes when it is given no dataset."""

from pathlib import Path

from filelock import FileLock

from ..prepare import build_dataset
from .simulate import simulate_screen


def simulated_demo(folder: str | Path) -> str:
    """Path of the dataset folder, which is made once, also when two runs start at once."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not (folder / "README.md").exists():
            raw = folder.with_name(folder.name + "_raw")
            # 1 / 3.2 of the real resolution: 160 x 200 pixels hold as many cells as the paper's 512 x 640.
            simulate_screen(raw, size="demo", seed=0, scale=1 / 3.2)
            build_dataset(raw, folder)
    return str(folder)
