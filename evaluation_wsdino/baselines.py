"""What a profile must beat: statistics of a field's pixels, and its nuclei counted and measured; no network.

A profile that only matches `intensity_features` has learned staining; one that only matches `nuclear_features` has
learned what a cell counter sees. Both give one row per field, which is then treated like a network's features.
"""

from functools import partial

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

SMALLEST_OBJECT = 4  # pixels; smaller ones are noise at any resolution


def intensity_features(plane: np.ndarray, max_intensity: float) -> np.ndarray:
    """Statistics of a whole field's pixels: what a plate reader could see, no shape and no texture.

    Parameters
    ----------
    plane : (height, width) array
        Raw intensities.
    max_intensity : float
        The intensity that becomes 1; pixels above it are clipped.

    Returns
    -------
    (11,) float32 array
        Mean, SD, skewness, seven percentiles (1, 5, 25, 50, 75, 95, 99) and the share of clipped pixels.
    """
    scaled = np.asarray(plane, dtype=np.float64).ravel() / max_intensity
    mean, deviation = scaled.mean(), scaled.std()
    skewness = ((scaled - mean) ** 3).mean() / max(deviation, 1e-12) ** 3
    percentiles = np.percentile(scaled, [1, 5, 25, 50, 75, 95, 99])
    return np.array([mean, deviation, skewness, *percentiles, (scaled > 1).mean()], dtype=np.float32)


def nuclear_features(plane: np.ndarray, max_intensity: float) -> np.ndarray:
    """Number, size, shape and brightness of the nuclei in a field of the nuclear stain.

    The number alone would be one dimension, in which a cosine knows two answers; so it does not stand alone.

    Parameters
    ----------
    plane, max_intensity
        As for `intensity_features`.

    Returns
    -------
    (10,) float32 array
        Number of nuclei; the share of the field they cover; 25th, 50th and 75th percentile of their areas (pixels);
        mean and SD of their eccentricities (0 a disk, towards 1 a line); median and SD of their brightness above the
        background, and the mean spread of brightness within one, the three as shares of `max_intensity`. All zeros
        for a field without nuclei.
    """
    scaled = np.minimum(np.asarray(plane, dtype=np.float64) / max_intensity, 1.0)
    labels = label_nuclei(scaled)
    count = int(labels.max())
    if not count:
        return np.zeros(10, dtype=np.float32)
    per_nucleus = {"labels": labels, "index": np.arange(1, count + 1)}
    mean, variance = partial(ndimage.mean, **per_nucleus), partial(ndimage.variance, **per_nucleus)
    # Second moments give the axes of the ellipse of equal moments. Unlike scikit-image's regionprops, 1/12 is added
    # for the extent of a pixel itself: nuclei may be a few pixels wide.
    rows, columns = np.indices(labels.shape)
    rr, cc = variance(rows) + 1 / 12, variance(columns) + 1 / 12
    rc = mean(rows * columns) - mean(rows) * mean(columns)
    root = np.sqrt((rr - cc) ** 2 + 4 * rc**2)
    eccentricity = np.sqrt(2 * root / (rr + cc + root))
    brightness = mean(scaled) - np.median(scaled[labels == 0])  # the threshold leaves a background
    spread = np.sqrt(variance(scaled))
    features = [count, (labels > 0).mean(), *np.percentile(np.bincount(labels.ravel())[1:], [25, 50, 75])]
    features += [eccentricity.mean(), eccentricity.std(), np.median(brightness), brightness.std(), spread.mean()]
    return np.array(features, dtype=np.float32)


def label_nuclei(scaled: np.ndarray, smallest: int | None = None) -> np.ndarray:
    """Segment the nuclei of a field of the nuclear stain.

    Otsu's threshold on the smoothed square root (bright mitotic nuclei would raise that of the raw plane), at least
    three noise deviations above the median so that an empty field stays empty; touching nuclei are parted by a
    watershed from the peaks of the distance to the background. Small objects are dropped.

    Parameters
    ----------
    scaled : (height, width) array
        Finite intensities, 0 or more.
    smallest : int, optional
        Pixels of the smallest nucleus that is kept. Default: a tenth of the median object, so that fragments count at
        any magnification, and at least 4.

    Returns
    -------
    (height, width) int32 array
        0 for background, otherwise the number of the nucleus: 1, 2, ...
    """
    smooth = ndimage.gaussian_filter(np.sqrt(scaled), 1.0)
    low, high = smooth.min(), smooth.max()
    if not high > low:
        return np.zeros(scaled.shape, dtype=np.int32)
    median = np.median(smooth)
    noise = 1.4826 * np.median(np.abs(smooth - median))
    mask = ndimage.binary_fill_holes(smooth > max(threshold_otsu(smooth), median + 3 * noise))
    objects, _ = ndimage.label(mask)
    sizes = np.bincount(objects.ravel())
    sizes[0] = 0
    if smallest is None:
        objects_seen = sizes[sizes >= SMALLEST_OBJECT]
        smallest = max(SMALLEST_OBJECT, np.median(objects_seen) / 10) if len(objects_seen) else SMALLEST_OBJECT
    if not (sizes >= smallest).any():
        return np.zeros(scaled.shape, dtype=np.int32)
    mask = (sizes >= smallest)[objects]
    distance = ndimage.distance_transform_edt(mask)
    # Peaks closer than a nucleus's radius belong to one nucleus; the radius is that of the median object.
    radius = max(2, round(float(np.sqrt(np.median(sizes[sizes >= smallest]) / np.pi))))
    relief = ndimage.gaussian_filter(distance, radius / 4)
    peaks, count = ndimage.label(mask & (relief == ndimage.maximum_filter(relief, size=2 * radius + 1)))
    parts = watershed(-relief, peaks, mask=mask)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    kept = sizes >= smallest
    numbers = np.where(kept, np.cumsum(kept), 0)
    return numbers[parts].astype(np.int32)
