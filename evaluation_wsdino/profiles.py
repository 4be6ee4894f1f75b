"""The way from fields to one vector per treatment: normalization on negative controls, then aggregation."""

import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
from sklearn.base import TransformerMixin, clone

from wsdino.errors import UserError

from .profile_table import CONTROL, feature_columns

_UNITS = {"plate": ["Metadata_Plate"], "well": ["Metadata_Plate", "Metadata_Well"], "field": []}


def normalize_profiles(profiles: pd.DataFrame, normalizer: TransformerMixin) -> pd.DataFrame:
    """The table with each channel's features replaced by those of a clone of `normalizer` fitted on its DMSO fields.

    Parameters
    ----------
    profiles : pandas.DataFrame
        One row per field, as `read_profiles` gives it.
    normalizer : TypicalVariationNormalizer or another transformer
        Cloned for each channel, fitted on the rows whose Metadata_Compound is "DMSO", applied to all rows.

    Returns
    -------
    pandas.DataFrame
        The same Metadata columns; as many feature columns per channel as the normalizer gives.

    Raises
    ------
    UserError
        There are fewer than two DMSO fields.
    """
    control = (profiles["Metadata_Compound"] == CONTROL).to_numpy()
    if control.sum() < 2:
        raise UserError(
            f"The profiles hold {int(control.sum())} DMSO fields, and normalization is fitted on at least two: "
            "extract the control's subset of the screen too."
        )
    parts = [profiles[[column for column in profiles.columns if str(column).startswith("Metadata_")]]]
    for channel, columns in feature_columns(profiles).items():
        features = profiles[columns].to_numpy(np.float64)
        values = clone(normalizer).fit(features[control]).transform(features)
        names = [f"{channel}_{index:04d}" for index in range(values.shape[1])]
        parts.append(pd.DataFrame(values, columns=names, index=profiles.index))
    return pd.concat(parts, axis=1)


def aggregate_profiles(
    profiles: pd.DataFrame,
    *,
    unit: Literal["plate", "well", "field"] = "plate",
    within: Literal["mean", "median"] = "mean",
    across: Literal["mean", "median"] = "median",
    normalize: bool = True,
) -> pd.DataFrame:
    """One profile per treatment: fields averaged within a plate, plates within a treatment, unit length at the end.

    Plates count alike whatever their number of fields; a treatment missing from a plate is made of the plates it has.

    Parameters
    ----------
    profiles : pandas.DataFrame
        One row per field, features of all channels side by side (after normalization). DMSO rows are left out.
    unit
        What stands between field and treatment: the plate (the paper), the well, or nothing ("field").
    within, across
        How the fields of a unit, then the units of a treatment become one vector. The paper: mean, then median.
    normalize : bool
        Divide each profile by its L2 norm (zero vectors stay zero).

    Returns
    -------
    pandas.DataFrame
        One row per treatment, sorted by name: Metadata_Treatment, Metadata_Compound, Metadata_Concentration,
        Metadata_MOA, Metadata_Batch and Metadata_Plate (several names joined by "|"), Metadata_Fields (their number),
        then the features.

    Raises
    ------
    UserError
        A treatment has two compounds, doses or MOAs; only DMSO is there; or the unit is not named.
    """
    treated = profiles[profiles["Metadata_Compound"] != CONTROL]
    if not len(treated):
        raise UserError("The profiles hold only DMSO fields: extract treated fields too.")
    groups = treated.groupby("Metadata_Treatment", sort=True)
    metadata = pd.DataFrame(index=groups.size().index)
    for column in ("Metadata_Compound", "Metadata_Concentration", "Metadata_MOA"):
        if column in treated.columns:
            several = groups[column].nunique(dropna=False)
            if (several > 1).any():
                name = several.index[several > 1][0]
                raise UserError(
                    f"Treatment {name} has {several[name]} values of {column}: a treatment is one compound at one "
                    "concentration with one MOA."
                )
            metadata[column] = groups[column].first()
    for column in ("Metadata_Batch", "Metadata_Plate"):
        if column in treated.columns:
            metadata[column] = groups[column].agg(_joined)
    metadata["Metadata_Fields"] = groups.size()
    keys = _UNITS[unit]
    for key in keys:
        if key not in treated.columns or treated[key].isna().any():
            raise UserError(f"The profiles do not name the {key} of each field, within which fields are averaged.")
    columns = [column for names in feature_columns(treated).values() for column in names]
    values = treated[columns].astype(np.float64)
    if keys:
        values = values.groupby([treated[key] for key in ("Metadata_Treatment", *keys)], sort=True).agg(within)
        values = values.groupby(level=0, sort=True).agg(across)
    else:
        values = values.groupby(treated["Metadata_Treatment"], sort=True).agg(across)
    if normalize:
        norms = np.linalg.norm(values.to_numpy(), axis=1, keepdims=True)
        values = values / np.where(norms > 0, norms, 1.0)
    return pd.concat([metadata, values], axis=1).reset_index()


def _joined(values: Iterable[str]) -> str:
    """The distinct names joined by "|", Week2 before Week10."""

    def natural(name: str) -> list[tuple]:
        parts = re.split(r"(\d+)", name)
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]

    return "|".join(sorted({str(value) for value in values}, key=natural))
