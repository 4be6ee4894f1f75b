"""The metric's page as a Space: a CSV of treatments in, NSC and NSCB out (run by Gradio, which Spaces install)."""

import csv

from not_same_compound import not_same_compound

HELP = (
    "A CSV with the columns `moa`, `compound` and `batch`, one row a treatment; every other column that holds numbers "
    "alone is a feature. A treatment seen in several batches names them joined by `|`."
)


def read_table(path):
    """(features, moas, compounds, batches) of a CSV as HELP describes it; ValueError says what is missing."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = reader.fieldnames or []
    for name in ("moa", "compound", "batch"):
        if name not in names:
            raise ValueError(f"The CSV has no column {name}: {HELP}")
    if not rows:
        raise ValueError("The CSV has no rows below its header.")
    features = []
    for name in names:
        if name in ("moa", "compound", "batch"):
            continue
        try:
            features.append([float(row[name]) for row in rows])
        except (TypeError, ValueError):
            continue  # a column of names, such as the treatment
    if not features:
        raise ValueError("The CSV has no column of numbers.")
    labels = [[row[name] or "" for row in rows] for name in ("moa", "compound", "batch")]
    return [list(values) for values in zip(*features, strict=True)], *labels


def score_file(path, metric="cosine", batch_rule="median"):
    """Markdown with both scores, and rows of (treatment's row, MOA, compound, NSC neighbour, NSCB neighbour)."""
    features, moas, compounds, batches = read_table(path)
    result = not_same_compound(features, moas, compounds, batches, metric=metric, batch_rule=batch_rule)
    lines = []
    for prefix in ("nsc", "nscb"):
        share = f"{result[prefix]:.1%}" if result[f"{prefix}_total"] else "no query"
        count = (
            f"{result[f'{prefix}_correct']} of {result[f'{prefix}_total']}, {result[f'{prefix}_excluded']} left out"
        )
        lines.append(f"**{prefix.upper()} {share}** ({count})")
    table = []
    for nsc, nscb in zip(result["nsc_queries"], result["nscb_queries"], strict=True):
        cells = [query["excluded"] or f"{query['neighbour_compound']}: {query['predicted']}" for query in (nsc, nscb)]
        table.append([nsc["row"] + 1, nsc["moa"], nsc["compound"], *cells])
    return "\n\n".join(lines), table


def main():
    try:
        import gradio
    except ImportError:
        raise SystemExit("This page is run by Gradio, which is not installed: pip install gradio.") from None

    def run(file, metric, batch_rule):
        try:
            return score_file(file, metric, batch_rule)
        except (ValueError, OSError, UnicodeDecodeError) as error:
            raise gradio.Error(str(error)) from None

    gradio.Interface(
        run,
        [
            gradio.File(label="CSV", file_types=[".csv"], type="filepath"),
            gradio.Dropdown(["cosine", "correlation", "euclidean"], value="cosine", label="metric"),
            gradio.Dropdown(["median", "joined", "disjoint"], value="median", label="batch_rule"),
        ],
        [
            gradio.Markdown(),
            gradio.Dataframe(headers=["row", "MOA", "compound", "nearest (NSC)", "nearest (NSCB)"]),
        ],
        title="Not same compound (and batch)",
        description=HELP,
    ).launch()


if __name__ == "__main__":
    main()
