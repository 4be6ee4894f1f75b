"""The folder a metric Space holds; `evaluate.load` reads not_same_compound.py in it, `import` finds the function."""

from .not_same_compound import NotSameCompound, not_same_compound

__all__ = ["NotSameCompound", "not_same_compound"]
