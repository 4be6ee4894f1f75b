"""Fetching plate archives from a local server that behaves as badly as real ones do."""

import gzip
import hashlib
import http.server
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from dataset_scripts.download import TABLES, Downloader, archive_name, check_archive, extract_archive
from dataset_scripts.prepare import build_dataset, main
from dataset_scripts.screen import ScreenError
from dataset_scripts.simulator.simulate import simulate_screen


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP with faults by file name: a list of faults, one used up by each GET."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests, self.ignore_range = folder, {}, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        server, name = self.server, self.path.lstrip("/")
        path = server.folder / name
        wanted = self.headers.get("Range")
        if send:
            server.requests.append((name, wanted))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        fault = (server.faults.get(name) or [None]).pop(0) if send and server.faults.get(name) else None
        if fault == "truncated":
            content = content[: len(content) // 2]
        if fault == "corrupted":
            middle = len(content) // 2
            content = content[:middle] + bytes(255 - b for b in content[middle : middle + 64]) + content[middle + 64 :]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and not server.ignore_range else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if send:
            if fault == "dropped":
                self.wfile.write(content[start : start + (len(content) - start) // 3])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
            else:
                self.wfile.write(content[start:])


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("download") / "raw"
    return simulate_screen(
        folder, "tiny", 2, image_size=(48, 56), scale=0.25, batches=2, replicates=1, fields_per_well=1, progress=False
    )


@pytest.fixture(scope="module")
def published(raw, tmp_path_factory):
    """The miniature of the public layout: tables, and a zip a plate with `<plate>/<file>` inside."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("BBBC021_v1_image.csv", "BBBC021_v1_moa.csv"):
        shutil.copy(raw / name, folder)
    (folder / "BBBC021_v1_compound.csv").write_text("compound,smiles\n")
    for plate in sorted(raw.glob("Week*/Week*")):
        with zipfile.ZipFile(folder / archive_name(plate.name), "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(plate.iterdir()):
                archive.write(path, f"{plate.name}/{path.name}")
    return folder


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "www"
    shutil.copytree(published, folder)
    server = Server(folder)
    yield server
    server.shutdown()
    server.server_close()


def plates_of(raw):
    return sorted(path.name for path in raw.glob("Week*/Week*"))


def fetcher(server, folder, **changes):
    return Downloader(server.url, folder, **{"pause": 0.01, "timeout": 5, **changes})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_goes_on_where_a_connection_dropped(server, tmp_path):
    name = sorted(path.name for path in server.folder.glob("*.zip"))[0]
    server.faults[name] = ["dropped", "dropped"]
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert sha256(path) == sha256(server.folder / name)
    starts = [int(r.removeprefix("bytes=").rstrip("-")) if r else 0 for n, r in server.requests if n == name]
    assert starts[0] == 0 and starts[1] > 0 and starts[2] > starts[1]


def test_starts_again_where_range_is_ignored(server, tmp_path):
    name = sorted(path.name for path in server.folder.glob("*.zip"))[0]
    server.ignore_range = True
    server.faults[name] = ["dropped"]
    received = []
    path = fetcher(server, tmp_path / "raw", tick=received.append).fetch(name, check_archive)
    assert sha256(path) == sha256(server.folder / name)
    assert sum(received) == path.stat().st_size


@pytest.mark.parametrize("fault", ["truncated", "corrupted"])
def test_bad_content_is_fetched_anew(server, tmp_path, fault):
    name = sorted(path.name for path in server.folder.glob("*.zip"))[0]
    server.faults[name] = [fault]
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert sha256(path) == sha256(server.folder / name)
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", ["truncated", "corrupted", "dropped"])
def test_gives_up_with_one_sentence(server, tmp_path, fault):
    name = sorted(path.name for path in server.folder.glob("*.zip"))[0]
    server.faults[name] = [fault] * 10
    with pytest.raises(ScreenError, match=f"{name} could not be fetched in 3 attempts"):
        fetcher(server, tmp_path / "raw", attempts=3).fetch(name, check_archive)
    assert not (tmp_path / "raw" / name).exists()


def test_a_partial_copy_longer_than_the_file(server, tmp_path):
    name = sorted(path.name for path in server.folder.glob("*.zip"))[0]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{name}.partial").write_bytes(b"x" * (2 * (server.folder / name).stat().st_size))
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert sha256(path) == sha256(server.folder / name)


def test_manifest_is_written_first_and_checked_afterwards(server, tmp_path):
    name = sorted(path.name for path in server.folder.glob("*.zip"))[0]
    raw = tmp_path / "raw"
    path = fetcher(server, raw).fetch(name, check_archive)
    known = json.loads((raw / "archives.json").read_text())[name]
    assert known == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    # There already: nothing is asked of the server.
    before = len(server.requests)
    fetcher(server, raw).fetch(name, check_archive)
    assert len(server.requests) == before
    # Damaged on disk: fetched again.
    path.write_bytes(b"damaged")
    assert sha256(fetcher(server, raw).fetch(name, check_archive)) == known["sha256"]
    # Another content on the server is refused.
    path.unlink()
    with zipfile.ZipFile(server.folder / name, "w") as archive:
        archive.writestr("plate/other.tif", b"other")
    with pytest.raises(ScreenError, match="differs from the copy first fetched"):
        fetcher(server, raw).fetch(name, check_archive)


def test_a_damaged_manifest_is_named_with_the_mend(server, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "archives.json").write_text("[1, 2")
    with pytest.raises(ScreenError, match="archives.json, the hashes .* is damaged .*: remove it"):
        fetcher(server, tmp_path / "raw").fetch("BBBC021_v1_moa.csv")


@pytest.mark.parametrize("evil", ["../escape.tif", "/escape.tif", "a/../../escape.tif", "..\\escape.tif", "C:\\e.tif"])
def test_no_path_escapes(tmp_path, evil):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(evil, b"evil")
    with pytest.raises(ScreenError, match="leads out of its folder"):
        check_archive(path)
    with pytest.raises(ScreenError, match="leads out of its folder"):
        extract_archive(path, tmp_path / "in" / "folder")
    assert not list(tmp_path.rglob("*.tif"))


def archive_of(path, contents, **claimed):
    """A zip whose directory claims something else of its first member than is true."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        for name, value in claimed.items():
            setattr(archive.infolist()[0], name, value)
    return path


@pytest.mark.parametrize(
    ("contents", "claimed", "message"),
    [
        ({"p/a.tif": b"x"}, {"file_size": 2**28 + 1}, "'p/a.tif' is 268,435,457 bytes unpacked, and 268,435,456 is"),
        ({"p/a.tif": b"x"}, {"flag_bits": 1}, "'p/a.tif' is encrypted"),
        ({"p/a.tif": b"x", "q/a.tif": b"y"}, {}, "two images named 'a.tif'"),
    ],
)
def test_unsafe_archives_are_refused_before_they_are_unpacked(tmp_path, monkeypatch, contents, claimed, message):
    path = archive_of(tmp_path / "evil.zip", contents, **claimed)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    for attempt in (check_archive, lambda path: extract_archive(path, tmp_path / "out")):
        with pytest.raises(ScreenError, match=message):
            attempt(path)
    assert not (tmp_path / "out").exists()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    """2 MB of black images in a few kB: below a GiB none of our business, beyond it too much."""
    path = archive_of(tmp_path / "bomb.zip", {f"p/{i}.tif": bytes(200_000) for i in range(10)})
    check_archive(path)
    monkeypatch.setattr("dataset_scripts.download.RATIO_FROM", 1_000_000)
    with pytest.raises(ScreenError, match="bytes unpack to 2,000,000, and 1,000,000 is the most"):
        check_archive(path)
    path = archive_of(
        tmp_path / "real.zip", {f"p/{i}.tif": np.random.default_rng(i).bytes(200_000) for i in range(10)}
    )
    check_archive(path)
    monkeypatch.setattr("dataset_scripts.download.MAX_PLATE_BYTES", 1_500_000)
    with pytest.raises(ScreenError, match="unpack to 2,000,000, and 1,500,000 is the most"):
        check_archive(path)


def test_a_member_larger_than_it_says_is_cut_there(tmp_path):
    path = archive_of(tmp_path / "liar.zip", {"p/a.tif": bytes(5_000_000)}, file_size=100)
    with pytest.raises(zipfile.BadZipFile):
        check_archive(path)
    with pytest.raises(zipfile.BadZipFile):
        extract_archive(path, tmp_path / "out")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.tif")) <= 100


def test_downloaded_build_equals_the_local_one(server, raw, tmp_path, capsys):
    build_dataset(raw, tmp_path / "local", source="BBBC021v1", progress=False)
    first = archive_name(plates_of(raw)[0])
    server.faults[first] = ["dropped", "corrupted"]
    build_dataset(tmp_path / "fetched", tmp_path / "remote", download=True, base_url=server.url)
    said = capsys.readouterr().out
    assert "disk space needed" in said and "free" in said
    local, remote = (
        load_dataset(str(tmp_path / name), "all", split="train", cache_dir=str(tmp_path / "cache"))
        for name in ("local", "remote")
    )
    assert len(local) == len(remote) > 0
    for a, b in zip(local, remote, strict=True):
        assert a["dna_file"] == b["dna_file"]
        assert (np.asarray(a["tubulin"]) == np.asarray(b["tubulin"])).all()
    # The raw images are gone; tables, hashes and datasets stay.
    left = {path.name for path in (tmp_path / "fetched").rglob("*") if path.is_file()}
    assert left == {"archives.json", "BBBC021_v1_image.csv", "BBBC021_v1_moa.csv", "BBBC021_v1_compound.csv"}
    # Safe to repeat: no archive is asked for again.
    before = len([name for name, _ in server.requests if name.endswith(".zip")])
    build_dataset(tmp_path / "fetched", tmp_path / "remote", download=True, base_url=server.url, progress=False)
    assert len([name for name, _ in server.requests if name.endswith(".zip")]) == before


@pytest.mark.parametrize("part", [1, 3], ids=["whole", "in part"])
def test_an_archive_brought_by_hand_is_taken(server, raw, tmp_path, part):
    """Fetched by another program, whole or broken off: not thrown away, and verified all the same."""
    name = archive_name(plates_of(raw)[0])
    content = (server.folder / name).read_bytes()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content[: len(content) // part])
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert path.read_bytes() == content
    assert server.requests == [(name, f"bytes={len(content) // part}-")]
    assert json.loads((tmp_path / "raw" / "archives.json").read_text())[name]["sha256"] == sha256(path)


def test_a_damaged_archive_brought_by_hand_is_fetched(server, raw, tmp_path):
    name = archive_name(plates_of(raw)[0])
    content = (server.folder / name).read_bytes()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(bytes(len(content)))
    assert fetcher(server, tmp_path / "raw").fetch(name, check_archive).read_bytes() == content


def test_a_table_brought_by_hand_is_fetched_whole(server, tmp_path):
    """Nothing would tell a mixture of two tables."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "BBBC021_v1_moa.csv").write_text("compound,conc")
    path = fetcher(server, tmp_path / "raw").fetch("BBBC021_v1_moa.csv")
    assert path.read_bytes() == (server.folder / path.name).read_bytes()


IMAGE_TABLE, MOA_TABLE = TABLES[:2]


@pytest.mark.parametrize("kind", ["brought by hand", "edited since", "compressed"])
def test_a_user_s_own_table_is_kept_and_said(server, raw, tmp_path, capsys, kind):
    arguments = dict(download=True, base_url=server.url, plates=plates_of(raw)[:1], illumination=False)
    (tmp_path / "raw").mkdir()
    if kind == "edited since":
        build_dataset(tmp_path / "raw", tmp_path / "before", progress=False, **arguments)
    own = (server.folder / MOA_TABLE).read_bytes() + b"DMSO,0,DMSO\n"
    table = tmp_path / "raw" / MOA_TABLE
    if kind == "compressed":
        own, table = gzip.compress(own), tmp_path / "raw" / f"{MOA_TABLE}.gz"
    table.write_bytes(own)
    server.requests.clear()
    build_dataset(tmp_path / "raw", tmp_path / "out", **arguments)
    assert table.read_bytes() == own and MOA_TABLE not in [name for name, _ in server.requests]
    said = capsys.readouterr().out
    assert f"{table} is not as fetched from {server.url}, and used as it is: remove it to fetch it" in said
    assert f"{IMAGE_TABLE} is not as fetched" not in said


def test_a_table_is_replaced_only_by_a_whole_one(server, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / MOA_TABLE).write_text("mine")
    server.faults[MOA_TABLE] = ["dropped"] * 2
    with pytest.raises(ScreenError, match="could not be fetched in 2 attempts"):
        fetcher(server, tmp_path / "raw", attempts=2).fetch(MOA_TABLE)
    assert (tmp_path / "raw" / MOA_TABLE).read_text() == "mine"


def test_a_table_whose_path_is_given_is_not_fetched(server, raw, tmp_path):
    (server.folder / IMAGE_TABLE).unlink()
    (server.folder / MOA_TABLE).unlink()
    build_dataset(
        tmp_path / "raw", tmp_path / "out", image_csv=raw / IMAGE_TABLE, moa_csv=raw / MOA_TABLE, download=True,
        base_url=server.url, plates=plates_of(raw)[:1], illumination=False, progress=False,
    )  # fmt: skip
    assert not {IMAGE_TABLE, MOA_TABLE} & {path.name for path in (tmp_path / "raw").iterdir()}


@pytest.mark.parametrize(
    ("name", "page"),
    [(name, "\n<!DOCTYPE html><title>Please log in</title>") for name in TABLES]
    + [(IMAGE_TABLE, ""), (MOA_TABLE, "compound\n")],
)
def test_a_page_that_answers_for_a_table_is_not_remembered(server, raw, tmp_path, name, page):
    arguments = dict(download=True, base_url=server.url, plates=plates_of(raw)[:1], illumination=False, progress=False)
    good = (server.folder / name).read_text()
    (server.folder / name).write_text(page)
    with pytest.raises(ScreenError, match=f"{server.url}{name} is not that table .*: log in.* or check --base_url"):
        build_dataset(tmp_path / "raw", tmp_path / "out", **arguments)
    assert not list((tmp_path / "raw").glob(f"{name}*"))
    (server.folder / name).write_text(good)
    build_dataset(tmp_path / "raw", tmp_path / "out", **arguments)
    assert (tmp_path / "raw" / name).read_text() == good


@pytest.mark.parametrize("keep_raw", [False, True])
def test_raw_images_that_an_interruption_left_are_deleted(server, raw, tmp_path, keep_raw):
    """As if stopped when a plate was built and before its raw images were deleted: the next run does it."""
    arguments = dict(download=True, base_url=server.url, progress=False)
    build_dataset(tmp_path / "raw", tmp_path / "out", keep_raw=True, **arguments)
    left, kept = (tmp_path / "raw" / archive_name(plate) for plate in plates_of(raw))
    extract_archive(left, tmp_path / "raw" / "plates" / plates_of(raw)[0])
    build_dataset(tmp_path / "raw", tmp_path / "out", keep_raw=keep_raw, **arguments)
    assert not list((tmp_path / "raw").rglob("*.tif"))
    assert left.is_file() == keep_raw and kept.is_file()


def test_an_interruption_is_one_sentence(server, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataset_scripts.prepare._build_plate", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(
            ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out"), "--workers", "1"]
            + ["--download", "--base_url", server.url]
        )
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("wsdino-prepare: interrupted: run the command again to go on from here\n")


def test_a_plate_that_the_server_lacks(server, raw, tmp_path, capsys):
    plates = plates_of(raw)
    (server.folder / archive_name(plates[1])).unlink()
    arguments = ["--raw", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    arguments += ["--download", "--base_url", server.url]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert archive_name(plates[1]) in error and "--allow_missing" in error
    main([*arguments, "--allow_missing", "--keep_raw"])
    assert (tmp_path / "raw" / archive_name(plates[0])).is_file()
    data = load_dataset(str(tmp_path / "out"), "all", split="train", cache_dir=str(tmp_path / "cache"))
    assert set(data["plate"]) == {plates[0]}


def test_only_the_plates_asked_for(server, raw, tmp_path):
    plate = plates_of(raw)[1]
    build_dataset(
        tmp_path / "raw", tmp_path / "out", download=True, base_url=server.url, plates=[plate], progress=False
    )
    assert {name for name, _ in server.requests if name.endswith(".zip")} == {archive_name(plate)}


def test_a_failing_plate_keeps_the_others(server, raw, tmp_path):
    plates = plates_of(raw)
    name = archive_name(plates[0])
    with zipfile.ZipFile(server.folder / name, "w") as archive:
        archive.writestr("../escape.tif", b"evil")
    arguments = dict(download=True, base_url=server.url, progress=False)
    with pytest.raises(ScreenError, match="leads out of its folder.*built are kept"):
        build_dataset(tmp_path / "raw", tmp_path / "out", **arguments)
    assert (tmp_path / "out" / ".build" / f"{plates[1]}.json").is_file()
    assert not (tmp_path / "out" / ".build" / f"{plates[0]}.json").exists()


def test_a_full_disk_is_told_before_anything_is_fetched(server, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ScreenError, match="0.00 GB free and about .* GB are needed"):
        build_dataset(tmp_path / "raw", tmp_path / "out", download=True, base_url=server.url, progress=False)
    assert not [name for name, _ in server.requests if name.endswith(".zip")]


@pytest.mark.parametrize("full", ["raw", "out"])
def test_each_disk_is_asked_for_its_own_share(server, tmp_path, monkeypatch, full):
    """The raw archives may lie on one disk and the dataset on another."""
    from collections import namedtuple

    usage, real = namedtuple("usage", "total used free"), Path.stat
    folders = {name: tmp_path / name for name in ("raw", "out")}

    def stat(path, **options):
        state = real(path, **options)
        if path not in folders.values():
            return state
        return os.stat_result([*state[:2], 10_000 + list(folders.values()).index(path), *state[3:]])  # st_dev

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000 if path == folders[full] else 10**11))
    sizes = [path.stat().st_size for path in server.folder.glob("*.zip")]
    share = {"raw": len(sizes) * max(sizes) * 3, "out": sum(sizes) * 0.5}[full]
    sentence = f"{folders[full]} has 0.00 GB free and about {share / 1e9:.2f} GB are needed"
    with pytest.raises(ScreenError, match=sentence):
        build_dataset(folders["raw"], folders["out"], download=True, base_url=server.url, progress=False)
    assert not [name for name, _ in server.requests if name.endswith(".zip")]


def test_a_table_that_the_server_lacks(server, tmp_path, capsys):
    """--allow_missing would not help, and is not named."""
    (server.folder / "BBBC021_v1_moa.csv").unlink()
    with pytest.raises(ScreenError, match=r"BBBC021_v1_moa.csv does not exist \(HTTP 404\): check --base_url$"):
        build_dataset(tmp_path / "raw", tmp_path / "out", download=True, base_url=server.url, allow_missing=True)


def test_addresses_are_checked(tmp_path):
    with pytest.raises(ScreenError, match="http"):
        Downloader("ftp://example.org", tmp_path)
    with pytest.raises(ScreenError, match="does not answer"):
        Downloader("http://127.0.0.1:9/", tmp_path, attempts=2, pause=0.01).sizes(["a"])
