"""What a simulated screen consists of: its mechanisms, batches, plates, doses and difficulty."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from wsdino.errors import UserError

from .phenotypes import mechanism_phenotypes

NAMES = 512  # number of names for compounds


@dataclass(frozen=True)
class ScreenDesign:
    """What a simulated screen consists of.

    Attributes
    ----------
    image_size : (rows, columns)
        Shape of the raw images, 32 to 8192 pixels each.
    scale : float
        Multiplies every length in a picture, 0.05 to 20; 1 = the raw pixels of BBBC021 (nuclei 38 pixels across).
    mechanisms : tuple of str
        Mechanisms spread over the batches; the first compound of the first one is the reference compound, whose
        lowest dose is on every plate of every batch.
    single_batch_mechanisms : tuple of str
        Mechanisms all of whose compounds are in one batch (so NSCB leaves them out, as it does two of BBBC021).
    batches, replicates : int
        Batches, and plates per batch, which repeat one layout.
    compounds, doses : int
        Compounds per mechanism, and annotated doses per compound.
    inactive : int
        Compounds without annotation (they look like DMSO).
    dmso_wells, reference_wells, fields_per_well : int
        Wells of DMSO and of the reference compound per plate, and fields per well.
    nuisance : float
        The dial of difficulty, 0 to 10. Multiplies the log standard deviations of what hides the mechanism: batch,
        plate and well effects, and how each treatment stains and kills in its own way; 0 = none.
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


def check_number(name: str, value, least: int, most: int) -> None:
    """Refuse what is not a whole number within the bounds."""
    if not (isinstance(value, int) and least <= value <= most):
        raise UserError(f"{name} is {value}: give a whole number from {least} to {most}")


def check_design(design: ScreenDesign) -> None:
    """Refuse a design that cannot be drawn.

    Raises
    ------
    UserError
        Naming the field of the design and its bounds.
    """
    for name, least, most in (("scale", 0.05, 20), ("nuisance", 0, 10)):
        if not least <= getattr(design, name) <= most:  # this form also refuses NaN
            raise UserError(f"{name} is {getattr(design, name)}: give a factor from {least} to {most}")
    sides = design.image_size if isinstance(design.image_size, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and 32 <= side <= 8192 for side in sides):
        raise UserError(f"image_size is {design.image_size}: give two whole numbers, rows and columns of 32 to 8192")
    for name in ("batches", "replicates", "compounds", "doses", "fields_per_well", "dmso_wells"):
        check_number(name, getattr(design, name), 1, 1000)
    for name in ("inactive", "reference_wells"):
        check_number(name, getattr(design, name), 0, 1000)
    known, named = mechanism_phenotypes(), [*design.mechanisms, *design.single_batch_mechanisms]
    for name in named:
        if name not in known:
            raise UserError(f"mechanism {name!r} is unknown: choose among {', '.join(known)}")
    if not design.mechanisms:
        raise UserError("the design has no mechanisms: name at least one")
    compounds = len(named) * design.compounds + design.inactive
    if compounds > NAMES:
        raise UserError(f"the design has {compounds} compounds, and there are names for {NAMES}: use fewer")


def stream(seed: int, *key) -> np.random.Generator:
    """The random stream of a named part of the screen, whatever the order of work and the number of processes."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, key)).encode())])
