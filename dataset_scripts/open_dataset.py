"""Opens a built dataset, a folder or a Hub id: what is known of its fields, and their images as they are asked for.

Parquet files are read where they are, in a folder or the Hub's cache: no copy is made of them, and a folder that was
built anew is never mistaken for what it held before. Datasets of other formats are opened by the datasets library.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from wsdino.errors import UserError, first_line

from .images import read_image

METADATA = {
    "plate": "Plate",
    "well": "Well",
    "site": "Site",
    "compound": "Compound",
    "concentration": "Concentration",
    "treatment": "Treatment",
    "moa": "MOA",
    "batch": "Batch",
    "replicate": "Replicate",
    "source": "Source",
}


class Fields:
    """Fields of a dataset, in order. `fields["plate"]` is a list with one value per field.

    Parameters
    ----------
    source : object
        Where columns and images are read from.
    rows : numpy.ndarray, optional
        Which of its rows, in which order; all if not given.

    Attributes
    ----------
    column_names : list of str
        All columns, images too.
    fingerprint : str
        Changes with the dataset's files and with the selection of fields; a cache or a result of these fields may be
        named by it.
    """

    def __init__(self, source: _ParquetFiles | _LibraryDataset, rows: np.ndarray | None = None):
        self._source, self._rows = source, rows
        self.column_names: list[str] = source.column_names
        self.fingerprint: str = source.fingerprint
        if rows is not None:
            self.fingerprint = _short_digest(source.fingerprint.encode() + np.asarray(rows, "<i8").tobytes())

    @classmethod
    def from_dataset(cls, dataset) -> Fields:
        """The rows of a `datasets.Dataset` that is already open or was made in memory."""
        return cls(_LibraryDataset(dataset, dataset._fingerprint))

    def __len__(self) -> int:
        return self._source.num_rows if self._rows is None else len(self._rows)

    def __getitem__(self, name: str) -> list:
        return self._column(name).to_pylist()

    def table(self, names: Iterable[str]) -> pd.DataFrame:
        """Some columns, one row per field."""
        return pa.table({name: self._column(name) for name in names}).to_pandas()

    def with_images(self, channels: Iterable[str]) -> Fields:
        """The fields that have an image in every one of `channels`, in order.

        Raises
        ------
        UserError
            No field has them all.
        """
        present = np.ones(len(self), dtype=bool)
        for channel in channels:
            present &= self._column(channel, presence=True).is_valid().to_numpy()
        if not present.any():
            raise UserError(
                f"No field of the dataset has an image in {' and '.join(channels)}: choose other channels."
            )
        return self if present.all() else self.select(np.flatnonzero(present))

    def select(self, rows: Sequence[int] | np.ndarray) -> Fields:
        """The fields of these row numbers, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        return Fields(self._source, rows if self._rows is None else self._rows[rows])

    def encoded(self, row: int, name: str) -> bytes | str | None:
        """The file of one image: its bytes or its path, None where the field lacks it."""
        value = self._source.value(int(row if self._rows is None else self._rows[row]), name)
        return value and (value["bytes"] if value["bytes"] is not None else value["path"])

    def image(self, row: int, channel: str) -> np.ndarray:
        """One decoded grey image, `(height, width)` uint8 or uint16.

        Raises
        ------
        UserError
            Naming the row: the field lacks this channel, or its image is damaged or of another kind.
        """
        encoded = self.encoded(row, channel)
        if encoded is None:
            raise UserError(f"row {row} has no {channel} image: leave out the fields that lack it.")
        plane, mode = read_image(
            io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, f"row {row}: {channel} image"
        )
        if plane.dtype not in (np.uint8, np.uint16):
            raise UserError(f"row {row}: {channel} image is of mode {mode}, not 8 or 16 bits: build the dataset so.")
        return plane

    def _column(self, name: str, presence: bool = False) -> pa.ChunkedArray:
        column = self._source.column(name, presence)
        return column if self._rows is None else column.take(pa.array(self._rows))


class Planes(Sequence):
    """One channel's planes, `(height, width)` uint16 or uint8 of one size and depth, decoded as they are asked for.

    Parameters
    ----------
    fields : Fields
    channel : str
    rows : list of int, optional
        Which fields, in which order; all if not given.

    Attributes
    ----------
    like : numpy.ndarray
        The plane of the dataset's first field, which all others must resemble.
    """

    def __init__(self, fields: Fields, channel: str, rows: Sequence[int] | None = None):
        self.fields, self.channel = fields, channel
        self.rows = range(len(fields)) if rows is None else rows
        self.like = fields.image(0, channel)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """The plane of one field.

        Raises
        ------
        UserError
            Naming the row: it is no such image, or differs from the first in size or depth.
        """
        row = self.rows[index]
        plane = self.fields.image(row, self.channel)
        if (plane.shape, plane.dtype) != (self.like.shape, self.like.dtype):
            raise UserError(
                f"row {row}: {self.channel} is {plane.dtype} of shape {plane.shape} where row 0 is {self.like.dtype} "
                f"of shape {self.like.shape}: all fields must have one size and depth."
            )
        return plane


def open_fields(
    path: str | Path, subsets: Sequence[str], *, channels: Sequence[str] = (), columns: Sequence[str] = ()
) -> Fields:
    """Open subsets of a dataset, joined in the order given.

    Parameters
    ----------
    path : str or path
        Folder of a dataset, or its Hub id.
    subsets : names
        Configurations of the dataset, such as "annotated" and "dmso".
    channels : names
        Image columns that it must have; fields that lack one of these images are left out.
    columns : names
        Further columns that it must have.

    Raises
    ------
    UserError
        There is no such dataset or column, it cannot be loaded, or it has no fields.
    """
    path = str(path)
    folder = Path(path).expanduser()
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"There is no dataset folder {path}: build it with wsdino-prepare, or give a Hub id.")
    fields = Fields(_open_source(path, folder, subsets))
    for name in (*channels, *columns):
        if name not in fields.column_names:
            known = ", ".join(fields.column_names)
            raise UserError(f"The dataset {path} has no column {name!r}; it has {known}: name one of these.")
    if not len(fields):
        raise UserError(f"The dataset {path} has no fields in {', '.join(subsets)}: choose another subset.")
    return fields.with_images(channels)


def metadata_table(fields: Fields) -> pd.DataFrame:
    """`Metadata_*` columns of every field, as cytomining tools name them.

    Raises
    ------
    UserError
        There is none: nobody could tell whose the features are.
    """
    present = [column for column in METADATA if column in fields.column_names]
    if not present:
        raise UserError(
            f"The dataset has none of the columns {', '.join(sorted(METADATA))}, which say whose the features are: "
            "rename its own columns so."
        )
    return fields.table(present).rename(columns={column: f"Metadata_{METADATA[column]}" for column in present})


def check_fields_once(metadata: pd.DataFrame, subsets: Sequence[str]) -> None:
    """Refuse subsets that overlap: a field that stands in a profile file twice would be its own neighbour.

    Parameters
    ----------
    metadata : pandas.DataFrame
        Of `metadata_table`.

    Raises
    ------
    UserError
        Naming the field.
    """
    keys = [name for name in ("Source", "Plate", "Well", "Site") if f"Metadata_{name}" in metadata]
    if "Well" not in keys or "Site" not in keys:
        return
    twice = metadata.duplicated([f"Metadata_{name}" for name in keys])
    if twice.any():
        field = " ".join(str(metadata[f"Metadata_{name}"][twice].iloc[0]) for name in keys[-3:])
        raise UserError(
            f"The subsets {' '.join(subsets)} hold the field {field} twice: name subsets that do not overlap."
        )


def load_thumbnails(path: str | Path, subset: str = "annotated", size: int = 72) -> dict[str, bytes]:
    """A square JPEG, `size` pixels wide, of each treatment's first preview.

    Raises
    ------
    UserError
        The dataset cannot be opened, or has no treatments or previews.
    """
    from PIL import Image

    fields = open_fields(path, [subset], columns=["treatment", "preview"])
    thumbnails: dict[str, bytes] = {}
    for row, treatment in enumerate(fields["treatment"]):
        if treatment in thumbnails or (encoded := fields.encoded(row, "preview")) is None:
            continue
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            picture = image.convert("RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        buffer = io.BytesIO()
        picture.crop((left, top, left + side, top + side)).resize((size, size)).save(buffer, "JPEG", quality=80)
        thumbnails[treatment] = buffer.getvalue()
    return thumbnails


def _open_source(path: str, folder: Path, subsets: Sequence[str]) -> _ParquetFiles | _LibraryDataset:
    import datasets  # takes a second to import
    from datasets.exceptions import DatasetsError

    try:
        if not folder.is_dir():
            folder = _parquet_snapshot(path, subsets) or folder
        local = folder.is_dir()
        name = str(folder.resolve()) if local else path
        if local:
            builders = [datasets.load_dataset_builder(name, subset) for subset in subsets]
            files = [str(file) for one in builders for file in (one.config.data_files or {}).get("train", ())]
            if files and all(file.endswith(".parquet") for file in files):
                return _ParquetFiles(files, _state(files))
        # The library would take a folder that changed since from its cache.
        mode = "reuse_cache_if_exists" if local else "reuse_dataset_if_exists"
        parts = [datasets.load_dataset(name, subset, split="train", download_mode=mode) for subset in subsets]
        cached = [file["filename"] for part in parts for file in part.cache_files]
        return _LibraryDataset(datasets.concatenate_datasets(parts), _state(files if local else cached))
    except (ValueError, OSError, DatasetsError) as error:
        # The library wraps the error that names what is damaged.
        reason = first_line(error.__cause__ or error)
        raise UserError(f"The dataset {path} cannot be loaded, subset {', '.join(subsets)}: {reason}") from error


def _parquet_snapshot(repository: str, subsets: Sequence[str]) -> Path | None:
    """The Hub's cache of a dataset whose card lists Parquet files for these subsets; None for other datasets.

    The files are read where the cache holds them: the datasets library would copy them once more.
    """
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, snapshot_download

    card = Path(snapshot_download(repository, repo_type="dataset", allow_patterns="README.md")) / "README.md"
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data) if card.is_file() else {}
    patterns: list[str] = []
    for subset in subsets:
        listed = configs.get(subset, {}).get("data_files")
        for each in listed if isinstance(listed, list) else [listed]:
            path = each.get("path") if isinstance(each, dict) and each.get("split") == "train" else None
            patterns += path if isinstance(path, list) else [path or ""]
    if not patterns or not all(pattern.endswith(".parquet") for pattern in patterns):
        return None
    return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=["README.md", *patterns]))


def _state(files: Iterable[str]) -> str:
    """A short digest of the names, sizes and times of files."""
    state = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in files]
    return _short_digest(json.dumps(state).encode())


class _ParquetFiles:
    """Rows of several Parquet files, one after another; images are read by row groups, the last of which is kept."""

    def __init__(self, files: list[str], fingerprint: str):
        self.files, self.fingerprint = files, fingerprint
        self.groups: list[tuple[int, int]] = []  # file, row group
        self.starts: list[int] = []  # first row of each group
        self.num_rows = 0
        self._readers: dict[int, pq.ParquetFile] = {}
        self._held: tuple = (None, None)
        for number, file in enumerate(files):
            try:
                footer = self._reader(number).metadata
                names = list(self._reader(number).schema_arrow.names)
            except (ValueError, OSError) as error:
                raise UserError(f"{file} is damaged ({first_line(error)}): build the dataset again.") from error
            if number == 0:
                self.column_names = names
            elif set(names) != set(self.column_names):
                raise UserError(f"{file} and {files[0]} have other columns: name subsets of one kind.")
            for group in range(footer.num_row_groups):
                self.groups.append((number, group))
                self.starts.append(self.num_rows)
                self.num_rows += footer.row_group(group).num_rows

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": {}, "_held": (None, None)}

    def _reader(self, number: int) -> pq.ParquetFile:
        if number not in self._readers:
            self._readers[number] = pq.ParquetFile(self.files[number], memory_map=True)
        return self._readers[number]

    def column(self, name: str, presence: bool) -> pa.ChunkedArray:
        """A whole column; of images with `presence` only what tells which there are."""
        read = f"{name}.path" if presence else name
        tables = [self._reader(number).read([read], use_threads=False) for number in range(len(self.files))]
        return pa.concat_tables(tables, promote_options="permissive").column(name)

    def value(self, row: int, name: str) -> dict | None:
        """The encoded image of one row."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        if self._held[0] != (group, name):
            number, inside = self.groups[group]
            chunk = self._reader(number).read_row_group(inside, [name], use_threads=False).column(name)
            self._held = ((group, name), chunk)
        return self._held[1][row - self.starts[group]].as_py()


class _LibraryDataset:
    """A dataset of another format, as the datasets library opens it."""

    def __init__(self, dataset, fingerprint: str):
        self.fingerprint, self.num_rows, self.column_names = fingerprint, len(dataset), dataset.column_names
        self._dataset = dataset.with_format("arrow")

    def column(self, name: str, presence: bool) -> pa.ChunkedArray:
        return self._dataset.select_columns([name])[:].column(name)

    def value(self, row: int, name: str) -> dict | None:
        return self._dataset.select_columns([name])[row : row + 1].column(name)[0].as_py()


def _short_digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
