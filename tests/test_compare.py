"""One table of many profiles: against single evaluations, copairs, enumeration, and answers known beforehand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from profile_screen import screen

from evaluation_wsdino.compare import MEASURES, Row, compare_rows, main
from evaluation_wsdino.measures import mean_average_precision, mechanism_precision, replicate_precision
from evaluation_wsdino.profiles import aggregate_profiles, normalize_profiles
from evaluation_wsdino.scores import Protocol, compare_sets, evaluate_set
from wsdino.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with two sets, and two seeds of another row."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "run" / "profiles").mkdir(parents=True)
    screen(4.0).to_parquet(folder / "run" / "profiles" / "trained.parquet")
    screen(0.3).to_parquet(folder / "run" / "profiles" / "untrained.parquet")
    for seed in (1, 2):
        screen(0.6, seed).to_parquet(folder / f"seed{seed}.parquet")
    return folder


def lines_of(table, row, channels="all"):
    return table[(table["row"] == row) & (table["channels"] == channels)].set_index("measure")


def compared(folder, *words):
    main([*map(str, words), "--output", str(folder / "out")])
    return pd.read_csv(folder / "out.csv")


def test_a_row_has_the_scores_of_its_own_evaluation(folder, capsys):
    table = compared(folder, folder / "run", folder / "run/profiles/untrained.parquet")
    first, second = (evaluate_set(screen(signal), plot=False) for signal in (4.0, 0.3))
    for name, scores in (("run", first), ("untrained", second)):
        got = lines_of(table, name)
        for prefix in ("nsc", "nscb"):
            assert got.loc[prefix, "value"] == pytest.approx(scores[prefix])
            assert tuple(got.loc[prefix, ["low", "high"]]) == pytest.approx(scores[f"{prefix}_bootstrap"])
            assert got.loc[prefix, "scored"] == scores[f"{prefix}_total"]
            for channel, part in scores["channels"].items():
                assert lines_of(table, name, channel).loc[prefix, "value"] == pytest.approx(part[prefix])
        assert got.loc["batch_mixing", "value"] == pytest.approx(scores["batch_effect"]["after"]["neighbour_share"])
    for prefix in ("nsc", "nscb"):
        expected = compare_sets(first, second, prefix)
        line = lines_of(table, "untrained").loc[prefix]
        assert (line["difference"], line["p"]) == pytest.approx((expected["difference"], expected["p_compound"]))
    text = (folder / "out.md").read_text()
    assert text in capsys.readouterr().out + "\n" and all(title in text for title in MEASURES.values())


def test_average_precisions_are_those_of_copairs():
    pytest.importorskip("copairs", reason="the second library")
    for seed in (0, 1):
        normalized = normalize_profiles(screen(0.7, seed), Protocol().normalizer())
        expected = mean_average_precision(normalized, null_size=20)
        assert replicate_precision(normalized).mean() == pytest.approx(expected["replicate"]["map"], abs=1e-6)
        treatments = aggregate_profiles(normalized)
        found = mechanism_precision(treatments).groupby(treatments["Metadata_MOA"].to_numpy()).mean()
        assert found.mean() == pytest.approx(expected["moa"]["map"], abs=1e-6)


def test_equal_vectors_are_no_precision():
    normalized = screen(1.0)
    normalized.loc[:, ~normalized.columns.str.startswith("Metadata_")] = 1.0
    treatments = aggregate_profiles(normalized)
    # Every treatment of another MOA comes first: 18, then those 4 of other compounds with its own.
    expected = np.mean([hit / (18 + hit) for hit in range(1, 5)])
    np.testing.assert_allclose(mechanism_precision(treatments), expected)


def test_seeds_are_averaged_by_treatment_and_compared_by_enumerating_exchanges(folder):
    table = compare_rows([Row("weak", [screen(0.3)]), Row("two", [screen(0.6, 1), screen(0.6, 2)])], Protocol())
    scores = [evaluate_set(frame, plot=False) for frame in (screen(0.3), screen(0.6, 1), screen(0.6, 2))]
    line = lines_of(table, "two").loc["nsc"]
    assert line["seeds"] == 2
    assert line["value"] == pytest.approx(np.mean([scores[1]["nsc"], scores[2]["nsc"]]))
    assert line["sd"] == pytest.approx(np.std([scores[1]["nsc"], scores[2]["nsc"]], ddof=1))
    answers = [np.array([query["correct"] for query in one["nsc_queries"]], dtype=float) for one in scores]
    difference = (answers[1] + answers[2]) / 2 - answers[0]
    compounds = [query["compound"] for query in scores[0]["nsc_queries"]]
    sums = [difference[[name == other for other in compounds]].sum() for name in sorted(set(compounds))]
    exchanged = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    assert line["difference"] == pytest.approx(difference.mean())
    assert line["p"] == pytest.approx(np.mean(np.array(exchanged) >= abs(sum(sums)) - 1e-9))


def test_rows_are_cut_to_the_fields_that_all_have(folder, capsys):
    less = screen(0.6, 1)
    less = less[less["Metadata_Treatment"] != "Act-0_1"]
    less.to_parquet(folder / "less.parquet")
    table = compared(folder, folder / "run", folder / "less.parquet")
    assert f"run: 4 of {len(screen(1.0))} rows left out" in capsys.readouterr().out
    full = screen(4.0)
    expected = evaluate_set(full[full["Metadata_Treatment"] != "Act-0_1"], plot=False)
    assert lines_of(table, "run").loc["nsc", "scored"] == expected["nsc_total"] == 23
    assert lines_of(table, "run").loc["nsc", "value"] == pytest.approx(expected["nsc"])


def test_rows_side_by_side_count_alike(folder):
    """Whatever their scale and width, and a row beside itself is that row."""
    big = screen(0.6, 1)
    features = ~big.columns.str.startswith("Metadata_")
    big.loc[:, features] *= 1000
    rows = [Row("a", [screen(0.6, 1)]), Row("b", [big])]
    both = compare_rows([*rows, Row("a+b", parts=rows)], Protocol(whitening="plain"))
    for measure in ("nsc", "nscb", "moa_map", "replicate_map"):
        assert lines_of(both, "a+b").loc[measure, "value"] == pytest.approx(lines_of(both, "a").loc[measure, "value"])
    assert set(both.loc[both["row"] == "a+b", "channels"]) == {"all"}


def wells_as_cellprofiler(signal, seed=0):
    """The screen's wells as pycytominer writes CellProfiler's features, with a missing value, a text, a constant."""
    frame = screen(signal, seed)
    features = [name for name in frame if not name.startswith("Metadata_")]
    wells = frame.groupby(["Metadata_Plate", "Metadata_Well"])[features].mean()
    parts = itertools.product(("Cells", "Cytoplasm", "Nuclei"), ("AreaShape_Area", "Texture_Contrast_DNA_5_00"))
    names = [f"{compartment}_{kind}_{index}" for index, (compartment, kind) in enumerate(parts)]
    table = wells.iloc[:, : len(names)].set_axis(names, axis=1).reset_index()
    table["Metadata_Well"] = table["Metadata_Well"].str.replace(r"^([A-Z])0", r"\1", regex=True)
    table["Cells_Missing_Value"] = [np.nan, *[1.0] * (len(table) - 1)]
    return table.assign(Cells_Constant_One=1.0, FileName_DNA="a.tif", Metadata_Count=7)


@pytest.mark.parametrize("name", ["cellprofiler.csv.gz", "cellprofiler.parquet"])
def test_a_table_of_another_program_is_a_row(folder, name, capsys):
    """It is read by well, labelled by the run, and its features are one group without the missing and the text."""
    table = wells_as_cellprofiler(4.0)
    table.to_csv(folder / name, index=False) if "csv" in name else table.to_parquet(folder / name)
    found = compared(folder, folder / "run", folder / name, "--concatenate", "run+cellprofiler")
    assert "7 features in 1 group; left out: 1 with missing values, 1 that are text" in capsys.readouterr().out
    assert set(found.loc[found["row"] == "cellprofiler", "channels"]) == {"all"}
    assert lines_of(found, "cellprofiler").loc["nsc", "scored"] == 24
    assert lines_of(found, "cellprofiler").loc["nsc", "value"] > 0.7
    assert lines_of(found, "run+cellprofiler").loc["nsc", "value"] > 0.9
    found = compared(folder, folder / "run", folder / name, "--compartments")
    assert set(found.loc[found["row"] == "cellprofiler", "channels"]) == {"all", "Cells", "Cytoplasm", "Nuclei"}


def test_a_table_of_other_wells_is_refused(folder, refused):
    wells_as_cellprofiler(1.0).assign(Metadata_Plate="P9").to_parquet(folder / "other.parquet")
    words = [folder / "run", folder / "other.parquet", "--output", folder / "never"]
    assert "other.parquet" in refused(main, *words, named="shares no plate and well")
    assert not (folder / "never.csv").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "wsdino-compare"),
        (["run", "run"], "Two rows are called run"),
        (["run", "--reference", "other"], "--reference other"),
        (["run", "--concatenate", "run+other"], "--concatenate run+other"),
        (["run", "absent.parquet"], "absent.parquet"),
        (["run", "--k", "0"], "--k"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(folder, refused, monkeypatch, words, named):
    monkeypatch.chdir(folder)
    refused(main, *words, named=named)


def test_without_mechanisms_only_replicates_are_scored():
    table = compare_rows([Row("a", [screen(1.0).assign(Metadata_MOA=None)])], Protocol())
    assert set(table["measure"]) == {"replicate_map", "batch_mixing"}
    with pytest.raises(UserError):
        compare_rows([Row("a", [screen(1.0)])], Protocol(), reference="b")
