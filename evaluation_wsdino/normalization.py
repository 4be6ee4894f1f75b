"""Typical variation normalization (TVN): whitening in which the spread of untreated cells becomes the unit sphere.

Ando, McLean and Berndl 2017; as used by Cross-Zamirski et al. 2022: PCA whitening fitted on DMSO fields, a channel at
a time. Whitening divides by the spread seen among the DMSO fields, so a direction whose spread is underestimated, as
the last ones always are when there are hardly more fields than features, drowns all others. Hence the guards below.
"""

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data


class TypicalVariationNormalizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """PCA whitening fitted on the negative control.

    Parameters
    ----------
    regularization : "auto", float in [0, 1], default "auto"
        Share of the mean variance mixed into each principal variance before dividing by its root:
        `(1 - r) * variance + r * mean variance`. "auto" is the Ledoit-Wolf estimate, near 0 when fields are many.
        0 is the paper's plain whitening.
    rank_guard : float in (0, 1] or None, default 0.5
        Keep at most this share of `n_control - 1` components, so that each kept direction was seen about twice over.
        None keeps every direction whose variance is above rounding (the paper).
    n_components : int or None
        A further limit on the number of components.
    groups : None, "center", "scale" or "coral", default None
        What is done to each group (plate or batch, the `groups` given to `fit` and `transform`) before whitening all:
        nothing (the paper); the group's control mean removed; and divided by its control's standard deviations; or
        the group's control covariance turned into the pooled one (CORAL, Sun, Feng and Saenko 2016). None of them is
        the default because none was better throughout: on a simulated screen with 16 control fields a plate, NSCB
        of 24 treatments changed by -4 to +6 with "coral" or "scale", by -1 to +2 with "center".

    Attributes
    ----------
    mean_ : (features,) mean of the control
    components_ : (components, features) unit principal directions, by falling variance
    explained_variance_ : (components,) variances of the control along them, before regularization
    scale_ : (components,) what the projections are divided by
    regularization_ : float, the share used
    alignments_ : {group: (mean, matrix or scale or None)}, with `groups` alone

    Examples
    --------
    >>> import numpy as np
    >>> dmso = np.random.default_rng(0).normal(size=(500, 3)) @ np.diag([10.0, 1.0, 0.1])
    >>> plain = TypicalVariationNormalizer(regularization=0, rank_guard=None).fit(dmso)
    >>> plain.transform(dmso).std(axis=0, ddof=1).round(6)
    array([1., 1., 1.])
    """

    def __init__(self, regularization="auto", rank_guard=0.5, n_components=None, groups=None):
        self.regularization = regularization
        self.rank_guard = rank_guard
        self.n_components = n_components
        self.groups = groups

    def fit(self, X, y=None, groups=None):
        """Fit on the control's features (fields, features), at least two fields; `groups` names each one's plate."""
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self._check_parameters()
        if self.groups is not None:
            X = self._fit_alignments(X, groups)
        count, width = X.shape
        self.mean_ = X.mean(axis=0)
        centred = X - self.mean_
        _, singular, directions = np.linalg.svd(centred, full_matrices=False)
        variance = singular**2 / (count - 1)
        # Above rounding: the numerical rank as numpy and MATLAB define it.
        above = singular > singular.max(initial=0.0) * max(count, width) * np.finfo(np.float64).eps
        kept = int(above.sum())
        if self.rank_guard is not None:
            kept = min(kept, max(1, int(self.rank_guard * (count - 1))))
        if self.n_components is not None:
            kept = min(kept, self.n_components)
        self.regularization_ = self._share(centred, variance)
        # The sign of a singular vector is arbitrary; fixed here so that equal input gives equal output everywhere.
        directions = directions[:kept]
        signs = np.sign(directions[np.arange(kept), np.abs(directions).argmax(axis=1)]) if kept else np.ones(0)
        self.components_ = directions * signs[:, None]
        self.explained_variance_ = variance[:kept]
        mean_variance = variance.sum() / width
        self.scale_ = np.sqrt((1 - self.regularization_) * variance[:kept] + self.regularization_ * mean_variance)
        if not kept:  # a constant control: nothing is known of its spread, so nothing is left to compare
            self.components_, self.explained_variance_, self.scale_ = np.zeros((1, width)), np.zeros(1), np.ones(1)
        return self

    def transform(self, X, groups=None):
        """Whitened features, shape (fields, components)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        if self.groups is not None:
            X = self._align(X, self._group_names(groups, len(X)))
        return (X - self.mean_) @ self.components_.T / self.scale_

    def fit_transform(self, X, y=None, groups=None):
        return self.fit(X, y, groups=groups).transform(X, groups=groups)

    def _share(self, centred, variance):
        return _ledoit_wolf(centred, variance) if self.regularization == "auto" else float(self.regularization)

    @staticmethod
    def _group_names(groups, count):
        if groups is None:  # without names all fields are one group
            return np.zeros(count, dtype=np.int64)
        groups = np.asarray(groups)
        if groups.shape != (count,):
            raise ValueError(f"groups has the shape {groups.shape} for {count} fields: name one group a field.")
        return groups

    def _fit_alignments(self, X, groups):
        groups = self._group_names(groups, len(X))
        self.alignments_ = {}
        names = np.unique(groups)
        least = 1 if self.groups == "center" else 2
        for name in names.tolist():
            count = int((groups == name).sum())
            if count < least:
                raise ValueError(
                    f"Group {name} has {count} control field: groups={self.groups!r} needs at least {least}; leave "
                    'the group out or choose groups="center".'
                )
        centred = np.concatenate([X[groups == name] - X[groups == name].mean(axis=0) for name in names])
        pooled_scale = centred.std(axis=0)
        pooled_root = self._covariance_power(centred, 0.5) if self.groups == "coral" else None
        for name in names.tolist():
            members = X[groups == name]
            mean = members.mean(axis=0)
            if self.groups == "center":
                change = None
            elif self.groups == "scale":
                scale = members.std(axis=0)
                # A feature that is constant in the group, by chance or rounding, keeps the pooled scale.
                change = np.where(scale > 1e-6 * pooled_scale, scale, np.where(pooled_scale > 0, pooled_scale, 1.0))
            else:
                change = self._covariance_power(members - mean, -0.5) @ pooled_root
            self.alignments_[name] = (mean, change)
        return self._align(X, groups)

    def _align(self, X, groups):
        X = X.copy()
        for name in np.unique(groups).tolist():
            if name not in self.alignments_:
                raise ValueError(f"Group {name} has no control field: extract its DMSO wells, or leave it out.")
            mean, change = self.alignments_[name]
            rows = groups == name
            X[rows] -= mean
            if self.groups == "scale":
                X[rows] /= change
            elif self.groups == "coral":
                X[rows] = X[rows] @ change
        return X

    def _covariance_power(self, centred, power):
        """The regularized covariance of the centred rows to a power, symmetric, so that axes keep their meaning."""
        count, width = centred.shape
        _, singular, directions = np.linalg.svd(centred, full_matrices=False)
        variance = singular**2 / max(count - 1, 1)
        # A group may have fewer fields than features: some of the mean variance is always mixed in.
        share = max(self._share(centred, variance), 1e-3)
        floor = share * variance.sum() / width
        if floor == 0:
            return np.eye(width)
        change = ((1 - share) * variance + floor) ** power - floor**power
        return floor**power * np.eye(width) + (directions.T * change) @ directions

    def _check_parameters(self):
        regularization, guard, limit = self.regularization, self.rank_guard, self.n_components
        if regularization != "auto" and not (isinstance(regularization, (int, float)) and 0 <= regularization <= 1):
            raise ValueError(f'regularization is {regularization!r}: give "auto" or a number from 0 to 1.')
        if guard is not None and not 0 < guard <= 1:
            raise ValueError(f"rank_guard is {guard!r}: give a share above 0 and up to 1, or None.")
        if limit is not None and limit < 1:
            raise ValueError(f"n_components is {limit!r}: give at least 1, or None.")
        if self.groups not in (None, "center", "scale", "coral"):
            raise ValueError(f'groups is {self.groups!r}: choose None, "center", "scale" or "coral".')

    @property
    def _n_features_out(self):
        return self.components_.shape[0]


def _ledoit_wolf(centred, variance):
    """Share of the mean variance in the best linear mix with the identity (Ledoit and Wolf 2004, equation 14).

    From the singular values' side, so that no features x features product is formed: with d features and n rows,
    the error of the sample covariance is estimated by (mean of |x|^4 - |S|^2) / n, S with divisor n.
    """
    count, width = centred.shape
    eigenvalues = variance * (count - 1) / count
    mean = eigenvalues.sum() / width
    spread = (eigenvalues**2).sum() - width * mean**2
    error = ((centred**2).sum(axis=1) ** 2).mean() - (eigenvalues**2).sum()
    return float(min(max(error / count / spread, 0.0), 1.0)) if spread > 0 else 0.0
