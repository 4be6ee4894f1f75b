"""Which treatment is in which well of which plate, and the two official tables that say so."""

from __future__ import annotations

import csv
import gzip
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsdino.errors import UserError

from ..screen import read_screen
from .screen_design import NAMES, ScreenDesign

HEADER = (
    "TableNumber,ImageNumber,Image_FileName_DAPI,Image_PathName_DAPI,Image_FileName_Tubulin,Image_PathName_Tubulin,"
    "Image_FileName_Actin,Image_PathName_Actin,Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,Replicate,"
    "Image_Metadata_Compound,Image_Metadata_Concentration"
)


@dataclass(frozen=True)
class Well:
    """One well of one plate: its treatment and the image files to draw.

    Attributes
    ----------
    concentration : float
        Micromolar; 0 for DMSO.
    moa : str
        Mechanism of action; empty where the treatment has no annotation.
    sites : list of int
        Numbers of the fields.
    files : list of (dna, tubulin, actin)
        Paths of each site's images, relative to the folder of the screen.
    """

    batch: str
    plate: str
    well: str
    replicate: int
    compound: str
    concentration: float
    treatment: str
    moa: str
    sites: list[int]
    files: list[tuple[str, str, str]]


def designed_wells(design: ScreenDesign, rng: np.random.Generator) -> list[Well]:
    """Lay out every plate of a design: the treatments of its batch, the reference compound and DMSO.

    Raises
    ------
    UserError
        A batch needs more wells than a plate has.
    """
    treatments: dict[int, list[tuple[str, float, str]]] = {batch: [] for batch in range(design.batches)}
    number = 0
    reference = None
    names = rng.permutation(999)[:NAMES] + 1  # so that the names' order says nothing about the mechanism
    for m, mechanism in enumerate([*design.mechanisms, *design.single_batch_mechanisms]):
        for c in range(design.compounds):
            single = mechanism in design.single_batch_mechanisms
            batch = m % design.batches if single else (m + c) % design.batches
            compound = f"SIM-{names[number]:03d}"
            number += 1
            top = float(rng.choice([0.3, 1.0, 3.0, 10.0, 30.0]))
            doses = [float(f"{top / 3.1623 ** (design.doses - 1 - d):.2g}") for d in range(design.doses)]
            if reference is None:
                reference = (compound, doses[0], mechanism)
                doses = doses[1:]  # the lowest dose is on every plate already
            treatments[batch] += [(compound, dose, mechanism) for dose in doses]
    for c in range(design.inactive):
        compound = f"SIM-{names[number + c]:03d}"
        treatments[c % design.batches] += [(compound, dose, "") for dose in (0.1, 1.0)[: design.doses]]

    places = [f"{row}{column:02d}" for row in "BCDEFG" for column in range(2, 12)]
    wells = []
    for batch in range(design.batches):
        layout = treatments[batch] + [reference] * design.reference_wells
        layout = layout + [("DMSO", 0.0, "DMSO")] * design.dmso_wells
        if len(layout) > len(places):
            raise UserError(
                f"batch {batch + 1} needs {len(layout)} wells and a plate has {len(places)}: "
                "give more batches, or fewer compounds, doses or wells"
            )
        chosen = rng.permutation(len(places))[: len(layout)]
        for replicate in range(1, design.replicates + 1):
            plate = f"Week{batch + 1}_{(batch + 1) * 1000 + 20 * replicate + 1}"
            for place, (compound, concentration, mechanism) in zip(chosen, layout, strict=True):
                name = places[place]
                files = []
                for site in range(1, design.fields_per_well + 1):
                    stem = f"Week{batch + 1}_{name}_s{site}_w"
                    files.append(
                        tuple(
                            f"Week{batch + 1}/{plate}/{stem}{w}"
                            f"{str(uuid.uuid5(uuid.NAMESPACE_OID, f'{plate}{stem}{w}')).upper()}.tif"
                            for w in (1, 2, 4)
                        )
                    )
                wells.append(
                    Well(
                        batch=f"Week{batch + 1}",
                        plate=plate,
                        well=name,
                        replicate=replicate,
                        compound=compound,
                        concentration=concentration,
                        treatment="DMSO" if compound == "DMSO" else f"{compound}_{concentration:g}",
                        moa=mechanism,
                        sites=list(range(1, design.fields_per_well + 1)),
                        files=files,
                    )
                )
    return wells


def official_wells(plate_map: tuple[str | Path, str | Path]) -> list[Well]:
    """The wells of official tables: the CSV of images and the CSV of mechanisms.

    Raises
    ------
    UserError
        A table cannot be read, or names a file that is no TIFF.
    """
    table = read_screen(*plate_map)
    for channel in ("dna", "tubulin", "actin"):
        bad = ~table[f"{channel}_file"].str.lower().str.endswith((".tif", ".tiff"))
        if bad.any():
            row, file = table.loc[bad.idxmax(), ["row", f"{channel}_file"]]
            what = f"the {channel} file {file!r} is not the name of a TIFF" if file else f"no {channel} image is named"
            raise UserError(f"{plate_map[0]}, line {row}: {what}: name one, which will be drawn")
    return [
        Well(
            batch=group["batch"].iloc[0],
            plate=plate,
            well=well,
            replicate=int(group["replicate"].iloc[0]),
            compound=group["compound"].iloc[0],
            concentration=float(group["concentration"].iloc[0]),
            treatment=group["treatment"].iloc[0],
            moa=group["moa"].iloc[0],
            sites=[int(site) for site in group["site"]],
            files=list(zip(group["dna_file"], group["tubulin_file"], group["actin_file"], strict=True)),
        )
        for (plate, well), group in table.groupby(["plate", "well"], sort=True)
    ]


def write_tables(folder: Path, wells: list[Well], rng: np.random.Generator) -> None:
    """Write the two official tables of a designed screen into `folder`, the rows in random order."""
    rows = []
    for well in wells:
        table = int(well.batch.removeprefix("Week")) % 10
        for files in well.files:
            cells = []
            for file in files:
                place, name = file.rsplit("/", 1)
                cells += [name, place]
            rows.append(
                [table, 0, *cells, well.plate, well.well, well.replicate, well.compound] + [f"{well.concentration:g}"]
            )
    # Neither sorted by label nor by plate: nothing downstream may rely on the order of the rows.
    rows = [rows[i] for i in rng.permutation(len(rows))]
    for number, row in enumerate(rows, start=1):
        row[1] = number
    with open(folder / "BBBC021_v1_image.csv", "w", newline="") as file:
        file.write(HEADER + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)
    labels = sorted({(w.compound, w.concentration, w.moa) for w in wells if w.moa})
    labels = [labels[i] for i in rng.permutation(len(labels))]
    with open(folder / "BBBC021_v1_moa.csv", "w", newline="") as file:
        file.write('"compound",concentration,"moa"\n')
        for compound, concentration, moa in labels:
            file.write(f'"{compound}",{concentration:.6f},"{moa}"\n')


def copy_table(source: str | Path, target: Path) -> None:
    """Copy an official table, unpacked if its name ends in .gz."""
    content = Path(source).read_bytes()
    target.write_bytes(gzip.decompress(content) if str(source).endswith(".gz") else content)
