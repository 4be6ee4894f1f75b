"""A profile file written in parts by one process or several, so that a killed extraction continues where it stopped.

Finished profiles are in `<name>.parquet`. While extraction is running, `<name>.parquet.parts/` holds what is done: one
small Parquet file per channel and range of fields, and `plan.json`, which names the length of the ranges. The plan and
the finished file name all settings that the features depend on: parts of another model or dataset are thrown away.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from wsdino.errors import UserError
from wsdino.files import locked, remove, write_json, written_whole

FORMAT = 1  # of the features themselves: files of another format are extracted again
SETTINGS = b"wsdino_settings"
ROW_GROUP = 8192


def part_size(fields: int, shard_fields: int, batch_size: int, processes: int) -> int:
    """Fields per part: whole batches, at most `shard_fields` where that is a batch, and as many parts per process.

    Batches then begin at multiples of the batch size, however many processes there are and wherever one was killed,
    and features are the same to the bit.
    """
    most = max(shard_fields // batch_size, 1) * batch_size
    parts = math.ceil(math.ceil(fields / most) / processes) * processes
    return math.ceil(fields / parts / batch_size) * batch_size


class ProfileFile:
    """One profile file from its first part to its last.

    Parameters
    ----------
    path : str or Path
        The finished file.
    metadata : pandas.DataFrame
        `Metadata_*` columns, one row per field.
    channels : dict
        For each channel, in the order of their columns, all that its features depend on beside the images: a
        description that JSON can hold.
    **inputs
        What the features of all channels depend on, such as the dataset's fingerprint. With the descriptions it is
        kept in the file's schema, as JSON under `wsdino_settings`.

    Attributes
    ----------
    part_fields : int
        Fields per part; set by `opened`.
    """

    def __init__(self, path: str | Path, metadata: pd.DataFrame, channels: dict[str, dict], **inputs: Any):
        self.path, self.channels = Path(path), list(channels)
        self.folder = self.path.with_name(self.path.name + ".parts")
        self.metadata = pa.table({name: pa.array(metadata[name]) for name in metadata})
        # As text, in which the order of the channels counts.
        self.settings = json.dumps({"format": FORMAT, "fields": len(metadata), **inputs, "channels": channels})
        self.part_fields = 0

    def is_up_to_date(self) -> bool:
        """Whether the finished file is there and was made with the same settings."""
        return _settings_of(self.path) == self.settings

    @contextmanager
    def opened(self, part_fields: int) -> Iterator[None]:
        """Hold the file's place: parts of other settings are removed, and no other extraction may write there.

        Parameters
        ----------
        part_fields : int
            Fields per part of a new extraction; one that continues keeps its own number.

        Raises
        ------
        UserError
            Another extraction is writing, or something else than profiles stands at `path`.
        """
        if self.path.exists() and _settings_of(self.path) is None:
            raise UserError(f"{self.path} holds something else than extracted profiles: name another output.")
        plan_file = self.folder / "plan.json"
        sentence = f"Another extraction is writing {self.path}: wait for it, or name another output."
        with locked(self.folder / "lock", sentence):
            try:
                plan = json.loads(plan_file.read_text(encoding="utf-8"))
                begun = json.dumps(plan["settings"]) == self.settings
            except (OSError, ValueError, KeyError, TypeError):
                begun = False
            if not begun:
                for path in self.folder.iterdir():
                    if path.name != "lock":
                        remove(path)
                plan = {"part_fields": part_fields, "settings": json.loads(self.settings)}
                write_json(plan_file, plan)
            self.part_fields = plan["part_fields"]
            yield

    def parts(self) -> list[range]:
        """The fields of each part, by their row numbers."""
        count = len(self.metadata)
        return [range(first, min(first + self.part_fields, count)) for first in range(0, count, self.part_fields)]

    def missing(self, channel: str) -> list[range]:
        """The parts of a channel that are not written, or damaged."""
        return [rows for rows in self.parts() if _rows_of(self._part_file(channel, rows)) != len(rows)]

    def write(self, channel: str, rows: range, features: np.ndarray) -> None:
        """Write the `(len(rows), width)` features of one part of a channel, in float32."""
        names = [f"{channel}_{index:04d}" for index in range(features.shape[1])]
        table = pa.table(list(features.astype(np.float32).T), names=names)
        with written_whole(self._part_file(channel, rows)) as partial:
            pq.write_table(table, partial)

    def join(self) -> None:
        """Write the finished file from its parts, some thousand rows at a time, and remove them."""
        parts = self.parts()
        together = max(1, ROW_GROUP // self.part_fields)
        firsts = [pq.read_schema(self._part_file(channel, parts[0])) for channel in self.channels]
        schema = pa.unify_schemas([self.metadata.schema, *firsts])
        schema = schema.with_metadata({SETTINGS: self.settings.encode()})
        with written_whole(self.path) as partial, pq.ParquetWriter(partial, schema) as writer:
            for start in range(0, len(parts), together):
                some = parts[start : start + together]
                columns = list(self.metadata.slice(some[0].start, some[-1].stop - some[0].start).columns)
                for channel in self.channels:
                    tables = [pq.read_table(self._part_file(channel, rows)) for rows in some]
                    columns += pa.concat_tables(tables).columns
                writer.write_table(pa.table(columns, schema=schema), row_group_size=2 * ROW_GROUP)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part_file(self, channel: str, rows: range) -> Path:
        return self.folder / f"{channel}-{rows.start:09d}.parquet"


def _settings_of(path: Path) -> str | None:
    """The settings in a profile file's schema; None for no file, a damaged file, and a file of another kind."""
    try:
        return (pq.read_schema(path).metadata or {})[SETTINGS].decode()
    except (OSError, ValueError, KeyError):  # pyarrow's errors are OSError or ValueError
        return None


def _rows_of(path: Path) -> int | None:
    """The number of rows in a Parquet file; None for no file and a damaged one."""
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError):
        return None
