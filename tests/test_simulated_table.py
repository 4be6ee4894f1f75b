"""The simulated table from results.json files alone: means, SDs, paired gains, and what it refuses."""

import json
import statistics
from xml.etree import ElementTree

import pytest
from scipy.stats import ttest_rel

from benchmarks import simulated_table


def write_results(folder, condition, seed, right, sets=("trained",), simulated=True, precision=None):
    """A results.json of ten treatments, of which the first `right` find their mechanism."""
    queries = [{"correct": row < right, "compound": f"c{row // 2}", "excluded": None} for row in range(10)]
    entry = {
        "nsc": right / 10,
        "nscb": right / 10,
        "treatments": [f"t{row}" for row in range(10)],
        "nsc_queries": queries,
        "nscb_queries": queries,
        **({"retrieval": {"moa": {"map": precision}}} if precision is not None else {}),
    }
    run = folder / condition / f"seed_{seed}"
    run.mkdir(parents=True)
    training = {"dna": {"collapse": {"verdict": "healthy" if right > 3 else "collapsed"}}}
    content = {"simulated": simulated, "sets": {name: entry for name in sets}, "training": training}
    (run / "results.json").write_text(json.dumps(content))


def test_table_from_results(tmp_path, capsys):
    plain, weak = (3, 5, 4), (6, 7, 9)
    for seed in range(3):
        write_results(tmp_path, "dino", seed, plain[seed])
        write_results(tmp_path, "compound", seed, weak[seed], sets=("trained", "untrained", "intensity"))
    simulated_table.main(["--folder", str(tmp_path), "--report"])
    shown = capsys.readouterr().out
    assert shown.startswith("SIMULATED") and shown.strip() == (tmp_path / "table.md").read_text().strip()
    (row,) = [line for line in shown.splitlines() if line.startswith("| compound ")]
    percent = [10.0 * right for right in weak]
    assert f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}" in row
    test = ttest_rel(weak, plain)
    low, high = (10 * bound for bound in test.confidence_interval())
    assert f"{10 * statistics.mean(w - p for w, p in zip(weak, plain, strict=True)):+.1f}" in row
    assert f"({low:+.1f} to {high:+.1f}), p = {test.pvalue:.2g}" in row
    assert row.endswith("| 0/3 |")
    assert "| 1/3 |" in shown  # dino's first seed collapsed
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["compound"]["nscb"] == {"0": 0.6, "1": 0.7, "2": 0.9}
    assert list(numbers) == ["intensity", "untrained", "dino", "compound"]


def test_average_precision_is_shown_where_it_was_computed(tmp_path, capsys):
    plain, weak = (0.30, 0.32), (0.40, 0.36)
    for seed in range(2):
        write_results(tmp_path, "dino", seed, 4, precision=plain[seed])
        write_results(tmp_path, "compound", seed, 6, precision=weak[seed])
        write_results(tmp_path, "moa", seed, 6)
    simulated_table.main(["--folder", str(tmp_path), "--report"])
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    test = ttest_rel(weak, plain)
    low, high = (100 * bound for bound in test.confidence_interval())
    assert (
        f"| 38.0 ± {100 * statistics.stdev(weak):.1f} | +7.0 ({low:+.1f} to {high:+.1f}), p = {test.pvalue:.2g} |"
        in (rows["compound"])
    )
    assert "|  |  | 0/2 |" in rows["moa"]
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["moa"]["map"] == {} and numbers["compound"]["map"] == {"0": 0.40, "1": 0.36}
    assert ElementTree.parse(tmp_path / "table.svg") is not None


def test_equal_gains_of_all_seeds_are_not_certainty(tmp_path, capsys):
    """In floating point 0.7 - 0.4 and 0.9 - 0.6 differ in the last bit."""
    for seed, right in enumerate((4, 6)):
        write_results(tmp_path, "dino", seed, right)
        write_results(tmp_path, "compound", seed, right + 3)
    assert 0.7 - 0.4 != 0.9 - 0.6
    simulated_table.main(["--folder", str(tmp_path), "--report"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| compound ")]
    assert "| +30.0 (+30.0 to +30.0) |" in row and "p =" not in row


def test_compound_labels_are_compared_with_each_control(tmp_path, capsys):
    weak, shuffled = (6, 7, 9), (5, 4, 7)
    for seed in range(3):
        write_results(tmp_path, "compound", seed, weak[seed])
        write_results(tmp_path, "shuffled", seed, shuffled[seed])
    write_results(tmp_path, "other_well", 1, 2)
    write_results(tmp_path, "mixed_plates", 1, 2)
    for other in ("clean_compound", "clean_dino", "mixed_plates_dino"):  # of another screen, or without labels
        write_results(tmp_path, other, 1, 9)
    simulated_table.main(["--folder", str(tmp_path), "--report"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| over ")]
    test = ttest_rel(weak, shuffled)
    low, high = (10 * bound for bound in test.confidence_interval())
    gain = f"+20.0 ({low:+.1f} to {high:+.1f}), p = {test.pvalue:.2g}"
    # One seed: 7 of 10 against 2 of 10. Rows 2 to 6 differ, of compounds 1, 2 (two each) and 3 (one): the exact
    # two-sided sign-flip p of sums 2, 2, 1 is 2 / 8.
    alone = "+50.0, p = 0.25 over compounds"
    assert rows == [
        f"| over shuffled | 0 1 2 | {gain} | {gain} |  |",
        f"| over other_well | 1 | {alone} | {alone} |  |",
        f"| over mixed_plates | 1 | {alone} | {alone} |  |",
    ]
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert list(numbers["compound"]["over"]) == ["shuffled", "other_well", "mixed_plates"]


def test_the_best_epoch_is_told_beside_the_last(tmp_path, capsys):
    curves = {0: (2, 8, 5), 1: (6, 3, 4)}
    for seed, right in curves.items():
        write_results(tmp_path, "compound", seed, right[-1])
        path = tmp_path / "compound" / f"seed_{seed}" / "results.json"
        content = json.loads(path.read_text())
        content["checkpoints"] = [
            {"epoch": 3.0 * (place + 1), "nsc": value / 10, "nscb": value / 20} for place, value in enumerate(right)
        ]
        path.write_text(json.dumps(content))
    simulated_table.main(["--folder", str(tmp_path), "--report"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "seeds 0, 1, epochs 3, 6, 9: NSC 45.0 at the last epoch, 70.0 at each seed's best" in last
    assert "NSCB 22.5 at the last epoch, 35.0" in last and "not a result" in last


def test_the_figure_has_a_dot_a_seed_at_its_score(tmp_path):
    for seed, right in enumerate((3, 5)):
        write_results(tmp_path, "dino", seed, right)
    simulated_table.main(["--folder", str(tmp_path), "--report"])
    root = ElementTree.parse(tmp_path / "table.svg").getroot()
    dots = [float(dot.get("cx")) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    lines = {
        text.text: float(text.get("x"))
        for text in root.iter("{http://www.w3.org/2000/svg}text")
        if text.text in ("0", "100")
    }
    assert len(dots) == 4  # two seeds in two panels; the last panel's axis is what `lines` kept
    full = lines["100"] - lines["0"]
    assert [round((dot - lines["0"]) / full, 3) for dot in dots[2:]] == [0.3, 0.5]


def test_a_folder_is_not_gone_on_with_under_other_settings(tmp_path):
    """A finished cell or screen would be taken for one of the settings asked for."""
    design = {"scale": 0.3125}
    (tmp_path / "screen").mkdir()
    (tmp_path / "screen" / "README.md").write_text("made")
    assert simulated_table.make_screen(tmp_path / "screen", design, 0, nuisance=1.0) == tmp_path / "screen"
    assert simulated_table.make_screen(tmp_path / "screen", design, 0, nuisance=1.0) == tmp_path / "screen"
    for seed, nuisance in ((1, 1.0), (0, 0.5)):
        with pytest.raises(SystemExit, match="screen was made with other settings"):
            simulated_table.make_screen(tmp_path / "screen", design, seed, nuisance=nuisance)
    write_results(tmp_path, "dino", 0, 4)
    run, screen = tmp_path / "dino" / "seed_0", tmp_path / "screen"
    simulated_table.run_cell(run, screen, ["--epochs", "2"], 0)
    simulated_table.run_cell(run, screen, ["--epochs", "2"], 0)
    with pytest.raises(SystemExit, match="seed_0 was made with other settings"):
        simulated_table.run_cell(run, screen, ["--epochs", "3"], 0)


def test_real_results_and_nothing_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no results.json"):
        simulated_table.main(["--folder", str(tmp_path), "--report"])
    write_results(tmp_path, "compound", 0, 5, simulated=False)
    with pytest.raises(SystemExit, match="simulated results alone"):
        simulated_table.main(["--folder", str(tmp_path), "--report"])
