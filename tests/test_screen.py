"""Reading the tables of a screen: official counts, other screens' columns, and one sentence for each fault."""

import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dataset_scripts.screen import ScreenColumns, read_screen
from wsdino.errors import UserError

HEADER = (
    "TableNumber,ImageNumber,Image_FileName_DAPI,Image_PathName_DAPI,Image_FileName_Tubulin,Image_PathName_Tubulin,"
    "Image_FileName_Actin,Image_PathName_Actin,Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,Replicate,"
    "Image_Metadata_Compound,Image_Metadata_Concentration"
)


def line(number, compound, dose, plate="Week4_27481", well="G10", site=1):
    stem = f"{well}_s{site}_w"
    folder = f"{plate.split('_')[0]}/{plate}"
    files = ",".join(f"{stem}{w}{number:04d}.tif,{folder}" for w in (1, 2, 4))
    return f"4,{number},{files},{plate},{well},1,{compound},{dose}"


@pytest.fixture
def tables(tmp_path):
    lines = [
        HEADER,
        line(1, "taxol", 0.3),
        line(2, "taxol", 0.3, site=2),
        line(3, "DMSO", 0, well="B02"),
        line(4, "taxol", 0.0001, well="B03"),
        line(5, "5-fluorouracil", 0.003, plate="Week10_40111"),
    ]
    image, moa = tmp_path / "image.csv", tmp_path / "moa.csv"
    image.write_text("\n".join(lines) + "\n")
    moa.write_text('"compound",concentration,"moa"\n"taxol",0.300000,"Microtubule stabilizers"\n"DMSO",0.0,"DMSO"\n')
    return image, moa


def test_fields(tables):
    fields = read_screen(*tables)
    assert list(fields["treatment"]) == ["taxol_0.3", "taxol_0.3", "DMSO", "taxol_0.0001", "5-fluorouracil_0.003"]
    assert list(fields["part"]) == ["annotated", "annotated", "dmso", "unannotated", "unannotated"]
    assert list(fields["moa"]) == ["Microtubule stabilizers"] * 2 + ["DMSO", "", ""]
    assert list(fields["batch"]) == ["Week4"] * 4 + ["Week10"]
    assert list(fields["site"]) == [1, 2, 1, 1, 1]
    assert list(fields["row"]) == [2, 3, 4, 5, 6]
    assert fields["actin_file"][0] == "Week4/Week4_27481/G10_s1_w40001.tif"
    assert fields["concentration"].dtype == float


def test_gzip_is_read_too(tables, tmp_path):
    plain = read_screen(*tables)
    pd.read_csv(tables[0], dtype=str).to_csv(tmp_path / "image.csv.gz", index=False)
    found = read_screen(tmp_path / "image.csv.gz", tables[1])
    pd.testing.assert_frame_equal(found.drop(columns="table"), plain.drop(columns="table"))


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("table", "old", "new", "message"),
    [
        (0, "Image_FileName_Actin", "Image_FileName_Aktin", "image.csv .*'Image_FileName_Actin'"),
        (1, '"moa"', '"mode"', "moa.csv .*'moa'"),
        (0, ",taxol,0.3", ",taxol,high", "image.csv, line 2: .*Concentration.*'high'"),
        (0, ",DMSO,0", ",,0", "image.csv, line 4: .*Compound'"),
        (0, "G10_s1_w10001", "G10_x1_w10001", "image.csv, line 2: .*site"),
        (0, "G10_s2_w20002", "G10_s1_w20001", "image.csv: lines 2 and 3 .*G10_s1_w20001"),
        (1, "0.300000", "0.310000", "moa.csv: .*'taxol_0.31'"),
        (1, '"DMSO",0.0,"DMSO"', '"taxol",0.3,"Other"', "moa.csv, line 3: 'taxol_0.3' .*'Other'"),
        (0, HEADER, "", "image.csv"),
    ],
)
def test_faults_are_named(tables, table, old, new, message):
    replace_in(tables[table], old, new)
    with pytest.raises(UserError, match=message):
        read_screen(*tables)


@pytest.mark.parametrize("content", [None, HEADER.encode() + b"\n", b"", b"\x1f\x8b\x08\x00cut"])
def test_missing_and_empty_tables(tables, tmp_path, content):
    path = tmp_path / ("cut.csv.gz" if content and content[0] == 0x1F else "other.csv")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        read_screen(path, tables[1])


def test_another_screen_brings_its_columns(tmp_path):
    table = pd.DataFrame(
        {
            "Metadata_Plate": ["P1", "P1", "P2"],
            "Metadata_Well": ["A01", "A02", "A01"],
            "Metadata_Site": ["1", "1", "2"],
            "FileName_OrigDNA": ["a_dna.tif", "b_dna.tif", "c_dna.tif"],
            "FileName_OrigER": ["a_er.tif", "b_er.tif", "c_er.tif"],
            "drug": ["vehicle", "aspirin", "aspirin"],
            "uM": ["0", "5", "10"],
            "mechanism": ["", "COX inhibitor", ""],
            "run": ["r1", "r1", "r2"],
        }
    )
    table.to_csv(tmp_path / "load_data.csv", index=False)
    columns = ScreenColumns(
        channels={"dna": ("FileName_OrigDNA", None), "er": ("FileName_OrigER", None)},
        plate="Metadata_Plate",
        well="Metadata_Well",
        site="Metadata_Site",
        compound="drug",
        concentration="uM",
        moa="mechanism",
        batch="run",
        replicate=None,
        control="vehicle",
    )
    fields = read_screen(tmp_path / "load_data.csv", None, columns)
    assert list(fields["treatment"]) == ["DMSO", "aspirin_5", "aspirin_10"]
    assert list(fields["part"]) == ["dmso", "annotated", "unannotated"]
    assert list(fields["batch"]) == ["r1", "r1", "r2"]
    assert list(fields["site"]) == [1, 1, 2]
    assert list(fields["er_file"]) == ["a_er.tif", "b_er.tif", "c_er.tif"]


OTHER = ScreenColumns(
    channels={"dna": ("F", None)}, plate="P", well="W", site="S", compound="D", concentration="C", moa="M",
    replicate=None, control="vehicle",
)  # fmt: skip
ROWS = """\
P,W,S,D,C,M,F
p1,A01,1,vehicle,0,,a_s1_.tif
p1,A02,1,aspirin,5,COX,b_s1_.tif
p1,A03,2,aspirin,5,COX,c_s2_.tif
"""


def read_other(tmp_path, old="", new="", encoding="utf-8", **changes):
    assert old in ROWS
    (tmp_path / "t.csv").write_text(ROWS.replace(old, new, 1) if old else ROWS, encoding=encoding)
    return read_screen(tmp_path / "t.csv", None, replace(OTHER, **changes))


@pytest.mark.parametrize("dose", ["", "NA", "0", "-", "0.1 %"])
def test_the_control_needs_no_concentration(tmp_path, dose):
    fields = read_other(tmp_path, "vehicle,0", f"vehicle,{dose}")
    (tmp_path / "moa.csv").write_text(f"compound,concentration,moa\nvehicle,{dose},none\naspirin,5,COX\n")
    pd.testing.assert_frame_equal(
        read_screen(tmp_path / "t.csv", tmp_path / "moa.csv", OTHER), fields, check_dtype=False
    )
    assert list(fields["concentration"]) == [0, 5, 5]
    assert list(fields["treatment"]) == ["DMSO", "aspirin_5", "aspirin_5"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("aspirin,5", "aspirin,5 µM", "line 4: column 'C' is '5' where other"),
        ("A01,1,", "A01,1.5,", "line 2: column 'S' is '1.5'"),
        ("A01,1,", "A01,3000000000,", "line 2: column 'S' is '3000000000'"),
        ("A01,1,", "A01,1e25,", "line 2: column 'S' is '1e25'"),
        ("aspirin,5,COX,c", "aspirin,5,MAO,c", "t.csv, line 4: 'aspirin_5' .*'MAO'.*'COX'"),
        ("aspirin,5,COX,c", "aspirin,5,,c", "t.csv, line 4: 'aspirin_5' .*''.*'COX'"),
        ("A03,2,", "A02,1,", "t.csv: lines 3 and 4 .*site 1 .*A02 .*p1"),
        ("A02,1,aspirin", "A02,1,DMSO", "t.csv, line 3: 'DMSO' .*'vehicle'"),
        ("a_s1_", "a\x07s1_", "t.csv, line 2: the dna file"),
        ("p1,A01", "../p1,A01", "t.csv, line 2: column 'P'"),
    ],
)
def test_faults_of_another_screen_are_named(tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        read_other(tmp_path, old, new)


@pytest.mark.parametrize("word", ["NA", " NA ", "NaN", "nan", "N/A", "None", "null", "<NA>", ""])
def test_a_mechanism_that_is_not_known_is_no_mechanism(tmp_path, word):
    """As R, pandas and others write it: not a label that all unannotated compounds share."""
    rows = "p1,A04,1,ibuprofen,5,COX,d_s1_.tif\n"
    fields = read_other(tmp_path, "c_s2_.tif\n", "c_s2_.tif\n" + rows)
    assert list(fields["part"]) == ["dmso", "annotated", "annotated", "annotated"]
    (tmp_path / "t.csv").write_text((ROWS + rows).replace("aspirin,5,COX", f"aspirin,5,{word}"))
    fields = read_screen(tmp_path / "t.csv", None, OTHER)
    assert list(fields["moa"]) == ["DMSO", "", "", "COX"]
    assert list(fields["part"]) == ["dmso", "unannotated", "unannotated", "annotated"]
    (tmp_path / "moa.csv").write_text(f"compound,concentration,moa\nibuprofen,5,COX\naspirin,5,{word}\n")
    with pytest.raises(UserError, match="moa.csv, line 3: column 'moa' is empty: fill it in, or take the line out"):
        read_screen(tmp_path / "t.csv", tmp_path / "moa.csv", OTHER)


@pytest.mark.parametrize("well", ["A03,2", "A02,1"])  # the second is the same site, too
def test_a_plate_is_of_one_batch(tmp_path, well):
    """Plates 1, 2, 3 in every batch: of different wells they would be merged, and be corrected as one."""
    rows = ROWS.replace("F\n", "F,B\n").replace(".tif\n", ".tif,b1\n").replace("c_s2_.tif,b1", "c_s2_.tif,b2")
    (tmp_path / "t.csv").write_text(rows.replace("A03,2", well))
    with pytest.raises(UserError, match="t.csv, line 4: .*'p1' is 'b2' .*'b1'"):
        read_screen(tmp_path / "t.csv", None, replace(OTHER, batch="B"))


@pytest.mark.parametrize("site", [1, 2])
def test_a_well_has_one_treatment(tmp_path, site):
    with pytest.raises(UserError, match="line 4: .*'A02' .*'p1' is 'aspirin_6' .*'aspirin_5'"):
        read_other(tmp_path, "A03,2,aspirin,5", f"A02,{site},aspirin,6")


def test_a_table_in_an_ambiguous_encoding_is_refused(tmp_path):
    with pytest.raises(UserError, match="t.csv .*UTF-8"):
        read_other(tmp_path, "aspirin", "β-aspirin", encoding="iso8859-7")


def test_patterns_give_their_first_group(tmp_path):
    fields = read_other(tmp_path, site=None, site_pattern=r"_s(\d)(_)", batch_pattern=r"^(?P<run>p)(?P<plate>\d)")
    assert list(fields["site"]) == [1, 1, 2] and set(fields["batch"]) == {"p"}


@pytest.mark.parametrize("pattern", ["(", "_s[0-9]", 5])
@pytest.mark.parametrize("name", ["site_pattern", "batch_pattern"])
def test_patterns_must_have_a_group(tmp_path, name, pattern):
    with pytest.raises(UserError, match=f"{name} .*group"):
        read_other(tmp_path, site=None, **{name: pattern})


def test_a_site_by_pattern_must_be_a_number(tmp_path):
    with pytest.raises(UserError, match="line 2: column 'F by site_pattern' is 's1', which is not a number"):
        read_other(tmp_path, site=None, site_pattern="_(s.)_")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        *((text, "columns.json") for text in ("{", "[]")),
        *((text, "channels") for text in ('{"plate": "P"}', '{"channels": {}}', '{"channels": "dna"}')),
        *(
            (f'{{"channels": {{"dna": {each}}}}}', "'dna'")
            for each in ('["a", "b", "c"]', '[["a"], "b"]', '{"a": "b", "c": "d"}', "3", "null", '["a", 1]')
        ),
        *(
            (f'{{"channels": {{"dna": "a"}}, "{name}": {value}}}', f"'{name}'")
            for name, value in (
                *(("plaet", '"P"'), ("plate", '["P"]'), ("control", "null"), ("batch_pattern", "5"), ("site", "0")),
                *(("moa", '["M"]'), ("moa_table", '["compound", "moa"]'), ("moa_table", '"moa"'), ("moa_table", "3")),
                *(("moa_table", '["compound", ["dose"], "moa"]'), ("moa_table", "null")),
            )
        ),
    ],
)
def test_bad_column_mappings(tmp_path, content, named):
    (tmp_path / "columns.json").write_text(content)
    with pytest.raises(UserError, match=f"columns.json.*{named}" if named != "columns.json" else named):
        ScreenColumns.from_json(tmp_path / "columns.json")


def test_a_mapping_is_read_as_it_stands(tmp_path):
    channels = '{"dna": "F", "er": ["G", "H"], "rna": {"file": "I", "page": 2}}'
    content = f'{{"channels": {channels}, "site": null, "moa_table": ["a", "b", "c"], "plate": "P"}}'
    (tmp_path / "columns.json").write_text(content)
    expected = ScreenColumns(
        channels={"dna": ("F", None), "er": ("G", "H"), "rna": ("I", None, 2)},
        site=None,
        moa_table=("a", "b", "c"),
        plate="P",
    )
    assert ScreenColumns.from_json(tmp_path / "columns.json") == expected


METADATA = os.environ.get("WSDINO_BBBC021_METADATA")


@pytest.mark.skipif(not METADATA, reason="WSDINO_BBBC021_METADATA names no folder with the official tables")
def test_official_counts():
    folder = Path(METADATA)
    image = next(path for path in folder.glob("BBBC021_v1_image.csv*"))
    fields = read_screen(image, folder / "BBBC021_v1_moa.csv")
    assert dict(fields["part"].value_counts()) == {"unannotated": 9352, "annotated": 2528, "dmso": 1320}
    annotated = fields[fields["part"] == "annotated"]
    assert annotated["treatment"].nunique() == 103
    assert annotated["compound"].nunique() == 38
    assert annotated["moa"].nunique() == 12
    assert fields["plate"].nunique() == 55
    assert fields["batch"].nunique() == 10
    assert fields["compound"].nunique() == 113
    batches = defaultdict(set)
    for moa, batch in zip(annotated["moa"], annotated["batch"], strict=True):
        batches[moa].add(batch)
    alone = {moa for moa, each in batches.items() if len(each) == 1}
    assert alone == {"Cholesterol-lowering", "Kinase inhibitors"}
    assert annotated[~annotated["moa"].isin(alone)]["treatment"].nunique() == 92
    spans = annotated.groupby("treatment")["batch"].nunique()
    assert dict(spans[spans > 1]) == {"taxol_0.3": 10}
