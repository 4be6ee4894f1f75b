"""What is particular to BBBC021: the address and names of its tables, and the text of the column `source`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from wsdino.errors import UserError
from wsdino.files import read_json

from .download import Downloader
from .screen import ScreenColumns

BBBC021_URL = "https://data.broadinstitute.org/bbbc/BBBC021/"
IMAGE_TABLE, MOA_TABLE, COMPOUND_TABLE = (f"BBBC021_v1_{name}.csv" for name in ("image", "moa", "compound"))


def find_table(name: str, *folders: str | Path) -> Path:
    """A table, plain or gzipped, in the first of the folders that holds it.

    Raises
    ------
    UserError
        None of them does.
    """
    for folder in folders:
        for path in (Path(folder) / name, Path(folder) / f"{name}.gz"):
            if path.is_file():
                return path
    raise UserError(f"{folders[0]} holds no {name} (or .gz): put it there, or give its path")


def fetch_tables(
    downloader: Downloader, wanted: dict[str, Iterable[str]], say: Callable[[str], None] = lambda text: None
) -> None:
    """Fetch tables, unless they are there: a table in the folder may be the user's own, or edited.

    Parameters
    ----------
    downloader : Downloader
    wanted : dict
        Name of a table -> columns that it must have.
    say : callable
        Called with one sentence for each table that is used as it is.

    Raises
    ------
    UserError
        The server lacks a table, or answers with something else, such as a network's login page.
    """
    for name, columns in wanted.items():
        own = [path for path in (downloader.folder / name, downloader.folder / f"{name}.gz") if path.is_file()]
        if own:
            say(f"{own[0]} is there and used as it is: remove it to fetch it")
            continue
        # The compound table is of no use here, and some copies of the screen lack it.
        if name == COMPOUND_TABLE and downloader.sizes([name])[name] is None:
            continue

        def check(path: Path, columns: Iterable[str] = columns, name: str = name) -> None:
            try:
                header = list(pd.read_csv(path, nrows=0))
            except ValueError:
                header = []
            if not header or header[0].startswith("<") or not set(columns) <= set(header):
                raise UserError(
                    f"{downloader.base_url}{name} is not that table (its header is {', '.join(header)[:60]!r}): log "
                    "in to the network if it wants that, or check --base_url and --columns"
                )

        (downloader.folder / f"{name}.partial").unlink(missing_ok=True)  # nothing would tell a mixture of two tables
        downloader.fetch(name, check)


def default_source(raw: Path, columns: ScreenColumns) -> str:
    """What the simulator wrote into the raw folder, "BBBC021v1", or the folder's name for another screen's columns."""
    marker = raw / "simulation.json"
    if marker.is_file():
        return str(read_json(marker, needs=["source"], fix="simulate the screen again")["source"])
    return "BBBC021v1" if columns == ScreenColumns() else raw.resolve().name
