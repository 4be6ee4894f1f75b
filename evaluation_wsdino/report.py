"""One self-contained HTML page about one run or several, and the command `wsdino-report RUN [RUN ...]`.

The page reads what `wsdino-evaluate` wrote (results.json), the training logs, and `pictures/*.png`; it holds every
style, script and picture itself, asks the network for nothing, and escapes every name that came from data.
"""

import argparse
import base64
import io
import json
import math
import os
from collections import Counter
from html import escape
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from .evaluate_profiles import SETS, compare_sets, read_json, read_metrics
from .pictures import read_sheet
from .profiles import ProfileError
from .report_charts import bars, colour, confusion_table, line_chart, number, percent, scatter_map
from .uncertainty import epoch_curves

_SET_NOTES = {
    "trained": "the network after training",
    "untrained": "the same network with random weights",
    "initial": "the network that training started from",
    "intensity": "mean, spread and percentiles of the pixels alone",
    "count": "nuclei counted, their size, shape and brightness",
}


def _data_uri(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _picture_uri(picture):
    """A small picture as JPEG, or as PNG where that is no larger, as of a map of a few colours."""
    found = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        found[kind] = buffer.getvalue()
    kind = min(found, key=lambda name: (len(found[name]), name))
    return _data_uri(found[kind], kind)


def load_run(folder, dataset=None):
    """What the page needs of one run folder: results, logs and pictures.

    Parameters
    ----------
    folder : str or Path
        A run folder with a results.json.
    dataset : str, False or None
        Folder of the dataset whose previews become thumbnails; None takes the one in the run's settings where it still
        exists, False none.

    Returns
    -------
    dict
        name, results, metrics {channel or "all channels": lines}, pictures {file stem: groups as of `read_sheet`,
        with data URIs for pictures}, thumbnails
        {treatment: data URI}.

    Raises
    ------
    ProfileError
        If the folder or its results.json is missing or not as wsdino-evaluate writes it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ProfileError(f"{folder} is not a folder: name a run folder, like runs/demo.")
    path = folder / "results.json"
    if not path.exists():
        raise ProfileError(f"{path} does not exist: run wsdino-evaluate {folder} first.")
    results = read_json(path, "run wsdino-evaluate again")
    needed = {"simulated", "sources", "headline", "counts", "protocol", "sets", "versions"}
    whole = isinstance(results, dict) and results.get("format") == 1 and needed <= set(results)
    sets = results["sets"] if whole and isinstance(results["sets"], dict) else {}
    if not sets or not all(isinstance(part, dict) for part in sets.values()):
        raise ProfileError(f"{path} is not a result of this version of wsdino-evaluate: run it again.")
    pictures = {}
    for picture in sorted(folder.glob("pictures/*.png")):
        try:
            groups = read_sheet(picture)
        except OSError as error:
            raise ProfileError(f"{picture} is not a picture that can be read ({error}): remove it.") from None
        pictures[picture.stem] = [
            (title, [(caption, _picture_uri(cell)) for caption, cell in cells]) for title, cells in groups
        ]
    thumbnails = {}
    if dataset is None:
        recorded = results["settings"].get("dataset") if isinstance(results.get("settings"), dict) else None
        recorded = recorded.get("path") if isinstance(recorded, dict) else None
        if isinstance(recorded, str) and Path(recorded).is_dir():
            try:
                thumbnails = load_thumbnails(recorded)
            except ProfileError as error:
                print(f"Without thumbnails: {error}")
    elif dataset:
        thumbnails = load_thumbnails(dataset)
    metrics = {log.parent.name: read_metrics(log) for log in sorted(folder.glob("*/metrics.jsonl"))}
    if results.get("checkpoints"):
        metrics["all channels"] = results["checkpoints"]
    return {
        "name": folder.resolve().name,
        "results": results,
        "metrics": metrics,
        "pictures": pictures,
        "thumbnails": thumbnails,
    }


def load_thumbnails(dataset, size=72):
    """`{treatment: data URI}` of the preview of each treatment's first field in a built dataset's folder."""
    from datasets import Image, load_dataset  # slow to import, and not needed without thumbnails
    from datasets.exceptions import DatasetsError

    # A folder is read as it is: the library's cache knows it by its name and card alone.
    stream = Path(dataset).is_dir()
    try:
        table = load_dataset(str(dataset), "annotated", split="train", streaming=stream)
        rows = iter(table.select_columns(["treatment", "preview"]).cast_column("preview", Image(decode=False)))
        first = {}
        for row in rows:
            first.setdefault(row["treatment"], row["preview"])
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ProfileError(f"{dataset} is not a dataset with treatments and previews ({message}).") from None
    thumbnails = {}
    for treatment, preview in first.items():
        if preview is None:
            continue
        picture = Image().decode_example(preview).convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=80)
        thumbnails[treatment] = _data_uri(buffer.getvalue(), "jpeg")
    return thumbnails


def _ordered(sets):
    return sorted(sets, key=lambda name: (SETS.index(name) if name in SETS else len(SETS), name))


def _interval(scores, prefix, kind="bootstrap"):
    low, high = scores.get(f"{prefix}_{kind}") or (None, None)
    return "" if low is None else f"{100 * low:.0f}–{percent(high, 0)}"


def _score(scores, prefix):
    if scores[prefix] is None:
        return "no query"
    return f"{percent(scores[prefix])} ({scores[f'{prefix}_correct']}/{scores[f'{prefix}_total']})"


def _p_value(value):
    if value is None:
        return "–"
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.2g}"


def _points(share):
    return f"{100 * share:+.1f}\u00a0points"


def _table(head, rows, numeric=()):
    """An HTML table; rows are (class, cells), cells are HTML already; `numeric` names right-aligned columns."""

    def cell(tag, index, text):
        kind = ' class="num"' if index in numeric else ""
        return f"<{tag}{kind}>{text}</{tag}>"

    head = "".join(cell("th", index, escape(text)) for index, text in enumerate(head))
    body = []
    for kind, cells in rows:
        first, *others = cells
        body.append(
            f'<tr class="{kind}"><th scope="row">{first}</th>'
            + "".join(cell("td", index, text) for index, text in enumerate(others, 1))
            + "</tr>"
        )
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="plain">{table}</table></div>'


def _elsewhere(protocol):
    """Of what else NSCB asks for another one, beside the compound: "batch" or "plate"."""
    return "plate" if protocol.get("batch_rule") == "plate" else "batch"


def _headline(runs):
    """The scores of each run's headline set: cards, or above two runs a table, which can be read down a column."""
    if len(runs) > 2:
        rows = [
            ("", [f"<b>{escape(run['name'])}</b>", *[_score_cell(_main(run), p) for p in ("nsc", "nscb")]])
            for run in runs
        ]
        return _table(["Run", "NSC", "NSCB"], rows, numeric=(1, 2))
    cards = []
    for run in runs:
        results = run["results"]
        name = results["headline"]["set"]
        scores = results["sets"][name]
        for prefix, title, what in (
            ("nsc", "NSC", "treatments matched to the right mechanism through another compound"),
            ("nscb", "NSCB", f"the same, through another compound of another {_elsewhere(results['protocol'])}"),
        ):
            label = f"{run['name']}: {title}" if len(runs) > 1 else f"{title}, {name}"
            interval = _interval(scores, prefix)
            others = [
                f"{other} {percent(results['sets'][other][prefix])}"
                for other in _ordered(results["sets"])
                if other != name and results["sets"][other][prefix] is not None
            ]
            cards.append(
                f'<div class="card">{escape(label)}<b>{percent(scores[prefix])}</b>'
                f"<small>{scores[f'{prefix}_correct']} of {scores[f'{prefix}_total']} {what}</small>"
                + (f"<small>95\u00a0% interval {interval} (compounds drawn anew)</small>" if interval else "")
                + (f"<small>for comparison: {escape(', '.join(others))}</small>" if others else "")
                + "</div>"
            )
    return f'<div class="cards">{"".join(cards)}</div>'


def _verdicts(runs):
    """One sentence a comparison: is the headline's set better than what it must beat, or a run than the first?"""
    lines = []
    for title, other, parts in _run_comparisons(runs) if len(runs) > 1 else _set_comparisons(runs[0]):
        found = []
        for prefix in ("nsc", "nscb"):
            part = parts[prefix]
            if part["compared"]:
                sure = part["p_compound"] < 0.05
                word = "not told apart from" if not sure else "better than" if part["difference"] > 0 else "worse than"
                mark = "soft" if not sure else "ok" if part["difference"] > 0 else "miss"
                found.append(
                    f'{prefix.upper()} <b class="{mark}">{word}</b> {escape(other)} '
                    f"({_points(part['difference'])}, {_p_value(part['p_compound'])})"
                )
        if found:
            lines.append(f"<li>{escape(title)}: {'; '.join(found)}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _set_comparisons(run):
    """(set, other set, {prefix: comparison}) of a run: its headline's set against each other one."""
    for comparison in run["results"].get("comparisons", []):
        yield comparison["second"], comparison["first"], comparison


def _run_comparisons(runs):
    """(run, first run, {prefix: comparison}) of the headline's sets of every run but the first."""
    for run in runs[1:]:
        parts = {prefix: compare_sets(_main(runs[0]), _main(run), prefix) for prefix in ("nsc", "nscb")}
        yield run["name"], runs[0]["name"], parts


def _sets_section(runs):
    rows = []
    for run in runs:
        sets = run["results"]["sets"]
        for name in _ordered(sets):
            scores = sets[name]
            title = f"{run['name']}: {name}" if len(runs) > 1 else name
            note = f'<br><span class="soft about">{escape(_SET_NOTES[name])}</span>' if name in _SET_NOTES else ""
            rows.append(
                ("", [f"<b>{escape(title)}</b>{note}", *[_score_cell(scores, p) for p in ("nsc", "nscb")], ""])
            )
            for channel, part in scores["channels"].items():
                ratio = _with_lines(number(part["participation_ratio"]), f"of {part['features']}")
                shares = [_with_lines(_score(part, p), _interval_line(part, p)) for p in ("nsc", "nscb")]
                rows.append(("sub", [escape(channel), *shares, ratio]))
    count = sum(len(run["results"]["sets"]) for run in runs)
    table = _table(["Profiles", "NSC", "NSCB", "dimensions in use"], rows, numeric=range(1, 4))
    return (
        _folded(table, f"{count} sets of profiles, and each channel alone", runs)
        + '<p class="soft">The 95\u00a0% interval draws compounds anew, since treatments of one compound succeed and '
        "fail together. By chance: the mean score with mechanisms dealt at random to compounds, and how often that "
        "scores as well. Dimensions in use: participation ratio of the features before normalization; 1 if they all "
        "vary along one line. Compare it with the untrained network's: brightness alone can bring it near 1.</p>"
    )


def _folded(table, summary, runs):
    """A table that grows with the runs: behind its summary where there are more than two."""
    return f"<details><summary>{summary}</summary>{table}</details>" if len(runs) > 2 else table


def _score_cell(scores, prefix):
    null = scores.get(f"{prefix}_null") or {}
    chance = [f"chance {percent(null.get('null_mean'), 0)},", _p_value(null.get("p_value"))]
    chance = " ".join(f'<span class="whole">{part}</span>' for part in chance)
    return _with_lines(f"<b>{_score(scores, prefix)}</b>", _interval_line(scores, prefix), chance)


def _interval_line(scores, prefix):
    interval = _interval(scores, prefix)
    return f'<span class="about">95\u00a0%: </span><span class="whole">{interval}</span>' if interval else ""


def _with_lines(first, *others):
    """A cell's text and, softer, the lines below it that say something."""
    return first + "".join(f'<br><span class="soft">{line}</span>' for line in others if line)


def _comparison_section(runs):
    of_sets = []
    for run in runs:
        name = f"{run['name']}: " if len(runs) > 1 else ""
        of_sets += [(name + title, other, parts) for title, other, parts in _set_comparisons(run)]
    of_runs, of_sets = _comparison_rows(_run_comparisons(runs)), _comparison_rows(of_sets)
    if not of_runs and not of_sets:
        return ""
    head = ["Comparison", "difference", "gained, lost", "by compound"]
    between = _table(head, of_runs, numeric=range(1, 4)) if of_runs else ""
    within = _table(head, of_sets, numeric=range(1, 4)) if of_sets else ""
    return (
        "<h2 id=comparison>Are the differences real?</h2>"
        + between
        + (within and _folded(within, f"{len(of_sets)} comparisons within the runs", runs))
        + '<p class="soft">Gained, lost: treatments that only the first named, or only the other, got right. By '
        "compound: the two exchanged compound by compound; the one to trust, since one compound often brings several "
        "treatments. Exact: McNemar's test, each changed treatment a fair coin. The p-values are not corrected for "
        "their number: of twenty comparisons without a difference one is below 0.05 by chance.</p>"
    )


def _comparison_rows(comparisons):
    return [
        _comparison_row(f"{title} against {other}", prefix, parts[prefix])
        for title, other, parts in comparisons
        for prefix in ("nsc", "nscb")
        if parts[prefix]["compared"]
    ]


def _comparison_row(title, prefix, part):
    def names(treatments):
        count = len(treatments)
        return f'<span title="{escape(", ".join(treatments))}">{count}</span>' if count else "0"

    return (
        "",
        [
            f'{escape(title)}<br><span class="soft">{prefix.upper()}, {part["compared"]} treatments</span>',
            _points(part["difference"]),
            f"{names(part['gained'])}, {names(part['lost'])}",
            f'{_p_value(part["p_compound"])}<br><span class="soft">exact {_p_value(part["p_exact"])}</span>',
        ],
    )


_MONITORS = (
    ("Loss", (("loss", "loss", "solid"),)),
    ("Teacher's entropy: of a target (solid), of their mean (dashed)", (
        ("teacher_entropy", "a target", "solid"), ("mean_entropy", "their mean", "dashed"))),
    ("KL divergence from teacher to student", (("kl", "KL", "solid"),)),
    ("Dimensions in use (participation ratio)", (("participation_ratio", "participation ratio", "solid"),)),
    ("Learning rate", (("lr", "learning rate", "solid"),)),
    ("Images a second", (("images_per_second", "images a second", "solid"),)),
)  # fmt: skip


def _training_section(runs, window):
    if not any(run["metrics"] for run in runs):
        return ""
    parts = ["<h2 id=training>Did training go well?</h2>"]
    verdicts = []
    for run in runs:
        trained = run["results"].get("training", {})
        for channel, training in sorted(trained.items(), key=lambda item: _channel_key(item[0])):
            collapse = training["collapse"]
            kind = {"healthy": "ok", "collapsed": "miss", "suspect": "miss"}.get(collapse["verdict"], "soft")
            title = f"{run['name']}, {channel}" if len(runs) > 1 else channel
            verdicts.append(
                f'<li>{escape(title)}: <b class="{kind}">{escape(collapse["verdict"])}</b>'
                f"{escape('; '.join(['', *collapse['reasons']]))}</li>"
            )
    parts.append(
        "<p>A falling loss alone proves nothing: a network can lower it by giving every image the same answer. "
        f"The monitors tell that apart.</p><ul>{''.join(verdicts)}</ul>"
    )
    channels = sorted({channel for run in runs for channel in run["metrics"]}, key=_channel_key)
    groups = [(None, channels)] if len(runs) == 1 else [(channel, [channel]) for channel in channels]
    for heading, members in groups:
        charts = []
        for title, fields in _MONITORS:
            series = []
            for run_index, run in enumerate(runs):
                for channel in members:
                    lines = run["metrics"].get(channel, [])
                    tint = colour(run_index if len(runs) > 1 else channels.index(channel))
                    for field, label, style in fields:
                        points = [(line["step"], line[field]) for line in lines if _is_number(line, field)]
                        name = run["name"] if len(runs) > 1 else channel
                        name = f"{name}, {label}" if len(fields) > 1 else name
                        if points:
                            series.append((name, *zip(*points, strict=True), tint, style))
            charts.append(line_chart(title, series))
        for prefix in ("nsc", "nscb"):
            series = []
            for run_index, run in enumerate(runs):
                for channel in members:
                    lines = run["metrics"].get(channel, [])
                    points = [(line["step"], line[prefix]) for line in lines if _is_number(line, prefix)]
                    if points:
                        name = run["name"] if len(runs) > 1 else channel
                        tint = colour(run_index if len(runs) > 1 else channels.index(channel))
                        series.append((name, *zip(*points, strict=True), tint, "solid"))
            charts.append(line_chart(f"{prefix.upper()} during training", series, share=True, legend=True))
        if heading:
            parts.append(f"<h3>{escape(heading)}</h3>")
        parts.append(f'<div class="grid-charts">{"".join(charts)}</div>')
    parts.append(_epochs_section(runs, window))
    return "".join(parts)


def _channel_key(channel):
    order = ("dna", "tubulin", "actin")
    return (order.index(channel) if channel in order else len(order), channel)


def _is_number(line, field):
    """A screen of one batch has no NSCB: training logs NaN for it."""
    values = (line.get(field), line.get("step"))
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _epochs_section(runs, fixed=None, prefix="nscb"):
    """Scores taken during training: the last, the mean over a window fixed beforehand, and the best with its mark."""
    summaries = []
    for channel in sorted({channel for run in runs for channel in run["metrics"]}, key=_channel_key):
        curves = {}
        for run in runs:
            lines = [line for line in run["metrics"].get(channel, []) if _is_number(line, prefix)]
            if lines:
                curves[run["name"]] = [(line.get("epoch", line["step"]), line[prefix]) for line in lines]
        if not curves:
            continue
        # Without a window given, the last quarter of what every run has reached.
        end = min(points[-1][0] for points in curves.values())
        first, last = fixed or (0.75 * end, end)
        curves = {name: points for name, points in curves.items() if any(first <= x <= last for x, _ in points)}
        if curves:
            summaries.append((channel, curves, epoch_curves(curves, (first, last))))
    if not summaries:
        return ""
    windows = [" to ".join(map(number, summary["window"])) for _, _, summary in summaries]
    alike = len(set(windows)) == 1
    rows = []
    for (channel, curves, summary), window in zip(summaries, windows, strict=True):
        for name, seed in summary["seeds"].items():
            title = f"{channel}, {name}" if len(runs) > 1 else channel
            last = curves[name][-1]
            rows.append(
                (
                    "",
                    [
                        escape(title),
                        f"{percent(last[1])} at {number(last[0])}",
                        _with_lines(percent(seed["window_mean"]), "" if alike else f"epochs {window}"),
                        f"{percent(seed['best'])} at {number(seed['best_epoch'])}"
                        f'<br><span class="miss">{escape(summary["best_note"])}</span>',
                    ],
                )
            )
        if len(curves) > 1:
            spread = f"{percent(summary['window_mean'])} ± {number(100 * summary['window_sd'])}"
            rows.append(("sub", [f"{escape(channel)}, all runs: mean ± SD", "", spread, ""]))
    head = ["", "last epoch", f"mean of epochs {windows[0]}" if alike else "mean of a window", "best epoch"]
    title = f"{prefix.upper()} while training, of one channel or, from checkpoints, of all"
    return f"<h3>{title}</h3>" + _table(head, rows, numeric=(1, 2, 3))


def _held_out_section(runs):
    """Compounds that training did not see: a row a run, and their sum over leave-one-compound-out runs."""
    rows, sums = [], Counter()
    for run in runs:
        part = _main(run).get("held_out")
        if part:
            counts = [f"{part[f'{prefix}_correct']}/{part[f'{prefix}_total']}" for prefix in ("nsc", "nscb")]
            title = ", ".join(part["compounds"])
            rows.append(("", [escape(f"{run['name']}: {title}" if len(runs) > 1 else title), *counts]))
            sums.update({key: value for key, value in part.items() if key != "compounds"})
    if not rows:
        return ""
    if len(rows) > 1:
        shares = [
            f"{percent(sums[f'{prefix}_correct'] / sums[f'{prefix}_total']) if sums[f'{prefix}_total'] else '–'} "
            f"({sums[f'{prefix}_correct']}/{sums[f'{prefix}_total']})"
            for prefix in ("nsc", "nscb")
        ]
        rows.append(("sub", ["all runs together", *shares]))
    return "<h3>Compounds kept out of training</h3>" + _table(["Compounds", "NSC", "NSCB"], rows, numeric=(1, 2))


def _measures_section(runs):
    rows, retrieval = [], False
    for run in runs:
        for name in _ordered(run["results"]["sets"]):
            scores = run["results"]["sets"][name]
            if "reproducibility" not in scores:
                continue
            title = f"{run['name']}: {name}" if len(runs) > 1 else name
            replicates, effect, five = (scores[key] for key in ("reproducibility", "batch_effect", "five_nearest"))
            before, after = effect["before"], effect["after"]
            cells = [
                escape(title),
                _with_lines(percent(five["nsc"]), percent(five["nscb"])),
                _with_lines(percent(replicates["share"]), f"{replicates['replicating']}/{replicates['treatments']}"),
                _change(before["variance_explained"], after["variance_explained"], after["expected_variance"]),
                _change(before["neighbour_share"], after["neighbour_share"], after["expected_neighbour"]),
            ]
            found = scores.get("retrieval")
            retrieval = retrieval or bool(found)
            for kind in ("replicate", "moa"):
                part = found and found[kind]
                cells.append(
                    f"{number(part['map'])}<br><span class=soft>{percent(part['significant'], 0)} significant</span>"
                    if part
                    else "–"
                )
            rows.append(("", cells))
    if not rows:
        return ""
    head = [
        "Profiles",
        "five nearest vote: NSC, NSCB",
        "replicates agree",
        "batch in the variance",
        "batch in the neighbours",
    ]
    head += ["mAP, replicates", "mAP, mechanisms"]
    if not retrieval:
        head, rows = head[:5], [(kind, cells[:5]) for kind, cells in rows]
    return (
        "<h2 id=measures>Other measures</h2>"
        + _folded(_table(head, rows, numeric=range(1, 7)), f"{len(rows)} sets of profiles", runs)
        + '<p class="soft">Replicates agree: treatments whose plates are more alike than 95 in 100 sets of plates '
        "of different treatments. Batch: how much of the variance of DMSO fields lies between batches, and how "
        "often a DMSO field's nearest neighbour is of its own batch, before and after normalization, on fields it "
        "was not fitted to; the nearer to chance, the better. Plates and wells that look alike count as their "
        "batch.</p>"
    )


def _change(before, after, chance):
    before = "–" if before is None else f"{100 * before:.0f}"
    values = f"{before} → {percent(after, 0)}"
    return _with_lines(f'<span class="whole">{values}</span>', f"chance {percent(chance, 0)}")


def _moa_section(runs):
    parts = ["<h2 id=mechanisms>Which mechanisms are recognised?</h2>"]
    rows, legend = [], []
    for prefix in ("nsc", "nscb"):
        for run_index, run in enumerate(runs):
            index = run_index * 2 + (prefix == "nscb")
            legend.append((f"{run['name']}, {prefix.upper()}" if len(runs) > 1 else prefix.upper(), colour(index)))
    names = sorted({moa for run in runs for moa in _main(run)["moas"]})
    for moa in names:
        values = []
        for prefix in ("nsc", "nscb"):
            for run_index, run in enumerate(runs):
                part = _main(run)[f"{prefix}_per_moa"].get(moa)
                tint = colour(run_index * 2 + (prefix == "nscb"))
                if part is None or not part["total"]:
                    values.append((None, "left out", tint))
                else:
                    values.append((part["accuracy"], f"{part['correct']}/{part['total']}", tint))
        rows.append((moa, values))
    parts.append(bars(rows, legend))
    parts.append(
        '<p class="soft">Left out of NSCB: mechanisms that occur in one batch, where no other batch could hold '
        "a match.</p>"
    )
    parts.append("<h3>What is taken for what</h3>")
    tables = []
    for run in runs:
        for prefix in ("nsc", "nscb"):
            scores = _main(run)
            title = f"{run['name']}, {prefix.upper()}" if len(runs) > 1 else prefix.upper()
            k = run["results"]["protocol"].get("k", 1)
            columns = "that of the nearest neighbour" if k == 1 else f"the vote of its {k} nearest neighbours"
            title += f": rows the true mechanism, columns {columns}, numbered alike"
            tables.append(confusion_table(scores["moas"], scores[f"{prefix}_confusion"], title))
    parts.append(f'<div class="two">{"".join(tables)}</div>')
    return "".join(parts)


def _main(run):
    return run["results"]["sets"][run["results"]["headline"]["set"]]


def _map_section(run, several):
    scores = _main(run)
    if not scores.get("map"):
        return ""
    points, batches = [], Counter()
    for name, batch, query, (x, y) in zip(
        scores["treatments"], scores["batches"], scores["nsc_queries"], scores["map"], strict=True
    ):
        shown = batch if "|" not in batch else "several batches"
        batches[shown] += 1
        label = f"{name}\n{query['moa']}\n{batch.replace('|', ', ')}"
        points.append({"x": x, "y": y, "label": label, "moa": query["moa"], "batch": shown})
    categories = [
        ("moa", "mechanism", scores["moas"]),
        ("batch", "batch", sorted(batches, key=lambda name: (len(name), name))),
    ]
    title = f"<h3>{escape(run['name'])}</h3>" if several else ""
    return (
        f'{title}<p class="soft">{escape(scores["map_method"])} of the treatments. Islands of one mechanism are good; '
        "islands of one batch are not.</p>" + scatter_map(points, categories)
    )


def _neighbour_section(run, index, several):
    scores = _main(run)
    thumbnails = run["thumbnails"]
    rows = []
    for row, (name, nsc, nscb) in enumerate(
        zip(scores["treatments"], scores["nsc_queries"], scores["nscb_queries"], strict=True)
    ):
        cells = [_entry(f"{escape(name)}<br><span class=soft>{escape(nsc['moa'])}</span>", thumbnails.get(name))]
        for query in (nsc, nscb):
            cells.append(_neighbour_cell(query, scores["treatments"], thumbnails))
        missed = int(
            (nsc["excluded"] is None and not nsc["correct"]) or (nscb["excluded"] is None and not nscb["correct"])
        )
        rows.append(
            f'<tr data-miss="{missed}" data-row="{row}"><th scope="row">{cells[0]}</th>'
            f"<td>{cells[1]}</td><td>{cells[2]}</td></tr>"
        )
    identifier = f"neighbours-{index}"
    title = f"{escape(run['name'])}: " if several else ""
    return (
        f"<details{'' if several else ' open'}><summary>{title}{len(rows)} treatments</summary>"
        f'<p class="filter" data-table="{identifier}"><button type="button" data-show="all" aria-pressed="true">all'
        "</button>"
        '<button type="button" data-show="miss" aria-pressed="false">missed only</button> '
        '<input type="search" placeholder="search treatments, mechanisms" aria-label="Search"></p>'
        f'<div class="scroll"><table class="plain neighbours" id="{identifier}"><thead><tr><th>Treatment</th>'
        "<th>Nearest, other compound (NSC)</th>"
        f"<th>Nearest, other compound and {_elsewhere(run['results']['protocol'])} (NSCB)</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _neighbour_cell(query, treatments, thumbnails):
    if query["excluded"] is not None:
        return f'<span class="soft">left out: {escape(query["excluded"])}</span>'
    if query["neighbour"] is None:
        return '<span class="miss">no neighbour: the profile has no direction</span>'
    name = treatments[query["neighbour"]]
    mark = '<span class="ok">✓</span>' if query["correct"] else '<span class="miss">✗</span>'
    note = f"{escape(query['neighbour_moa'])}, {number(query['similarity'])}"
    if "neighbours" in query:  # the mark is the vote's, which the nearest may have lost
        note += f"; vote: {escape(query['predicted'])}"
    return _entry(f"{mark} {escape(name)}<br><span class=soft>{note}</span>", thumbnails.get(name))


def _entry(text, picture):
    """A name beside its thumbnail, where there is one."""
    return (
        f'<div class="entry"><img src="{picture}" alt="" loading="lazy"><span>{text}</span></div>' if picture else text
    )


def _pictures_section(runs):
    figures = []
    for kind, title in (("fields", "Example fields"), ("attention", "Where the network looks"), ("", "More pictures")):
        for run in runs:
            for stem, groups in sorted(run["pictures"].items(), key=lambda item: _channel_key(item[0].split("_")[-1])):
                own = stem.split("_")[0] if stem.split("_")[0] in ("fields", "attention") else ""
                if own == kind:
                    channel = stem.partition("_")[2] or stem
                    caption = f"{title}: {channel}" if kind else stem
                    caption = f"{run['name']}, {caption}" if len(runs) > 1 else caption
                    figures.append(_sheet(caption, groups))
    if not figures:
        return ""
    about = (
        '<p class="soft">Attention: of the last block\'s class token to each patch, head by head, each map from its '
        "smallest value (black) to its largest (white). The mass: 60\u00a0% of the heads' mean attention, in as few "
        "patches as hold it. Fields are shown with the square root of intensity; a click enlarges a picture.</p>"
    )
    return f"<h2 id=pictures>What the network sees</h2>{about}{''.join(figures)}"


def _sheet(caption, groups):
    """A sheet's pictures, each with its title as text; one that has no titles is shown whole."""
    parts = [f"<h3>{escape(caption)}</h3>"]
    for title, cells in groups:
        whole = len(groups) == 1 and len(cells) == 1
        figures = [
            f'<figure><img src="{uri}" alt="{escape(f"{caption}, {title} {name}".strip(", "))}" loading="lazy">'
            + (f"<figcaption>{escape(name)}</figcaption>" if name else "")
            + "</figure>"
            for name, uri in cells
        ]
        parts.append(f'<p class="group">{escape(title)}</p>' if title else "")
        size = " whole" if whole else " small" if title else ""
        parts.append(f'<div class="pictures{size}">{"".join(figures)}</div>')
    return "".join(parts)


def _flatten(value, prefix=""):
    if isinstance(value, dict) and value:
        flat = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}{key}."))
        return flat
    return {prefix.rstrip("."): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _differing_protocols(runs):
    """A sentence where the runs' scores were computed in different ways."""
    columns = [_flatten(run["results"]["protocol"]) for run in runs]
    found = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = list(dict.fromkeys(column.get(key, "–") for column in columns))
        if len(values) > 1:
            found.append(f"{key}: {', '.join(values)}")
    if not found:
        return []
    return [f"The runs were scored differently ({'; '.join(found)}): their scores are not of one kind."]


def _settings_section(runs):
    columns = []
    for run in runs:
        results = run["results"]
        settings = {"protocol": results["protocol"], "counts": results["counts"], "sources": results["sources"]}
        columns.append(
            _flatten({**settings, "settings": results.get("settings"), "evaluated with": results["versions"]})
        )
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "–") for column in columns]
        differs = "differs" if len(set(values)) > 1 else ""
        rows.append((differs, [escape(key), *[escape(value) for value in values]]))
    body = _table(["", *[run["name"] for run in runs]], rows)
    return f"<h2 id=settings>Settings and versions</h2><details><summary>{len(rows)} entries</summary>{body}</details>"


def render_report(runs, window=None):
    """The page's HTML text, for runs as `load_run` gives them (at least one); `window`: see `wsdino-report --help`."""
    several = len(runs) > 1
    title = (
        " and ".join([", ".join(run["name"] for run in runs[:-1]), runs[-1]["name"]]) if several else runs[0]["name"]
    )
    parts = [f"<h1>WS-DINO: {escape(title)}</h1>"]
    simulated = [run["name"] for run in runs if run["results"]["simulated"]]
    if simulated:
        whose = "" if len(simulated) == len(runs) else f" ({', '.join(simulated)})"
        parts.append(
            f'<p class="banner">SIMULATED DATA{escape(whose)}: these images were drawn by a program. '
            "The figures below say nothing about real cells or compounds.</p>"
        )
    counts = runs[0]["results"]["counts"]
    parts.append(
        f'<p class="soft">{counts["scored_treatments"]} treatments of {counts["compounds"]} compounds with '
        f"{counts['moas']} mechanisms of action, {number(counts['fields'])} fields on {counts['plates']} plates in "
        f"{counts['batches']} batches{' (first run)' if several else ''}.</p>"
    )
    sections = [
        (
            "sets",
            "Scores",
            "<h2 id=sets>Scores, and what they are compared with</h2>" + _sets_section(runs) + _held_out_section(runs),
        ),
        ("comparison", "Differences", _comparison_section(runs)),
        ("measures", "Measures", _measures_section(runs)),
        ("training", "Training", _training_section(runs, window)),
        ("mechanisms", "Mechanisms", _moa_section(runs)),
        ("map", "Map", "".join(["<h2 id=map>Map of treatments</h2>", *[_map_section(run, several) for run in runs]])),
        ("pictures", "Pictures", _pictures_section(runs)),
        (
            "neighbours",
            "Neighbours",
            "".join(
                [
                    "<h2 id=neighbours>Nearest neighbour of each treatment</h2>",
                    *[_neighbour_section(run, index, several) for index, run in enumerate(runs)],
                ]
            ),
        ),
        ("settings", "Settings", _settings_section(runs)),
    ]
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label, text in sections if text)
    parts.append(f"<nav>{links}</nav>")
    parts.append(_headline(runs))
    parts.append(_verdicts(runs))
    notes = dict.fromkeys(
        f"{run['name']}: {note}" if several else note for run in runs for note in run["results"].get("notes", [])
    )
    notes |= dict.fromkeys(_differing_protocols(runs))
    parts += [f'<p class="banner">{escape(note)}</p>' for note in notes]
    left = all(run["results"]["headline"]["set"] == "trained" for run in runs)
    protocol = runs[0]["results"]["protocol"]  # of runs that differ in it a banner says so
    k = protocol.get("k", 1)
    parts.append(
        '<p class="note">'
        + ("The headline is the network as training left it; no epoch was chosen by its score. " if left else "")
        + "NSC (not same compound) asks whether "
        + ("the treatment most alike" if k == 1 else f"the vote of the {k} treatments most alike")
        + ", among all other compounds, has the same mechanism of action; NSCB asks it of other compounds "
        + (
            "in other batches, where batch effects cannot help.</p>"
            if _elsewhere(protocol) == "batch"
            else "on other plates, which may be of the same batch.</p>"
        )
    )
    parts += [text for _, _, text in sections]
    folder = files(__package__)
    style = folder.joinpath("report.css").read_text(encoding="utf-8")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>WS-DINO: {escape(title)}{' (simulated data)' if simulated else ''}</title>"
        f"<style>\n{style}</style></head>\n<body><main>\n{''.join(part + chr(10) for part in parts)}</main>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def write_report(run_folders, output=None, dataset=None, window=None):
    """Write the page about one or several run folders; returns its path (default: report.html in the first folder)."""
    runs = [load_run(folder, dataset) for folder in tqdm(run_folders, desc="Reading", unit="run", disable=None)]
    names = Counter(run["name"] for run in runs)
    for run, folder in zip(runs, run_folders, strict=True):
        if names[run["name"]] > 1:
            run["name"] = str(folder)
    output = Path(output) if output else Path(run_folders[0]) / "report.html"
    partial = output.with_name(output.name + ".partial")
    try:
        page = render_report(runs, window)
    except KeyError as error:
        paths = ", ".join(str(Path(folder) / "results.json") for folder in run_folders)
        raise ProfileError(f"{paths} lacks the entry {error}: run wsdino-evaluate again.") from error
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, output)
    return output


def main(argv=None):
    """The command `wsdino-report RUN [RUN ...]`."""
    parser = argparse.ArgumentParser(
        prog="wsdino-report",
        description="Write one self-contained HTML page about one run, or a comparison of several.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder with a results.json (wsdino-evaluate)")
    parser.add_argument("--output", help="file to write (default: report.html in the first run folder)")
    parser.add_argument(
        "--dataset", help="folder of the dataset, for thumbnails (default: the one in the run's settings)"
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("FIRST", "LAST"),
        help="epochs over which scores during training are averaged (default: the last quarter)",
    )
    parser.add_argument("--no_thumbnails", action="store_true", help="leave the treatments' pictures out")
    arguments = parser.parse_args(argv)
    try:
        if arguments.dataset and not Path(arguments.dataset).is_dir():
            raise ProfileError(
                f"--dataset {arguments.dataset} is not a folder: name the dataset that the run was made of."
            )
        if arguments.window and not 0 <= arguments.window[0] <= arguments.window[1]:
            raise ProfileError("--window takes the first and the last epoch, the first not above the last.")
        dataset = False if arguments.no_thumbnails else arguments.dataset
        path = write_report(arguments.runs, arguments.output, dataset, arguments.window)
    except (ProfileError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
