"""The tables, curves and maps of the page as plain data, which `page.html` sets and escapes."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from wsdino.run_folder import PROFILE_SETS

from ..scores import PREFIXES, compare_sets
from ..uncertainty import epoch_curves
from .charts import colour, line_chart, number, percent, scatter_map
from .runs import Run

SCORE_HEAD = ("NSC, 95\u00a0% interval", "NSCB, 95\u00a0% interval")
# Title of a chart, and its fields in metrics.jsonl with their labels; the line of a second field is dashed.
MONITORS = {
    "Loss": {"loss": ""},
    "Entropy of the teacher: of each target (solid), of their mean (dashed)": {
        "teacher_entropy": ", each target",
        "mean_entropy": ", their mean",
    },
    "KL divergence from teacher to student": {"kl": ""},
    "Dimensions in use (participation ratio)": {"participation_ratio": ""},
    "Learning rate": {"lr": ""},
    "Image pairs per second": {"pairs_per_second": ""},
    "NSC during training": {"nsc": ""},
    "NSCB during training": {"nscb": ""},
}


class Cell(NamedTuple):
    """A cell of a table: its first line, the softer ones below it, a class of the style sheet, and a hover text."""

    lines: tuple[str, ...]
    kind: str = ""
    hover: str = ""


def cell(*lines: str, kind: str = "", hover: str = "") -> Cell:
    """A cell whose empty lines are left out; a line breaks after a comma alone."""
    return Cell(tuple(line.replace(" ", "\u00a0").replace(",\u00a0", ", ") for line in lines if line), kind, hover)


class Table(NamedTuple):
    """A table: titles of its columns, and rows of (class, title, softer line below it, cells)."""

    head: Sequence[str]
    rows: Sequence[tuple[str, str, str, Sequence[Cell]]]


def p_value(p: float | None) -> str:
    """`p = 0.031`, or `p < 0.001`; a dash for None."""
    return "–" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def by_channel(names: Iterable[str]) -> list[str]:
    """Channels in the order of the paper, others after them by name."""
    order = ("dna", "tubulin", "actin")
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def entries(runs: Sequence[Run]) -> list[tuple[Run, str, str, dict]]:
    """(run, title, set, scores) of every profile set of every run."""
    return [(run, f"{run.prefix}{name}", name, run.results["sets"][name]) for run in runs for name in run.set_names]


def share(scores: dict, prefix: str) -> str:
    """`41.7 % (15/36)`."""
    counts = f"({scores[f'{prefix}_correct']}/{scores[f'{prefix}_total']})"
    return "no query" if scores[prefix] is None else f"{percent(scores[prefix])} {counts}"


def score_cells(scores: dict) -> list[Cell]:
    """NSC and NSCB, each with its interval and, where it was computed, what chance gives."""
    cells = []
    for prefix in PREFIXES:
        low, high = scores.get(f"{prefix}_bootstrap") or (None, None)
        interval = "" if low is None else f"{100 * low:.0f}–{percent(high, 0)}"
        null = scores.get(f"{prefix}_null")
        chance = f"chance {percent(null['null_mean'], 0)}, {p_value(null['p_value'])}" if null else ""
        cells.append(cell(share(scores, prefix), interval, chance))
    return cells


def score_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """The scores of each run's headline set, with a single run's other sets below; and of several runs' other sets."""
    headlines, others = [], []
    for run, title, name, scores in entries(runs):
        about = PROFILE_SETS[name].caption if name in PROFILE_SETS else ""
        if name == run.headline:
            title, about = (run.name, name) if len(runs) > 1 else (title, about)
            headlines.append(("headline", title, about, score_cells(scores)))
        else:
            others.append(("main", title, about, score_cells(scores)))
    head = ("Profiles", *SCORE_HEAD)
    if len(runs) == 1:
        return Table(head, headlines + others), Table(head, [])
    return Table(("Run", *SCORE_HEAD), headlines), Table(head, others)


def channel_table(runs: Sequence[Run]) -> Table:
    """The scores of each channel alone, and how many dimensions its features use."""
    rows = []
    for _, title, _, scores in entries(runs):
        rows.append(("main", title, "", ()))
        for channel, part in scores["channels"].items():
            ratio = cell(f"{number(part['participation_ratio'])} of {part['features']}")
            rows.append(("sub", channel, "", [*score_cells(part), ratio]))
    return Table(("Channel", *SCORE_HEAD, "dimensions in use"), rows)


def held_out_table(runs: Sequence[Run]) -> Table:
    """Compounds that training did not see: a row per run, and their sum over leave-one-compound-out runs."""
    rows, total = [], Counter()
    for run in runs:
        part = run.scores.get("held_out")
        if part:
            counts = [cell(f"{part[f'{prefix}_correct']}/{part[f'{prefix}_total']}") for prefix in PREFIXES]
            rows.append(("", run.prefix + ", ".join(part["compounds"]), "", counts))
            total.update({key: value for key, value in part.items() if key != "compounds"})
    if len(rows) > 1:
        for prefix in PREFIXES:
            scored = total[f"{prefix}_total"]
            total[prefix] = total[f"{prefix}_correct"] / scored if scored else None
        rows.append(("sub", "all runs together", "", [cell(share(total, prefix)) for prefix in PREFIXES]))
    return Table(("Compounds", "NSC", "NSCB"), rows)


def comparison_tables(runs: Sequence[Run]) -> tuple[Table, Table]:
    """Each run against the first, and within each run the headline's set against its other sets."""
    first, head = runs[0], ("Comparison", "NSC", "NSCB")
    between = [
        (f"{run.name} against {first.name}", {p: compare_sets(first.scores, run.scores, p) for p in PREFIXES})
        for run in runs[1:]
    ]
    within = [
        (f"{run.prefix}{one['second']} against {one['first']}", one)
        for run in runs
        for one in run.results["comparisons"]
    ]
    rows = [
        [("", title, "", [_verdict(parts[p]) for p in PREFIXES]) for title, parts in one] for one in (between, within)
    ]
    return Table(head, rows[0]), Table(head, rows[1])


def _verdict(part: dict) -> Cell:
    """Whether the second of two sets is better than the first, with the treatments that they differ in."""
    if not part["compared"]:
        return cell("–")
    kind, word = ("ok", "better") if part["difference"] > 0 else ("miss", "worse")
    if part["p_compound"] >= 0.05:
        kind, word = "soft", "not told apart"
    gained, lost = part["gained"], part["lost"]
    return cell(
        word,
        f"{100 * part['difference']:+.1f} points, {p_value(part['p_compound'])}",
        f"{len(gained)} gained, {len(lost)} lost of {part['compared']}",
        f"exact {p_value(part['p_exact'])}",
        kind=kind,
        hover="\n".join(
            f"{word}: {', '.join(names)}" for word, names in (("gained", gained), ("lost", lost)) if names
        ),
    )


def measure_table(runs: Sequence[Run]) -> Table:
    """Votes of five neighbours, agreement of replicates, batch effects and, where computed, mAP."""
    head = ["Profiles", "five nearest vote: NSC, NSCB", "replicates agree", "batch in the variance"]
    head += ["batch in the neighbours", "mAP, replicates", "mAP, mechanisms"]
    rows = []
    for _, title, _, scores in entries(runs):
        if "reproducibility" not in scores:
            continue
        replicates, effect, five = (scores[key] for key in ("reproducibility", "batch_effect", "five_nearest"))
        before, after = effect["before"], effect["after"]
        cells = [
            cell(percent(five["nsc"]), percent(five["nscb"])),
            cell(percent(replicates["share"]), f"{replicates['replicating']}/{replicates['treatments']}"),
        ]
        for key, chance in (("variance_explained", "expected_variance"), ("neighbour_share", "expected_neighbour")):
            earlier = percent(before[key], 0).rstrip("\u00a0%")
            change = f"{earlier} → {percent(after[key], 0)}"
            cells.append(cell(change, f"chance {percent(after[chance], 0)}"))
        for kind in ("replicate", "moa"):
            part = (scores.get("retrieval") or {}).get(kind)
            significant = f"{percent(part['significant'], 0)} significant" if part else ""
            cells.append(cell(number(part["map"] if part else None), significant))
        rows.append(("", title, "", cells))
    if not any(scores.get("retrieval") for _, _, _, scores in entries(runs)):
        head, rows = head[:5], [(*row[:3], row[3][:4]) for row in rows]
    return Table(head, rows)


def training_charts(runs: Sequence[Run]) -> Iterator[tuple[str, list[dict]]]:
    """(heading, charts): one run has a curve per channel, several have charts per channel and a curve per run."""
    channels = by_channel({channel for run in runs for channel in run.metrics})
    groups = [(channel, [(run.name, run.metrics.get(channel, [])) for run in runs]) for channel in channels]
    if len(runs) == 1:
        groups = [("", [(channel, runs[0].metrics[channel]) for channel in channels])]
    for heading, sources in groups:
        charts = []
        for title, fields in MONITORS.items():
            series = []
            for index, (name, lines) in enumerate(sources):
                for number_of_field, (key, label) in enumerate(fields.items()):
                    points = [(line["step"], line[key]) for line in lines if _is_number(line, key)]
                    series.append((name + label, points, colour(index), number_of_field > 0))
            charts.append(line_chart(title, series, share=set(fields) <= set(PREFIXES)))
        yield heading, [chart for chart in charts if chart]


def _is_number(line: dict, key: str) -> bool:
    """Whether a line has a value to draw: a screen of one batch has no NSCB, for which training logs NaN."""
    values = (line.get(key), line.get("step"))
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def epoch_table(runs: Sequence[Run], window: Sequence[float] | None) -> Table:
    """NSCB while training: of the last epoch, over a window fixed beforehand, and the best with its caveat.

    Without a window, it is the last quarter of what every run of the channel has reached.
    """
    rows, windows = [], {}
    for channel in by_channel({channel for run in runs for channel in run.metrics}):
        curves = {}
        for run in runs:
            lines = [line for line in run.metrics.get(channel, []) if _is_number(line, "nscb")]
            if lines:
                curves[run.name] = [(line.get("epoch", line["step"]), line["nscb"]) for line in lines]
        end = min((points[-1][0] for points in curves.values()), default=0)
        first, last = window or (0.75 * end, end)
        curves = {name: points for name, points in curves.items() if any(first <= x <= last for x, _ in points)}
        if not curves:
            continue
        windows[channel] = f"{number(first)} to {number(last)}"
        summary = epoch_curves(curves, (first, last))
        for name, seed in summary["seeds"].items():
            epoch, value = curves[name][-1]
            cells = [
                cell(f"{percent(value)} at {number(epoch)}"),
                cell(percent(seed["window_mean"]), f"epochs {windows[channel]}"),
                cell(f"{percent(seed['best'])} at {number(seed['best_epoch'])}", summary["best_note"], kind="miss"),
            ]
            rows.append(("", f"{channel}, {name}" if len(runs) > 1 else channel, "", cells))
        if len(curves) > 1:
            spread = f"{percent(summary['window_mean'])} ± {number(100 * summary['window_sd'])}"
            rows.append(("sub", f"{channel}, all runs: mean ± SD", "", [cell(), cell(spread), cell()]))
    return Table(("", "last epoch", "mean of a window", "best epoch"), rows)


def mechanism_bars(runs: Sequence[Run]) -> tuple[list[dict], list]:
    """The legend, and for each mechanism its bars: (share, text, colour), NSC of every run before NSCB."""
    sources = [(p, run, colour(2 * index + (p == "nscb"))) for p in PREFIXES for index, run in enumerate(runs)]
    legend = [{"label": f"{run.prefix}{p.upper()}", "colour": tint, "dashed": False} for p, run, tint in sources]
    rows = []
    for moa in sorted({moa for run in runs for moa in run.scores["moas"]}):
        parts = [(run.scores[f"{p}_per_moa"].get(moa), tint) for p, run, tint in sources]
        rows.append((moa, [
            (part["accuracy"], f"{part['correct']}/{part['total']}", tint) if part and part["total"]
            else (0, "left out", tint) for part, tint in parts
        ]))  # fmt: skip
    return legend, rows


def treatment_map(run: Run) -> dict | None:
    """The chart of a run's treatments, None where they have no places."""
    scores = run.scores
    if not scores.get("map"):
        return None
    rows = zip(scores["treatments"], scores["batches"], scores["nsc_queries"], scores["map"], strict=True)
    points = []
    for name, batch, query, (x, y) in rows:
        label = f"{name}\n{query['moa']}\n{batch.replace('|', ', ')}"
        shown = "several batches" if "|" in batch else batch
        points.append({"x": x, "y": y, "label": label, "moa": query["moa"], "batch": shown})
    batches = sorted({point["batch"] for point in points}, key=lambda name: (len(name), name))
    return scatter_map(points, [("moa", "mechanism", scores["moas"]), ("batch", "batch", batches)])


def picture_sheets(runs: Sequence[Run]) -> Iterator[tuple[str, list]]:
    """(caption, groups) of all sheets: example fields first, then attention, then any others."""
    titles = {"fields_": "Example fields: ", "attention_": "Where the network looks: ", "": ""}
    for kind, title in titles.items():
        for run in runs:
            own = {
                stem.removeprefix(kind): groups
                for stem, groups in run.pictures.items()
                if next(prefix for prefix in titles if stem.startswith(prefix)) == kind
            }
            for channel in by_channel(own):
                yield f"{run.prefix}{title}{channel}", own[channel]


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Nested settings as one dictionary, with dotted keys and values as text."""
    if isinstance(value, dict) and value:
        return {key: text for name, item in value.items() for key, text in flatten(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def side_by_side(columns: Iterable[dict]) -> list[tuple[str, list[str]]]:
    """(key, values) of flattened settings, a dash where a run lacks the key."""
    flat = [flatten(column) for column in columns]
    keys = dict.fromkeys(key for column in flat for key in column)
    return [(key, [column.get(key, "–") for column in flat]) for key in keys]


def settings_table(runs: Sequence[Run]) -> Table:
    """Every setting, count and version, with its value in each run."""
    names = ("protocol", "counts", "sources", "settings", "versions")
    rows = side_by_side({name: run.results.get(name) for name in names} for run in runs)
    return Table(
        ("", *[run.name for run in runs]),
        [
            ("differs" if len(set(values)) > 1 else "", key, "", [Cell((value,)) for value in values])
            for key, values in rows
        ],
    )


def notes(runs: Sequence[Run]) -> list[str]:
    """Sentences that stand beside the scores, also that runs were scored in different ways."""
    found = [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.results.get("notes", [])]
    differing = [
        f"{key}: {', '.join(dict.fromkeys(values))}"
        for key, values in side_by_side(run.results["protocol"] for run in runs)
        if len(set(values)) > 1
    ]
    if differing:
        found.append(f"The runs were scored differently ({'; '.join(differing)}), so their scores do not compare.")
    return list(dict.fromkeys(found))
