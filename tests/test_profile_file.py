"""A profile file from its parts: which are missing, by brute force; damage, other settings, another writer."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation_wsdino.profile_file import ProfileFile
from wsdino.errors import UserError


def make_file(path, count=10, **inputs):
    metadata = pd.DataFrame(
        {"Metadata_Site": np.arange(count), "Metadata_Plate": [f"p{i // 5}" for i in range(count)]}
    )
    return ProfileFile(path, metadata, {"dna": {"weights": "a"}, "actin": {"weights": "b"}}, **inputs)


def write_all(file, values):
    for channel, features in (("dna", values), ("actin", values[:, ::-1])):
        for rows in file.missing(channel):
            file.write(channel, rows, features[rows.start : rows.stop])


@given(count=st.integers(1, 40), part_fields=st.integers(1, 12), data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_parts_in_any_order_join_to_the_rows_in_order(count, part_fields, data, tmp_path_factory):
    values = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    file = make_file(tmp_path_factory.mktemp("join") / "a.parquet", count)
    with file.opened(part_fields):
        rows = [list(part) for part in file.missing("dna")]
        assert sum(rows, []) == list(range(count)) and {len(part) for part in rows[:-1]} <= {part_fields}
        held = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True))
        for number in held:
            file.write("dna", file.parts()[number], values[rows[number]])
        assert [list(part) for part in file.missing("dna")] == [p for i, p in enumerate(rows) if i not in held]
        write_all(file, values)
        assert not file.is_up_to_date()
        file.join()
    assert file.is_up_to_date() and not file.folder.exists()
    table = pd.read_parquet(file.path)
    names = [f"{channel}_{index:04d}" for channel in ("dna", "actin") for index in range(3)]
    assert table.columns.tolist() == ["Metadata_Site", "Metadata_Plate", *names]
    np.testing.assert_array_equal(table[names[:3]], values)
    np.testing.assert_array_equal(table[names[3:]], values[:, ::-1])
    assert table["Metadata_Site"].tolist() == list(range(count))


def test_many_parts_are_joined_in_several_row_groups(tmp_path):
    count = 20_000
    values = np.arange(count, dtype=np.float32)[:, None] * [1, 2]
    file = make_file(tmp_path / "a.parquet", count)
    with file.opened(500):
        write_all(file, values)
        file.join()
    assert pq.ParquetFile(file.path).num_row_groups == 3
    np.testing.assert_array_equal(pd.read_parquet(file.path)["actin_0000"], values[:, 1])


def test_a_part_size_stays_that_of_the_first_run(tmp_path):
    values = np.zeros((10, 2), np.float32)
    file = make_file(tmp_path / "a.parquet")
    with file.opened(4):
        file.write("dna", range(4, 8), values[4:8])
    again = make_file(tmp_path / "a.parquet")
    with again.opened(3):
        assert again.missing("dna") == [range(0, 4), range(8, 10)]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"half"])
def test_damaged_parts_and_damaged_plans_are_done_again(tmp_path, content):
    values = np.zeros((10, 2), np.float32)
    file = make_file(tmp_path / "a.parquet")
    with file.opened(4):
        write_all(file, values)
        second = sorted(file.folder.glob("dna-*.parquet"))[1]
        second.write_bytes(second.read_bytes()[:300] if content == b"half" else content)
        assert file.missing("dna") == [range(4, 8)] and file.missing("actin") == []
    (file.folder / "plan.json").write_bytes(content)
    with file.opened(4):
        assert file.missing("actin") == file.parts()


def test_parts_of_other_settings_are_removed(tmp_path):
    file = make_file(tmp_path / "a.parquet", fingerprint="old")
    with file.opened(4):
        write_all(file, np.zeros((10, 2), np.float32))
    with make_file(tmp_path / "a.parquet", fingerprint="new").opened(4):
        assert sorted(path.name for path in file.folder.iterdir()) == ["lock", "plan.json"]


def test_the_settings_stand_in_the_file_and_the_order_of_channels_counts(tmp_path):
    file = make_file(tmp_path / "a.parquet", fingerprint="f")
    with file.opened(4):
        write_all(file, np.zeros((10, 2), np.float32))
        file.join()
    told = json.loads(pq.read_schema(file.path).metadata[b"wsdino_settings"])
    assert told["fields"] == 10 and told["fingerprint"] == "f" and told["channels"]["actin"] == {"weights": "b"}
    assert make_file(tmp_path / "a.parquet", fingerprint="f").is_up_to_date()
    assert not make_file(tmp_path / "a.parquet", fingerprint="g").is_up_to_date()
    metadata = pq.read_table(file.path).select(["Metadata_Site", "Metadata_Plate"]).to_pandas()
    turned = {"actin": {"weights": "b"}, "dna": {"weights": "a"}}
    assert not ProfileFile(file.path, metadata, turned, fingerprint="f").is_up_to_date()


def test_something_else_in_its_place_and_another_writer_are_refused(tmp_path):
    (tmp_path / "notes.parquet").write_text("someone's notes")
    (tmp_path / "folder.parquet").mkdir()
    pd.DataFrame({"Metadata_Site": [1]}).to_parquet(tmp_path / "table.parquet")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name), make_file(path).opened(4):
            pass
    file = make_file(tmp_path / "a.parquet", fingerprint="new")
    file.folder.mkdir()
    theirs = file.folder / "dna-000000000.parquet"
    theirs.write_bytes(b"half of what another extraction is writing, with other settings")
    with FileLock(file.folder / "lock"), pytest.raises(UserError, match="Another extraction"), file.opened(4):
        pass
    assert theirs.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.parquet.parts",
        "folder.parquet",
        "notes.parquet",
        "table.parquet",
    ]
