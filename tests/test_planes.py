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
import pytest
from PIL import Image

from dataset_scripts.planes import load_part, open_planes
from dataset_scripts.screen import ScreenError


def make(planes, **columns):
    def png(plane):
        if plane is None:
            return None
        buffer = io.BytesIO()
        Image.fromarray(plane).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"tubulin": datasets.Image(), "number": datasets.Value("int32")})
    rows = {"tubulin": [png(plane) for plane in planes], "number": list(range(len(planes)))}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def planes():
    return list(np.random.default_rng(0).integers(0, 65535, (7, 12, 16)).astype(np.uint16))


def test_equals_decoding_and_is_read_only(planes, tmp_path):
    dataset = make(planes)
    found = open_planes(dataset, "tubulin", tmp_path, progress=False)
    assert isinstance(found, np.memmap) and found.dtype == np.uint16 and found.shape == (7, 12, 16)
    for i in range(7):
        assert (found[i] == np.asarray(dataset[i]["tubulin"])).all()
    with pytest.raises(ValueError):
        found[0] = 0


def test_rows_follow_the_dataset(planes, tmp_path):
    dataset = make(planes).select([5, 1, 1, 3])
    found = open_planes(dataset, "tubulin", tmp_path, progress=False)
    assert [int(np.argmax([(plane == other).all() for other in planes])) for plane in found] == [5, 1, 1, 3]


def test_written_once_and_another_fingerprint_is_another_file(planes, tmp_path):
    dataset = make(planes)
    open_planes(dataset, "tubulin", tmp_path, progress=False)
    (file,) = tmp_path.glob("*.npy")
    before = file.stat().st_mtime_ns
    open_planes(dataset, "tubulin", tmp_path, progress=False)
    assert file.stat().st_mtime_ns == before
    other = dataset.select(range(7)).filter(lambda row: row["number"] != 2)
    assert len(open_planes(other, "tubulin", tmp_path, progress=False)) == 6
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize("damage", ["cut", "note", "a plane", "half-written"])
def test_a_damaged_cache_is_written_anew(planes, tmp_path, damage):
    dataset = make(planes)
    expected = np.array(open_planes(dataset, "tubulin", tmp_path, progress=False))
    (file,), (note,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
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
    assert (open_planes(dataset, "tubulin", tmp_path, progress=False) == expected).all()


def _open_in_process(arguments):
    dataset, folder = arguments
    return int(open_planes(dataset, "tubulin", folder, progress=False).astype(np.int64).sum())


def test_two_processes_at_once(planes, tmp_path):
    dataset = make(planes)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.map(_open_in_process, [(dataset, str(tmp_path))] * 4, chunksize=1)
    assert sums == [int(np.sum(planes, dtype=np.int64))] * 4
    assert len(list(tmp_path.glob("*.npy"))) == 1 and not list(tmp_path.glob("*.partial"))


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
    dataset, other = make(planes), make([plane[::-1] for plane in planes])
    context = multiprocessing.get_context("spawn")
    opened, removed, sums = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=_hold_while_removed, args=(str(tmp_path), dataset, opened, removed, sums))
    process.start()
    assert opened.wait(60)
    (old,) = tmp_path.glob("*.npy")
    open_planes(other, "tubulin", tmp_path, progress=False)
    assert not old.exists() and len(list(tmp_path.glob("*.npy"))) == len(list(tmp_path.glob("*.json"))) == 1
    removed.set()
    assert sums.get(timeout=60) == int(np.sum(planes, dtype=np.int64))
    process.join()
    assert process.exitcode == 0


def test_what_is_used_what_is_written_and_what_is_another_s_is_kept(planes, tmp_path):
    used, new = make(planes), make([plane[::-1] for plane in planes])
    open_planes(used, "tubulin", tmp_path, progress=False)
    (note,), (file,) = tmp_path.glob("*.json"), tmp_path.glob("*.npy")
    _age(note, 31)
    open_planes(used, "tubulin", tmp_path, progress=False)  # opening is using
    mine, writing = tmp_path / "my-own-letter.json", tmp_path / "dna-0123456789abcdef-9.npy.partial"
    dead = tmp_path / "dna-fedcba9876543210-9.npy.partial"
    for path in (mine, writing, dead):
        path.write_text("{}")
    _age(mine, 400)
    _age(dead, 2)
    open_planes(new, "tubulin", tmp_path, progress=False)
    assert file.exists() and note.exists() and mine.exists() and writing.exists() and not dead.exists()


def test_a_full_disk_is_an_error_and_leaves_no_cache(planes, tmp_path):
    """The largest file that this process may write stands for the disk; a map of a full disk would end it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(ScreenError, match="cannot be written .*: free some space"):
            open_planes(make(planes), "tubulin", tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*.npy"))
    assert (open_planes(make(planes), "tubulin", tmp_path, progress=False) == planes).all()


def test_8_bit_planes_stay_8_bit(tmp_path):
    planes = list(np.random.default_rng(0).integers(0, 255, (3, 5, 6)).astype(np.uint8))
    found = open_planes(make(planes), "tubulin", tmp_path, progress=False)
    assert found.dtype == np.uint8 and (found == planes).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:3] + [None], "row 3 has no tubulin"),
        (lambda p: p[:3] + [p[3][:, :5]], "row 3.*one size"),
        (lambda p: p[:3] + [p[3].astype(np.uint8)], "row 3.*uint8"),
        (lambda p: [np.zeros((4, 5, 3), np.uint8)], "row 0.*grey"),
        (lambda p: [], "no rows"),
    ],
)
def test_bad_rows_are_named(planes, tmp_path, change, message):
    with pytest.raises(ScreenError, match=message):
        open_planes(make(change(planes)), "tubulin", tmp_path, progress=False)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "row 1: tubulin image is truncated or not an image .*: fetch it again"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x10\0\0\0\0\0\0\0\0", "row 1: tubulin image"),
        (None, "row 1: tubulin image is missing"),
    ],
)
def test_a_damaged_image_of_a_dataset_is_named(planes, tmp_path, content, message):
    rows = [make(planes).cast_column("tubulin", datasets.Image(decode=False))[i]["tubulin"] for i in range(3)]
    rows[1] = {"bytes": content, "path": None if content else str(tmp_path / "absent.png")}
    dataset = datasets.Dataset.from_dict(
        {"tubulin": rows}, features=datasets.Features({"tubulin": datasets.Image(decode=False)})
    ).cast_column("tubulin", datasets.Image())
    with pytest.raises(ScreenError, match=message):
        open_planes(dataset, "tubulin", tmp_path / "cache", progress=False)


def test_unknown_channel(planes, tmp_path):
    with pytest.raises(ScreenError, match="no channel 'actin': choose among tubulin"):
        open_planes(make(planes), "actin", tmp_path)


def test_note_is_json(planes, tmp_path):
    open_planes(make(planes), "tubulin", tmp_path, progress=False)
    (note,), (file,) = tmp_path.glob("*.json"), tmp_path.glob("*.npy")
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
    dataset = load_part(folder, "annotated")
    (level,) = {int(value) for plane in dataset["dna"] for value in np.unique(plane)}
    assert (open_planes(dataset, "dna", progress=False) == level).all()
    return level, dataset._fingerprint


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
    joined = [datasets.concatenate_datasets([load_part(path, "annotated")] * 2)._fingerprint for path in (one, two)]
    assert joined[0] != joined[1]


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
    (folder / "README.md").write_text(CARD + "Another word.\n")
    assert levels(folder)[1] != before[1]


def test_the_cache_of_a_folder_that_nobody_opened_for_long_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_folder(tmp_path / "screen", 1000)
    old, other = tmp_path / "cache" / ("wsdino_" + "0" * 16), tmp_path / "cache" / "wsdino_planes"
    for folder in (old, other):
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - 31 * 86400,) * 2)
    load_part(tmp_path / "screen", "annotated")
    assert not old.exists() and other.exists()
    assert len(list((tmp_path / "cache").glob("wsdino_" + "[0-9a-f]" * 16))) == 1
