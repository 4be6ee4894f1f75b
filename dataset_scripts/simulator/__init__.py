"""A simulated screen in the layout of BBBC021, and drawings of single fields and cells."""

from .drawing import draw_field
from .optics import Optics
from .phenotypes import Phenotype, mechanism_phenotypes

__all__ = ["Optics", "Phenotype", "draw_field", "mechanism_phenotypes"]
