"""The simulated table from results.json files alone: means, SDs, paired gains, and what it refuses."""

import json
import statistics

import pytest
from scipy.stats import ttest_rel

from benchmarks import simulated_table


def write_results(folder, condition, seed, right, sets=("trained",), simulated=True):
    """A results.json of ten treatments, of which the first `right` find their mechanism."""
    queries = [{"correct": row < right, "compound": f"c{row // 2}", "excluded": None} for row in range(10)]
    entry = {
        "nsc": right / 10,
        "nscb": right / 10,
        "treatments": [f"t{row}" for row in range(10)],
        "nsc_queries": queries,
        "nscb_queries": queries,
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
    assert f"({low:+.1f} to {high:+.1f})" in row and f"{test.pvalue:.2g}" in row
    assert row.endswith("| 0/3 |")
    assert "| 1/3 |" in shown  # dino's first seed collapsed
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["compound"]["nscb"] == {"0": 0.6, "1": 0.7, "2": 0.9}
    assert list(numbers) == ["intensity", "untrained", "dino", "compound"]


def test_real_results_and_nothing_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no results.json"):
        simulated_table.main(["--folder", str(tmp_path), "--report"])
    write_results(tmp_path, "compound", 0, 5, simulated=False)
    with pytest.raises(SystemExit, match="simulated results alone"):
        simulated_table.main(["--folder", str(tmp_path), "--report"])
