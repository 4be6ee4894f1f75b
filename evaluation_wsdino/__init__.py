"""Evaluation of profiles: normalization, aggregation, NSC and NSCB with intervals, and the report."""

from .normalization import TypicalVariationNormalizer
from .profiles import ProfileError, aggregate_profiles, normalize_profiles, read_profiles

__all__ = [
    "ProfileError",
    "TypicalVariationNormalizer",
    "aggregate_profiles",
    "normalize_profiles",
    "read_profiles",
]
