"""A run folder's scores: against the steps done by hand, and the files as a user leaves them."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from profile_screen import screen
from scipy.stats import binomtest
from threadpoolctl import threadpool_info, threadpool_limits

from evaluation_wsdino import TypicalVariationNormalizer, aggregate_profiles, normalize_profiles
from evaluation_wsdino.evaluate_profiles import evaluate_run, format_table, main
from evaluation_wsdino.scores import control_batch_effect, evaluate_set, map_treatments, participation_ratio
from evaluation_wsdino.training_log import collapse_verdict
from wsdino.errors import UserError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo"
    (folder / "profiles").mkdir(parents=True)
    screen(4.0).to_parquet(folder / "profiles" / "trained.parquet")
    screen(0.3).to_parquet(folder / "profiles" / "untrained.parquet")
    (folder / "settings.json").write_text(json.dumps({"arguments": {"num_prototypes": 64, "seed": 7}, "dataset": {}}))
    for channel in ("dna", "tubulin"):
        (folder / channel).mkdir()
        lines = [
            {"step": step, "loss": 4.0 - step / 10, "teacher_entropy": 2.0, "mean_entropy": 3.0, "kl": 0.5}
            for step in range(5)
        ]
        (folder / channel / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def steps_by_hand(frame):
    """The way from fields to NSC and NSCB, written with loops and numpy's covariance, plain whitening."""
    parts = []
    for channel in ("dna", "tubulin"):
        values = frame[[column for column in frame if column.startswith(channel)]].to_numpy(float)
        dmso = values[(frame["Metadata_Compound"] == "DMSO").to_numpy()]
        eigenvalues, vectors = np.linalg.eigh(np.cov(dmso.T))
        parts.append((values - dmso.mean(axis=0)) @ vectors / np.sqrt(eigenvalues))
    values = np.concatenate(parts, axis=1)
    treatments = sorted(set(frame["Metadata_Treatment"]) - {"DMSO"})
    profiles, info = [], []
    for name in treatments:
        rows = frame[frame["Metadata_Treatment"] == name]
        plates = [
            values[rows.index[rows["Metadata_Plate"] == plate]].mean(axis=0)
            for plate in sorted(set(rows["Metadata_Plate"]))
        ]
        vector = np.median(plates, axis=0)
        profiles.append(vector / np.linalg.norm(vector))
        info.append((rows["Metadata_MOA"].iloc[0], rows["Metadata_Compound"].iloc[0], rows["Metadata_Batch"].iloc[0]))
    out = {}
    for name in ("nsc", "nscb"):
        right = total = 0
        for i, (moa, compound, batch) in enumerate(info):
            if name == "nscb" and moa == "Kinase inhibitors":
                continue
            best = None
            for j, (_, other, week) in enumerate(info):
                if other == compound or (name == "nscb" and (week == batch or info[j][0] == "Kinase inhibitors")):
                    continue
                if best is None or profiles[i] @ profiles[j] > profiles[i] @ profiles[best]:
                    best = j
            total += 1
            right += info[best][0] == moa
        out[name] = (right, total)
    return out


@pytest.mark.parametrize(("signal", "seed"), [(4.0, 0), (0.8, 1), (0.5, 2)])
def test_scores_agree_with_the_steps_by_hand(signal, seed):
    frame = screen(signal, seed)
    plain = TypicalVariationNormalizer(regularization=0, rank_guard=None)
    got = evaluate_set(frame, plain, details=False)
    expected = steps_by_hand(frame)
    assert (got["nsc_correct"], got["nsc_total"]) == expected["nsc"]
    assert (got["nscb_correct"], got["nscb_total"]) == expected["nscb"]
    assert expected["nscb"][1] == 18 and got["nscb_excluded"] == 6


def test_a_run_is_evaluated_and_written(run):
    results = evaluate_run(run, progress=False)
    assert json.loads((run / "results.json").read_text()) == results
    assert not list(run.glob("*.partial"))
    assert results["simulated"] is True and results["sources"] == ["simulated, seed 7"]
    assert list(results["sets"]) == ["trained", "untrained"]
    assert results["headline"]["set"] == "trained" and results["headline"]["nsc"] == results["sets"]["trained"]["nsc"]
    assert results["sets"]["trained"]["nsc"] > 0.9 > 0.7 > results["sets"]["untrained"]["nsc"]
    counts = {
        "fields": 132,
        "dmso_fields": 36,
        "treatments": 24,
        "compounds": 12,
        "moas": 4,
        "plates": 6,
        "batches": 3,
    }
    assert counts.items() <= results["counts"].items()
    assert results["settings"]["arguments"]["seed"] == 7
    assert results["training"]["dna"]["last_loss"] == pytest.approx(3.6)
    assert results["training"]["dna"]["collapse"]["verdict"] == "healthy"
    comparison = results["comparisons"][0]
    assert (comparison["first"], comparison["second"]) == ("untrained", "trained")
    trained, untrained = results["sets"]["trained"], results["sets"]["untrained"]
    gain = trained["nsc_correct"] - untrained["nsc_correct"]
    assert len(comparison["nsc"]["gained"]) - len(comparison["nsc"]["lost"]) == gain
    low, high = trained["nsc_wilson"]
    assert low < trained["nsc"] <= high
    assert set(trained["channels"]) == {"dna", "tubulin"}
    table = format_table(results)
    assert "SIMULATED" in table
    assert f"trained against untrained, NSC: {100 * gain / 24:+.1f} points" in table


def test_a_small_screen_is_scored_on_one_thread_and_the_pools_are_left_as_they_were(run, monkeypatch):
    profiles, seen = pd.read_parquet(run / "profiles" / "trained.parquet"), []

    class Watching(TypicalVariationNormalizer):
        def fit(self, *args, **kwargs):
            seen.append({pool["num_threads"] for pool in threadpool_info()})
            return super().fit(*args, **kwargs)

    with threadpool_limits(3):
        before = [pool["num_threads"] for pool in threadpool_info()]
        evaluate_set(profiles, Watching(), plot=False)
        assert seen and all(threads == {1} for threads in seen)
        assert [pool["num_threads"] for pool in threadpool_info()] == before
        seen.clear()
        monkeypatch.setattr("evaluation_wsdino.scores.ONE_THREAD_BELOW", 100)
        evaluate_set(profiles, Watching(), details=False)
        assert seen and all(threads == set(before) for threads in seen)


def test_the_plate_rule_admits_neighbours_of_the_same_batch(run, capsys):
    """By brute force: of another compound, on no plate of the query's; the single-batch MOA stays left out."""
    profiles = pd.read_parquet(run / "profiles" / "trained.parquet")
    treatments = aggregate_profiles(normalize_profiles(profiles, TypicalVariationNormalizer()))
    vectors = treatments[[name for name in treatments if not name.startswith("Metadata_")]].to_numpy()
    moas, compounds = treatments["Metadata_MOA"].tolist(), treatments["Metadata_Compound"].tolist()
    plates = [set(names.split("|")) for names in treatments["Metadata_Plate"]]
    right = total = 0
    kept = [i for i, moa in enumerate(moas) if moa != "Kinase inhibitors"]
    for i in kept:
        others = [j for j in kept if compounds[j] != compounds[i] and not plates[i] & plates[j]]
        best = max(others, key=lambda j: vectors[i] @ vectors[j])
        right, total = right + (moas[best] == moas[i]), total + 1
    main([str(run), "--batch_rule", "plate"])
    results = json.loads((run / "results.json").read_text())
    scores = results["sets"]["trained"]
    assert (scores["nscb_correct"], scores["nscb_total"]) == (right, total)
    assert results["protocol"]["batch_rule"] == "plate"


def test_checkpoints_are_scored_together_in_order(run):
    folder = run / "profiles" / "checkpoints"
    folder.mkdir()
    for step, signal in ((200, 4.0), (30, 0.3)):
        screen(signal).to_parquet(folder / f"step_{step:08d}.parquet")
    (run / "dna" / "metrics.jsonl").write_text('{"step": 100, "epoch": 5.0, "loss": 1.0}\n')
    (run / "tubulin" / "metrics.jsonl").write_text('{"step": 200, "epoch": 10.0, "nsc": 0.5}\n')
    results = evaluate_run(run, progress=False)
    assert list(results["sets"]) == ["trained", "untrained"]
    first, last = results["checkpoints"]
    assert (first["step"], first["epoch"], last["step"], last["epoch"]) == (30, 1.5, 200, 10.0)
    for line, name in ((first, "untrained"), (last, "trained")):  # of the same fields
        for key in ("nsc", "nscb", "nsc_correct", "nscb_total"):
            assert line[key] == results["sets"][name][key]
    (folder / "step_x.parquet").write_bytes((folder / "step_00000030.parquet").read_bytes())
    with pytest.raises(UserError, match="rename or remove"):
        evaluate_run(run, progress=False)


def test_a_channel_has_the_intervals_of_its_own_scores(run):
    profiles = pd.read_parquet(run / "profiles" / "untrained.parquet")
    result = evaluate_set(profiles, plot=False)
    for channel in ("dna", "tubulin"):
        part = result["channels"][channel]
        for prefix in ("nsc", "nscb"):
            counts = binomtest(part[f"{prefix}_correct"], part[f"{prefix}_total"])
            assert part[f"{prefix}_wilson"] == pytest.approx(tuple(counts.proportion_ci(method="wilson")))
            low, high = part[f"{prefix}_bootstrap"]
            assert low <= part[prefix] <= high and high > low
        alone = profiles[[name for name in profiles if name.startswith(("Metadata_", channel))]]
        alone = evaluate_set(alone, plot=False)
        for prefix in ("nsc", "nscb"):
            assert part[f"{prefix}_bootstrap"] == alone[f"{prefix}_bootstrap"]


def test_real_data_are_not_called_simulated(run):
    for path in run.glob("profiles/*.parquet"):
        pd.read_parquet(path).assign(Metadata_Source="BBBC021v1").to_parquet(path)
    results = evaluate_run(run, progress=False)
    assert results["simulated"] is False
    assert "SIMULATED" not in format_table(results)


def test_a_collapsed_network_is_scored_as_wrong_and_named(run):
    frame = screen(1.0)
    features = [column for column in frame if not column.startswith("Metadata_")]
    frame[features] = np.float32(0.25)
    frame.to_parquet(run / "profiles" / "trained.parquet")
    lines = [{"step": 9, "loss": 0.2, "teacher_entropy": 0.01, "mean_entropy": 0.012, "participation_ratio": 1.0}]
    (run / "dna" / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    results = evaluate_run(run, progress=False)
    assert results["headline"]["nsc"] == 0.0 and results["headline"]["nscb"] == 0.0
    assert results["sets"]["trained"]["channels"]["dna"]["participation_ratio"] == 0.0
    assert results["training"]["dna"]["collapse"]["verdict"] == "collapsed"
    assert "same prototype" in format_table(results)


def test_unlabelled_treatments_are_left_out_of_scores_and_counted():
    frame = screen(4.0)
    frame.loc[frame["Metadata_Compound"] == "Act-0", "Metadata_MOA"] = ""
    got = evaluate_set(frame, details=False)
    assert got["nsc_total"] == 22 and not any(name.startswith("Act-0") for name in got["treatments"])


def test_participation_ratio_by_hand():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(1000, 4)))[0]
    directions = np.linalg.qr(directions - directions.mean(axis=0))[0]
    assert participation_ratio(directions) == pytest.approx(4.0)  # equal variances
    assert participation_ratio(directions * [3, 1, 1, 1]) == pytest.approx((9 + 3) ** 2 / (81 + 3))
    assert participation_ratio(directions[:, :1] @ np.ones((1, 5))) == pytest.approx(1.0)
    assert participation_ratio(np.full((10, 3), 0.1)) == 0.0


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ({"teacher_entropy": 2.0, "mean_entropy": 3.5, "participation_ratio": 8}, "healthy"),
        ({"teacher_entropy": 0.02, "mean_entropy": 0.03}, "collapsed"),  # one prototype for all
        ({"teacher_entropy": 4.155, "mean_entropy": 4.158}, "collapsed"),  # uniform: ln 64 = 4.1589
        ({"teacher_entropy": 2.0, "mean_entropy": 2.01}, "suspect"),  # every image the same target
        ({"teacher_entropy": 2.0, "mean_entropy": 3.5, "participation_ratio": 1.1}, "suspect"),
        ({"loss": 1.0}, "unknown"),
    ],
)
def test_the_verdict_on_collapse(line, verdict):
    healthy = {"teacher_entropy": 2.0, "mean_entropy": 3.5, "participation_ratio": 9}
    lines = [line] if verdict == "unknown" else [healthy, line]
    assert collapse_verdict(lines, 64)["verdict"] == verdict


def test_a_low_ratio_is_no_suspicion_where_random_weights_have_it_too():
    line = {"teacher_entropy": 2.0, "mean_entropy": 3.5, "participation_ratio": 1.1}
    assert collapse_verdict([line], 64, untrained_ratio=1.1)["verdict"] == "healthy"
    assert collapse_verdict([line], 64, untrained_ratio=8.0)["verdict"] == "suspect"


def test_batch_effect_on_fields_the_normalization_has_not_seen():
    """Control fields of twelve batches that differ by a shift alone, twelve fields per plate."""
    rng = np.random.default_rng(0)
    rows = [(f"Week{b}_1", f"B{w:02d}", s, "DMSO", f"Week{b}") for b in range(12) for w in range(6) for s in (1, 2)]
    frame = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in ("Plate", "Well", "Site", "Compound", "Batch")])
    shift = np.repeat(rng.normal(size=(12, 4)) * 3, 12, axis=0)
    for index, column in enumerate((rng.normal(size=(144, 4)) + shift).T):
        frame[f"dna_{index:04d}"] = column
    plain = control_batch_effect(frame, TypicalVariationNormalizer())
    assert plain["before"]["variance_explained"] > 0.8 and plain["after"]["variance_explained"] > 0.7
    assert plain["before"]["expected_variance"] == pytest.approx(11 / 71)
    assert plain["before"]["neighbour_share"] > 0.7


def test_maps_have_two_coordinates_a_treatment():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.eye(4), 10, axis=0) + 0.05 * rng.normal(size=(40, 4))
    points, method = map_treatments(clusters)
    assert "t-SNE" in method and np.shape(points) == (40, 2)
    centres = np.array(points).reshape(4, 10, 2).mean(axis=1)
    near = ((np.array(points)[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert (near == np.repeat(range(4), 10)).all()
    assert np.shape(map_treatments(np.eye(3))[0]) == (3, 2) and map_treatments(np.eye(3))[1] == "PCA"
    assert map_treatments(np.zeros((20, 3)))[0] == [[0.0, 0.0]] * 20


def test_compounds_kept_out_of_training_are_scored_apart(run):
    settings = {"arguments": {"exclude_compounds": ["Act-0", "Kin-1"], "weak_label": "moa"}, "dataset": {}}
    (run / "settings.json").write_text(json.dumps(settings))
    results = evaluate_run(run, progress=False)
    scores = results["sets"]["trained"]
    queries = [q for q in scores["nsc_queries"] if q["compound"] in ("Act-0", "Kin-1")]
    assert scores["held_out"]["nsc_total"] == len(queries) == 4
    assert scores["held_out"]["nsc_correct"] == sum(q["correct"] for q in queries)
    assert scores["held_out"]["nscb_total"] == 2  # Kinase inhibitors are left out of NSCB
    (note,) = results["notes"]
    assert "but those of the compounds kept out" in note and note in format_table(results)


def test_scores_of_a_training_that_saw_the_mechanisms_say_so(run):
    (run / "settings.json").write_text(json.dumps({"arguments": {"weak_label": "moa"}, "dataset": {}}))
    results = evaluate_run(run, progress=False)
    assert "held_out" not in results["sets"]["trained"]
    assert len(results["notes"]) == 1 and results["notes"][0] in format_table(results)


# ---------------------------------------------------------------- the command


def test_the_command_prints_a_table(run, capsys):
    main([str(run), "--whitening", "plain", "--batch_rule", "joined"])
    out = capsys.readouterr().out
    assert "trained" in out and "NSCB" in out and "results.json" in out
    protocol = json.loads((run / "results.json").read_text())["protocol"]
    assert protocol["batch_rule"] == "joined"
    assert "regularization=0" in protocol["normalization"]


def stop(run, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(run), *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_bad_input_ends_with_one_sentence_and_leaves_old_results(run, tmp_path, capsys):
    (run / "results.json").write_text("{}")
    assert "is not a folder: name a run folder" in stop(tmp_path / "absent", [], capsys)
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet file: run wsdino-extract" in stop(tmp_path / "empty", [], capsys)
    assert "--k" in stop(run, ["--k", "0"], capsys)
    path = run / "profiles" / "trained.parquet"
    good = pd.read_parquet(path)
    for change, message in (
        (lambda frame: frame[frame["Metadata_Compound"] != "DMSO"], "hold 0 DMSO fields"),
        (lambda frame: frame.assign(Metadata_Batch=""), "No field has a Metadata_Batch"),
        (lambda frame: frame.assign(Metadata_Batch=None), "No field has a Metadata_Batch"),
        (lambda frame: frame.assign(dna_0000=np.nan), "column dna_0000, is not a finite number"),
    ):
        change(good).to_parquet(path)
        error = stop(run, [], capsys)
        assert message in error and "trained" in error and "Traceback" not in error
        assert error.startswith("wsdino-evaluate: error: ") and error.count("\n") == 1
    assert (run / "results.json").read_text() == "{}"
    path.write_bytes(b"nothing")
    assert "trained.parquet is not a readable" in stop(run, [], capsys)
    good.to_parquet(path)
    (run / "settings.json").write_text("{")
    assert "settings.json" in stop(run, [], capsys)
    (run / "settings.json").write_bytes(b'{"arguments": "\xff"}')
    assert "settings.json" in stop(run, [], capsys)


def test_fields_without_a_mechanism_are_counted_as_fields_alone(run):
    """As of the part `unannotated`: their compounds are not among those scored."""
    frame = screen(4.0)
    none = frame["Metadata_MOA"].isin(["Eg5 inhibitors", "Kinase inhibitors"])
    frame.loc[none, "Metadata_MOA"] = np.where(frame.loc[none, "Metadata_MOA"] == "Eg5 inhibitors", "", " ")
    for path in run.glob("profiles/*.parquet"):
        frame.to_parquet(path)
    counts = evaluate_run(run, progress=False)["counts"]
    expected = {"fields": len(frame), "treatments": 24, "scored_treatments": 12, "compounds": 6, "moas": 2}
    assert {name: counts[name] for name in expected} == expected


def test_one_direction_is_drawn_as_one(run):
    """Two DMSO fields leave whitening a single direction."""
    frame = screen(4.0)
    frame = frame[(frame["Metadata_Compound"] != "DMSO") | (frame.groupby("Metadata_Compound").cumcount() < 2)]
    frame = frame[[column for column in frame if not column.startswith("tubulin")]]
    for path in run.glob("profiles/*.parquet"):
        frame.to_parquet(path)
    scores = evaluate_run(run, progress=False)["sets"]["trained"]
    assert scores["map_method"] == "PCA" and np.shape(scores["map"]) == (24, 2)


def test_results_are_strict_json(run):
    """No NaN or Infinity, which other readers of JSON refuse."""
    frame = screen(4.0)
    frame = frame[frame["Metadata_Batch"] == "Week1"]  # no NSCB query at all
    for path in run.glob("profiles/*.parquet"):
        frame.to_parquet(path)
    evaluate_run(run, progress=False)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((run / "results.json").read_text(), parse_constant=refuse)
    assert results["headline"]["nscb"] is None
    assert "no query" in format_table(results)
    assert math.isfinite(results["headline"]["nsc"])


# ---------------------------------------------------------------- screens without mechanisms, with other controls


@pytest.mark.parametrize("without", ["no column", "empty"])
def test_a_screen_without_mechanisms_is_scored_by_its_replicates(run, without):
    for path in run.glob("profiles/*.parquet"):
        frame = pd.read_parquet(path)
        frame = frame.drop(columns="Metadata_MOA") if without == "no column" else frame.assign(Metadata_MOA=None)
        frame.to_parquet(path)
    results = evaluate_run(run, progress=False)
    assert results["headline"]["nsc"] is None and results["counts"]["scored_treatments"] == 0
    assert any("mechanism" in note for note in results["notes"])
    scores = results["sets"]["trained"]
    assert scores["nsc_total"] == 0 and scores["reproducibility"]["treatments"] == 24
    assert scores["average_precision"]["replicate"]["value"] > 0.9
    assert (
        scores["average_precision"]["replicate"]["low"]
        > results["sets"]["untrained"]["average_precision"]["replicate"]["value"]
    )
    assert "replicate mAP" in format_table(results)


def test_a_screen_of_genes_with_two_controls(run):
    """Genes in a column of their own, no concentration, controls by name, mechanisms that are several."""
    expected = evaluate_run(run, progress=False)["sets"]["trained"]
    for path in run.glob("profiles/*.parquet"):
        frame = pd.read_parquet(path)
        control = frame["Metadata_Compound"] == "DMSO"
        names = np.where(frame.groupby("Metadata_Compound").cumcount() % 2, "no-guide", "non-targeting")
        frame["Metadata_Gene"] = frame["Metadata_Treatment"].mask(control, pd.Series(names))
        frame["Metadata_MOA"] = frame["Metadata_MOA"] + "; of " + frame["Metadata_Batch"]
        frame.drop(columns=["Metadata_Compound", "Metadata_Treatment", "Metadata_Concentration"]).to_parquet(path)
    controls = ["--controls", "no-guide", "non-targeting"]
    main([str(run), "--compound_column", "gene", "--moa_separator", ";", *controls])
    results = json.loads((run / "results.json").read_text())
    assert results["counts"]["dmso_fields"] == 36 and results["protocol"]["moa_separator"] == ";"
    scores = results["sets"]["trained"]
    assert scores["nsc_total"] == expected["nsc_total"] == 24
    # Other doses of a compound are other genes here, so that each has its own mechanism nearer than before.
    assert scores["nsc_correct"] >= expected["nsc_correct"]
    main([str(run), "--compound_column", "gene", *controls])
    alone = json.loads((run / "results.json").read_text())["sets"]["trained"]
    assert all(" of " in name for name in alone["moas"]) and alone["nsc_correct"] <= scores["nsc_correct"]


def test_a_column_marks_the_controls(run, capsys):
    for path in run.glob("profiles/*.parquet"):
        frame = pd.read_parquet(path)
        kind = np.where(frame["Metadata_Compound"] == "DMSO", "negcon", "trt")
        frame.replace({"Metadata_Compound": {"DMSO": "water"}}).assign(Metadata_pert_type=kind).to_parquet(path)
    assert evaluate_run(run, progress=False)["counts"]["dmso_fields"] == 36  # marked as cytomining tools do
    main([str(run), "--controls", "negcon", "--control_column", "pert_type"])
    assert json.loads((run / "results.json").read_text())["counts"]["dmso_fields"] == 36
    assert "--controls" in stop(run, ["--controls", "negcon"], capsys)
    assert "--control_column" in stop(run, ["--controls", "negcon", "--control_column", "kind"], capsys)


@pytest.mark.parametrize("kind", ["csv.gz", "parquet"])
def test_a_table_of_another_program_beside_a_run_is_one_set(run, kind):
    frame = screen(4.0)
    features = [name for name in frame if not name.startswith("Metadata_")]
    wells = frame.groupby(["Metadata_Plate", "Metadata_Well"])[features].mean()
    names = [f"{part}_AreaShape_{letter}" for part in ("Cells", "Nuclei") for letter in "ABCDEF"]
    wells = wells.set_axis(names, axis=1).reset_index().assign(Cells_Texture_Bad=np.nan)
    path = run / "profiles" / f"cellprofiler.{kind}"
    wells.to_csv(path, index=False) if kind == "csv.gz" else wells.to_parquet(path)
    results = evaluate_run(run, progress=False)
    scores = results["sets"]["cellprofiler"]
    assert list(scores["channels"]) == ["features"] and scores["channels"]["features"]["features"] == 12
    labels = (
        frame.groupby(["Metadata_Plate", "Metadata_Well"])
        .first()
        .reset_index()[[name for name in frame if name.startswith("Metadata_")]]
    )
    values = wells[names].set_axis([f"features_{index:04d}" for index in range(12)], axis=1)
    expected = evaluate_set(pd.concat([labels, values], axis=1), details=False)  # six DMSO wells: two components
    for key in ("nsc_correct", "nsc_total", "nscb_correct", "nscb_total"):
        assert scores[key] == expected[key]
    assert any("1 with missing values" in note for note in results["notes"])
    assert results["headline"]["set"] == "trained"
