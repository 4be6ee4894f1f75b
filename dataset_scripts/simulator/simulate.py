"""Simulates a screen in the official layout of BBBC021: two CSVs, and 16-bit TIFFs under <Week>/<plate>/.

    wsdino-simulate data/simulated --size demo --seed 7

Everything is a function of the seed: each field has its own random stream, keyed by plate, well and site, so any
number of worker processes writes the same bytes. `simulation.json`, written last, marks the folder as simulated and
holds the design and the truth (phenotype strengths, plate effects); without it the folder is unfinished.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from wsdino.errors import UserError, command
from wsdino.files import claim_folder, read_json, write_json

from ..processes import process_pool, usable_cores
from .drawing import draw_field
from .optics import Optics
from .phenotypes import Phenotype, mechanism_phenotypes
from .plate_layout import Well, copy_table, designed_wells, official_wells, write_tables
from .screen_design import SCREEN_SIZES, ScreenDesign, check_design, check_number, stream


def simulate_screen(
    folder: str | Path,
    size: str = "demo",
    seed: int = 0,
    *,
    plate_map: tuple[str | Path, str | Path] | None = None,
    workers: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Path:
    """Write a simulated screen in the layout of BBBC021.

    Parameters
    ----------
    folder : path
        Made if missing. A finished simulation of the same design and seed is not changed; an unfinished one is
        finished.
    size : str
        Name of a design in :data:`SCREEN_SIZES`: "tiny", "demo" or "full".
    seed : int
        At least 0; the screen is a function of design and seed.
    plate_map : (image_csv, moa_csv), optional
        Reproduce the plates, wells, sites and file names of these official tables instead of a design's own.
    workers : int, optional
        Processes; default: one per core that this process may use, or one for a small screen. The result does not
        depend on it.
    progress : bool
        Show a progress bar.
    **changes
        Fields of :class:`ScreenDesign` that differ from those of `size`, for example `image_size=(512, 640)`.

    Returns
    -------
    pathlib.Path
        The folder, holding `BBBC021_v1_image.csv`, `BBBC021_v1_moa.csv`, `simulation.json` and the TIFFs.

    Raises
    ------
    UserError
        An impossible design, an unreadable plate map, or a folder with other content.
    """
    if size not in SCREEN_SIZES:
        raise UserError(f"size {size!r} is unknown: choose one of {', '.join(SCREEN_SIZES)}")
    unknown = sorted(set(changes) - {each.name for each in fields(ScreenDesign)})
    if unknown:
        raise UserError(f"a design has no field {unknown[0]!r}")
    design = replace(SCREEN_SIZES[size], **changes)
    check_design(design)
    check_number("seed", seed, 0, 2**63 - 1)
    if workers is not None:
        check_number("workers", workers, 1, 1024)
    folder = Path(folder)
    description = {
        "source": f"simulated, seed {seed}",
        "seed": seed,
        "design": json.loads(json.dumps(asdict(design))),
        "plate_map": [f"{zlib.crc32(Path(path).read_bytes()):08x}" for path in plate_map] if plate_map else None,
    }
    done, begun = folder / "simulation.json", folder / "simulation.json.partial"
    if done.is_file():
        if _describes(done, description):
            return folder
        raise UserError(f"{folder} holds another simulation: choose another folder, or remove this one")
    if claim_folder(folder, begun.name, "simulation") and not _describes(begun, description):
        raise UserError(f"{folder} holds an unfinished simulation of other settings: remove it, or finish that one")
    rng = stream(seed, "layout")
    wells = official_wells(plate_map) if plate_map else designed_wells(design, rng)
    optics = _plate_optics(design, seed, sorted({(well.batch, well.plate) for well in wells}))
    phenotypes, strengths = _well_phenotypes(wells, seed)
    tasks = [
        (folder, seed, design, well, phenotypes[well.treatment], strengths[well.treatment], optics[well.plate])
        for well in wells
    ]
    write_json(begun, description)
    for place in sorted({Path(path).parent for well in wells for site in well.files for path in site}):
        (folder / place).mkdir(parents=True, exist_ok=True)
    _run(_write_well, tasks, workers, progress, f"simulating {len({well.plate for well in wells})} plates, wells")

    if plate_map:
        copy_table(plate_map[0], folder / "BBBC021_v1_image.csv")
        copy_table(plate_map[1], folder / "BBBC021_v1_moa.csv")
    else:
        write_tables(folder, wells, rng)
    truth = {"strength": strengths, "optics": {plate: asdict(value) for plate, value in optics.items()}}
    write_json(begun, {**description, "truth": truth})
    begun.replace(done)
    return folder


def _describes(path: Path, description: dict) -> bool:
    """Whether a note of a simulation says what `description` says."""
    known = read_json(path, fix=f"remove {path.parent} and simulate it anew")
    return all(known.get(key) == value for key, value in description.items())


def _plate_optics(design: ScreenDesign, seed: int, plates: list[tuple[str, str]]) -> dict[str, Optics]:
    """Stain, seeding and light of every plate: each batch has its own, from which its plates deviate a little."""
    k = design.nuisance
    optics = {}
    for batch, plate in plates:
        b, p = stream(seed, "batch", batch), stream(seed, "plate", plate)
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


def _well_phenotypes(wells: list[Well], seed: int) -> tuple[dict[str, Phenotype], dict[str, float]]:
    """Full-dose phenotype and strength of every treatment."""
    known = mechanism_phenotypes()
    normal = Phenotype()
    doses: dict[str, set[float]] = {}
    mechanism: dict[str, str] = {}
    for well in wells:
        if well.moa not in ("", "DMSO"):
            doses.setdefault(well.compound, set()).add(well.concentration)
            mechanism[well.compound] = well.moa
    phenotypes, strengths = {}, {}
    for well in wells:
        treatment, compound = well.treatment, well.compound
        if treatment in phenotypes:
            continue
        rng = stream(seed, "compound", compound)
        name = mechanism.get(compound)
        if compound == "DMSO":
            phenotypes[treatment], strengths[treatment] = normal, 0.0
        elif name is None:  # not annotated: mostly inactive
            name = str(rng.choice(sorted(known)))
            phenotypes[treatment] = normal.blend(known[name], 1.0)
            strengths[treatment] = round(float(rng.uniform(0, 0.3)), 3)
        else:
            if name not in known:
                raise UserError(f"mechanism {name!r} of {compound!r} has no phenotype: use {', '.join(known)}")
            # Compounds of one mechanism differ, and most have a side effect.
            side_effect = known[str(rng.choice(sorted(set(known) - {name})))]
            phenotypes[treatment] = known[name].blend(side_effect, float(rng.uniform(0, 0.2))).vary(rng, 0.09)
            active = sorted(doses[compound])
            if well.moa == "":  # a dose outside the annotated, active range
                strengths[treatment] = 0.15 if well.concentration < active[0] else 1.0
            else:
                rank = active.index(well.concentration) / (len(active) - 1) if len(active) > 1 else 1.0
                strengths[treatment] = round(float(rng.uniform(0.55, 0.8) * (1 - rank) + 1.0 * rank), 3)
    return phenotypes, strengths


def _write_well(task) -> None:
    """Draw and write every site of one well."""
    folder, seed, design, well, phenotype, strength, optics = task
    here = stream(seed, "well", well.plate, well.well)
    k = design.nuisance
    # A compound stains and kills in its own way, which says little about its mechanism: brightness and number of
    # cells alone must not be enough to match compounds of one mechanism.
    own = stream(seed, "treatment", well.treatment)
    drugged = 0.0 if well.compound == "DMSO" else 1.0
    gain = np.exp(k * (here.normal(0, 0.10, 3) + drugged * own.normal(0, 0.28, 3)))
    toxicity = drugged * own.normal(0, 0.30)
    optics = replace(
        optics,
        gain=tuple(float(a * b) for a, b in zip(optics.gain, gain, strict=True)),
        density=optics.density * float(np.exp(k * (here.normal(0, 0.18) + toxicity))),
        blur=optics.blur * float(np.exp(k * here.normal(0, 0.05))),
    )
    shown = Phenotype().blend(phenotype, strength)
    for site, files in zip(well.sites, well.files, strict=True):
        rng = stream(seed, "field", well.plate, well.well, site)
        planes = draw_field(rng, design.image_size, shown, optics, design.scale)
        for plane, file in zip(planes, files, strict=True):
            Image.fromarray(plane).save(folder / file, format="TIFF")


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


@command("wsdino-simulate")
def main(argv: list[str] | None = None) -> None:
    """`wsdino-simulate`: write a simulated screen; flags as in `--help`."""
    parser = argparse.ArgumentParser(prog="wsdino-simulate", description="Simulate a screen in BBBC021's layout.")
    parser.add_argument("folder", help="folder to write; made if missing")
    parser.add_argument("--size", default="demo", choices=sorted(SCREEN_SIZES), help="design (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: %(default)s)")
    parser.add_argument("--image_size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="raw image size")
    parser.add_argument("--scale", type=float, help="multiplies every length in a picture (1: as in BBBC021)")
    parser.add_argument(
        "--nuisance",
        type=float,
        help="difficulty: multiplies what batch, plate, well and treatment do beside the mechanism (default: 1)",
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
    except KeyboardInterrupt:
        sys.stderr.write("\nwsdino-simulate: interrupted: run the command again to continue from here\n")
        raise
    what = f"the plates of {args.plate_map[0]}" if args.plate_map else f"size {args.size}"
    print(f"{folder}: simulated screen, seed {args.seed}, {what}")


if __name__ == "__main__":
    main()
