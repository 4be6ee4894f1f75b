"""The BBBC021 dataset builder: official tables and a folder of TIFFs in, rows with 16-bit images out.

Loading scripts are gone from `datasets`, so the builder runs in this process: `wsdino-prepare` writes its rows to
Parquet on all cores, and `BBBC021(...).download_and_prepare()` builds into the datasets cache instead.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import pandas as pd

from .illumination import illumination_function
from .plates import Preprocessing, find_file, plate_levels, plate_rows, present_images, read_plane
from .screen import PARTS, ScreenColumns, ScreenError, channel_pattern, read_screen

CITATION = """\
@article{caie2010high,
  title={High-Content Phenotypic Profiling of Drug Response Signatures across Distinct Cancer Cells},
  author={Caie, Peter D. and Walls, Rebecca E. and Ingleston-Orme, Alexandra and Daya, Sandeep and Houslay, Tom and
          Eagle, Rob and Roberts, Mark E. and Carragher, Neil O.},
  journal={Molecular Cancer Therapeutics}, volume={9}, number={6}, pages={1913--1926}, year={2010}
}
@article{ljosa2012annotated,
  title={Annotated high-throughput microscopy image sets for validation},
  author={Ljosa, Vebjorn and Sokolnicki, Katherine L. and Carpenter, Anne E.},
  journal={Nature Methods}, volume={9}, number={7}, pages={637}, year={2012}
}
@article{ljosa2013comparison,
  title={Comparison of Methods for Image-Based Profiling of Cellular Morphological Responses to Small-Molecule
         Treatment},
  author={Ljosa, Vebjorn and Caie, Peter D. and ter Horst, Rob and Sokolnicki, Katherine L. and Jenkins, Emma L. and
          Daya, Sandeep and Roberts, Mark E. and Jones, Thouis R. and Singh, Shantanu and Genovesio, Auguste and
          Clemons, Paul A. and Carragher, Neil O. and Carpenter, Anne E.},
  journal={Journal of Biomolecular Screening}, volume={18}, number={10}, pages={1321--1329}, year={2013}
}
"""


def screen_features(channels) -> datasets.Features:
    """The dataset's columns for the given channel names. Labels are strings: integer ids would leak an order."""
    text, number, image = datasets.Value("string"), datasets.Value("int32"), datasets.Image()
    features = {channel: image for channel in channels}
    features["preview"] = image
    features["compound"] = text
    features["concentration"] = datasets.Value("float64")
    for name in ("treatment", "moa", "batch", "plate", "well"):
        features[name] = text
    features["site"] = features["replicate"] = number
    features["source"] = text
    features.update({f"{channel}_file": text for channel in channels})
    features["table_number"] = features["image_number"] = number
    return datasets.Features(features)


@dataclass
class RawScreen:
    """A screen's raw images and tables, located and checked before any work starts.

    Attributes
    ----------
    raw : path
        Folder of the images; also of the tables, unless they are given.
    image_csv, moa_csv : path, optional
        Default: `BBBC021_v1_image.csv` and `BBBC021_v1_moa.csv` in `raw` (the second also beside the first), plain or
        .gz. With columns of another screen there need be no MOA table.
    columns : ScreenColumns
    preprocessing : Preprocessing
    allow_missing : bool
        Build what is there: a missing channel becomes a null image, a field without any image is left out.
    plates : list of str, optional
        Build only these.
    source : str, optional
        Default: what `simulation.json` in `raw` says, else "BBBC021v1", or the folder's name for other columns.
    to_come : bool
        The images are still to be downloaded: do not look for them yet.
    progress : bool
        Show a bar where looking for the images takes long.
    table : pandas.DataFrame, optional
        The image table, already read (see :func:`dataset_scripts.screen.read_screen`).
    """

    raw: Path
    image_csv: Path | None = None
    moa_csv: Path | None = None
    columns: ScreenColumns = field(default_factory=ScreenColumns)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    allow_missing: bool = False
    plates: list[str] | None = None
    source: str | None = None
    to_come: bool = False
    progress: bool = False
    table: pd.DataFrame | None = None

    def __post_init__(self):
        self.raw = Path(self.raw)
        if not self.raw.is_dir():
            raise ScreenError(f"folder {self.raw} of raw images does not exist: give the folder that holds them")
        for channel in self.channels:
            if not channel_pattern(channel):
                raise ScreenError(f"channel name {channel!r} cannot be a column: use letters, digits and _")
            if channel in screen_features([other for other in self.channels if other != channel]):
                raise ScreenError(f"channel name {channel!r} is that of another column: choose another name")
        if self.image_csv is None and self.table is not None:
            self.image_csv = self.raw
        if self.image_csv is None:
            self.image_csv = self._table("BBBC021_v1_image.csv", self.raw)
        if self.moa_csv is None and self.columns == ScreenColumns():
            self.moa_csv = self._table("BBBC021_v1_moa.csv", self.raw, Path(self.image_csv).parent)
        if self.source is None:
            self.source = self._own_source()
        table = read_screen(self.image_csv, self.moa_csv, self.columns, self.table)
        self.plates_named = table["plate"].nunique()
        if self.plates:
            absent = sorted(set(self.plates) - set(table["plate"]))
            if absent:
                raise ScreenError(f"{self.image_csv} has no plate {absent[0]!r}: choose among the plates it names")
            table = table[table["plate"].isin(self.plates)]
        self._find_files(table)

    @property
    def channels(self) -> list[str]:
        return list(self.columns.channels)

    def _own_source(self) -> str:
        marker = self.raw / "simulation.json"
        if marker.is_file():
            try:
                return str(json.loads(marker.read_text())["source"])
            except (ValueError, KeyError, TypeError) as error:
                raise ScreenError(f"{marker} cannot be read ({error}): simulate the screen again") from error
        return "BBBC021v1" if self.columns == ScreenColumns() else self.raw.resolve().name

    def _table(self, name: str, *folders: Path) -> Path:
        for folder in folders:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
        raise ScreenError(f"{self.raw} holds no {name} (or .gz): put it there, or give its path")

    def _find_files(self, table: pd.DataFrame) -> None:
        """Keep the fields that can be built, and know the size of an image."""
        self.fields_named, self.images_named = len(table), len(table) * len(self.channels)
        self.fields, self.image_size = table.reset_index(drop=True), None
        if self.to_come:
            return
        present = present_images(
            table, self.raw, self.channels, self.allow_missing, str(self.image_csv), self.progress
        )
        self.fields = table[present.any(axis=1)].reset_index(drop=True)
        if self.fields.empty:
            raise ScreenError(f"{self.raw} holds none of the {present.size} images of {self.image_csv}: nothing to do")
        first = self.fields.iloc[0]
        path = next(p for c in self.channels if (p := find_file(self.raw, first[f"{c}_file"])) is not None)
        self.image_size = read_plane(path, self.preprocessing.bits).shape

    def plate_names(self) -> list[str]:
        """The plates with an image, in natural order (Week2 before Week10)."""
        return sorted(self.fields["plate"].unique(), key=natural_key)

    def plate_fields(self, plate: str) -> pd.DataFrame:
        return self.fields[self.fields["plate"] == plate]

    @property
    def recipe(self) -> dict:
        """The settings that the dataset's planes depend on."""
        return {"preprocessing": asdict(self.preprocessing), "channels": self.channels, "source": self.source}

    def digest(self, fields: pd.DataFrame) -> str:
        """sha256 of the recipe, of some fields' rows of the table, and of their files' sizes and times.

        An image that came or changed since gives another: what was built of the fields before is then out of date.
        """
        states = [
            (state.st_size, state.st_mtime_ns)
            for channel in self.channels
            for file in fields[f"{channel}_file"]
            if not self.to_come and (path := find_file(self.raw, file)) and (state := path.stat())
        ]
        return hashlib.sha256(json.dumps([self.recipe, states]).encode() + fields.to_csv().encode()).hexdigest()


def natural_key(name: str) -> list:
    """Sorts numbers inside names by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass
class ScreenConfig(datasets.BuilderConfig):
    """Configuration of :class:`BBBC021`: the name is a part ("annotated", "dmso", "unannotated") or "all".

    The digest of the screen's fields names the cache.
    """

    digest: str = ""


class BBBC021(datasets.GeneratorBasedBuilder):
    """Builder of BBBC021, or of any screen that :class:`RawScreen` describes.

    `BBBC021(config_name="annotated", screen=RawScreen("raw")).download_and_prepare()`; the arguments of
    :class:`RawScreen` are also taken directly: `BBBC021(config_name="all", raw="raw", allow_missing=True)`.
    """

    BUILDER_CONFIG_CLASS = ScreenConfig
    BUILDER_CONFIGS = [ScreenConfig(name=name) for name in (*PARTS, "all")]

    def __init__(self, cache_dir=None, config_name="annotated", screen: RawScreen | None = None, **kwargs):
        known = {name: kwargs.pop(name) for name in RawScreen.__dataclass_fields__ if name in kwargs}
        if screen is None:
            if "raw" not in known:
                raise ScreenError("give the folder of raw images: BBBC021(raw=...), or a RawScreen")
            screen = RawScreen(**known)
        self.screen = screen
        super().__init__(cache_dir=cache_dir, config_name=config_name, digest=screen.digest(screen.fields), **kwargs)

    def _info(self):
        official = self.screen.source == "BBBC021v1"
        return datasets.DatasetInfo(
            description=f"{self.screen.source}: fields of {len(self.screen.channels)} channels.",
            features=screen_features(self.screen.channels),
            homepage="https://bbbc.broadinstitute.org/BBBC021" if official else "",
            citation=CITATION if official else "",
        )

    def _split_generators(self, dl_manager):
        return [datasets.SplitGenerator("train", gen_kwargs={"plates": self.screen.plate_names()})]

    def _generate_examples(self, plates):
        screen = self.screen
        for plate in plates:
            fields = screen.plate_fields(plate)
            functions = {}
            if screen.preprocessing.illumination:
                levels = plate_levels(fields, screen.raw, screen.channels, screen.preprocessing, screen.image_size)
                functions = {channel: illumination_function(level) for channel, level in levels.items()}
            if self.config.name != "all":
                fields = fields[fields["part"] == self.config.name]
            for number, row in enumerate(
                plate_rows(
                    fields,
                    screen.raw,
                    screen.channels,
                    screen.preprocessing,
                    functions,
                    screen.image_size,
                    screen.source,
                )
            ):
                yield f"{plate}_{number}", row
