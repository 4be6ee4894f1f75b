"""Tables as labs save them give the same cells; doses, wells and names are read as they are meant."""

import numpy as np
import pandas as pd
import pytest

from dataset_scripts.tables import common_names, read_doses, read_tables, spelling, well_name
from wsdino.errors import UserError

PLAIN = pd.DataFrame(
    {"Plate": "P1", "Well": ["A1", "A2", "B1"], "Drug": ["DMSO", "taxol", "α-amanitin"], "Dose": ["", "0.3", "1"]}
)
COMMA = PLAIN.assign(Dose=PLAIN["Dose"].str.replace(".", ","))


def text(**changes):
    return lambda path: PLAIN.to_csv(path, index=False, **changes)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.csv", text()),
        ("t.csv.gz", text()),
        ("t.tsv", text(sep="\t")),
        ("t.txt", text(sep="|")),
        ("t.csv", text(encoding="utf-8-sig")),
        ("t.csv", text(encoding="utf-16")),
        ("t.csv", text(lineterminator="\r")),
        ("t.csv", text(lineterminator="\r\n")),
        ("t.csv", lambda path: COMMA.to_csv(path, index=False, sep=";")),
        ("t.csv", lambda path: COMMA.to_csv(path, index=False)),
        ("t.csv", lambda path: path.write_text("sep=;\n" + COMMA.to_csv(index=False, sep=";"), encoding="utf-8")),
        ("t.csv", lambda path: path.write_text(PLAIN.to_csv(index=False) + ",,,\n,,,\n\n", encoding="utf-8")),
        ("t.csv", lambda path: PLAIN.rename(columns={"Drug": " Drug ", "Dose": "Dose\n"}).to_csv(path, index=False)),
        ("t.parquet", lambda path: PLAIN.to_parquet(path)),
        ("t.parquet", lambda path: PLAIN.assign(Dose=[np.nan, 0.3, 1]).to_parquet(path)),
        ("t.xlsx", lambda path: PLAIN.assign(Dose=[None, 0.3, 1]).to_excel(path, index=False)),
        ("t", lambda path: PLAIN.to_parquet(path)),  # a file is what it holds, not what it is called
    ],
)
def test_one_table_in_every_form(name, write, tmp_path):
    write(tmp_path / name)
    table = read_tables(tmp_path / name)
    assert table[["Plate", "Well", "Drug"]].to_numpy().tolist() == PLAIN[["Plate", "Well", "Drug"]].to_numpy().tolist()
    doses = read_doses(table["Dose"].replace("", "0"), "Dose", str)
    assert doses.tolist() == [0, 0.3, 1]
    assert (table["_line"] - table["_line"][0]).tolist() == [0, 1, 2]


def test_several_tables_are_one_and_rows_know_where_they_come_from(tmp_path):
    PLAIN[:1].to_csv(tmp_path / "a.csv", index=False)
    PLAIN[1:].drop(columns="Dose").to_csv(tmp_path / "b.csv", index=False)
    table = read_tables([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert table["Dose"].tolist() == ["", "", ""] and table["_line"].tolist() == [2, 2, 3]
    assert [file[-5:] for file in table["_file"]] == ["a.csv", "b.csv", "b.csv"]


def test_an_encoding_is_taken_only_where_all_agree(tmp_path):
    (tmp_path / "micro.csv").write_bytes("Drug,Dose\ntaxol,3 µM\n".encode("cp1252"))
    table, notes = read_tables(tmp_path / "micro.csv", notes=(notes := [])), notes
    assert table["Dose"][0] == "3 µM" and any("not UTF-8" in note for note in notes)
    (tmp_path / "greek.csv").write_bytes("Drug,Dose\n\u03b1-amanitin,3\n".encode("cp1253"))
    with pytest.raises(UserError, match="greek.csv.*line 2.*0xe1.*cp1253.*--encoding"):
        read_tables(tmp_path / "greek.csv")
    assert read_tables(tmp_path / "greek.csv", encoding="cp1253")["Drug"][0] == "α-amanitin"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"a,b\n1\n", "line 2: 1 values for 2"),
        (b"a,b\n1,2\n\n1\n", "line 4: 1 values for 2"),
        (b"a, a\n1,2\n", "two columns 'a'"),
        (b"a,b\n1,2,3\n", "line 2: 3 values for 2"),
        (b"", "cannot be read as CSV"),
        (b"a,b\n1,\0\n", "line 2 holds a NUL"),
        (b"<!doctype html>", "web page"),
        (b"\xd0\xcf\x11\xe0rest", "Excel file of before 2007"),
        (b"PK\x03\x04" + bytes(400), "cannot be read as Excel"),
        (b"PAR1rest", "cannot be read as Parquet"),
        (b"\x1f\x8b\x08\0rest", "cannot be read as CSV"),
    ],
)
def test_what_is_no_table_is_named_for_what_it_is(content, named, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_tables(tmp_path / "t.csv")
    assert named in str(error.value) and "t.csv" in str(error.value)


@pytest.mark.parametrize(
    ("cells", "header", "wanted"),
    [
        (
            ["300 nM", "0.3 µM", "0.3uM", "0.0003 mM", "300000 pM", "3e-7 M", "0.3 μmol/L", "0,3 ÂµM"],
            "Dose",
            [0.3] * 8,
        ),
        (["300", "1000"], "Dose (nM)", [0.3, 1]),
        (["300", "2 µM"], "dose_nM", [0.3, 2]),
        (["0.3", "10"], "uM", [0.3, 10]),
        (["5", "10"], "mmoles_per_liter", [5, 10]),
        (["0.1", str(0.1 + 0.2), "4.9709549833322875"], "uM", [0.1, 0.3, 4.97095]),
        (["5 µg/ml", "0"], "Dose", [5, 0]),
        (["1.000,5", "0,5"], "Dose", [1000.5, 0.5]),
        (["1,000.5", "0.5"], "Dose", [1000.5, 0.5]),
        (["1,000", "0,3"], "Dose", [1, 0.3]),
        (["1e-3", "1E3"], "Dose", [0.001, 1000]),
    ],
)
def test_doses(cells, header, wanted):
    assert read_doses(pd.Series(cells), header, str).tolist() == wanted


@pytest.mark.parametrize(
    ("cells", "line"),
    [(["3", "high"], 1), (["1,000", "3"], 0), (["3 µM", "4"], 1), (["3 µM", "4 µg/ml"], 1), (["", "3"], 0)],
)
def test_doses_that_may_mean_two_things_are_refused(cells, line):
    with pytest.raises(UserError, match=f"line {line}: column 'Dose' is '{cells[line]}'"):
        read_doses(pd.Series(cells), "Dose", lambda label: f"line {label}")


@pytest.mark.parametrize("name", ["A1", "A01", "a1", "A-1", "A - 01", "r01c01", "R1C1", " A01 ", "A001"])
def test_well_names(name):
    assert well_name(name) == "A01"
    assert well_name("r32c48") == "AF48" and well_name("well 7") == "well 7"


def test_near_doses_and_spellings_are_told_and_could_be_merged():
    rows = [
        ("taxol", 10),
        ("taxol", 9.9997),
        ("taxol", 10),
        ("Taxol", 1),
        ("TAXOL ", 1),
        ("MG-132", 3.3),
        ("MG\u2011132", 3.3),
    ]
    rows += [("aspirin", 1), ("aspirin", 3), ("aspirin", 0)]
    names, doses = map(pd.Series, zip(*rows, strict=True))
    merged, nominal, told = common_names(names, doses)
    assert merged.tolist() == ["taxol"] * 5 + ["MG-132"] * 2 + ["aspirin"] * 3
    assert nominal.tolist() == [10, 10, 10, 1, 1, 3.3, 3.3, 1, 3, 0]
    assert len(told) == 3 and all(word in " ".join(told) for word in ("'Taxol'", "9.9997", "MG-132"))
    assert spelling("Taxol") == spelling("taxol ") != spelling("docetaxel")
