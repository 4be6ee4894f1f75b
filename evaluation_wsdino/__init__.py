"""Evaluation of profiles: normalization, aggregation, NSC and NSCB with intervals, comparison, and the report."""

from .normalization import TypicalVariationNormalizer
from .profile_table import read_profiles
from .profiles import aggregate_profiles, normalize_profiles

__all__ = ["TypicalVariationNormalizer", "aggregate_profiles", "normalize_profiles", "read_profiles"]
