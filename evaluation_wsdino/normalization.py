"""Typical variation normalization (TVN): whitening in which the spread of untreated cells becomes the unit sphere.

Ando, McLean and Berndl 2017; as used by Cross-Zamirski et al. 2022: PCA whitening fitted on DMSO fields, for each
channel. Whitening divides by the spread seen among the DMSO fields, so a direction whose spread is underestimated, as
the last ones always are when there are hardly more fields than features, drowns all others. Hence the guards below.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
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

    Attributes
    ----------
    mean_ : (features,) mean of the control
    components_ : (components, features) unit principal directions, by falling variance
    explained_variance_ : (components,) variances of the control along them, before regularization
    scale_ : (components,) what the projections are divided by
    regularization_ : float, the share used

    Examples
    --------
    >>> import numpy as np
    >>> dmso = np.random.default_rng(0).normal(size=(500, 3)) @ np.diag([10.0, 1.0, 0.1])
    >>> plain = TypicalVariationNormalizer(regularization=0, rank_guard=None).fit(dmso)
    >>> plain.transform(dmso).std(axis=0, ddof=1).round(6)
    array([1., 1., 1.])
    """

    def __init__(
        self,
        regularization: float | Literal["auto"] = "auto",
        rank_guard: float | None = 0.5,
        n_components: int | None = None,
    ):
        self.regularization = regularization
        self.rank_guard = rank_guard
        self.n_components = n_components

    def fit(self, X: ArrayLike, y: None = None) -> "TypicalVariationNormalizer":
        """Fit on the control's features, shape (fields, features), at least two fields; `y` is ignored.

        Raises
        ------
        ValueError
            Fewer than two fields, a value that is not finite, or a parameter outside its range.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self._check_parameters()
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
        self.regularization_ = (
            _ledoit_wolf(centred, variance) if self.regularization == "auto" else float(self.regularization)
        )
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

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Whitened features, shape (fields, components)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return (X - self.mean_) @ self.components_.T / self.scale_

    def _check_parameters(self) -> None:
        regularization, guard, limit = self.regularization, self.rank_guard, self.n_components
        if regularization != "auto" and not (isinstance(regularization, int | float) and 0 <= regularization <= 1):
            raise ValueError(f'regularization is {regularization!r}: give "auto" or a number from 0 to 1.')
        if guard is not None and not 0 < guard <= 1:
            raise ValueError(f"rank_guard is {guard!r}: give a share above 0 and up to 1, or None.")
        if limit is not None and limit < 1:
            raise ValueError(f"n_components is {limit!r}: give at least 1, or None.")

    @property
    def _n_features_out(self) -> int:
        return self.components_.shape[0]


def _ledoit_wolf(centred: np.ndarray, variance: np.ndarray) -> float:
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
