"""A profile file written in shards by one process or many, so that a killed extraction goes on where it stopped.

`<name>.parquet` stands for itself when it is whole; until then `<name>.parquet.shards/` holds what is done, one small
Parquet file a channel and range of rows, in the same convention. Every file is written beside and renamed, and names
in its schema a digest of all that its numbers depend on: shards of another model or dataset are thrown away.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .profiles import ProfileError

DIGEST, SETTINGS = b"wsdino_inputs", b"wsdino_settings"
ROW_GROUP = 8192


class ProfileFile:
    """One profile file on its way from nothing to whole.

    Parameters
    ----------
    path : str or Path
        The file in the end.
    metadata : pandas.DataFrame
        `Metadata_*` columns, one row a field.
    channels : list of str
        In the order of their columns.
    digest : str
        Changes when anything changes that the features depend on.
    settings : dict
        What the features were made with, for the reader; kept in the file's schema as JSON.
    """

    def __init__(self, path, metadata: pd.DataFrame, channels: list[str], digest: str, settings: dict | None = None):
        self.path, self.channels, self.digest = Path(path), list(channels), digest
        self.metadata = pa.table({name: pa.array(metadata[name]) for name in metadata})
        self.folder = self.path.with_name(self.path.name + ".shards")
        self.schema_metadata = {DIGEST: digest.encode(), SETTINGS: json.dumps(settings or {}).encode()}

    def is_whole(self) -> bool:
        """Whether the file is there and made of the same inputs."""
        return _digest_of(self.path) == self.digest

    def start(self) -> None:
        """Make the folder of the shards.

        Raises
        ------
        ProfileError
            If the file cannot be written there, or something else than profiles stands in its place.
        """
        if self.path.is_dir() or (self.path.exists() and _digest_of(self.path) is None):
            raise ProfileError(f"{self.path} holds something else than extracted profiles: name another output.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(_unwritable(self.path, error)) from error

    def clear(self) -> None:
        """Remove the shards of other inputs and half-written ones, for whoever alone writes here.

        Raises
        ------
        ProfileError
            If they cannot be removed.
        """
        try:
            for path in self.folder.iterdir():
                if path.name != "lock" and (path.suffix != ".parquet" or _digest_of(path) != self.digest):
                    path.unlink()
        except OSError as error:
            raise ProfileError(_unwritable(self.path, error)) from error

    def shards(self, channel: str) -> list[tuple[int, int, Path]]:
        """First row, row after the last, and file of every whole shard of a channel, in order."""
        found = []
        for path in self.folder.glob(f"{channel}-*.parquet"):
            first, last = path.stem[len(channel) + 1 :].split("-")
            found.append((int(first), int(last), path))
        return sorted(found)

    def missing(self, channel: str) -> list[tuple[int, int]]:
        """The ranges of rows, first and one after the last, that no shard holds."""
        edges = [0]
        for first, last, _ in self.shards(channel):
            edges += [first, last]
        edges.append(len(self.metadata))
        return [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2) if edges[i] < edges[i + 1]]

    def write_shard(self, channel: str, first: int, features: np.ndarray) -> None:
        """Write the `(rows, width)` features of a channel for the rows from `first` on."""
        last = first + len(features)
        columns = self._metadata_columns(first, last)
        for index in range(features.shape[1]):
            columns[f"{channel}_{index:04d}"] = pa.array(features[:, index].astype(np.float32))
        target = self.folder / f"{channel}-{first:09d}-{last:09d}.parquet"
        partial = target.with_name(target.name + ".partial")
        try:
            pq.write_table(pa.table(columns).replace_schema_metadata(self.schema_metadata), partial)
            partial.replace(target)
        except OSError as error:
            raise ProfileError(_unwritable(target, error)) from error

    def join(self) -> None:
        """Write the file from its shards, some thousand rows at a time, and remove them.

        Raises
        ------
        ProfileError
            If rows are missing, or the file cannot be written.
        """
        shards = {channel: self.shards(channel) for channel in self.channels}
        for channel in self.channels:
            if self.missing(channel):
                raise ProfileError(f"{self.folder} lacks rows of {channel}: extract again.")
        cuts = sorted({0, *(last for found in shards.values() for _, last, _ in found)})
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            writer, waiting = None, []
            for first, last in pairwise(cuts):
                columns = self._metadata_columns(first, last)
                for channel in self.channels:
                    start, stop, path = shards[channel][0]
                    rows = _features_of(path).slice(first - start, last - first)
                    columns |= dict(zip(rows.column_names, rows.columns, strict=True))
                    if stop == last:
                        shards[channel].pop(0)
                waiting.append(pa.table(columns).replace_schema_metadata(self.schema_metadata))
                writer = writer or pq.ParquetWriter(partial, waiting[0].schema)
                if last == cuts[-1] or sum(map(len, waiting)) >= ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=2 * ROW_GROUP)
                    waiting = []
            writer.close()
            partial.replace(self.path)
        except OSError as error:
            raise ProfileError(_unwritable(self.path, error)) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def _metadata_columns(self, first: int, last: int) -> dict[str, pa.Array]:
        part = self.metadata.slice(first, last - first)
        return dict(zip(part.column_names, part.columns, strict=True))


def _features_of(path: Path) -> pa.Table:
    """The feature columns of a shard."""
    file = pq.ParquetFile(path)
    return file.read([name for name in file.schema_arrow.names if not name.startswith("Metadata_")])


def _digest_of(path: Path) -> str | None:
    """The digest in a profile file's schema; None for no file, half a file, and another kind of file."""
    try:
        return (pq.read_schema(path).metadata or {}).get(DIGEST, b"").decode() or None
    except (OSError, ValueError):  # pyarrow's errors are of both kinds
        return None


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path} cannot be written ({error.strerror or error}): make room there or name another output."
