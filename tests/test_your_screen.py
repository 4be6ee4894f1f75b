"""docs/your_screen.md: every command that it shows runs on the files that it shows, and builds the right pixels."""

import re
import shlex
from pathlib import Path

import layout_files
import numpy as np
import pytest
from datasets import load_dataset
from layout_files import CHANNELS, COMPOUNDS, FIELDS, value

from dataset_scripts.prepare import main

GUIDE = (Path(__file__).parents[1] / "docs" / "your_screen.md").read_text(encoding="utf-8")
SECTIONS = {title: text for title, text in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", GUIDE, re.M | re.S)}
WRITERS = {name: getattr(layout_files, name) for name in ("load_data", "gallery", "phenix", "imagexpress", "incell")}
WRITERS |= {"ome": layout_files.ome_tiff, "folder": layout_files.named}


@pytest.mark.parametrize("layout", [*WRITERS, "ome-zarr"])
def test_the_guide(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (WRITERS.get(layout) or layout_files.ome_zarr)(Path("my_screen"))
    layout_files.plate_map(Path("plate_map.csv"))
    section = SECTIONS[layout.partition("-")[0]]
    for file in re.findall(r"^    (my_screen/.*?)(?: {2,}.*)?$", section, re.M):
        assert Path(file).is_file() or "zarr" in layout, file
    plan, build = (shlex.split(line)[1:] for line in re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines())
    before = sorted(tmp_path.rglob("*"))
    main(plan)
    said = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (said["layout"], said["rows"]) == (layout.partition("-")[0], "12")
    assert said["images"] == "24 of 24 are there, 0 are absent" and said["control"].startswith("4 fields")
    assert sorted(tmp_path.rglob("*")) == before
    main(build)
    rows = load_dataset("my_dataset", "all", split="train")
    assert {(row["plate"], row["well"], row["site"]) for row in rows} == set(FIELDS)
    for row in rows:
        compound, dose, moa = COMPOUNDS[row["well"]]
        name = compound if layout != "gallery" or compound == "DMSO" else f"BRD-{compound}"
        assert row["treatment"] == (name if name == "DMSO" else f"{name}_{dose}")
        assert row["moa"] == (moa or "DMSO" if layout != "gallery" else "DMSO" * (name == "DMSO"))
        for channel in CHANNELS:
            pixels = set(np.unique(np.asarray(row[channel])))
            assert pixels == {value(row["plate"], row["well"], row["site"], channel)}


def test_a_layout_of_ones_own(tmp_path):
    """The guide's example, added to the table of layouts as it says."""
    from dataset_scripts.layouts import Screen, Source, file_names
    from dataset_scripts.tables import row_letters

    code = re.search(r"```python\n(.*?)```", GUIDE, re.S)[1]
    space = {**vars(file_names), "Screen": Screen, "Source": Source, "row_letters": row_letters}
    exec(code, space)
    for well in (1, 26):
        layout_files.write_image(tmp_path / "P1" / f"W{well:04d}F0001T0001Z001C1.tif", "P1", "A01", 1, "dapi")
    screen = space["yokogawa"](Source(tmp_path))
    assert set(screen.table["well"]) == {"A01", "B02"}
