"""The folder of a dataset while it is built: who may write to it, which plates are done, how their files are named.

A plate is done only if its record is in `.build` and fits the present settings, so an interrupted build continues
with the next plate.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsdino.errors import UserError
from wsdino.files import claim_folder, locked, read_json, write_json

from .screen import PARTS


class DatasetFolder:
    """Folder of a dataset, finished or not.

    Parameters
    ----------
    path : path
        Made if missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.work = self.path / ".build"
        self.finished, self.begun = self.path / "build.json", self.work / "recipe"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, new or of this program, while it is built: two builds would write the same files.

        Raises
        ------
        UserError
            The folder holds something else, or another build holds it.
        """
        if not self.finished.is_file():
            claim_folder(self.path, ".build/recipe", "dataset of this program", ignore=[".build"])
        try:
            with locked(self.work / "lock", f"Another wsdino-prepare is building {self.path}: wait for its end."):
                try:
                    yield
                except BaseException:
                    if not self.begun.is_file():  # refused before it began
                        shutil.rmtree(self.work, ignore_errors=True)
                    raise
        except OSError as error:
            # Libraries raise errors of a full disk without the file's name.
            raise UserError(
                f"{error.filename or self.path} cannot be read or written: {error.strerror or error}"
            ) from error

    def begin(self, recipe: dict, plates: list[str]) -> None:
        """Accept the same dataset, finished or interrupted, and note that a build of it has begun.

        Parameters
        ----------
        recipe : dict
            Settings that the dataset's planes depend on.
        plates : list of str
            All plates that the dataset is to hold.

        Raises
        ------
        UserError
            The folder holds a dataset of other settings, or a plate that is not among these.
        """
        fix = f"remove {self.path} and build it anew"
        before, records, held = recipe, [], set()
        if self.begun.is_file():
            before = read_json(self.begun, needs=["source"], fix=fix)
            held = {path.stem for path in self.work.glob("*.json")}
        elif self.finished.is_file():
            build = read_json(self.finished, needs=["recipe", "plates"], fix=fix)
            before, records = build["recipe"], build["plates"]
            held = {record["plate"] for record in records}
        if before != recipe:
            raise UserError(
                f"{self.path} holds a dataset of other settings or another source ({before['source']}): choose "
                "another folder, or remove this one"
            )
        if others := sorted(held - set(plates)):
            raise UserError(
                f"{self.path} holds plate {others[0]}, which is not among the plates to build now: name it too "
                "(--plates), or choose another folder"
            )
        for record in records:
            self.write_record(record)
        write_json(self.begun, recipe)

    def write_record(self, record: dict) -> None:
        """Note that a plate is done."""
        write_json(self.work / f"{record['plate']}.json", record)

    def record(self, plate: str, digest: str) -> dict | None:
        """What was written of a plate, if its settings, rows and images had this digest and its files are whole."""
        try:
            record = read_json(self.work / f"{plate}.json", fix="")
            whole = [(self.path / file["path"]).stat().st_size == file["bytes"] for file in _files(record)]
            return record if record["digest"] == digest and all(whole) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged: it is built anew
            return None

    def finish(self, records: list[dict]) -> None:
        """Name the Parquet files `train-0000i-of-0000n` in the order of the records, and remove leftovers."""
        for part in PARTS:
            members = [record for record in records if part in record["shards"]]
            own = [f"data/{part}/{record['plate']}.parquet" for record in members]
            final = [f"data/{part}/train-{i:05d}-of-{len(members):05d}.parquet" for i in range(len(members))]
            # By way of the plate's own name, so that renumbering cannot overwrite the file of another plate.
            for names in (own, final):
                for record, name, last in zip(members, names, final, strict=True):
                    shard = record["shards"][part]
                    if shard["path"] != last:
                        (self.path / shard["path"]).replace(self.path / name)
                        shard["path"] = name
                        self.write_record(record)
        kept = {file["path"] for record in records for file in _files(record)}
        for folder in ("data", "illumination"):
            for path in sorted((self.path / folder).rglob("*")):
                if path.is_file() and path.relative_to(self.path).as_posix() not in kept:
                    path.unlink()

    def close(self, recipe: dict, counts: dict, records: list[dict]) -> None:
        """Write `build.json`, which says that the dataset is whole."""
        write_json(self.finished, {"recipe": recipe, "counts": counts, "plates": records})
        shutil.rmtree(self.work)


def _files(record: dict) -> list[dict]:
    return [*record["shards"].values(), *(function["file"] for function in record["functions"].values())]
