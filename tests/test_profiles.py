"""Aggregation and checks of profile tables, against plain loops over dictionaries."""

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from evaluation_wsdino import TypicalVariationNormalizer, aggregate_profiles, normalize_profiles, read_profiles
from evaluation_wsdino.profile_table import check_profiles
from wsdino.errors import UserError


def table(seed=0, features=4):
    """A small screen: 3 plates in 2 weeks, 2 channels, DMSO on each plate, an uneven number of fields."""
    rng = np.random.default_rng(seed)
    rows = []
    for plate, batch in (("Week2_1", "Week2"), ("Week2_2", "Week2"), ("Week10_1", "Week10")):
        wells = [
            ("B02", "DMSO", 0.0, "DMSO"),
            ("B03", "taxol", 0.3, "stabilizers"),
            ("C07", "taxol", 0.3, "stabilizers"),
        ]
        if batch == "Week2":
            wells += [("B04", "taxol", 1.0, "stabilizers"), ("B05", "AZ-C", 0.1, "Eg5")]
        for well, compound, concentration, moa in wells:
            for site in range(1, 4 if compound == "DMSO" else int(rng.integers(2, 5))):
                name = "DMSO" if compound == "DMSO" else f"{compound}_{concentration:g}"
                rows.append((plate, well, site, compound, concentration, name, moa, batch, "simulated, seed 0"))
    names = ("Plate", "Well", "Site", "Compound", "Concentration", "Treatment", "MOA", "Batch", "Source")
    frame = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])
    for channel in ("dna", "tubulin"):
        for index in range(features):
            frame[f"{channel}_{index:04d}"] = rng.normal(size=len(frame)).astype(np.float32)
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


def loops(frame, unit, within, across):
    """{treatment: vector} by dictionaries of lists."""
    average = {"mean": np.mean, "median": np.median}
    columns = [column for column in frame.columns if not column.startswith("Metadata_")]
    units = {}
    for row in frame.to_dict("records"):
        if row["Metadata_Compound"] != "DMSO":
            key = {"plate": row["Metadata_Plate"], "well": (row["Metadata_Plate"], row["Metadata_Well"])}.get(
                unit, len(units)
            )
            units.setdefault(row["Metadata_Treatment"], {}).setdefault(key, []).append([row[c] for c in columns])
    out = {}
    for treatment, members in units.items():
        if unit == "field":
            vectors = [vector for fields in members.values() for vector in fields]
        else:
            vectors = [average[within](np.array(fields, dtype=np.float64), axis=0) for fields in members.values()]
        vector = average[across](np.array(vectors, dtype=np.float64), axis=0)
        out[treatment] = vector / np.sqrt((vector**2).sum())
    return out


@pytest.mark.parametrize("unit", ["plate", "well", "field"])
@pytest.mark.parametrize(("within", "across"), [("mean", "median"), ("median", "mean"), ("mean", "mean")])
def test_aggregation_agrees_with_plain_loops(unit, within, across):
    frame = table()
    expected = loops(frame, unit, within, across)
    got = aggregate_profiles(frame, unit=unit, within=within, across=across)
    assert got["Metadata_Treatment"].tolist() == sorted(expected)
    for _, row in got.iterrows():
        vector = row[[column for column in got.columns if not column.startswith("Metadata_")]].to_numpy(float)
        np.testing.assert_allclose(vector, expected[row["Metadata_Treatment"]], rtol=1e-12)


def test_the_default_is_the_papers_order():
    frame = table()
    pd.testing.assert_frame_equal(aggregate_profiles(frame), aggregate_profiles(frame, unit="plate", within="mean"))
    expected = loops(frame, "plate", "mean", "median")
    assert any(not np.allclose(expected[name], loops(frame, "field", "", "mean")[name]) for name in expected)


def test_metadata_of_treatments():
    got = aggregate_profiles(table()).set_index("Metadata_Treatment")
    assert got.loc["taxol_0.3", "Metadata_Batch"] == "Week2|Week10"  # natural order, each once
    assert got.loc["AZ-C_0.1", "Metadata_Batch"] == "Week2"
    assert got.loc["taxol_0.3", "Metadata_Plate"] == "Week2_1|Week2_2|Week10_1"
    assert got.loc["taxol_1", "Metadata_MOA"] == "stabilizers" and got.loc["taxol_1", "Metadata_Concentration"] == 1.0
    frame = table()
    assert got.loc["taxol_0.3", "Metadata_Fields"] == (frame["Metadata_Treatment"] == "taxol_0.3").sum()


def test_the_order_of_rows_changes_nothing():
    frame = table()
    pd.testing.assert_frame_equal(aggregate_profiles(frame), aggregate_profiles(frame.iloc[::-1]))


def test_without_normalization_and_with_a_zero_profile():
    frame = table()
    features = [column for column in frame.columns if not column.startswith("Metadata_")]
    frame.loc[frame["Metadata_Compound"] == "AZ-C", features] = 0.0
    got = aggregate_profiles(frame).set_index("Metadata_Treatment")[features]
    np.testing.assert_array_equal(got.loc["AZ-C_0.1"], 0.0)
    np.testing.assert_allclose(np.linalg.norm(got.loc["taxol_1"]), 1.0)
    assert (
        np.linalg.norm(
            aggregate_profiles(frame, normalize=False).set_index("Metadata_Treatment")[features], axis=1
        ).max()
        > 1
    )


def test_each_channel_is_whitened_alone_on_its_dmso_fields():
    frame = table()
    plain = TypicalVariationNormalizer(regularization=0, rank_guard=None)
    got = normalize_profiles(frame, plain)
    dmso = frame["Metadata_Compound"] == "DMSO"
    for channel in ("dna", "tubulin"):
        columns = [column for column in frame.columns if column.startswith(channel)]
        expected = (
            PCA(whiten=True).fit(frame.loc[dmso, columns].to_numpy(float)).transform(frame[columns].to_numpy(float))
        )
        np.testing.assert_allclose(np.abs(got[columns].to_numpy()), np.abs(expected), rtol=1e-6)
    assert not hasattr(plain, "mean_")  # the one given is a pattern and stays unfitted


# ---------------------------------------------------------------- bad input


def test_a_table_is_read_back_and_checked(tmp_path):
    table().to_parquet(tmp_path / "trained.parquet")
    assert len(read_profiles(tmp_path / "trained.parquet")) == len(table())
    with pytest.raises(UserError, match="absent.parquet does not exist"):
        read_profiles(tmp_path / "absent.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is not one")
    with pytest.raises(UserError, match="broken.parquet is not a readable"):
        read_profiles(tmp_path / "broken.parquet")


def spoil(kind):
    frame = table()
    if kind == "no plate":
        return frame.drop(columns="Metadata_Plate")
    if kind == "no rows":
        return frame.iloc[:0]
    if kind == "no features":
        return frame[[column for column in frame.columns if column.startswith("Metadata_")]]
    if kind == "text":
        return frame.assign(dna_0001="high")
    if kind == "nan":
        frame.loc[[5, 7], "tubulin_0002"] = np.nan
        return frame
    if kind == "empty name":
        frame.loc[4, "Metadata_Treatment"] = " "
        return frame
    return pd.concat([frame, frame.iloc[[3]]], ignore_index=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no plate", "t.parquet has no column Metadata_Plate"),
        ("no rows", "t.parquet has no rows"),
        ("no features", "t.parquet has no feature columns"),
        ("text", "column dna_0001, is not numeric"),
        ("nan", r"row 5, column tubulin_0002, is not a finite number \(2 such rows\)"),
        ("empty name", "row 4, has no Metadata_Treatment"),
        ("duplicate", "rows 3 and [0-9]+, are the same plate, well and site"),
    ],
)
def test_unusable_tables_are_refused_in_a_sentence(tmp_path, kind, message):
    spoil(kind).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        read_profiles(tmp_path / "t.parquet")


def test_names_that_would_read_as_several_are_refused():
    """Batches and plates of a treatment are joined by "|"."""
    frame = table()
    for column in ("Metadata_Batch", "Metadata_Plate"):
        with pytest.raises(UserError, match=rf"row 0, has the {column} .W.\|"):
            check_profiles(frame.assign(**{column: frame[column].str.replace("Week", "W7|")}))


def test_a_field_twice_is_refused_where_no_source_is_named_too():
    with pytest.raises(UserError, match="rows 3 and [0-9]+, are the same plate, well and site"):
        check_profiles(spoil("duplicate").assign(Metadata_Source=None))


def test_a_field_without_a_batch_or_well_is_refused_where_others_have_one():
    for column in ("Metadata_Batch", "Metadata_Well"):
        frame = table()
        frame.loc[4, column] = None
        with pytest.raises(UserError, match=f"row 4, has no {column}"):
            check_profiles(frame)


def test_tables_without_any_well_are_no_duplicates():
    """As of screens that name no wells: nothing says which field is which."""
    frame = table()
    expected = aggregate_profiles(frame)
    frame["Metadata_Well"] = None
    pd.testing.assert_frame_equal(aggregate_profiles(frame), expected)
    with pytest.raises(UserError, match="the Metadata_Well of each"):
        aggregate_profiles(frame, unit="well")


def test_contradictions_and_missing_controls_are_refused():
    frame = table()
    frame.loc[frame.index[frame["Metadata_Treatment"] == "taxol_1"][0], "Metadata_MOA"] = "other"
    with pytest.raises(UserError, match="Treatment taxol_1 has 2 values of Metadata_MOA"):
        aggregate_profiles(frame)
    treated = table()[lambda t: t["Metadata_Compound"] != "DMSO"]
    with pytest.raises(UserError, match="hold 0 DMSO fields"):
        normalize_profiles(treated, TypicalVariationNormalizer())
    with pytest.raises(UserError, match="only DMSO"):
        aggregate_profiles(table()[lambda t: t["Metadata_Compound"] == "DMSO"])
