"""The plane cache: equal to decoding each image, shared, checked, and safe against interruption."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset_scripts import Planes, open_fields, open_planes
from dataset_scripts.png import encode_png
from wsdino.errors import UserError


def make(folder, planes):
    """The fields of a dataset of one Parquet file."""

    def png(plane):
        if plane is None:
            return None
        buffer = io.BytesIO()
        Image.fromarray(plane).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"tubulin": datasets.Image(), "number": datasets.Value("int32")})
    rows = {"tubulin": [png(plane) for plane in planes], "number": list(range(len(planes)))}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return open_fields(folder, ["default"])


@pytest.fixture
def planes():
    return list(np.random.default_rng(0).integers(0, 65535, (7, 12, 16)).astype(np.uint16))


def test_equals_decoding_and_is_read_only(planes, tmp_path):
    dataset = make(tmp_path / "data", planes)
    found = open_planes(dataset, "tubulin", tmp_path / "cache", progress=False)
    assert isinstance(found, np.memmap) and found.dtype == np.uint16 and found.shape == (7, 12, 16)
    for i in range(7):
        assert (found[i] == planes[i]).all()
    with pytest.raises(ValueError):
        found[0] = 0


def test_rows_follow_the_dataset(planes, tmp_path):
    dataset = make(tmp_path / "data", planes).select([5, 1, 1, 3])
    found = open_planes(dataset, "tubulin", tmp_path / "cache", progress=False)
    assert [int(np.argmax([(plane == other).all() for other in planes])) for plane in found] == [5, 1, 1, 3]


def test_written_once_and_another_fingerprint_is_another_file(planes, tmp_path):
    dataset = make(tmp_path / "data", planes)
    open_planes(dataset, "tubulin", tmp_path / "cache", progress=False)
    (file,) = (tmp_path / "cache").glob("*.npy")
    before = file.stat().st_mtime_ns
    open_planes(dataset, "tubulin", tmp_path / "cache", progress=False)
    assert file.stat().st_mtime_ns == before
    other = dataset.select([0, 1, 3, 4, 5, 6])
    assert len(open_planes(other, "tubulin", tmp_path / "cache", progress=False)) == 6
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.parametrize("damage", ["cut", "note", "a plane", "half-written"])
def test_a_damaged_cache_is_written_anew(planes, tmp_path, damage):
    dataset = make(tmp_path / "data", planes)
    expected = np.array(open_planes(dataset, "tubulin", tmp_path / "cache", progress=False))
    (file,), (note,) = (tmp_path / "cache").glob("*.npy"), (tmp_path / "cache").glob("*.json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "note":
        note.write_text("{")
    elif damage == "a plane":
        content = bytearray(file.read_bytes())
        content[-200] ^= 255
        file.write_bytes(content)
    else:  # the writer died
        note.unlink()
        os.replace(file, f"{file}.partial")
    assert (open_planes(dataset, "tubulin", tmp_path / "cache", progress=False) == expected).all()


def _open_in_process(arguments):
    dataset, folder = arguments
    return int(open_planes(dataset, "tubulin", folder, progress=False).astype(np.int64).sum())


def test_two_processes_at_once(planes, tmp_path):
    dataset = make(tmp_path / "data", planes)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(_open_in_process, [(dataset, str(tmp_path / "cache"))] * 4, chunksize=1)
    assert sums == [int(np.sum(planes, dtype=np.int64))] * 4
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1 and not list((tmp_path / "cache").glob("*.partial"))


def _age(path, days):
    before = time.time() - days * 86400
    os.utime(path, (before, before))


def _hold_while_removed(folder, dataset, opened, removed, sums):
    """Maps the planes, has them removed meanwhile, and reads every pixel afterwards."""
    found = open_planes(dataset, "tubulin", folder, progress=False)
    for note in Path(folder).glob("*.json"):
        _age(note, 31)
    opened.set()
    assert removed.wait(60)
    sums.put(int(found.astype(np.int64).sum()))


def test_caches_that_nobody_opens_are_removed_but_keep_their_pages_while_mapped(planes, tmp_path):
    dataset, other = make(tmp_path / "data", planes), make(tmp_path / "other", [plane[::-1] for plane in planes])
    context = multiprocessing.get_context("spawn")
    opened, removed, sums = context.Event(), context.Event(), context.Queue()
    process = context.Process(
        target=_hold_while_removed, args=(str(tmp_path / "cache"), dataset, opened, removed, sums)
    )
    process.start()
    assert opened.wait(60)
    (old,) = (tmp_path / "cache").glob("*.npy")
    open_planes(other, "tubulin", tmp_path / "cache", progress=False)
    assert (
        not old.exists()
        and len(list((tmp_path / "cache").glob("*.npy"))) == len(list((tmp_path / "cache").glob("*.json"))) == 1
    )
    removed.set()
    assert sums.get(timeout=60) == int(np.sum(planes, dtype=np.int64))
    process.join()
    assert process.exitcode == 0


def test_what_is_used_what_is_written_and_what_is_another_s_is_kept(planes, tmp_path):
    used, new = make(tmp_path / "data", planes), make(tmp_path / "other", [plane[::-1] for plane in planes])
    open_planes(used, "tubulin", tmp_path / "cache", progress=False)
    (note,), (file,) = (tmp_path / "cache").glob("*.json"), (tmp_path / "cache").glob("*.npy")
    _age(note, 31)
    open_planes(used, "tubulin", tmp_path / "cache", progress=False)  # opening is using
    cache = tmp_path / "cache"
    mine, writing = cache / "my-own-letter.json", cache / "dna-0123456789abcdef-9.npy.partial"
    dead = cache / "dna-fedcba9876543210-9.npy.partial"
    for path in (mine, writing, dead):
        path.write_text("{}")
    _age(mine, 400)
    _age(dead, 2)
    open_planes(new, "tubulin", tmp_path / "cache", progress=False)
    assert file.exists() and note.exists() and mine.exists() and writing.exists() and not dead.exists()


def test_a_full_disk_is_an_error_and_leaves_no_cache(planes, tmp_path):
    """The largest file that this process may write stands for the disk; a map of a full disk would end it."""
    resource = pytest.importorskip("resource")
    fields = make(tmp_path / "data", planes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .*: free some space"):
            open_planes(fields, "tubulin", tmp_path / "cache", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert (open_planes(fields, "tubulin", tmp_path / "cache", progress=False) == planes).all()


def test_8_bit_planes_stay_8_bit(tmp_path):
    planes = list(np.random.default_rng(0).integers(0, 255, (3, 5, 6)).astype(np.uint8))
    found = open_planes(make(tmp_path / "data", planes), "tubulin", tmp_path / "cache", progress=False)
    assert found.dtype == np.uint8 and (found == planes).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:3] + [None], "row 3 has no tubulin"),
        (lambda p: p[:3] + [p[3][:, :5]], "row 3.*one size"),
        (lambda p: p[:3] + [p[3].astype(np.uint8)], "row 3.*uint8"),
        (lambda p: [np.zeros((4, 5, 3), np.uint8)], "row 0.*grey"),
        (lambda p: [], "no fields"),
    ],
)
def test_bad_rows_are_named(planes, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        open_planes(make(tmp_path / "data", change(planes)), "tubulin", tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "row 1: tubulin image is truncated or not an image .*: fetch it again"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x10\0\0\0\0\0\0\0\0", "row 1: tubulin image"),
        (None, "row 1: tubulin image is missing"),
    ],
)
def test_a_damaged_image_of_a_dataset_is_named(planes, tmp_path, content, message):
    rows = [{"bytes": encode_png(plane), "path": None} for plane in planes]
    rows[1] = {"bytes": content, "path": None if content else str(tmp_path / "absent.png")}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"tubulin": pa.array(rows, image)}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=message):
        open_planes(open_fields(tmp_path, ["default"]), "tubulin", tmp_path / "cache", progress=False)


def test_unknown_channel(planes, tmp_path):
    make(tmp_path / "data", planes)
    with pytest.raises(UserError, match="no column 'actin'; it has tubulin"):
        open_fields(tmp_path / "data", ["default"], channels=["actin"])


def test_note_is_json(planes, tmp_path):
    open_planes(make(tmp_path / "data", planes), "tubulin", tmp_path / "cache", progress=False)
    (note,), (file,) = (tmp_path / "cache").glob("*.json"), (tmp_path / "cache").glob("*.npy")
    assert json.loads(note.read_text())["bytes"] == file.stat().st_size


CARD = "---\nconfigs:\n- config_name: annotated\n  data_files: annotated/train.parquet\n---\nOne card for all.\n"


def write_folder(folder, level):
    """A dataset folder whose card says nothing of its images: two planes of one grey level."""
    (folder / "annotated").mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"dna": datasets.Image()})
    rows = datasets.Dataset.from_dict({"dna": [np.full((8, 8), level, np.uint16)] * 2}, features=features)
    rows.to_parquet(folder / "annotated" / "train.parquet")
    (folder / "README.md").write_text(CARD)


def levels(folder):
    fields = open_fields(folder, ["annotated"])
    (level,) = {int(value) for plane in Planes(fields, "dna") for value in np.unique(plane)}
    assert (open_planes(fields, "dna", progress=False) == level).all()
    return level, fields.fingerprint


def test_a_folder_is_never_taken_for_another_or_for_what_it_was(tmp_path):
    """The datasets library tells local folders apart by name and card alone."""
    one, two = tmp_path / "one" / "screen", tmp_path / "two" / "screen"
    write_folder(one, 1000)
    write_folder(two, 2000)
    first, second = levels(one), levels(two)
    assert (first[0], second[0]) == (1000, 2000) and first[1] != second[1]
    assert levels(one) == first  # again, from the cache
    write_folder(one, 3000)
    again = levels(one)
    assert again[0] == 3000 and again[1] not in (first[1], second[1])


def test_what_is_not_data_of_a_part_leaves_its_cache_alone(tmp_path):
    """A run kept inside the dataset's folder writes there all the time; another part may grow."""
    folder = tmp_path / "screen"
    write_folder(folder, 1000)
    before = levels(folder)
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "runs" / "last").symlink_to("nowhere")
    shutil.copy(folder / "annotated" / "train.parquet", folder / "other.parquet")
    assert levels(folder) == before
