"""The paper's Table 1 on a SIMULATED screen: weak labels against the spread of the seeds and fixed controls.

    python benchmarks/simulated_table.py --folder runs/table                 # small ViT, two CPU cores, hours
    python benchmarks/simulated_table.py --folder runs/table --gpu           # ViT-S/8 on one GPU
    python benchmarks/simulated_table.py --folder runs/table --report        # only read what is there

Every cell (condition x seed) is one run folder made by the same commands a user would type: train, extract, evaluate.
A cell that has its results.json is done, an interrupted one resumes from its last checkpoint, and the command may run
several times at once on one folder, each taking what the others have not. All conditions train for
the same number of optimiser steps (but `twice_the_steps`), are evaluated at the last step, and differ from `compound`
in the flags below alone. The table reads nothing but results.json files. Beside NSC and NSCB, which move in steps of
one treatment, it gives the mean average precision of finding treatments of the same mechanism and another compound,
which uses the whole ranking and so has less noise (needs the package copairs).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from filelock import FileLock, Timeout
from scipy.stats import t as student_t
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset_scripts import build_dataset, simulate_screen  # noqa: E402
from evaluation_wsdino.scores import compare_sets  # noqa: E402

# As the real map: 60 treatments of 30 compounds, 10 mechanisms (two in a single batch), 6 batches of 3 plates. Batch,
# plate, well and compound effects are the simulator's defaults.
SCREEN = {
    "size": "demo",
    "mechanisms": (
        "Microtubule stabilizers",
        "Microtubule destabilizers",
        "Eg5 inhibitors",
        "Actin disruptors",
        "Aurora kinase inhibitors",
        "DNA damage",
        "Epithelial",
        "Protein synthesis",
    ),
    "batches": 6,
}
SIZES = {
    # What is simulated, and the flags of every run. The small fields are the real ones at 1 / 3.2 of their resolution
    # (160 x 200 pixels once halved, for 512 x 640): as many cells per field, crop and tile. Patches of 4 pixels in
    # place of 8, since cells are that much smaller; RESULTS.md says what patches of 8 and half the steps gave.
    "small": (
        {"scale": 1 / 3.2},
        ["--preset", "demo", "--patch_size", "4", "--num_hidden_layers", "2"]
        + ["--epochs", "24", "--save_every", "6", "--keep", "4"],
    ),
    "gpu": (
        {"image_size": (1024, 1280), "doses": 3},
        ["--preset", "scratch", "--mixed_precision", "bf16", "--epochs", "100", "--warmup_epochs", "5"]
        + ["--centering", "sinkhorn", "--koleo_weight", "0.02"],
    ),
}
# In every row the anchors of a step come from one plate, and partners from another plate where the label has one.
COMMON = ["--anchor_group", "plate", "--pair_constraint", "plate"]
MAIN = {
    "dino": ["--weak_label", "none"],
    "treatment": ["--weak_label", "treatment"],
    "compound": ["--weak_label", "compound"],
    "moa": ["--weak_label", "moa"],
}
# What a row is compared with where that is not `dino`.
PLAIN = {"mixed_plates": "mixed_plates_dino", "clean_compound": "clean_dino", "clean_dino": "clean_dino"}
# What is shown of an entry of results.json; None where it was not computed.
MEASURES = {
    "nsc": ("NSC", lambda entry: entry["nsc"]),
    "nscb": ("NSCB", lambda entry: entry["nscb"]),
    "map": ("mAP", lambda entry: entry.get("retrieval", {}).get("moa", {}).get("map")),
}
BASELINES = ("intensity", "nuclei", "untrained", "initial")  # what no training changes
# Fixed before any run, reported whatever they show.
CONTROLS = {
    "shuffled": ["--weak_label", "shuffled"],  # compound labels assigned to the wrong fields: no gain expected
    "any_image": ["--pair_constraint", "none"],  # partner may be the anchor, as in the released code's 4 %
    "other_image": ["--pair_constraint", "image"],
    "other_well": ["--pair_constraint", "well"],
    "other_batch": ["--pair_constraint", "batch"],
    "mixed_plates_dino": ["--weak_label", "none", "--anchor_group", "none"],  # anchors of all plates in every step
    "mixed_plates": ["--anchor_group", "none"],
    "twice_the_steps": [],
    "clean_dino": ["--weak_label", "none"],  # a screen without batch, plate and well effects
    "clean_compound": [],
}


def check_recipe(place: Path, **recipe) -> None:
    """Note beside `place` what it is made with; refuse a place that was made with something else."""
    note, recipe = place.with_name(place.name + ".json"), json.loads(json.dumps(recipe))
    if not note.exists():
        note.write_text(json.dumps(recipe) + "\n")
    elif json.loads(note.read_text()) != recipe:
        raise SystemExit(f"{place} was made with other settings, which {note} holds: give another --folder.")


def make_screen(folder: Path, design: dict, seed: int, **changes) -> Path:
    """The built screen, with a column `shuffled`; made once, by one process."""
    whole = folder.with_name(folder.name + "_as_built")
    raw = folder.with_name(folder.name + "_raw")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        check_recipe(folder, seed=seed, **SCREEN, **design, **changes)
        if (folder / "README.md").exists():
            return folder
        simulate_screen(raw, seed=seed, **SCREEN, **design, **changes)
        build_dataset(raw, whole)
        configurations = []
        for part in ("annotated", "dmso"):
            dataset = load_dataset(str(whole), part, split="train")
            shuffled = np.random.default_rng(seed).permutation(np.array(dataset["compound"], dtype=object)).tolist()
            (folder / part).mkdir(parents=True, exist_ok=True)
            dataset.add_column("shuffled", shuffled).to_parquet(folder / part / "train.parquet")
            configurations.append(f"- config_name: {part}\n  data_files: {part}/train.parquet\n")
        (folder / "README.md").write_text(
            "---\nconfigs:\n" + "".join(configurations) + "---\nSIMULATED images: no real cells.\n"
        )
    return folder


def run_cell(run: Path, screen: Path, flags: list[str], seed: int) -> None:
    """Train, extract and evaluate one cell, as far as it is not done; a cell that another process runs is skipped."""
    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{run}.lock", timeout=0):
            _run_cell(run, screen, flags, seed)
    except Timeout:
        print(f"{run} is being run by another process.")


def _run_cell(run: Path, screen: Path, flags: list[str], seed: int) -> None:
    check_recipe(run, screen=screen.name, flags=flags)
    if (run / "results.json").exists():
        return
    train = [ROOT / "train_accelerate.py", "--resume", "--output_dir", run, "--dataset", screen, "--seed", seed]
    extract = [ROOT / "extract_profiles.py", run]
    # The baselines of `compound` stand for all rows, its checkpoints for the choice of an epoch.
    extract += ["--checkpoints"] if run.parent.name == "compound" else ["--sets", "trained"]
    evaluate = ["-m", "evaluation_wsdino.evaluate_profiles", run, "--retrieval"]
    steps = [[*train, *flags], extract, evaluate]
    for step in steps:
        done = subprocess.run([sys.executable, *map(str, step)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{run}: {' '.join(map(str, step))} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def read_scores(folder: Path) -> dict[str, dict[int, dict]]:
    """`{row: {seed: entry of results.json}}`; what no training changes is read from each seed's `compound` run."""
    rows: dict[str, dict[int, dict]] = {}
    for path in sorted(folder.glob("*/seed_*/results.json")):
        condition, seed = path.parts[-3], int(path.parts[-2].removeprefix("seed_"))
        results = json.loads(path.read_text())
        if not results["simulated"]:
            raise SystemExit(f"{path} is not of a simulated screen: this table is of simulated results alone.")
        if condition == "compound":
            for name in sorted(set(BASELINES) & set(results["sets"])):
                rows.setdefault(name, {})[seed] = results["sets"][name]
        if "trained" in results["sets"]:
            verdicts = [channel["collapse"]["verdict"] for channel in results["training"].values()]
            curve = results.get("checkpoints", [])
            rows.setdefault(condition, {})[seed] = {**results["sets"]["trained"], "verdicts": verdicts, "curve": curve}
    return rows


def values_of(scores: dict[int, dict], measure: str) -> dict[int, float]:
    """A measure's value by seed, where it was computed."""
    values = {seed: MEASURES[measure][1](entry) for seed, entry in sorted(scores.items())}
    return {seed: value for seed, value in values.items() if value is not None}


def paired(first: dict[int, dict], second: dict[int, dict], measure: str) -> dict | None:
    """Second minus first over common seeds: mean, SD, 95 % t interval, p; of NSC and NSCB each seed's exact p.

    None where they share no seed.
    """
    before, after = values_of(first, measure), values_of(second, measure)
    seeds = sorted(set(before) & set(after))
    if not seeds:
        return None
    gains = [after[seed] - before[seed] for seed in seeds]
    mean = statistics.mean(gains)
    result = {"seeds": seeds, "gains": gains, "mean": mean}
    if measure != "map":
        result["p_treatments"] = [compare_sets(first[seed], second[seed], measure)["p_compound"] for seed in seeds]
    if len(seeds) > 1:
        # Equal gains differ in their last bit, and a t test of that would be certain of everything.
        sd = statistics.stdev(gains) if max(gains) - min(gains) > 1e-9 else 0.0
        half = student_t.ppf(0.975, len(seeds) - 1) * sd / math.sqrt(len(seeds))
        p = float(2 * student_t.sf(abs(mean) / (sd / math.sqrt(len(seeds))), len(seeds) - 1)) if sd else None
        result |= {"sd": sd, "interval": [mean - half, mean + half], "p": p}
    return result


def format_table(rows: dict[str, dict[int, dict]]) -> tuple[str, dict]:
    """A Markdown table and the same as numbers."""

    def cell(values):
        values = [100 * value for value in values.values()]
        if not values:
            return ""
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    def gain_text(test):
        if test is None:
            return ""
        text = f"{100 * test['mean']:+.1f}"
        if "interval" in test:
            text += f" ({100 * test['interval'][0]:+.1f} to {100 * test['interval'][1]:+.1f})"
            text += "" if test["p"] is None else f", p = {test['p']:.2g}"
        elif "p_treatments" in test:
            text += f", p = {test['p_treatments'][0]:.2g} over compounds"
        return text

    order = [*BASELINES, *MAIN, *CONTROLS]
    lines = [
        "SIMULATED. NSC, NSCB and mAP in %, mean ± SD over seeds. Gain over DINO without labels on the same screen "
        "with the same anchors, paired by seed: mean, 95 % t interval and p.",
        "",
        "| row | seeds | "
        + " | ".join(f"{name} | gain in {name}" for name, _ in MEASURES.values())
        + " | channels not healthy |",
        "|" + "---|" * (3 + 2 * len(MEASURES)),
    ]
    numbers = {}
    for name in [*(row for row in order if row in rows), *(row for row in rows if row not in order)]:
        scores = rows[name]
        base = PLAIN.get(name, "dino")
        numbers[name] = {measure: values_of(scores, measure) for measure in MEASURES}
        gains = {
            measure: None if name == base else paired(rows.get(base, {}), scores, measure) for measure in MEASURES
        }
        if any(gains.values()):
            numbers[name]["gain"] = gains
        verdicts = [verdict for entry in scores.values() for verdict in entry.get("verdicts", [])]
        bad = f"{sum(v != 'healthy' for v in verdicts)}/{len(verdicts)}" if verdicts else ""
        columns = [name, len(scores)]
        for measure in MEASURES:
            columns += [cell(numbers[name][measure]), gain_text(gains[measure])]
        lines.append("| " + " | ".join(map(str, [*columns, bad])) + " |")
    # On the screen of `compound` and with labels, so that one setting tells the two apart.
    controls = [
        name for name in CONTROLS if name in rows and name not in PLAIN.values() and not name.startswith("clean_")
    ]
    if "compound" in rows and controls:
        lines += [
            "",
            "Compound labels over each control that differs in one setting, paired by seed; of one seed, the exact p "
            "of the treatments that differ, exchanged by compound.",
            "",
            f"| compound | seeds | {' | '.join(name for name, _ in MEASURES.values())} |",
            "|" + "---|" * (2 + len(MEASURES)),
        ]
        numbers["compound"]["over"] = {}
        for name in controls:
            tests = {measure: paired(rows[name], rows["compound"], measure) for measure in MEASURES}
            numbers["compound"]["over"][name] = tests
            seeds = " ".join(str(seed) for seed in sorted(set(rows[name]) & set(rows["compound"])))
            lines.append(f"| over {name} | {seeds} | {' | '.join(map(gain_text, tests.values()))} |")
    lines += epoch_lines(rows)
    return "\n".join(lines), numbers


def epoch_lines(rows: dict[str, dict[int, dict]]) -> list[str]:
    """What choosing the epoch with the test labels would have added, where a row has checkpoints of several epochs."""
    lines = []
    for name, scores in rows.items():
        curves = {seed: entry["curve"] for seed, entry in scores.items() if len(entry.get("curve", [])) > 1}
        if curves:
            text = []
            for prefix in ("nsc", "nscb"):
                last = statistics.mean(100 * curve[-1][prefix] for curve in curves.values())
                best = statistics.mean(100 * max(line[prefix] for line in curve) for curve in curves.values())
                text.append(f"{prefix.upper()} {last:.1f} at the last epoch, {best:.1f} at each seed's best")
            epochs = ", ".join(f"{line['epoch']:g}" for line in next(iter(curves.values())))
            lines += [
                "",
                f"{name}, seeds {', '.join(map(str, curves))}, epochs {epochs}: {'; '.join(text)} "
                "(chosen with the test labels, so not a result).",
            ]
    return lines


def draw_table(numbers: dict) -> str:
    """The table as an SVG: a dot a seed, a bar at their mean, a dashed line at the mean of DINO without labels."""
    left, width, gap, step, top = 150, 250, 34, 22, 62
    shown = [measure for measure in MEASURES if any(row[measure] for row in numbers.values())]
    height = top + step * len(numbers) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + len(shown) * (width + gap)} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20"><tspan font-weight="bold">SIMULATED screen.</tspan> A dot a seed, a bar at their '
        "mean; dashed: DINO without labels.</text>",
    ]
    for panel, measure in enumerate(shown):
        x0 = left + panel * (width + gap)
        parts.append(f'<text x="{x0}" y="{top - 18}">{MEASURES[measure][0]} (%)</text>')
        for percent in range(0, 101, 20):
            x = x0 + width * percent / 100
            parts.append(f'<line x1="{x}" x2="{x}" y1="{top - 8}" y2="{height - 26}" stroke="#ddd"/>')
            parts.append(f'<text x="{x}" y="{height - 10}" text-anchor="middle" fill="#555">{percent}</text>')
        if numbers.get("dino", {}).get(measure):
            x = x0 + width * statistics.mean(numbers["dino"][measure].values())
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 8}" y2="{height - 26}" stroke="#555" '
                'stroke-dasharray="4 3"/>'
            )
        for place, (name, row) in enumerate(numbers.items()):
            y = top + step * place + step / 2
            if panel == 0:
                label = name.replace("_", " ")
                parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{label}</text>')
            if not row[measure]:
                continue
            mean = x0 + width * statistics.mean(row[measure].values())
            colour = "#777" if name in BASELINES else "#0b6e99" if name in MAIN else "#b35c00"
            parts.append(
                f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 8}" y2="{y + 8}" stroke="{colour}" stroke-width="3"/>'
            )
            parts += [
                f'<circle cx="{x0 + width * value:.1f}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.55"/>'
                for value in row[measure].values()
            ]
    return "\n".join([*parts, "</svg>\n"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where screens, runs and the table are kept")
    parser.add_argument("--gpu", action="store_true", help="full-size images and ViT-S/8 instead of the small ViT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training; the screen stays one")
    parser.add_argument("--screen_seed", type=int, default=0, help="of the simulated screen")
    parser.add_argument("--nuisance", type=float, default=1.0, help="difficulty: scales batch, plate and well effects")
    parser.add_argument(
        "--conditions", nargs="+", default=list(MAIN), choices=[*MAIN, *CONTROLS], help="rows of the table to run"
    )
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="last: further flags of every training")
    parser.add_argument("--report", action="store_true", help="run nothing, read what is there")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.resolve()
    design, flags = SIZES["gpu" if arguments.gpu else "small"]
    if not arguments.report:
        # Seed by seed, so that a table cut short has whole pairs.
        cells = [(condition, seed) for seed in arguments.seeds for condition in arguments.conditions]
        for condition, seed in tqdm(cells, desc="cells", unit="run"):
            clean = condition.startswith("clean_")
            screen = make_screen(
                folder / ("screen_clean" if clean else "screen"),
                design,
                arguments.screen_seed,
                nuisance=0.0 if clean else arguments.nuisance,
            )
            own = flags + COMMON + arguments.flags + {**MAIN, **CONTROLS}[condition]
            if condition == "twice_the_steps":
                place = len(own) - own[::-1].index("--epochs")
                own[place] = str(2 * int(own[place]))
            run_cell(folder / condition / f"seed_{seed}", screen, own, seed)
    rows = read_scores(folder)
    if not rows:
        raise SystemExit(f"{folder} holds no results.json yet: run without --report.")
    table, numbers = format_table(rows)
    (folder / "table.json").write_text(json.dumps(numbers, indent=1) + "\n")
    (folder / "table.md").write_text(table + "\n")
    (folder / "table.svg").write_text(draw_table(numbers))
    print(table)


if __name__ == "__main__":
    main()
