"""Screens whose files tell well, site and channel by their names: ImageXpress, IN Cell, and any other."""

from __future__ import annotations

import re

import pandas as pd

from wsdino.errors import UserError

from ..tables import FILE, LINE, over_distinct, row_letters
from . import IMAGE, Screen, Source, channel_name, screen_of

GROUPS = (
    "plate",
    "well",
    "row",
    "column",
    "site",
    "channel",
    "batch",
    "z",
    "time",
    "compound",
    "concentration",
    "moa",
)
IMAGEXPRESS = r"(?P<plate>.*?)_?(?P<well>[A-P]\d\d)(?:_s(?P<site>\d+))?(?:_w(?P<channel>\d))?[^/_]*\.tiff?|.*\.HTD"
INCELL = (
    r"(?:(?P<plate>.+)/)?(?P<well>[A-Z]{1,2} - \d+)\(fld (?P<site>\d+) wv (?P<channel>[^)]+?)"
    r"(?: z (?P<z>\d+))?(?: time (?P<time>\d+)[^)]*)?\)\.tiff?"
)


def by_pattern(source: Source, pattern: str) -> pd.DataFrame:
    """One row per image whose path fits: its path and the pattern's named groups.

    Raises
    ------
    UserError
        The pattern is no regular expression, names an unknown group, or fits no image.
    """
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--pattern {pattern!r} is no regular expression ({error})") from error
    if strange := set(compiled.groupindex) - set(GROUPS):
        raise UserError(f"--pattern names a group {sorted(strange)[0]!r}: use {', '.join(GROUPS)}")
    images = [file for file in source.files if IMAGE.fullmatch(file)]
    rows = [{"file": file, **match.groupdict("")} if (match := compiled.search(file)) else None for file in images]
    if not any(rows):
        first = f"; the first is {images[0]}" if images else ""
        raise UserError(f"{pattern!r} fits none of the {len(images):,} images of {source.raw}{first}: see --pattern")
    if missed := [file for file, row in zip(images, rows, strict=True) if row is None]:
        source.notes.append(f"{len(missed):,} of {len(images):,} images are not understood, the first is {missed[0]}")
    return pd.DataFrame([row for row in rows if row])


def one_row_per_field(files: pd.DataFrame, source: Source, names: dict[str, str] | None = None, **known) -> Screen:
    """Put the channels of a field into one row; of focus planes and time points the chosen one is kept.

    Parameters
    ----------
    files : pandas.DataFrame
        One row per image: `file`, `plate`, `well`, and `channel`, `site`, `z`, `time`, `batch` where known.
    names : dict, optional
        Channel as in the files -> its name.

    Raises
    ------
    UserError
        Several planes and none chosen; two files of one channel of one field.
    """
    files = files.assign(**{name: text for name, text in (("site", "1"), ("channel", "image")) if name not in files})
    for axis in sorted({"z", "time"} & set(files)):
        values, chosen = sorted(files[axis].unique(), key=_natural), source.choose.get(axis)
        if len(values) > 1:
            if chosen not in values:
                known_values = ", ".join(values[:9])
                raise UserError(
                    f"{source.raw} holds fields at several {axis} ({known_values}): choose one by --{axis}"
                )
            source.notes.append(f"of {len(values)} values of {axis}, {chosen} is read")
            files = files[files[axis] == chosen]
        files = files.drop(columns=axis)
    keys = [name for name in files.columns if name not in ("file", "channel")]
    if len(
        twice := files.sort_values([*keys, "channel"])[
            lambda sorted: sorted.duplicated([*keys, "channel"], keep=False)
        ]
    ):
        raise UserError(
            f"{twice['file'].iloc[0]} and {twice['file'].iloc[1]} are one channel of one field: tell them apart by a "
            "group of --pattern, or remove one"
        )
    table = files.set_index([*keys, "channel"])["file"].unstack("channel", fill_value="").reset_index()
    order = sorted(files["channel"].unique(), key=_natural)
    channels = {channel_name((names or {}).get(each, each)): f"file_{each}" for each in order}
    if len(channels) < len(order):
        raise UserError(
            f"{source.raw}: two of the channels {', '.join(order)} would have one name: use --layout folder"
        )
    table = table.rename(columns=dict(zip(order, channels.values(), strict=True))).rename_axis(columns=None)
    table[FILE], table[LINE] = str(source.raw), 0
    return screen_of(table, {name: (column, None) for name, column in channels.items()}, source, **known)


def _natural(text: str) -> list:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def folder(source: Source) -> Screen:
    """Any naming: `--pattern` with the groups plate, well (or row and column), site, channel, z, time, batch, ..."""
    if not source.pattern:
        raise UserError(
            "--layout folder needs --pattern: a regular expression with the groups plate, well, site, channel"
        )
    files = by_pattern(source, source.pattern)
    if {"row", "column"} <= set(files):
        row = over_distinct(files.pop("row"), lambda text: row_letters(int(text)) if text.isdecimal() else text)
        files["well"] = row + files.pop("column")
    if "well" not in files:
        raise UserError(f"--pattern {source.pattern!r} has no group (?P<well>...): name the part that is the well")
    if "plate" not in files:
        files["plate"] = source.raw.resolve().name
        source.notes.append(f"--pattern names no plate: all images are of plate {files['plate'].iloc[0]}")
    return one_row_per_field(files, source)


def imagexpress(source: Source) -> Screen:
    """`<name>_A01_s1_w1<id>.tif` of ImageXpress; the .HTD names the channels, and z 0 is a projection."""
    files = by_pattern(source, rf"^(?:{IMAGEXPRESS})$")
    step = files["file"].str.extract(r"(?:^|/)ZStep_(\d+)/")[0].fillna("0")
    time = files["file"].str.extract(r"(?:^|/)TimePoint_(\d+)/")[0].fillna("1")
    place = files["file"].str.replace(r"[^/]*$|(TimePoint|ZStep)_\d+/", "", regex=True).str.rstrip("/")
    htd = {file.rpartition("/")[0]: file for file in source.matching(r".*\.HTD")}
    # The first words of a file may be the same on every plate, and so may a folder's last: its whole path is not.
    stems: dict[str, set[str]] = {}
    for here, stem in zip(place, files["plate"].str.rpartition("/")[2], strict=True):
        stems.setdefault(here, set()).add(htd[here].rpartition("/")[2][:-4] if here in htd else stem)
    names = {here: next(iter(each)) for here, each in stems.items() if len(each) == 1 and "" not in each}
    if len(set(names.values())) < len(stems):
        names = {here: here.replace("/", "_") or source.raw.resolve().name for here in stems}
    waves = {_waves(source, file) for file in htd.values()}
    labels = dict(enumerate(next(iter(waves)), start=1)) if len(waves) == 1 else {}
    files = files.assign(plate=place.map(names), z=step, time=time).replace({"site": {"": "1"}, "channel": {"": "1"}})
    return one_row_per_field(files, source, {c: labels.get(int(c), f"w{c}") for c in files["channel"].unique()})


def _waves(source: Source, file: str) -> tuple[str, ...]:
    text = (source.raw / file).read_text(encoding="latin-1")
    return tuple(re.findall(r'^"WaveName\d+",\s*"([^"]*)"', text, re.MULTILINE))


def incell(source: Source) -> Screen:
    """`A - 01(fld 1 wv DAPI - DAPI).tif` of the IN Cell Analyzers; the folder is the plate."""
    files = by_pattern(source, rf"^{INCELL}$")
    files["plate"] = files["plate"].replace("", source.raw.resolve().name).str.replace("/", "_")
    emission = {each: each.rpartition(" - ")[2] for each in files["channel"].unique()}
    clear = len(set(emission.values())) == len(emission)
    about = [(source.raw / file).read_text(encoding="latin-1") for file in source.matching(r".*\.xdce")]
    sizes = {float(size) for text in about for size in re.findall(r'pixel_width="([\d.]+)"', text)}
    return one_row_per_field(
        files, source, emission if clear else None, pixel_size=min(sizes) if len(sizes) == 1 else None
    )
