"""A simulated screen in the layout of BBBC021, and drawings of single fields and cells."""

from .drawing import draw_crops, draw_field
from .optics import Optics, random_optics
from .phenotypes import Phenotype, mechanism_blend, mechanism_phenotypes, random_phenotype

__all__ = [
    "Optics",
    "Phenotype",
    "draw_crops",
    "draw_field",
    "mechanism_blend",
    "mechanism_phenotypes",
    "random_optics",
    "random_phenotype",
]
