"""What the page needs of a run folder: results, training logs, pictures, and thumbnails of its dataset."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageOps

from wsdino.errors import UserError, first_line
from wsdino.run_folder import RunFolder, ordered_sets

from ..pictures import read_sheet


@dataclass
class Run:
    """One run folder's content. Pictures and thumbnails are data URIs."""

    name: str
    results: dict  # as of `RunFolder.results`
    metrics: dict[str, list[dict]]  # of each channel, and of "all channels" together
    pictures: dict[str, list] = field(default_factory=dict)  # of each sheet, its groups: title, [(caption, picture)]
    thumbnails: dict[str, str] = field(default_factory=dict)  # of each treatment
    prefix: str = ""  # of what the page says of this run, "name: " beside other runs

    @property
    def headline(self) -> str:
        """Name of the profile set that the run is about."""
        return self.results["headline"]["set"]

    @property
    def scores(self) -> dict:
        """The entry of that set."""
        return self.results["sets"][self.headline]

    @property
    def set_names(self) -> list[str]:
        """Every profile set in the order of all tables."""
        return ordered_sets(self.results["sets"])

    @property
    def elsewhere(self) -> str:
        """What a neighbour must differ in for NSCB, beside the compound: "batch" or "plate"."""
        return "plate" if self.results["protocol"].get("batch_rule") == "plate" else "batch"


def load_run(folder: str | Path, dataset: str | Path | None = None, *, thumbnails: bool = True) -> Run:
    """Read one run folder.

    Parameters
    ----------
    folder : str or Path
        A run folder with a results.json.
    dataset : str or Path, optional
        Folder of the dataset whose previews become thumbnails; the one in the run's settings, where it still exists,
        if not given.
    thumbnails : bool
        False reads none.

    Raises
    ------
    UserError
        The folder or its results.json is missing or damaged, or `dataset` has no previews.
    """
    run = RunFolder(folder)
    results = run.results()
    recorded = results["settings"]["dataset"].get("path")
    found = {}
    if thumbnails and dataset:
        found = load_thumbnails(dataset)
    elif thumbnails and isinstance(recorded, str) and Path(recorded).is_dir():
        try:
            found = load_thumbnails(recorded)
        except UserError as error:
            print(f"The page has no thumbnails: {error}")
    metrics = {log.parent.name: run.metrics(log.parent.name) for log in sorted(run.path.glob("*/metrics.jsonl"))}
    if results.get("checkpoints"):
        metrics["all channels"] = results["checkpoints"]
    return Run(run.path.resolve().name, results, metrics, _pictures(run.pictures), found)


def _pictures(folder: Path) -> dict[str, list]:
    sheets = {}
    for path in sorted(folder.glob("*.png")):
        try:
            groups = read_sheet(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read as a picture ({first_line(error)}): remove it.") from None
        sheets[path.stem] = [
            (title, [(caption, _smaller(cell)) for caption, cell in cells]) for title, cells in groups
        ]
    return sheets


def load_thumbnails(dataset: str | Path, size: int = 72) -> dict[str, str]:
    """`{treatment: data URI}` of the preview of each treatment's first field in a built dataset's folder.

    Raises
    ------
    UserError
        The folder has no treatments with previews.
    """
    first = {}
    try:
        for path in sorted(Path(dataset).glob("data/annotated/*.parquet")):
            for row in pq.read_table(path, columns=["treatment", "preview"]).to_pylist():
                if row["preview"]:
                    first.setdefault(row["treatment"], row["preview"]["bytes"])
        pictures = {
            name: ImageOps.fit(Image.open(io.BytesIO(data)).convert("RGB"), (size, size))
            for name, data in first.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
    else:
        reason = "" if pictures else "there is no data/annotated/*.parquet"
    if reason:
        raise UserError(f"{dataset} is not a built dataset with treatments and previews: {reason}.")
    return {name: _data_uri(picture, "jpeg", quality=80) for name, picture in pictures.items()}


def _smaller(picture: Image.Image) -> str:
    """A picture as JPEG, or as PNG where that is no larger, as for a map of a few colours."""
    return min(_data_uri(picture, "png", optimize=True), _data_uri(picture, "jpeg", quality=88), key=len)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
