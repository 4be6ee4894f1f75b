"""A build that is repeated, interrupted, continued or shared ends as one that was left alone."""

import json
import os

import pytest
from filelock import FileLock
from small_screens import copy_of, load, table_of

from dataset_scripts import builder, plates
from dataset_scripts.prepare import build_dataset, main
from wsdino.errors import UserError


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_image_that_came_later_is_built_in(raw, tmp_path):
    folder, late = copy_of(raw, tmp_path / "raw")
    content = late.read_bytes()
    late.unlink()
    build_dataset(folder, tmp_path / "out", allow_missing=True, progress=False)
    assert sum(row["tubulin"] is None for row in load(tmp_path / "out", "all", tmp_path)) == 1
    late.write_bytes(content)
    build_dataset(folder, tmp_path / "out", allow_missing=True, progress=False)
    assert not any(row["tubulin"] is None for row in load(tmp_path / "out", "all", tmp_path))


def interrupt(output, change):
    """As if the build had been stopped before its end: the plates' records are in `.build`, each changed."""
    build = json.loads((output / "build.json").read_text())
    (output / ".build").mkdir()
    (output / ".build" / "recipe").write_text(json.dumps(build["recipe"]))
    for number, record in enumerate(build["plates"]):
        if text := change(number, json.dumps(record)):
            (output / ".build" / f"{record['plate']}.json").write_text(text)
    (output / "build.json").unlink()
    return build


def test_safe_to_repeat_and_restartable(raw, tmp_path):
    output = tmp_path / "out"
    build_dataset(raw, output, progress=False)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    build_dataset(raw, output, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    # As if the process had died in one plate: its record is gone and a file is cut.
    first = interrupt(output, lambda number, text: text if number else None)["plates"][0]
    broken = output / next(iter(first["shards"].values()))["path"]
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    build_dataset(raw, output, progress=False)
    assert broken.read_bytes() == content
    again = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    changed = {path for path in before if again[path] != before[path]}
    assert changed == {output / shard["path"] for shard in first["shards"].values()}


def test_damaged_records_of_plates_are_made_anew(raw, tmp_path):
    build_dataset(raw, tmp_path / "out", progress=False)
    before = interrupt(tmp_path / "out", lambda *_: "{")
    build_dataset(raw, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "build.json").read_text()) == before


def test_dying_in_the_middle_of_a_plate(raw, built, tmp_path, monkeypatch):
    """No shard is taken for whole: going on gives the bytes of an uninterrupted build."""
    real, rows = plates.plate_rows, []

    def dies(*arguments):
        for row in real(*arguments):
            rows.append(row)
            if len(rows) == 40:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(plates, "plate_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(raw, tmp_path / "out", progress=False)
    monkeypatch.undo()
    done = {path.stem for path in (tmp_path / "out" / ".build").glob("*.json")}
    assert 0 < len(done) < 6
    with pytest.raises(UserError, match="other settings"):
        build_dataset(raw, tmp_path / "out", resize=1.0, progress=False)
    build_dataset(raw, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert contents(tmp_path / "out") == contents(built)


def test_a_folder_that_another_build_holds_is_left_as_it_is(raw, built, tmp_path):
    from shutil import copytree

    output = copytree(built, tmp_path / "out")
    (output / ".build").mkdir()
    with FileLock(output / ".build" / "lock"):
        with pytest.raises(UserError, match="wsdino-prepare is building .*out"):
            build_dataset(raw, output, progress=False)
        assert [path.name for path in (output / ".build").iterdir()] == ["lock"]
    # Refused for other reasons, it is left as it was, too; and what a build leaves that died at once is no stranger.
    with pytest.raises(UserError, match="other settings"):
        build_dataset(raw, output, resize=1.0, progress=False)
    assert not (output / ".build").exists()
    (tmp_path / "new" / ".build").mkdir(parents=True)
    (tmp_path / "new" / ".build" / "lock").touch()
    build_dataset(raw, tmp_path / "new", plates=["Week1_1021"], illumination=False, progress=False)


def test_output_that_holds_something_else(raw, built, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="letter|not empty"):
        build_dataset(raw, tmp_path, progress=False)
    with pytest.raises(UserError, match="other settings"):
        build_dataset(raw, built, resize=1.0, progress=False)


def test_plates_are_added_by_name_and_never_dropped_silently(raw, tmp_path):
    plates = sorted({row["Image_Metadata_Plate_DAPI"] for row in table_of(raw)})
    build_dataset(raw, tmp_path / "out", plates=plates[:1], progress=False)
    with pytest.raises(UserError, match=plates[0]):
        build_dataset(raw, tmp_path / "out", plates=plates[1:2], progress=False)
    build_dataset(raw, tmp_path / "out", plates=plates[:2], progress=False)
    assert set(load(tmp_path / "out", "all", tmp_path)["plate"]) == set(plates[:2])
    with pytest.raises(UserError, match="no plate 'Week77_1'"):
        build_dataset(raw, tmp_path / "other", plates=["Week77_1"], progress=False)


def test_any_number_of_workers_builds_the_same_files(raw, built, tmp_path):
    build_dataset(raw, tmp_path / "out", workers=2, progress=False)
    assert contents(tmp_path / "out") == contents(built)


def dies(*_):
    """A worker process that is killed."""
    os._exit(9)


def test_a_worker_process_that_is_killed_is_one_sentence(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "build_plate", dies)
    with pytest.raises(SystemExit) as ended:
        main(["--raw", str(raw), "--output", str(tmp_path / "out"), "--workers", "2"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("wsdino-prepare: error: ") and "--workers" in said and "__main__" in said
