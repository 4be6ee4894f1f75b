"""Rules that the columns of a table must keep; every refusal names the file, the line and the column."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from wsdino.errors import UserError

from .tables import FILE, LINE, over_distinct

UNFIT = re.compile(r"[/\\\x00-\x1f]|^\.\.?$")  # for a file's name
MOST_WHOLE = 2**31 - 1  # the dataset's columns of whole numbers are int32


class TableRules:
    """A table of text, checked column by column.

    Parameters
    ----------
    table : pandas.DataFrame
        Cells are text. The columns `_file` and `_line`, where present, say where each row came from.
    path : path
        The table's file, where the rows do not name theirs; their lines are then counted from 2.
    """

    def __init__(self, table: pd.DataFrame, path: str | Path):
        self.table, self.path = table.reset_index(drop=True), str(path)
        self.lines = self.table[LINE] if LINE in self.table else pd.Series(np.arange(len(self.table)) + 2)
        self.files = self.table[FILE].astype(str) if FILE in self.table else pd.Series(self.path, self.table.index)

    def place(self, row: int) -> str:
        """File and line of a row, by its position."""
        return f"{self.files[row]}, line {self.lines[row]}"

    def refuse(self, bad: pd.Series, sentence: str | Callable[[int], str]) -> None:
        """Raise a `UserError` about the first row where `bad` is true."""
        if bad.any():
            row = int(bad.to_numpy().argmax())
            raise UserError(f"{self.place(row)}: {sentence if isinstance(sentence, str) else sentence(row)}")

    def require(self, columns: Iterable[str]) -> None:
        """Refuse a table that lacks one of these columns."""
        for column in columns:
            if column not in self.table:
                known = ", ".join(str(name) for name in self.table if name not in (FILE, LINE))
                raise UserError(
                    f"{self.path} has no column {column!r} (it has {known}): name one of these in the column mapping "
                    "(dataset_scripts/other_screens.md), or fetch the table again"
                )

    def text(self, column: str, *, empty: bool = False, none: Iterable[str] = ()) -> pd.Series:
        """Stripped text; what stands in `none` counts as empty, which is refused unless `empty`."""
        text = over_distinct(self.table[column], lambda cell: "" if cell.strip() in none else cell.strip())
        if not empty:
            self.refuse(text == "", f"column {column!r} is empty: fill it in, or take the line out")
        return text

    def name(self, column: str) -> pd.Series:
        """Text that may become a file's name, and so may not lead out of a folder."""
        names = self.text(column)
        self.refuse(
            over_distinct(names, lambda name: len(name) > 100 or UNFIT.search(name) is not None).astype(bool),
            lambda row: (
                f"column {column!r} is {names[row][:40]!r}, which cannot name a file: give a short name "
                "without slashes"
            ),
        )
        return names

    def numbers(self, column: str, text: pd.Series | None = None) -> pd.Series:
        """Finite numbers of a column, or of `text`, which stands for it."""
        text = self.table[column] if text is None else text
        numbers = pd.to_numeric(text, errors="coerce")
        self.refuse(~np.isfinite(numbers), lambda row: f"column {column!r} is {text[row]!r}, which is not a number")
        return numbers

    def whole(self, column: str, text: pd.Series | None = None) -> pd.Series:
        """Whole numbers that fit into 32 bits."""
        numbers = self.numbers(column, text)
        self.refuse(
            (numbers != numbers.round()) | (numbers.abs() > MOST_WHOLE),
            lambda row: (
                f"column {column!r} is {(self.table[column] if text is None else text)[row]!r}, which is not a "
                f"whole number of at most {MOST_WHOLE:,}"
            ),
        )
        return numbers.astype(int)

    def found(self, text: pd.Series, pattern: str, setting: str, what: str, column: str) -> pd.Series:
        """What the first group of a pattern finds in each text.

        Parameters
        ----------
        text : pandas.Series
        pattern : str
            A regular expression with a group.
        setting : str
            Name of the pattern in the column mapping.
        what : str
            What it should find, for the message.
        column : str
            What `text` is, for the message.
        """
        try:
            distinct = text.astype(str).drop_duplicates()
            found = text.astype(str).map(distinct.set_axis(distinct).str.extract(pattern).iloc[:, 0])
        except (ValueError, TypeError, re.error) as error:
            raise UserError(f"{setting} {pattern!r} ({error}): give a regular expression with a group") from error
        self.refuse(
            found.isna(),
            lambda row: (
                f"no {what} ({pattern}) in {column} {text[row]!r}: name the {what.split()[0]}'s column in the "
                "column mapping"
            ),
        )
        return found

    def one_value(self, fields: pd.DataFrame, keys: list[str], name: str, what: str, fix: str) -> None:
        """Refuse two values of the column `name` where the columns `keys` are the same."""
        first = fields.groupby(keys)[name].transform("first")
        self.refuse(
            fields[name] != first,
            lambda row: (
                f"{what.format(**fields.loc[row])} is {fields.loc[row, name]!r} here and {first[row]!r} above: {fix}"
            ),
        )

    def unique(self, keys: pd.Series | pd.DataFrame, sentence: Callable[[object], str]) -> None:
        """Refuse rows, named by the index of `keys`, that agree in all of them; `sentence` gets what they share."""
        twice = keys[keys.duplicated(keep=False)]
        if len(twice):
            same = (twice == twice.iloc[0]) if twice.ndim == 1 else (twice == twice.iloc[0]).all(axis=1)
            rows = twice.index[same][:2]
            lines = " and ".join(str(self.lines[row]) for row in rows)
            raise UserError(f"{self.files[rows[0]]}: lines {lines} {sentence(twice.iloc[0])}")
