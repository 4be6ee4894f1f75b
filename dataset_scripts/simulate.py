"""Simulates a screen in the official layout of BBBC021: two CSVs, and 16-bit TIFFs under <Week>/<plate>/.

    wsdino-simulate data/simulated --size demo --seed 7

Everything is a function of the seed: each field has its own random stream, keyed by plate, well and site, so any
number of worker processes writes the same bytes. `simulation.json`, written last, marks the folder as simulated and
holds the design and the truth (phenotype strengths, plate effects); without it the folder is unfinished.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import uuid
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .draw_cells import Optics, Phenotype, draw_field, mechanism_phenotypes
from .processes import process_pool, usable_cores
from .screen import ScreenError, read_screen

HEADER = (
    "TableNumber,ImageNumber,Image_FileName_DAPI,Image_PathName_DAPI,Image_FileName_Tubulin,Image_PathName_Tubulin,"
    "Image_FileName_Actin,Image_PathName_Actin,Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,Replicate,"
    "Image_Metadata_Compound,Image_Metadata_Concentration"
)
NAMES = 512  # of compounds


@dataclass(frozen=True)
class ScreenDesign:
    """What a simulated screen consists of.

    Attributes
    ----------
    image_size : (rows, columns)
        Of the raw images.
    scale : float
        Multiplies every length in a picture; 1 = the raw pixels of BBBC021 (nuclei 38 pixels across).
    mechanisms : tuple of str
        Mechanisms spread over the batches; the first compound of the first one is the reference compound, whose
        lowest dose is on every plate of every batch.
    single_batch_mechanisms : tuple of str
        Mechanisms all of whose compounds live in one batch (so NSCB leaves them out, as two of BBBC021's).
    batches, replicates : int
        Batches, and plates a batch, which repeat one layout.
    compounds, doses : int
        Compounds a mechanism and annotated doses a compound.
    inactive : int
        Compounds without annotation (they look like DMSO).
    dmso_wells, reference_wells, fields_per_well : int
        Per plate, per plate, per well.
    nuisance : float
        The dial of difficulty. Multiplies the log standard deviations of what hides the mechanism: batch, plate and
        well effects, and how each treatment stains and kills in its own way; 0 = none.
    """

    image_size: tuple[int, int]
    scale: float = 1.0
    mechanisms: tuple[str, ...] = ()
    single_batch_mechanisms: tuple[str, ...] = ()
    batches: int = 4
    replicates: int = 3
    compounds: int = 3
    doses: int = 2
    inactive: int = 1
    dmso_wells: int = 4
    reference_wells: int = 2
    fields_per_well: int = 4
    nuisance: float = 1.0


SCREEN_SIZES = {
    "tiny": ScreenDesign(
        image_size=(128, 160),
        scale=0.5,
        mechanisms=("Microtubule stabilizers", "Eg5 inhibitors"),
        single_batch_mechanisms=("Cholesterol-lowering", "Kinase inhibitors"),
        batches=3,
        replicates=2,
        compounds=2,
        dmso_wells=3,
        reference_wells=1,
        fields_per_well=2,
    ),
    "demo": ScreenDesign(
        image_size=(320, 400),
        mechanisms=("Microtubule stabilizers", "Microtubule destabilizers", "Eg5 inhibitors", "Actin disruptors"),
        single_batch_mechanisms=("Cholesterol-lowering", "Kinase inhibitors"),
    ),
    "full": ScreenDesign(
        image_size=(1024, 1280),
        mechanisms=(
            "Microtubule stabilizers",
            "Microtubule destabilizers",
            "Eg5 inhibitors",
            "Actin disruptors",
            "Aurora kinase inhibitors",
            "DNA damage",
            "DNA replication",
            "Epithelial",
            "Protein degradation",
            "Protein synthesis",
        ),
        single_batch_mechanisms=("Cholesterol-lowering", "Kinase inhibitors"),
        batches=10,
        compounds=3,
        doses=3,
        dmso_wells=6,
        reference_wells=6,
    ),
}


def simulate_screen(
    folder,
    size: str = "demo",
    seed: int = 0,
    *,
    plate_map=None,
    workers: int | None = None,
    progress: bool = True,
    **changes,
) -> Path:
    """Write a simulated screen in the layout of BBBC021.

    Parameters
    ----------
    folder : path
        Made if missing. A finished simulation of the same design and seed is left as it is.
    size : str
        Name of a design in :data:`SCREEN_SIZES`: "tiny", "demo" or "full".
    seed : int
    plate_map : (image_csv, moa_csv), optional
        Reproduce the plates, wells, sites and file names of these official tables instead of a design's own.
    workers : int, optional
        Processes; default: the cores this process may use. The result does not depend on it.
    progress : bool
        Show a progress bar.
    **changes
        Fields of :class:`ScreenDesign` to set otherwise, for example `image_size=(512, 640)`.

    Returns
    -------
    pathlib.Path
        The folder, holding `BBBC021_v1_image.csv`, `BBBC021_v1_moa.csv`, `simulation.json` and the TIFFs.
    """
    if size not in SCREEN_SIZES:
        raise ScreenError(f"size {size!r} is unknown: choose one of {', '.join(SCREEN_SIZES)}")
    try:
        design = replace(SCREEN_SIZES[size], **changes)
    except TypeError as error:
        raise ScreenError(f"unknown change of the design: {error}") from error
    _check_design(design)
    _check_number("seed", seed, 0, 2**63 - 1)
    if workers is not None:
        _check_number("workers", workers, 1, 1024)
    folder = Path(folder)
    description = {
        "source": f"simulated, seed {seed}",
        "seed": seed,
        "design": json.loads(json.dumps(asdict(design))),
        "plate_map": [_digest(path) for path in plate_map] if plate_map else None,
    }
    done, begun = folder / "simulation.json", folder / "simulation.json.partial"
    if done.is_file():
        try:
            known = json.loads(done.read_text())
            same = all(known.get(key) == value for key, value in description.items())
        except (ValueError, AttributeError) as error:
            raise ScreenError(f"{done} is damaged ({error}): remove {folder} and simulate it anew") from error
        if same:
            return folder
        raise ScreenError(f"{folder} holds another simulation: choose another folder, or remove this one")
    if begun.is_file():
        if begun.read_text() != json.dumps(description):
            raise ScreenError(
                f"{folder} holds an unfinished simulation of other settings: remove it, or finish that one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ScreenError(f"{folder} is not empty and holds no simulation: choose another folder")
    rng = _stream(seed, "layout")
    wells = _official_wells(plate_map, seed) if plate_map else _designed_wells(design, rng)
    optics = _plate_optics(design, seed, sorted({(well["batch"], well["plate"]) for well in wells}))
    phenotypes, strengths = _well_phenotypes(wells, seed)
    tasks = []
    for well in wells:
        dose = strengths[well["treatment"]]
        tasks.append((str(folder), seed, design, well, phenotypes[well["treatment"]], dose, optics[well["plate"]]))
    folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(description))
    for place in sorted({Path(path).parent for well in wells for site in well["files"] for path in site}):
        (folder / place).mkdir(parents=True, exist_ok=True)
    _run(_write_well, tasks, workers, progress, f"simulating {len({w['plate'] for w in wells})} plates, wells")

    if plate_map:
        _copy_table(plate_map[0], folder / "BBBC021_v1_image.csv")
        _copy_table(plate_map[1], folder / "BBBC021_v1_moa.csv")
    else:
        _write_tables(folder, wells, rng)
    description["truth"] = {
        "strength": strengths,
        "optics": {plate: asdict(value) for plate, value in optics.items()},
    }
    finished = folder / "simulation.json.finished"
    finished.write_text(json.dumps(description, indent=1))
    os.replace(finished, done)
    begun.unlink()
    return folder


def _check_number(name: str, value, least: int, most: int) -> None:
    if not (isinstance(value, int) and least <= value <= most):
        raise ScreenError(f"{name} is {value}: give a whole number from {least} to {most}")


def _check_design(design: ScreenDesign) -> None:
    for name, least, most in (("scale", 0.05, 20), ("nuisance", 0, 10)):
        if not least <= getattr(design, name) <= most:  # nor NaN
            raise ScreenError(f"{name} is {getattr(design, name)}: give a factor from {least} to {most}")
    sides = design.image_size if isinstance(design.image_size, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and 32 <= side <= 8192 for side in sides):
        raise ScreenError(f"image_size is {design.image_size}: give two whole numbers, rows and columns of 32 to 8192")
    for name in ("batches", "replicates", "compounds", "doses", "fields_per_well", "dmso_wells"):
        _check_number(name, getattr(design, name), 1, 1000)
    for name in ("inactive", "reference_wells"):
        _check_number(name, getattr(design, name), 0, 1000)
    known, named = mechanism_phenotypes(), [*design.mechanisms, *design.single_batch_mechanisms]
    for name in named:
        if name not in known:
            raise ScreenError(f"mechanism {name!r} is unknown: choose among {', '.join(known)}")
    if not design.mechanisms:
        raise ScreenError("the design has no mechanisms: name at least one")
    compounds = len(named) * design.compounds + design.inactive
    if compounds > NAMES:
        raise ScreenError(f"the design has {compounds} compounds, and there are names for {NAMES}: give fewer")


def _stream(seed: int, *key) -> np.random.Generator:
    """The random stream of a named thing: the same for any order of work and any number of processes."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, key)).encode())])


def _designed_wells(design: ScreenDesign, rng: np.random.Generator) -> list[dict]:
    """The wells of every plate: treatments of the batch, the reference, DMSO."""
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
            raise ScreenError(
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
                    {
                        "batch": f"Week{batch + 1}",
                        "plate": plate,
                        "well": name,
                        "replicate": replicate,
                        "compound": compound,
                        "concentration": concentration,
                        "treatment": "DMSO" if compound == "DMSO" else f"{compound}_{concentration:g}",
                        "moa": mechanism,
                        "sites": list(range(1, design.fields_per_well + 1)),
                        "files": files,
                    }
                )
    return wells


def _official_wells(plate_map, seed: int) -> list[dict]:
    """The wells of official tables. Compounds without any annotation get a random, mostly weak, phenotype later."""
    table = read_screen(*plate_map)
    for channel in ("dna", "tubulin", "actin"):
        bad = ~table[f"{channel}_file"].str.lower().str.endswith((".tif", ".tiff"))
        if bad.any():
            row, file = table.loc[bad.idxmax(), ["row", f"{channel}_file"]]
            what = f"the {channel} file {file!r} is not the name of a TIFF" if file else f"no {channel} image is named"
            raise ScreenError(f"{plate_map[0]}, line {row}: {what}: name one, which is drawn there")
    wells = []
    for (plate, well), group in table.groupby(["plate", "well"], sort=True):
        first = group.iloc[0]
        wells.append(
            {
                "batch": first["batch"],
                "plate": plate,
                "well": well,
                "replicate": int(first["replicate"]),
                "compound": first["compound"],
                "concentration": float(first["concentration"]),
                "treatment": first["treatment"],
                "moa": first["moa"],
                "sites": [int(site) for site in group["site"]],
                "files": list(zip(group["dna_file"], group["tubulin_file"], group["actin_file"], strict=True)),
            }
        )
    return wells


def _plate_optics(design: ScreenDesign, seed: int, plates: list[tuple[str, str]]) -> dict[str, Optics]:
    """Stain, seeding and light of every plate: a batch's own, and a smaller deviation of the plate."""
    k = design.nuisance
    optics = {}
    for batch, plate in plates:
        b, p = _stream(seed, "batch", batch), _stream(seed, "plate", plate)
        gain = np.exp(k * (b.normal(0, 0.22, 3) + p.normal(0, 0.08, 3)))
        background = np.array(Optics.background) * np.exp(k * (b.normal(0, 0.12, 3) + p.normal(0, 0.04, 3)))
        optics[plate] = Optics(
            gain=tuple(float(g) for g in gain),
            background=tuple(float(g) for g in np.clip(background, 430, 1100)),
            blur=float(0.9 * np.exp(k * (b.normal(0, 0.12) + p.normal(0, 0.08)))),
            density=float(np.exp(k * (b.normal(0, 0.15) + p.normal(0, 0.08)))),
            cell_size=float(np.exp(k * b.normal(0, 0.04))),
            vignette=float(np.clip(0.3 + k * b.normal(0, 0.08), 0, 0.7)),
            centre=tuple(float(0.5 + k * x) for x in b.normal(0, 0.08, 2)),
        )
    return optics


def _well_phenotypes(wells: list[dict], seed: int) -> tuple[dict[str, Phenotype], dict[str, float]]:
    """Full-dose phenotype and strength of every treatment."""
    known = mechanism_phenotypes()
    normal = Phenotype()
    doses: dict[str, set[float]] = {}
    mechanism: dict[str, str] = {}
    for well in wells:
        if well["moa"] not in ("", "DMSO"):
            doses.setdefault(well["compound"], set()).add(well["concentration"])
            mechanism[well["compound"]] = well["moa"]
    phenotypes, strengths = {}, {}
    for well in wells:
        treatment, compound = well["treatment"], well["compound"]
        if treatment in phenotypes:
            continue
        rng = _stream(seed, "compound", compound)
        name = mechanism.get(compound)
        if compound == "DMSO":
            phenotypes[treatment], strengths[treatment] = normal, 0.0
        elif name is None:  # not annotated: mostly inactive
            name = str(rng.choice(sorted(known)))
            phenotypes[treatment] = normal.blend(known[name], 1.0)
            strengths[treatment] = round(float(rng.uniform(0, 0.3)), 3)
        else:
            if name not in known:
                raise ScreenError(f"mechanism {name!r} of {compound!r} has no phenotype: use {', '.join(known)}")
            # Compounds of a mechanism differ, and most do something else besides.
            besides = known[str(rng.choice(sorted(set(known) - {name})))]
            phenotypes[treatment] = known[name].blend(besides, float(rng.uniform(0, 0.2))).vary(rng, 0.09)
            active = sorted(doses[compound])
            if well["moa"] == "":  # a dose outside the annotated, active range
                strengths[treatment] = 0.15 if well["concentration"] < active[0] else 1.0
            else:
                rank = active.index(well["concentration"]) / (len(active) - 1) if len(active) > 1 else 1.0
                strengths[treatment] = round(float(rng.uniform(0.55, 0.8) * (1 - rank) + 1.0 * rank), 3)
    return phenotypes, strengths


def _write_well(task) -> None:
    """Draw and write every site of one well."""
    folder, seed, design, well, phenotype, strength, optics = task
    here = _stream(seed, "well", well["plate"], well["well"])
    k = design.nuisance
    # A compound stains and kills in its own way, which says little about its mechanism: with brightness and number
    # of cells alone, compounds of one mechanism must not find each other.
    own = _stream(seed, "treatment", well["treatment"])
    drugged = 0.0 if well["compound"] == "DMSO" else 1.0
    gain = np.exp(k * (here.normal(0, 0.10, 3) + drugged * own.normal(0, 0.28, 3)))
    toxicity = drugged * own.normal(0, 0.30)
    optics = replace(
        optics,
        gain=tuple(float(a * b) for a, b in zip(optics.gain, gain, strict=True)),
        density=optics.density * float(np.exp(k * (here.normal(0, 0.18) + toxicity))),
        blur=optics.blur * float(np.exp(k * here.normal(0, 0.05))),
    )
    shown = Phenotype().blend(phenotype, strength)
    for site, files in zip(well["sites"], well["files"], strict=True):
        rng = _stream(seed, "field", well["plate"], well["well"], site)
        planes = draw_field(rng, design.image_size, shown, optics, design.scale)
        for plane, file in zip(planes, files, strict=True):
            Image.fromarray(plane).save(os.path.join(folder, file), format="TIFF")


def _run(function, tasks, workers, progress, what) -> None:
    if workers is None:
        # Starting processes costs more than drawing a small screen.
        workers = usable_cores() if len(tasks) >= 100 else 1
    with tqdm(total=len(tasks), desc=what, disable=not progress, mininterval=0.5) as bar:
        if workers == 1:
            for task in tasks:
                function(task)
                bar.update()
        else:
            with process_pool(workers) as pool:
                for _ in pool.map(function, tasks, chunksize=4):
                    bar.update()


def _write_tables(folder: Path, wells: list[dict], rng: np.random.Generator) -> None:
    rows = []
    for well in wells:
        table = int(well["batch"].removeprefix("Week")) % 10
        for files in well["files"]:
            cells = []
            for file in files:
                place, name = file.rsplit("/", 1)
                cells += [name, place]
            rows.append(
                [table, 0, *cells, well["plate"], well["well"], well["replicate"], well["compound"]]
                + [f"{well['concentration']:g}"]
            )
    # Neither sorted by label nor by plate: nothing downstream may lean on the order of the rows.
    rows = [rows[i] for i in rng.permutation(len(rows))]
    for number, row in enumerate(rows, start=1):
        row[1] = number
    with open(folder / "BBBC021_v1_image.csv", "w", newline="") as file:
        file.write(HEADER + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)
    labels = sorted({(w["compound"], w["concentration"], w["moa"]) for w in wells if w["moa"]})
    labels = [labels[i] for i in rng.permutation(len(labels))]
    with open(folder / "BBBC021_v1_moa.csv", "w", newline="") as file:
        file.write('"compound",concentration,"moa"\n')
        for compound, concentration, moa in labels:
            file.write(f'"{compound}",{concentration:.6f},"{moa}"\n')


def _copy_table(source, target: Path) -> None:
    content = Path(source).read_bytes()
    target.write_bytes(gzip.decompress(content) if str(source).endswith(".gz") else content)


def _digest(path) -> str:
    return f"{zlib.crc32(Path(path).read_bytes()):08x}"


def main(argv=None) -> None:
    """`wsdino-simulate`: write a simulated screen."""
    parser = argparse.ArgumentParser(prog="wsdino-simulate", description="Simulate a screen in BBBC021's layout.")
    parser.add_argument("folder", help="folder to write; made if missing")
    parser.add_argument("--size", default="demo", choices=sorted(SCREEN_SIZES), help="design (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="raw image size")
    parser.add_argument("--scale", type=float, help="multiplies every length in a picture (1: as in BBBC021)")
    parser.add_argument(
        "--nuisance",
        type=float,
        help="difficulty: multiplies batch, plate, well and treatment effects other than the mechanism (default: 1)",
    )
    parser.add_argument(
        "--plate_map", nargs=2, metavar=("IMAGE_CSV", "MOA_CSV"), help="reproduce the plates of these official tables"
    )
    parser.add_argument("--workers", type=int, help="processes (default: all cores); the result does not depend on it")
    args = parser.parse_args(argv)
    changes = {name: getattr(args, name) for name in ("image_size", "scale", "nuisance")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if "image_size" in changes:
        changes["image_size"] = tuple(changes["image_size"])
    try:
        folder = simulate_screen(
            args.folder, args.size, args.seed, plate_map=args.plate_map, workers=args.workers, **changes
        )
    except (ScreenError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted: run the command again to go on from here\n")
    what = f"the plates of {args.plate_map[0]}" if args.plate_map else f"size {args.size}"
    print(f"{folder}: simulated screen, seed {args.seed}, {what}")


if __name__ == "__main__":
    main()
