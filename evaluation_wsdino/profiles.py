"""Profile tables: reading and checking them, and the way from fields to one vector a treatment.

A profile table follows the cytomining convention: `Metadata_*` columns, then numeric features named
`<channel>_<index>`, one row a field of view. Rows of the negative control have `Metadata_Compound` "DMSO".
"""

from pathlib import Path

import numpy as np
import pandas as pd

from wsdino.errors import UserError

CONTROL = "DMSO"
_NEEDED = ("Metadata_Plate", "Metadata_Compound", "Metadata_Treatment")
_WHOLE = ("Metadata_Batch", "Metadata_Well", "Metadata_Site")  # a screen names them for all fields or for none


class ProfileError(UserError):
    """A profile table, run folder or option of the evaluation that cannot be used; one sentence says the mend."""


def feature_columns(profiles):
    """`{channel: [column, ...]}` of the feature columns, in the order in which the table holds them."""
    channels = {}
    for column in profiles.columns:
        if not str(column).startswith("Metadata_"):
            channels.setdefault(str(column).rpartition("_")[0] or str(column), []).append(column)
    return channels


def is_named(names):
    """Which values of a column name something: those not missing and not blank."""
    return names.notna() & (names.astype(str).str.strip() != "")


def check_profiles(profiles, source="the profile table"):
    """Raise ProfileError unless `profiles` has the columns needed, finite numbers, whole names, and no field twice."""
    for column in _NEEDED:
        if column not in profiles.columns:
            raise ProfileError(f"{source} has no column {column}: write it as extract_profiles.py does.")
    if not len(profiles):
        raise ProfileError(f"{source} has no rows: extract at least one DMSO and one treated field.")
    _check_features(profiles, source)
    unnamed = set()
    for column in _NEEDED + tuple(name for name in _WHOLE if name in profiles.columns):
        empty = ~is_named(profiles[column])
        if empty.all() and column in _WHOLE:
            unnamed.add(column)
        elif empty.any():
            row = int(np.flatnonzero(empty)[0])
            raise ProfileError(f"{source}, row {row}, has no {column}: every field needs one.")
    for column in ("Metadata_Batch", "Metadata_Plate"):
        if column in profiles.columns:
            names = profiles[column].astype(str)
            several = names.str.contains("|", regex=False).to_numpy()
            if several.any():
                row = int(several.argmax())
                raise ProfileError(
                    f'{source}, row {row}, has the {column} {names.iloc[row]!r}, and "|" joins the names of several: '
                    "name it otherwise."
                )
    keys = ("Metadata_Source", "Metadata_Plate", "Metadata_Well", "Metadata_Site")
    keys = [column for column in keys if column in profiles.columns and column not in unnamed]
    if "Metadata_Well" in keys and "Metadata_Site" in keys:
        twice = profiles.duplicated(keys).to_numpy()
        if twice.any():
            field = profiles.groupby(keys, dropna=False, sort=False).ngroup().to_numpy()
            first, second = np.flatnonzero(field == field[twice.argmax()])[:2]
            raise ProfileError(
                f"{source}, rows {first} and {second}, are the same plate, well and site: keep one row a field."
            )


def _check_features(profiles, source="the profile table"):
    """The part of `check_profiles` that is about numbers."""
    columns = [column for names in feature_columns(profiles).values() for column in names]
    if not columns:
        raise ProfileError(f"{source} has no feature columns, named like dna_0000.")
    for column in columns:
        if not pd.api.types.is_numeric_dtype(profiles[column]):
            raise ProfileError(f"{source}, column {column}, is not numeric: features are numbers.")
    bad = ~np.isfinite(profiles[columns].to_numpy(np.float64))
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ProfileError(
            f"{source}, row {row}, column {columns[column]}, is not a finite number ({bad.any(axis=1).sum()} such "
            "rows): extract those fields again or leave them out."
        )


def read_profiles(path):
    """The checked table of one `profiles/<set>.parquet` file."""
    try:
        profiles = pd.read_parquet(path)
    except FileNotFoundError:
        raise ProfileError(f"{path} does not exist: run wsdino-extract first.") from None
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    check_profiles(profiles, Path(path).name)
    return profiles


def normalize_profiles(profiles, normalizer, group_by=None):
    """The table with each channel's features replaced by those of a clone of `normalizer` fitted on its DMSO fields.

    Parameters
    ----------
    profiles : pandas.DataFrame
        One row a field (see the module's docstring).
    normalizer : TypicalVariationNormalizer or another transformer
        Cloned for each channel, fitted on the rows whose Metadata_Compound is "DMSO", applied to all rows.
    group_by : str or None
        Metadata column ("Metadata_Plate", "Metadata_Batch") given to the normalizer as each field's group.

    Returns
    -------
    pandas.DataFrame
        The same Metadata columns; as many feature columns a channel as the normalizer gives.
    """
    from sklearn.base import clone

    _check_features(profiles)
    control = (profiles["Metadata_Compound"] == CONTROL).to_numpy()
    if control.sum() < 2:
        raise ProfileError(
            f"The profiles hold {int(control.sum())} DMSO fields: normalization is fitted on at least two, so extract "
            "the DMSO part of the screen too."
        )
    aligns = getattr(normalizer, "groups", None)
    if group_by is not None and aligns is None:
        raise ProfileError(
            f"group_by is {group_by!r}, but the normalizer aligns no groups: give it groups, such as "
            'TypicalVariationNormalizer(groups="center").'
        )
    if group_by is None and aligns is not None:
        raise ProfileError(
            f'The normalizer aligns groups ("{aligns}"), but no group_by names them: name their column.'
        )
    groups = None
    if group_by is not None:
        if group_by not in profiles.columns:
            raise ProfileError(f"The profiles have no column {group_by}, by which they are to be grouped.")
        groups = profiles[group_by].astype(str).to_numpy()
        without = sorted(set(groups) - set(groups[control]))
        if without:
            names = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
            raise ProfileError(
                f"{len(without)} of {len(set(groups))} values of {group_by} have no DMSO field ({names}): extract "
                "their DMSO fields, leave them out, or do not group."
            )
    parts = [profiles[[column for column in profiles.columns if str(column).startswith("Metadata_")]]]
    for channel, columns in feature_columns(profiles).items():
        features = profiles[columns].to_numpy(np.float64)
        if groups is None:
            values = clone(normalizer).fit(features[control]).transform(features)
        else:
            try:
                fitted = clone(normalizer).fit(features[control], groups=groups[control])
            except ValueError as error:
                raise ProfileError(str(error)) from None
            values = fitted.transform(features, groups=groups)
        names = [f"{channel}_{index:04d}" for index in range(values.shape[1])]
        parts.append(pd.DataFrame(values, columns=names, index=profiles.index))
    return pd.concat(parts, axis=1)


def _joined(values):
    """The distinct names in natural order, joined by "|"."""
    from .not_same_compound.not_same_compound import _natural_key

    return "|".join(sorted({str(value) for value in values}, key=_natural_key))


_UNITS = {"plate": ["Metadata_Plate"], "well": ["Metadata_Plate", "Metadata_Well"], "field": None}


def aggregate_profiles(profiles, *, unit="plate", within="mean", across="median", normalize=True):
    """One profile a treatment: fields averaged within a plate, plates within a treatment, unit length at the end.

    Plates count alike whatever their number of fields; a treatment missing from a plate is made of the plates it has.

    Parameters
    ----------
    profiles : pandas.DataFrame
        One row a field, features of all channels side by side (after normalization). DMSO rows are left out.
    unit : {"plate", "well", "field"}
        What stands between field and treatment: the plate (the paper), the well, or nothing.
    within, across : {"mean", "median"}
        How the fields of a unit, then the units of a treatment become one vector. The paper: mean, then median.
    normalize : bool
        Divide each profile by its L2 norm (zero vectors stay zero).

    Returns
    -------
    pandas.DataFrame
        One row a treatment, sorted by name: Metadata_Treatment, Metadata_Compound, Metadata_Concentration,
        Metadata_MOA, Metadata_Batch and Metadata_Plate (several names joined by "|"), Metadata_Fields (their number),
        then the features.

    Raises
    ------
    ProfileError
        If a treatment has two compounds or MOAs, or nothing but DMSO is there, or the table is not one that
        `check_profiles` lets pass: a value not finite, a field twice, a name missing.
    """
    check_profiles(profiles)
    if unit not in _UNITS:
        raise ProfileError(f"unit is {unit!r}: choose one of {', '.join(_UNITS)}.")
    for name, value in (("within", within), ("across", across)):
        if value not in ("mean", "median"):
            raise ProfileError(f'{name} is {value!r}: choose "mean" or "median".')
    treated = profiles[profiles["Metadata_Compound"] != CONTROL]
    if not len(treated):
        raise ProfileError("The profiles hold DMSO fields alone: extract treated fields too.")
    groups = treated.groupby("Metadata_Treatment", sort=True)
    metadata = pd.DataFrame(index=groups.size().index)
    for column in ("Metadata_Compound", "Metadata_Concentration", "Metadata_MOA"):
        if column in treated.columns:
            several = groups[column].nunique(dropna=False)
            if (several > 1).any():
                name = several.index[several > 1][0]
                raise ProfileError(
                    f"Treatment {name} has {several[name]} values of {column}: a treatment is one compound at one "
                    "concentration with one MOA."
                )
            metadata[column] = groups[column].first()
    for column in ("Metadata_Batch", "Metadata_Plate"):
        if column in treated.columns:
            metadata[column] = groups[column].agg(_joined)
    metadata["Metadata_Fields"] = groups.size()
    columns = [column for names in feature_columns(treated).values() for column in names]
    features = treated[columns].astype(np.float64)
    keys = _UNITS[unit]
    if keys is not None:
        for key in keys:
            if key not in treated.columns:
                raise ProfileError(f"The profiles have no column {key}, by which fields are to be averaged.")
            if treated[key].isna().any():
                raise ProfileError(f"The profiles name no {key}, by which fields are to be averaged.")
        names = [treated["Metadata_Treatment"], *[treated[key] for key in keys]]
        features = features.groupby(names, sort=True).agg(within)
        values = features.groupby(level=0, sort=True).agg(across)
    else:
        values = features.groupby(treated["Metadata_Treatment"], sort=True).agg(across)
    if normalize:
        norms = np.linalg.norm(values.to_numpy(), axis=1, keepdims=True)
        values = values / np.where(norms > 0, norms, 1.0)
    return pd.concat([metadata, values], axis=1).reset_index()
