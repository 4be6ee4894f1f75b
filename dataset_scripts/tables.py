"""Tables as labs save them: any separator, encoding, Excel or Parquet; wells, doses and names in several spellings."""

from __future__ import annotations

import csv
import gzip
import io
import re
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from wsdino.errors import UserError

MOST_BYTES = 1_000_000_000  # of a table, unpacked: 300 times BBBC021's; a larger .gz is a bomb
FILE, LINE = "_file", "_line"  # columns that say where a row of a table came from
NEAR = 1.05  # doses of one compound whose ratio is smaller are one nominal dose: series step by 1.5 or more

# Programs of the field write one byte per character in one of these; a table is taken only where all of them agree.
ONE_BYTE = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "mac_roman")
MOLAR = {"m": 1e6, "mm": 1e3, "um": 1.0, "nm": 1e-3, "pm": 1e-6}  # to micromolar
_MICRO = re.compile("Â?[µμ]")  # the micro sign, the Greek letter, and UTF-8 that was read as Latin-1
_PER_LITRE = re.compile(r"\s*mol(?:ar|es?)?\s*(?:/|per|\s)?\s*(?:l(?:iter|itre)?)?(?:\^?-1)?$", re.IGNORECASE)
_NUMBER = re.compile(r"([+-]?[\d.,'\u2019 ]*\d[.,]?(?:[eE][+-]?\d+)?)\s*([^\d\s].*)?")
_HEADER_UNIT = re.compile(r"(?:^|[\s_.(\[/-])([uµμnpm]M|M|[uµμnp]m)(?=$|[\s_)\]])")
_WELL = re.compile(r"(?:r0*(\d+)[\s_-]*c0*(\d+)|([a-z]{1,2})[\s_-]*0*(\d+))", re.IGNORECASE)


def read_tables(paths: str | Path | Iterable[str | Path], what: str = "table", notes: list[str] | None = None,
                encoding: str | None = None) -> pd.DataFrame:  # fmt: skip
    """Read one table, or several of one screen below one another.

    Parameters
    ----------
    paths : path or paths
        Text with any of the separators `, ; tab |`, plain or gzipped; Parquet; Excel (.xlsx, its first sheet).
    what : str
        Names the table in messages.
    notes : list of str, optional
        Receives one sentence for everything that was taken otherwise than it stands.
    encoding : str, optional
        Of text tables; default: UTF-8, UTF-16 with its mark, or what all usual one-byte encodings agree on.

    Returns
    -------
    pandas.DataFrame
        Cells are text, empty where a table lacks a column; `_file` and `_line` say where a row comes from. Lines
        without any value are left out.

    Raises
    ------
    UserError
        A table is missing, of no known kind, or damaged.
    """
    notes = [] if notes is None else notes
    tables = [
        _read(Path(path), what, notes, encoding) for path in ([paths] if isinstance(paths, str | Path) else paths)
    ]
    if not tables:
        raise UserError(f"No {what} is named: give at least one.")
    if len(tables) == 1:
        return tables[0]
    joined = pd.concat(tables, ignore_index=True)
    notes.append(f"{len(tables)} tables are read as one: {', '.join(f'{len(t):,} rows' for t in tables)}")
    return joined.fillna("")


def _read(path: Path, what: str, notes: list[str], encoding: str | None) -> pd.DataFrame:
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist: give its path (CSV, TSV, Parquet, Excel; plain or .gz)")
    kind, fix = "a table", "save it as CSV in UTF-8, or fetch it again"
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        if start.startswith(b"PAR1"):
            kind, skipped = "Parquet", 0
            table = _as_text(pd.read_parquet(path))
        elif start.startswith(b"PK\x03\x04"):
            kind, skipped = "Excel", 0
            sheets = pd.read_excel(path, sheet_name=None, dtype=object, keep_default_na=False, engine="openpyxl")
            filled = [name for name in sheets if len(sheets[name])] or list(sheets)
            table = _as_text(sheets[filled[0]])
            if len(filled) > 1:
                notes.append(f"{path}: the sheet {filled[0]!r} is read, {', '.join(map(repr, filled[1:]))} are not")
        elif start.startswith(b"\xd0\xcf\x11\xe0"):
            raise ValueError("it is an Excel file of before 2007")
        else:
            kind = "CSV"
            table, skipped = _read_text(path, start, encoding, notes)
    except (ValueError, OSError, EOFError, KeyError, ImportError, zlib.error, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} {path} cannot be read as {kind} ({reason}): {fix}") from error
    if table.empty:
        raise UserError(f"{what} {path} has a header but no rows: give the table of a screen with images")
    table.columns, before = [_clean(name) for name in table.columns], list(table.columns)
    if twice := [name for name in table.columns if list(table.columns).count(name) > 1]:
        raise UserError(f"{what} {path} has two columns {twice[0]!r}: rename one")
    if changed := [name for name, old in zip(table.columns, before, strict=True) if name != old]:
        notes.append(f"{path}: spaces in the header are dropped ({', '.join(map(repr, changed[:4]))})")
    table.index += 2 + skipped
    blank = table.iloc[:, 0] == ""
    for column in table.columns[1:] if blank.any() else ():
        blank &= table[column] == ""
    table = table[~blank]
    table[LINE] = table.index.astype("int32")
    table[FILE] = pd.Categorical([str(path)], ["", str(path)]).repeat(len(table))
    return table.reset_index(drop=True)


def _clean(name: object) -> str:
    return " ".join(str(name).replace("\ufeff", "").split())


def _read_text(path: Path, start: bytes, encoding: str | None, notes: list[str]) -> tuple[pd.DataFrame, int]:
    """The table, and the number of lines before its header."""
    import pyarrow as pa
    import pyarrow.csv as arrow

    with (gzip.open if start.startswith(b"\x1f\x8b") else open)(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it holds more than {MOST_BYTES:,} bytes")
    if content.lstrip()[:1] == b"<":
        raise ValueError("it is a web page or XML")
    encoding = encoding or _encoding(content, notes, path)
    if encoding != "utf-8-sig":
        content = content.decode(encoding).encode()
    if b"\0" in content:  # which some programs take for the end of a cell
        raise ValueError(f"line {content[: content.index(0)].count(10) + 1} holds a NUL")
    blank = re.match(rb'(?:\xef\xbb\xbf)?(?:[\r\n]*"?sep=(.)"?(?=[\r\n]))?[\r\n]*', content)  # Excel's own first line
    content, skipped = content[blank.end() :], len(re.findall(b"\r\n|\r|\n", blank[0]))
    head = content[:100_000].decode("utf-8", "ignore")
    plain = re.sub('"[^"]*"', "", head)
    separator = blank[1].decode() if blank[1] else max(",;\t|", key=re.split("[\r\n]", plain)[0].count)
    if separator != ",":
        notes.append(f"{path}: columns are separated by {'tabs' if separator == chr(9) else repr(separator)}")
    names = next(csv.reader(io.StringIO(head, newline=""), delimiter=separator), [])
    uneven = []

    def refuse(row: arrow.InvalidRow) -> str:
        uneven.append(f"line {row.number + skipped}: {row.actual_columns} values for {row.expected_columns} columns")
        return "error"

    try:
        table = arrow.read_csv(
            pa.BufferReader(content),
            arrow.ReadOptions(use_threads=False),  # with threads a row does not know its number
            arrow.ParseOptions(
                delimiter=separator, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=refuse
            ),
            arrow.ConvertOptions(column_types=dict.fromkeys(names, pa.dictionary(pa.int32(), pa.string()))),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(uneven[0] if uneven else str(error)) from error
    codes = [column.combine_chunks() for column in table.unify_dictionaries().columns]
    cells = [_objects(each.dictionary.to_pylist())[each.indices.to_numpy()] for each in codes]
    return pd.DataFrame(dict(enumerate(cells)), dtype=object).set_axis(table.column_names, axis=1), skipped


def _encoding(content: bytes, notes: list[str], path: Path) -> str:
    if content.isascii():
        return "utf-8-sig"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        content.decode("utf-8-sig")
        return "utf-8-sig"
    except UnicodeDecodeError as error:
        at = error
    high = bytes(sorted({byte for byte in content if byte > 127}))
    readings = {name: high.decode(name, "replace") for name in ONE_BYTE}
    if len(set(readings.values())) == 1:  # as for the micro sign, which is most tables' only such letter
        notes.append(f"{path} is not UTF-8: {readings['cp1252']} is read as Windows and Mac programs write it")
        return "cp1252"
    byte = content[at.start : at.start + 1]
    letters = ", ".join(f"{byte.decode(name, 'replace')!r} in {name}" for name in ONE_BYTE[:4])
    line = len(re.findall(b"\r\n|\r|\n", content[: at.start])) + 1
    raise ValueError(f"line {line} is not 'utf-8': byte 0x{byte.hex()} is {letters}; --encoding names the right one")


def _as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers as people write them: 3 and not 3.0, for a column with an empty cell is a column of floats."""

    def text(value: object) -> str:
        if value is None or value is pd.NaT or value is pd.NA or value != value:
            return ""
        return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)

    def column(values: pd.Series) -> pd.Series:
        codes, distinct = pd.factorize(values, use_na_sentinel=True)
        return pd.Series(_objects([*map(text, distinct.tolist()), ""])[codes], dtype=object)

    return pd.DataFrame({name: column(table[name]).reset_index(drop=True) for name in table.columns})


def over_distinct(values: pd.Series, function: Callable[[str], object]) -> pd.Series:
    """`function` of each value, computed and held once per distinct one: a table of 400,000 rows has few."""
    codes, distinct = pd.factorize(values.to_numpy(dtype=object))
    return pd.Series(_objects([function(value) for value in distinct])[codes], values.index, dtype=object)


def _objects(values: list) -> np.ndarray:
    held = np.empty(len(values), dtype=object)
    held[:] = values
    return held


def well_name(text: str) -> str:
    """`A01` for A1, a01, A-01, A - 01, r01c01 and R1C1; other names stay as they are."""
    if (match := _WELL.fullmatch(text.strip())) is None:
        return text.strip()
    row, column, letters, number = match.groups()
    return f"{letters.upper()}{int(number):02d}" if letters else f"{row_letters(int(row))}{int(column):02d}"


def row_letters(number: int) -> str:
    """The letters of a plate's row: 1 is A, 26 is Z, 27 is AA."""
    return (row_letters((number - 1) // 26) if number > 26 else "") + chr(65 + (number - 1) % 26)


def read_doses(values: pd.Series, header: str, where, notes: list[str] | None = None) -> pd.Series:
    """Doses as numbers; those with a molar unit, in the cell or in the header, in micromolar.

    Parameters
    ----------
    values : pandas.Series
        Text: `0.3`, `0,3`, `300 nM`, `1e-3 mM`, `5 µg/ml`.
    header : str
        The column's name, whose unit counts for cells without their own. `mmoles_per_liter` is taken as it stands:
        public plate maps of that name hold micromolar.
    where : function
        Index label -> "table.csv, line 3", for messages.
    notes : list of str, optional
        Receives what was converted.

    Returns
    -------
    pandas.Series
        Floats of six significant digits, which is what a treatment's name says.

    Raises
    ------
    UserError
        A cell holds no number, one that may be read in two ways, or its unit does not go with the others'.
    """
    distinct = values.drop_duplicates()
    parsed = {}
    for label, text in distinct.items():
        match = _NUMBER.fullmatch(text.strip())
        number = _number(match[1], distinct) if match else None
        if number is None or not np.isfinite(number):
            raise UserError(
                f"{where(label)}: column {header!r} is {text!r}, which is no number, or may be read in two ways: "
                "write it as 1000.5, with its unit if it has one"
            )
        parsed[text] = number, _unit(match[2] or "")
    found = _HEADER_UNIT.search(header)
    own = _unit(found[1]) if found else ""
    parsed = {text: (number, unit or own) for text, (number, unit) in parsed.items()}
    units = {unit for number, unit in parsed.values() if number}
    if len(units) > 1 and units - set(MOLAR):
        odd = next(text for text, (number, unit) in parsed.items() if number and unit not in MOLAR)
        others = ", ".join(sorted(units - {parsed[odd][1]}))
        raise UserError(
            f"{where(values.index[values == odd][0])}: column {header!r} is {odd!r} where other doses are in "
            f"{others}: give each its unit"
        )
    if notes is not None and units - {"", "um"}:
        converted = f"µM, from {', '.join(sorted(units))}" if units <= set(MOLAR) else f"{units.pop()}, as written"
        notes.append(f"doses of the column {header!r} are read in {converted}")
    numbers = {text: float(f"{number * MOLAR.get(unit, 1):g}") for text, (number, unit) in parsed.items()}
    return values.map(numbers).astype(float)


def _unit(text: str) -> str:
    """A molar unit in the spelling of :data:`MOLAR`, or the text itself."""
    short = _MICRO.sub("u", text.strip())
    for word, letter in (("micro", "u"), ("nano", "n"), ("milli", "m")):
        short = short.replace(word, letter)
    short = _PER_LITRE.sub("m", short)
    return short.lower() if short.lower() in MOLAR else text.strip()


def _number(text: str, column: pd.Series) -> float | None:
    """A number with a decimal point or comma; None where it could be either."""
    text = re.sub(r"[\s'\u2019]", "", text)
    point, comma = text.rfind("."), text.rfind(",")
    if comma >= 0 and point >= 0:  # the last of them is the decimal one
        text = text.replace(",", "") if point > comma else text.replace(".", "").replace(",", ".")
    elif text.count(",") > 1:
        text = text.replace(",", "")
    elif comma >= 0:
        if re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", text):
            # 1,000 is one or a thousand: a neighbour such as 0,3 or 12,5 tells which.
            if not column.str.contains(r"^\s*[+-]?(?:0\d*|\d+),(?:\d{1,2}|\d{4,})(?!\d)|^\s*0,", regex=True).any():
                return None
        text = text.replace(",", ".")
    try:
        return float(text)
    except ValueError:
        return None


def spelling(name: str) -> str:
    """What two spellings of one name share: letters without case, spaces, and Unicode's other forms."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"\s+", "", re.sub("[\u2010-\u2015\u2212]", "-", plain))


def common_names(compounds: pd.Series, doses: pd.Series) -> tuple[pd.Series, pd.Series, list[str]]:
    """The most frequent spelling of every compound, and of its doses those that lie within 5 % of one another.

    Parameters
    ----------
    compounds : pandas.Series of str
    doses : pandas.Series of float
        The same length.

    Returns
    -------
    compounds, doses : pandas.Series
        As they would be when merged.
    sentences : list of str
        One for each compound that is spelled in several ways, and for each group of near doses.
    """
    known = doses.fillna(0.0)  # without doses, NaN throughout
    pairs = pd.DataFrame({"name": compounds, "dose": known}).value_counts(sort=False)
    names_of: dict[str, Counter[str]] = defaultdict(Counter)
    doses_of: dict[str, Counter[float]] = defaultdict(Counter)
    for (name, dose), count in pairs.items():
        names_of[spelling(name)][name] += count
        doses_of[spelling(name)][dose] += count
    best, nominal, sentences = {}, {}, []
    for key, spelled in names_of.items():
        chosen = spelled.most_common(1)[0][0]
        best.update(dict.fromkeys(spelled, chosen))
        if len(spelled) > 1:
            sentences.append("compound " + " = ".join(f"{name!r} ({n:,} rows)" for name, n in spelled.most_common()))
        group: list[float] = []
        for dose in [*sorted(doses_of[key]), np.inf]:
            if group and not 0 < group[0] <= dose < group[0] * NEAR:
                most = max(group, key=lambda each: (doses_of[key][each], -len(f"{each:g}")))
                nominal.update({(key, each): most for each in group})
                if len(group) > 1:
                    told = " = ".join(f"{each:g} ({doses_of[key][each]:,} rows)" for each in group)
                    sentences.append(f"{chosen!r} at {told}")
                group = []
            group.append(dose)
    keys = over_distinct(compounds, spelling)
    merged = pd.Series([nominal[pair] for pair in zip(keys, known, strict=True)], doses.index, dtype=float)
    return over_distinct(compounds, best.__getitem__), merged.where(doses.notna()), sentences
