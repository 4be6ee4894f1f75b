"""A build that fetches its plates: it equals one of local images, and leaves no raw image behind."""

import gzip
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from small_screens import load

from dataset_scripts.archives import PlateArchives, archive_name, extract_archive
from dataset_scripts.bbbc021 import COMPOUND_TABLE, IMAGE_TABLE, MOA_TABLE
from dataset_scripts.prepare import build_dataset, main
from wsdino.errors import UserError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def server(archive_server):
    return archive_server


@pytest.fixture
def plates(archive_raw):
    return sorted(path.name for path in archive_raw.glob("Week*/Week*"))


@pytest.fixture
def build(server, tmp_path):
    """Build from the server: raw images go to `raw`, the dataset to `out`."""

    def run(output="out", **changes):
        given = {"download": True, "base_url": server.url, "illumination": False, "progress": False} | changes
        build_dataset(tmp_path / "raw", tmp_path / output, **given)

    return run


def zips(server):
    return [name for name, _ in server.requests if name.endswith(".zip")]


def test_downloaded_build_equals_the_local_one(server, archive_raw, plates, build, tmp_path):
    build_dataset(archive_raw, tmp_path / "local", source="BBBC021v1", progress=False)
    server.faults[archive_name(plates[0])] = ["dropped", "corrupted"]
    build(illumination=True, workers=2)
    local, remote = (load(tmp_path / name, "all", tmp_path) for name in ("local", "out"))
    assert len(local) == len(remote) > 0
    for a, b in zip(local, remote, strict=True):
        assert a["dna_file"] == b["dna_file"]
        assert (np.asarray(a["tubulin"]) == np.asarray(b["tubulin"])).all()
    # The raw images are gone; the tables stay.
    left = {path.name for path in (tmp_path / "raw").rglob("*") if path.is_file()}
    assert left == {IMAGE_TABLE, MOA_TABLE, COMPOUND_TABLE}
    # Safe to repeat: no archive is asked for again.
    before = len(zips(server))
    build(illumination=True)
    assert len(zips(server)) == before


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_that_is_there_is_used(server, plates, build, tmp_path, packed):
    own = (server.folder / MOA_TABLE).read_bytes() + b"DMSO,0,DMSO\n"
    table = tmp_path / "raw" / (f"{MOA_TABLE}.gz" if packed else MOA_TABLE)
    table.parent.mkdir()
    table.write_bytes(gzip.compress(own) if packed else own)
    before = table.read_bytes()
    build(plates=plates[:1])
    assert table.read_bytes() == before and MOA_TABLE not in [name for name, _ in server.requests]


def test_a_table_whose_path_is_given_is_not_fetched(server, archive_raw, plates, build, tmp_path):
    (server.folder / IMAGE_TABLE).unlink()
    (server.folder / MOA_TABLE).unlink()
    build(image_csv=archive_raw / IMAGE_TABLE, moa_csv=archive_raw / MOA_TABLE, plates=plates[:1])
    assert not {IMAGE_TABLE, MOA_TABLE} & {path.name for path in (tmp_path / "raw").iterdir()}


@pytest.mark.parametrize(
    ("name", "page"),
    [(name, "\n<!DOCTYPE html><title>Please log in</title>") for name in (IMAGE_TABLE, MOA_TABLE, COMPOUND_TABLE)]
    + [(IMAGE_TABLE, ""), (MOA_TABLE, "compound\n")],
)
def test_a_page_that_answers_for_a_table_is_not_kept(server, plates, build, tmp_path, name, page):
    good = (server.folder / name).read_text()
    (server.folder / name).write_text(page)
    with pytest.raises(UserError, match=f"{server.url}{name} .*--base_url"):
        build(plates=plates[:1])
    assert not list((tmp_path / "raw").glob(f"{name}*"))
    (server.folder / name).write_text(good)
    build(plates=plates[:1])
    assert (tmp_path / "raw" / name).read_text() == good


def test_a_partial_table_is_fetched_whole(server, plates, build, tmp_path):
    """Nothing would tell a mixture of two tables."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{MOA_TABLE}.partial").write_bytes(b"another,")
    build(plates=plates[:1])
    assert (tmp_path / "raw" / MOA_TABLE).read_bytes() == (server.folder / MOA_TABLE).read_bytes()


@pytest.mark.parametrize("keep_raw", [False, True])
def test_raw_images_that_an_interruption_left_are_deleted(build, plates, tmp_path, keep_raw):
    """As if stopped when a plate was built and before its raw images were deleted: the next run does it."""
    build(keep_raw=True)
    left, kept = (tmp_path / "raw" / archive_name(plate) for plate in plates)
    extract_archive(left, tmp_path / "raw" / "plates" / plates[0])
    build(keep_raw=keep_raw)
    assert not list((tmp_path / "raw").rglob("*.tif"))
    assert left.is_file() == keep_raw and kept.is_file()


def test_an_interruption_is_one_sentence(server, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlateArchives, "fetch", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(
            ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--workers", "1"]
            + ["--download", "--base_url", server.url]
        )
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 130 and said.startswith("wsdino-prepare: interrupted")


def test_a_plate_that_the_server_lacks(server, plates, build, tmp_path):
    (server.folder / archive_name(plates[1])).unlink()
    with pytest.raises(UserError, match=f"{archive_name(plates[1])} .*--allow_missing"):
        build()
    build(allow_missing=True, keep_raw=True)
    assert (tmp_path / "raw" / archive_name(plates[0])).is_file()
    assert set(load(tmp_path / "out", "all", tmp_path)["plate"]) == {plates[0]}


def test_only_the_plates_asked_for(server, plates, build):
    build(plates=plates[1:])
    assert set(zips(server)) == {archive_name(plates[1])}


def test_a_failing_plate_keeps_the_others(server, plates, build, tmp_path):
    with zipfile.ZipFile(server.folder / archive_name(plates[0]), "w") as archive:
        archive.writestr("../escape.tif", b"evil")
    with pytest.raises(UserError, match="escape.tif.*kept"):
        build()
    assert (tmp_path / "out" / ".build" / f"{plates[1]}.json").is_file()
    assert not (tmp_path / "out" / ".build" / f"{plates[0]}.json").exists()


@pytest.mark.parametrize("full", ["raw", "out"])
def test_each_disk_is_asked_for_its_own_share(server, build, tmp_path, monkeypatch, full):
    """The raw archives may lie on one disk and the dataset on another; nothing is fetched to a full one."""
    folders, real = {name: tmp_path / name for name in ("raw", "out")}, Path.stat

    class Stat:
        def __init__(self, path):
            self.st_dev, self.st_mode = list(folders.values()).index(path), real(path).st_mode

    monkeypatch.setattr(
        Path, "stat", lambda path, **more: Stat(path) if path in folders.values() else real(path, **more)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000 if path == folders[full] else 10**11))
    sizes = [path.stat().st_size for path in server.folder.glob("*.zip")]
    share = {"raw": len(sizes) * max(sizes) * 3, "out": sum(sizes) * 0.5}[full]
    with pytest.raises(UserError, match=f"{folders[full]} has 0.00 GB free and about {share / 1e9:.2f} GB are needed"):
        build()
    assert not zips(server)


def test_a_table_that_the_server_lacks(server, build):
    """--allow_missing would not help, and is not named."""
    (server.folder / MOA_TABLE).unlink()
    with pytest.raises(UserError, match=f"{MOA_TABLE} .*--base_url$"):
        build(allow_missing=True)
