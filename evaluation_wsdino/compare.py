"""One table of many profiles of one screen, all scored alike, and the command `wsdino-compare RUN... PROFILES...`.

Each row is a run's profile set, a table of another program, or several of them side by side; several seeds of a row
count as one. All rows are cut to the plates, wells and sites that they share, and go through the same TVN,
aggregation and metric. A score is a mean over treatments, with an interval by compound; two rows are compared on the
same treatments, exchanged compound by compound.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from wsdino.errors import UserError, command
from wsdino.files import write_text
from wsdino.run_folder import RunFolder
from wsdino.settings import parse_settings, setting

from .measures import mechanism_precision, replicate_precision
from .profile_table import PLACE, TableSettings, feature_columns, place_of, read_profiles
from .profiles import normalize_profiles
from .results import headline_set, profile_files
from .scores import ONE_THREAD_BELOW, Protocol, answers, control_batch_effect, labelled_treatments, score_treatments
from .uncertainty import bootstrap_interval, exchange_p

ALL = "all"
MEASURES = {
    "nsc": "NSC",
    "nscb": "NSCB",
    "moa_map": "MOA mAP",
    "replicate_map": "replicate mAP",
    "batch_mixing": "batch mixing",
}


@dataclass
class CompareSettings(Protocol, TableSettings):
    """Settings of `wsdino-compare`."""

    rows: list[str] = setting(
        [],
        "Rows of the table: run folders (their trained set) and profile tables, as SOURCE or NAME=SOURCE; several "
        "seeds of one row as NAME=SOURCE,SOURCE.",
    )
    concatenate: list[str] = setting([], "Further rows: rows by name, side by side, as A+B.")
    reference: str | None = setting(None, "Name of the row that the others are compared with; the first by default.")
    output: str = setting("comparison", "Where to write: <output>.csv and <output>.md.")


@dataclass
class Row:
    """One row of the comparison.

    Attributes
    ----------
    name : str
    tables : list of pandas.DataFrame
        Of each seed, the profiles as `read_profiles` gives them; of a concatenation none.
    parts : list of Row
        What a concatenation is made of.
    """

    name: str
    tables: list[pd.DataFrame] = field(default_factory=list)
    parts: list["Row"] = field(default_factory=list)

    def normalized(self, protocol: Protocol) -> list[pd.DataFrame]:
        """The normalized profiles of each seed; a single seed stands beside each seed of the other parts."""
        if not self.parts:
            return [normalize_profiles(table, protocol.normalizer()) for table in self.tables]
        of_parts = [part.normalized(protocol) for part in self.parts]
        seeds = max(map(len, of_parts))
        if any(len(tables) not in (1, seeds) for tables in of_parts):
            raise UserError(f"--concatenate {self.name}: the rows have different numbers of seeds.")
        return [side_by_side([tables[seed % len(tables)] for tables in of_parts], self.parts) for seed in range(seeds)]


def side_by_side(tables: list[pd.DataFrame], rows: list[Row]) -> pd.DataFrame:
    """Normalized profiles of several rows as one table, each divided by its root mean square so that all count alike.

    The channels are named `<row>:<channel>`. Where one has no sites, fields are averaged within a well.
    """
    place = [name for name in PLACE if all(name in table for table in tables)]
    metadata, features = None, []
    for table, row in zip(tables, rows, strict=True):
        keys = list(place_of(table, tuple(place)))
        columns = [name for name in table if not name.startswith("Metadata_")]
        values = table[columns] / np.sqrt((table[columns] ** 2).to_numpy().sum(axis=1).mean() or 1.0)
        features.append(values.groupby(pd.Index(keys)).mean().add_prefix(f"{row.name}:"))
        if metadata is None:
            metadata = table.drop(columns=columns).groupby(pd.Index(keys)).first()
    return pd.concat([metadata, *features], axis=1, join="inner").reset_index(drop=True)


def read_rows(settings: CompareSettings) -> tuple[list[Row], list[str]]:
    """The rows that the settings name, cut to what they share, and sentences about what was left out.

    Raises
    ------
    UserError
        A source cannot be read, two rows have one name, a concatenation names no row, or rows share no field.
    """
    if not settings.rows:
        raise UserError("Name what to compare: wsdino-compare RUN... PROFILES...")
    rows, notes, labels = {}, [], None
    for words in settings.rows:
        name, _, sources = words.rpartition("=")
        tables = []
        for source in sources.split(","):
            path = _profiles_of(Path(source))
            table = read_profiles(path, settings, labels, relabel=True)
            labels = table if labels is None else labels
            if note := table.attrs.pop("note", None):
                notes.append(f"{path}: {note}")
            tables.append(table)
        name = name or (Path(sources).name if Path(sources).is_dir() else Path(sources).name.partition(".")[0])
        if name in rows:
            raise UserError(f"Two rows are called {name}: name them apart, as NAME={sources}.")
        rows[name] = Row(name, tables)
    notes += _cut(list(rows.values()))
    for words in settings.concatenate:
        unknown = [name for name in words.split("+") if name not in rows]
        if unknown:
            raise UserError(f"--concatenate {words}: there is no row {unknown[0]}, only {', '.join(rows)}.")
        rows[words] = Row(words, parts=[rows[name] for name in words.split("+")])
    return list(rows.values()), notes


def _profiles_of(path: Path) -> Path:
    """The file of a source: a run folder's headline set, or the table itself."""
    run = RunFolder(path)
    if not run.profiles.is_dir():
        return path
    files = profile_files(run)
    return files[headline_set(files)]


def _cut(rows: list[Row]) -> list[str]:
    """Cut every table to the fields (or, where a table has no sites, wells) that all share; what each lost."""
    tables = [(row, index, table) for row in rows for index, table in enumerate(row.tables)]
    place = tuple(name for name in PLACE if all(name in table for _, _, table in tables))
    places = [place_of(table, place) for _, _, table in tables]
    shared = places[0]
    for other in places[1:]:
        shared = shared[shared.isin(other)]
    if not len(shared):
        raise UserError(f"The rows share no {', '.join(name.removeprefix('Metadata_').lower() for name in place)}.")
    notes = []
    for (row, index, table), own in zip(tables, places, strict=True):
        kept = own.isin(shared)
        row.tables[index] = table[kept].reset_index(drop=True)
        if not kept.all():
            notes.append(f"{row.name}: {(~kept).sum()} of {len(table)} rows left out, which not all rows have.")
    return list(dict.fromkeys(notes))


def compare_rows(
    rows: Iterable[Row], protocol: Protocol, reference: str | None = None, progress: bool = True
) -> pd.DataFrame:
    """Every measure of every row, of all channels together and each alone.

    Parameters
    ----------
    rows : iterable of Row
        All of the same fields.
    reference : str, optional
        The row that the others are compared with; the first if not given.

    Returns
    -------
    pandas.DataFrame
        row, channels ("all" or one), seeds, measure (nsc, nscb, moa_map, replicate_map, batch_mixing), scored
        (treatments; of batch mixing, fields), value (a mean over treatments and seeds, 0 to 1), low and high (95 %, by
        compound), sd (between seeds, nan for one), difference and p (against the reference's same channels, or all
        where it lacks them; nan in its own lines). Batch mixing is the share of DMSO fields whose nearest neighbour
        is of the same batch, after TVN, on fields it was not fitted on.
    """
    rows = list(rows)
    names = [row.name for row in rows]
    reference = reference or names[0]
    if reference not in names:
        raise UserError(f"--reference {reference} is no row: name one of {', '.join(names)}.")
    found = {}
    for row in tqdm(rows, desc="Scoring", unit="row", disable=None if progress else True):
        found[row.name] = _measured(row, protocol)
    lines = []
    for name, channels in found.items():
        for channel, measures in channels.items():
            for measure, (values, compounds) in measures.items():
                line = {"row": name, "channels": channel, "seeds": values.shape[1], "measure": measure}
                line |= _summary(values, compounds)
                basis = found[reference].get(channel, found[reference][ALL])
                if name != reference and measure in basis and compounds is not None:
                    line |= _difference(values, basis[measure][0], compounds)
                lines.append(line)
    return pd.DataFrame(lines, columns=["row", "channels", "seeds", "measure", "scored", "value", "low", "high", "sd",
                                        "difference", "p"])  # fmt: skip


def _measured(row: Row, protocol: Protocol) -> dict[str, dict]:
    """`{channels: {measure: (values, compounds)}}`; values (treatments, seeds), or (1, seeds) without compounds."""
    seeds = []
    for number, normalized in enumerate(row.normalized(protocol)):
        with threadpool_limits(1 if normalized.size < ONE_THREAD_BELOW else None):
            groups = feature_columns(normalized)
            metadata = [name for name in normalized if name.startswith("Metadata_")]
            chosen = {ALL: list(groups)} | (
                {name: [name] for name in groups} if len(groups) > 1 and not row.parts else {}
            )
            raw = None if row.parts else row.tables[number]
            seeds.append({})
            for channel, names in chosen.items():
                columns = metadata + [column for name in names for column in groups[name]]
                of_raw = None if raw is None else raw[_columns_of(raw, names)]
                seeds[-1][channel] = _measures(normalized[columns], of_raw, protocol)
    compounds = normalized.groupby("Metadata_Treatment")["Metadata_Compound"].first()
    found = {}
    for channel in seeds[0]:
        found[channel] = {}
        for measure in seeds[0][channel]:
            values = [seed[channel][measure] for seed in seeds if channel in seed]
            if isinstance(values[0], pd.Series):
                table = pd.concat(values, axis=1, join="inner")
                found[channel][measure] = (table, compounds[table.index])
            else:
                found[channel][measure] = (pd.DataFrame([values]), None)
    return found


def _columns_of(table: pd.DataFrame, channels: list[str]) -> list[str]:
    metadata = [name for name in table if name.startswith("Metadata_")]
    return metadata + [column for name in channels for column in feature_columns(table)[name]]


def _measures(normalized: pd.DataFrame, raw: pd.DataFrame | None, protocol: Protocol) -> dict[str, pd.Series | float]:
    """Each measure of one seed: by treatment, and batch mixing as one number."""
    found = {}
    treatments = labelled_treatments(normalized, protocol.unit)
    if len(treatments):
        scores = score_treatments(treatments, **protocol.metric_options())
        scores["treatments"] = treatments["Metadata_Treatment"].tolist()
        for prefix in ("nsc", "nscb"):
            correct = {name: float(answer) for name, (answer, _) in answers(scores, prefix).items()}
            found[prefix] = pd.Series(correct, dtype=np.float64)
        found["moa_map"] = mechanism_precision(treatments, protocol.moa_separator)
    found["replicate_map"] = replicate_precision(normalized)
    if raw is not None:
        found["batch_mixing"] = control_batch_effect(raw, protocol.normalizer())["after"]["neighbour_share"]
    return found


def _summary(values: pd.DataFrame, compounds: pd.Series | None) -> dict:
    """Mean over treatments and seeds, its interval by compound, and the SD between seeds."""
    of_seeds = values.mean()
    line = {"value": of_seeds.mean(), "sd": of_seeds.std(ddof=1)}
    if compounds is not None:
        line["scored"] = len(values)
        line["low"], line["high"] = bootstrap_interval(values.mean(axis=1), compounds)
    return line


def _difference(values: pd.DataFrame, basis: pd.DataFrame, compounds: pd.Series) -> dict:
    """Mean difference to the reference over the treatments of both, and its p-value by compound."""
    difference = (values.mean(axis=1) - basis.mean(axis=1)).dropna()
    return {"difference": difference.mean(), "p": exchange_p(difference, compounds[difference.index])}


def format_markdown(table: pd.DataFrame, notes: Iterable[str] = ()) -> str:
    """The comparison as a Markdown table, one line per row and channels, in per cent."""
    measures = [name for name in MEASURES if (table["measure"] == name).any()]
    lines = [
        f"| profiles | channels | {' | '.join(MEASURES[name] for name in measures)} |",
        f"|---|---|{'---|' * len(measures)}",
    ]
    for (name, channels), part in table.groupby(["row", "channels"], sort=False):
        of_measure = part.set_index("measure")
        cells = [_cell(of_measure.loc[measure]) if measure in of_measure.index else "–" for measure in measures]
        seeds = f" ({part['seeds'].iloc[0]} seeds)" if part["seeds"].iloc[0] > 1 else ""
        lines.append(f"| {name}{seeds} | {channels} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *[f"- {note}" for note in notes]])


def _cell(line: pd.Series) -> str:
    """`41.7 ± 1.2 (30–53); +3.1, p = 0.04`."""
    if not np.isfinite(line["value"]):
        return "–"
    text = f"{100 * line['value']:.1f}"
    if np.isfinite(line["sd"]):
        text += f" ± {100 * line['sd']:.1f}"
    if np.isfinite(line["low"]):
        text += f" ({100 * line['low']:.0f}–{100 * line['high']:.0f})"
    if np.isfinite(line["difference"]):
        p = "p < 0.001" if line["p"] < 0.001 else f"p = {line['p']:.2g}"
        text += f"; {100 * line['difference']:+.1f}, {p}"
    return text


@command("wsdino-compare")
def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-compare RUN... PROFILES...`."""
    settings = parse_settings(
        CompareSettings, argv, prog="wsdino-compare", positional=("rows",),
        description="Score runs and profile tables of one screen under one protocol, each with intervals and "
        "differences to a reference, and write the table as CSV and Markdown.",
    )  # fmt: skip
    rows, notes = read_rows(settings)
    table = compare_rows(rows, settings, settings.reference)
    words = f"Mean (95 % interval by compound); difference to {settings.reference or rows[0].name}, p by compound. "
    protocol = "; ".join(f"{name}: {value}" for name, value in settings.description().items())
    text = format_markdown(table, [*notes, words + protocol + "."])
    print(text)
    write_text(f"{settings.output}.csv", table.to_csv(index=False))
    write_text(f"{settings.output}.md", text + "\n")
    print(f"Written: {settings.output}.csv, {settings.output}.md")


if __name__ == "__main__":
    main()
