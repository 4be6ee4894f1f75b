"""Fetching files from a server that behaves as badly as real ones do, and archives made to harm."""

import zipfile

import numpy as np
import pytest

from dataset_scripts.archives import check_archive, extract_archive
from dataset_scripts.download import Downloader
from wsdino.errors import UserError


@pytest.fixture
def server(archive_server):
    return archive_server


@pytest.fixture
def name(server):
    """One of the server's archives."""
    return sorted(path.name for path in server.folder.glob("*.zip"))[0]


def fetcher(server, folder, **changes):
    return Downloader(server.url, folder, **{"pause": 0.01, "timeout": 5, **changes})


def test_continues_where_a_connection_dropped(server, name, tmp_path):
    server.faults[name] = ["dropped", "dropped"]
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert path.read_bytes() == (server.folder / name).read_bytes()
    starts = [int(r.removeprefix("bytes=").rstrip("-")) if r else 0 for n, r in server.requests if n == name]
    assert starts[0] == 0 and starts[1] > 0 and starts[2] > starts[1]


def test_starts_again_where_range_is_ignored(server, name, tmp_path):
    server.ignore_range = True
    server.faults[name] = ["dropped"]
    received = []
    path = fetcher(server, tmp_path / "raw", tick=received.append).fetch(name, check_archive)
    assert path.read_bytes() == (server.folder / name).read_bytes()
    assert sum(received) == path.stat().st_size


@pytest.mark.parametrize("fault", ["truncated", "corrupted"])
def test_bad_content_is_fetched_anew(server, name, tmp_path, fault):
    server.faults[name] = [fault]
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert path.read_bytes() == (server.folder / name).read_bytes()
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", ["truncated", "corrupted", "dropped"])
def test_gives_up_with_one_sentence(server, name, tmp_path, fault):
    server.faults[name] = [fault] * 10
    with pytest.raises(UserError, match=f"{name} .* 3 attempts"):
        fetcher(server, tmp_path / "raw", attempts=3).fetch(name, check_archive)
    assert not (tmp_path / "raw" / name).exists()


def test_a_partial_copy_longer_than_the_file(server, name, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{name}.partial").write_bytes(b"x" * (2 * (server.folder / name).stat().st_size))
    path = fetcher(server, tmp_path / "raw").fetch(name, check_archive)
    assert path.read_bytes() == (server.folder / name).read_bytes()


@pytest.mark.parametrize("there", ["whole", "in part", "damaged"])
def test_an_archive_that_is_there_is_verified_and_taken(server, name, tmp_path, there):
    """Fetched before, or by another program, whole or broken off: what is good of it is not fetched again."""
    content = (server.folder / name).read_bytes()
    start = len(content) // 3
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(
        {"whole": content, "in part": content[:start]}.get(there, bytes(len(content)))
    )
    assert fetcher(server, tmp_path / "raw").fetch(name, check_archive).read_bytes() == content
    expected = {
        "whole": [],
        "in part": [(name, f"bytes={start}-")],
        "damaged": [(name, f"bytes={len(content)}-"), (name, None)],
    }
    assert server.requests == expected[there]


def test_addresses_are_checked(tmp_path):
    with pytest.raises(UserError, match="http"):
        Downloader("ftp://example.org", tmp_path)
    with pytest.raises(UserError, match="127.0.0.1:9"):
        Downloader("http://127.0.0.1:9/", tmp_path, attempts=2, pause=0.01).sizes(["a"])


def archive_of(path, contents, **claimed):
    """A zip whose directory claims something else of its first member than is true."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
        for name, value in claimed.items():
            setattr(archive.infolist()[0], name, value)
    return path


EVIL = ["../escape.tif", "/escape.tif", "a/../../escape.tif", "..\\escape.tif", "C:\\e.tif"]


@pytest.mark.parametrize(
    ("contents", "claimed"),
    [
        *(({name: b"evil"}, {}) for name in EVIL),
        ({"p/a.tif": b"x"}, {"file_size": 2**30 + 1}),
        ({"p/a.tif": b"x"}, {"flag_bits": 1}),
        ({"p/a.tif": b"x", "q/a.tif": b"y"}, {}),
    ],
    ids=str,
)
def test_unsafe_archives_are_refused_before_they_are_unpacked(tmp_path, monkeypatch, contents, claimed):
    path = archive_of(tmp_path / "evil.zip", contents, **claimed)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    for attempt in (check_archive, lambda path: extract_archive(path, tmp_path / "in" / "folder")):
        with pytest.raises(UserError, match="evil.zip"):
            attempt(path)
    assert not list(tmp_path.rglob("*.tif")) and not (tmp_path / "in" / "folder").exists()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    """2 MB of black images in a few kB: below a GiB no harm, beyond it too much."""
    path = archive_of(tmp_path / "bomb.zip", {f"p/{i}.tif": bytes(200_000) for i in range(10)})
    check_archive(path)
    monkeypatch.setattr("dataset_scripts.archives.UNPACKED_BASE", 1_000_000)
    with pytest.raises(UserError, match="bomb.zip unpacks to 2,000,000"):
        check_archive(path)
    noise = {f"p/{i}.tif": np.random.default_rng(i).bytes(200_000) for i in range(10)}
    check_archive(archive_of(tmp_path / "real.zip", noise))


def test_a_member_larger_than_it_says_is_cut_there(tmp_path):
    path = archive_of(tmp_path / "liar.zip", {"p/a.tif": bytes(5_000_000)}, file_size=100)
    with pytest.raises(zipfile.BadZipFile):
        check_archive(path)
    with pytest.raises(zipfile.BadZipFile):
        extract_archive(path, tmp_path / "out")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.tif")) <= 100
