"""Extraction that is killed, shared between processes or repeated; its memory."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from extraction_run import (
    LAUNCH_TWO,
    command,
    extract,
    features_of,
    make_model,
    plain_features,
    refused,
    screen_rows,
)
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import extract_profiles
from benchmarks.extraction import measure_memory
from evaluation_wsdino.profile_file import ProfileFile
from modeling_wsdino import WSDinoImageProcessor, WSDinoModel, build_repository

KILLED = """
import os, signal, sys
import evaluation_wsdino.profile_file as profile_file

write, left = profile_file.pq.write_table, int(sys.argv.pop(1))

def write_and_die(table, path, **kwargs):
    global left
    write(table, path, **kwargs)
    left -= 1
    if left == 0:  # the part is written beside, but not renamed yet
        os.kill(os.getpid(), signal.SIGKILL)

profile_file.pq.write_table = write_and_die
import extract_profiles
extract_profiles.main(sys.argv[1:])
"""


# Of several processes only the named ones die, and the script finds the project as a module does.
KILLED_RANKS = """import os, signal, sys
if os.environ["RANK"] not in os.environ["KILLED_RANKS"].split():
    sys.argv[1] = "0"
"""


@pytest.fixture
def run(random_run, tmp_path):
    """A copy of the run to write into."""
    return Path(shutil.copytree(random_run, tmp_path / "run"))


def test_a_killed_extraction_continues_where_it_stopped(run, tmp_path, monkeypatch):
    """SIGKILL while the seventh part is written: the end equals the uninterrupted file, whole parts are not redone."""
    flags = ("--sets", "trained", "--batch_size", 8, "--shard_fields", 24)
    killed = command("-c", KILLED, 7, run, *flags)
    assert killed.returncode == -signal.SIGKILL
    path, folder = run / "profiles" / "trained.parquet", run / "profiles" / "trained.parquet.parts"
    assert not path.exists()
    # Of 108 fields in parts of 24: five of dna, one of tubulin, and the half-written second.
    assert sorted(len(pd.read_parquet(part)) for part in folder.glob("*.parquet")) == [12, 24, 24, 24, 24, 24]
    assert len(list(folder.glob("*.partial"))) == 1
    redone, write = [], ProfileFile.write
    monkeypatch.setattr(
        ProfileFile, "write", lambda self, *rest: (redone.append((rest[0], rest[1].start)), write(self, *rest))
    )
    extract(run, *flags)
    tubulin, actin = [("tubulin", first) for first in (24, 48, 72, 96)], [("actin", 24 * part) for part in range(5)]
    assert redone == tubulin + actin and not folder.exists()
    whole = Path(shutil.copytree(run, tmp_path / "whole", ignore=shutil.ignore_patterns("profiles")))
    extract(whole, *flags)
    pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(whole / "profiles" / "trained.parquet"))


def test_any_batch_and_shard_size_may_finish_what_another_began(run, tiny_screen, monkeypatch):
    flags = ("--sets", "trained", "--channels", "dna")
    write, left = ProfileFile.write, [3]

    def fail_after_three(self, *rest):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError
        write(self, *rest)

    monkeypatch.setattr(ProfileFile, "write", fail_after_three)
    with pytest.raises(RuntimeError):
        extract(run, *flags, "--batch_size", 5, "--shard_fields", 11)
    left[0] = 100
    parts = sorted((run / "profiles" / "trained.parquet.parts").glob("dna-*.parquet"))
    parts[1].unlink()  # a hole
    extract(run, *flags, "--batch_size", 16, "--shard_fields", 40)
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    expected = np.stack([plain_features(model, row["dna"]) for row in screen_rows(tiny_screen)])
    np.testing.assert_allclose(features_of(pd.read_parquet(run / "profiles" / "trained.parquet")), expected, atol=2e-4)


def test_only_what_changed_is_extracted_again(run, tiny_screen, tmp_path, capsys):
    path = run / "profiles" / "trained.parquet"
    flags = (run, "--sets", "trained", "--channels", "dna")

    def changed(*more):
        before = path.stat().st_ino, path.stat().st_mtime_ns
        extract(*flags, *more)
        return (path.stat().st_ino, path.stat().st_mtime_ns) != before

    extract(*flags)
    assert not changed() and "up to date" in capsys.readouterr().out
    assert not changed("--batch_size", 3, "--shard_fields", 7, "--num_workers", 1)
    assert changed("--tiles", "full") and changed()  # and back again
    copy = Path(shutil.copytree(tiny_screen, tmp_path / "copy"))
    shard = sorted((copy / "data" / "dmso").glob("*.parquet"))[-1]
    table = pq.read_table(shard)
    swapped = table.take([0, 0, *range(2, len(table))])
    place = table.column_names.index("dna")  # the second field's dna image alone is another now
    pq.write_table(table.set_column(place, table.schema.field("dna"), swapped.column("dna")), shard)
    assert changed("--dataset", copy)
    build_repository(run / "dna" / "model", make_model(["dna"], seed=9), WSDinoImageProcessor(tile_size=32))
    assert changed("--subsets", "dmso") and len(pd.read_parquet(path)) == 36
    model = WSDinoModel.from_pretrained(run / "dna" / "model").eval()
    (row, *_) = screen_rows(tiny_screen, ["dmso"])
    expected = plain_features(model, row["dna"])
    np.testing.assert_allclose(features_of(pd.read_parquet(path)).iloc[0], expected, atol=2e-4)


def test_parts_of_another_model_are_not_joined(run, monkeypatch):
    """Interrupted, the model trained on, started again: nothing of the old model may survive."""
    flags = ("--sets", "trained", "--channels", "dna", "--batch_size", 8, "--shard_fields", 24)
    with monkeypatch.context() as patch:
        patch.setattr(ProfileFile, "join", lambda self: None)
        extract(run, *flags)
    build_repository(run / "dna" / "model", make_model(["dna"], seed=9), WSDinoImageProcessor(tile_size=32))
    extract(run, *flags)
    path = run / "profiles" / "trained.parquet"
    table = pd.read_parquet(path)
    path.unlink()
    extract(run, *flags)
    pd.testing.assert_frame_equal(table, pd.read_parquet(path))


# ------------------------------------------------------------------------------------------- several processes


def test_two_processes_write_what_one_writes(run, tmp_path):
    """`accelerate launch` on two processes (gloo): each extracts a share, together the same file to the bit."""
    flags = ("--sets", "trained", "intensity", "--batch_size", 8, "--shard_fields", 24)
    two = Path(shutil.copytree(run, tmp_path / "two"))
    extract(run, *flags)
    done = command(
        *(*LAUNCH_TWO, "extract_profiles.py", two, *flags),
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 2" in done.stderr
    for name in ("trained", "intensity"):
        ours, expected = (pd.read_parquet(folder / "profiles" / f"{name}.parquet") for folder in (two, run))
        pd.testing.assert_frame_equal(ours, expected)


@pytest.mark.slow
def test_one_of_two_processes_killed_then_both_then_resumed(run, tmp_path):
    """SIGKILL in the middle of a part, of one process and of both: in the end no row is lost or doubled."""
    flags = ("--sets", "trained", "--batch_size", 4, "--shard_fields", 8)
    expected = Path(shutil.copytree(run, tmp_path / "expected"))
    extract(expected, *flags)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("import os, signal, sys", KILLED_RANKS))
    folder = run / "profiles" / "trained.parquet.parts"
    kept = {}
    for ranks in ("1", "0 1", "0"):
        done = command(*LAUNCH_TWO, script, 3, run, *flags, ACCELERATE_USE_CPU="true", KILLED_RANKS=ranks)
        assert done.returncode != 0
        now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
        assert len(now) > len(kept) and kept.items() <= now.items(), "whole parts stay and are not done again"
        kept = now
    assert not (run / "profiles" / "trained.parquet").exists()
    done = command(*LAUNCH_TWO, "extract_profiles.py", run, *flags, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_parquet(run / "profiles" / "trained.parquet")
    pd.testing.assert_frame_equal(table, pd.read_parquet(expected / "profiles" / "trained.parquet"))
    assert not table.duplicated(["Metadata_Plate", "Metadata_Well", "Metadata_Site"]).any()
    assert not folder.exists()


def test_a_launch_of_fewer_processes_than_asked_is_refused(run, monkeypatch, capsys):
    for name, value in (("ACCELERATE_MIXED_PRECISION", "no"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        extract(run)
    assert ended.value.code == 2 and "--multi_gpu" in capsys.readouterr().err


@given(
    fields=st.integers(1, 5000),
    shard_fields=st.integers(1, 600),
    batch_size=st.integers(1, 40),
    processes=st.integers(1, 7),
)
@settings(deadline=None, max_examples=200)
def test_parts_are_whole_batches_and_shared_equally(fields, shard_fields, batch_size, processes):
    size = extract_profiles.part_size(fields, shard_fields, batch_size, processes)
    assert size % batch_size == 0 and 0 < size <= max(shard_fields, batch_size)
    parts = -(-fields // size)
    if fields >= processes * batch_size * 10 and size >= batch_size * 10:
        assert -(-parts // processes) * size <= 1.25 * fields / processes + batch_size, "the busiest process's share"


def test_two_extractions_at_once_into_one_file_are_refused(run, capsys):
    folder = run / "profiles" / "trained.parquet.parts"
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        assert "Another extraction" in refused(capsys, run, "--sets", "trained")
        done = command(*LAUNCH_TWO, "extract_profiles.py", run, "--sets", "trained", ACCELERATE_USE_CPU="true")
    assert "Another extraction" in done.stderr and "UserError" not in done.stderr and "gloo" not in done.stderr
    extract(run, "--sets", "trained")


def test_a_full_disk_ends_in_a_sentence_and_the_next_run_finishes(run, capsys, monkeypatch):
    import evaluation_wsdino.profile_file as profile_file

    write, count = profile_file.pq.write_table, [0]

    def full(table, path, **kwargs):
        count[0] += 1
        if count[0] == 3:
            raise OSError(28, "No space left on device")
        write(table, path, **kwargs)

    flags = (run, "--sets", "trained", "--channels", "dna", "--batch_size", 8, "--shard_fields", 24)
    monkeypatch.setattr(profile_file.pq, "write_table", full)
    assert "No space left on device" in refused(capsys, *flags)
    extract(*flags)
    assert len(pd.read_parquet(run / "profiles" / "trained.parquet")) == 108


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_screen():
    """The 8,000 fields read after the first 2,000 are 78 MiB of pixels; what the process holds grows by under 25."""
    measured = measure_memory(10_000, batch_size=16)
    early, late = next(line for line in measured if line["fields"] >= 2_000), measured[-1]
    assert late["fields"] == 10_000
    print(f"own memory {early['own_mib']} -> {late['own_mib']} MiB")
    assert late["own_mib"] - early["own_mib"] < 25
