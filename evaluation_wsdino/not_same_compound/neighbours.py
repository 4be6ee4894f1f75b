"""The nearest neighbours of vectors among the candidates that each may have; numpy alone.

One blocked product in double precision gives the similarities; codes of names say who is whose candidate.
"""

import numpy as np

_BLOCK = 2**19  # similarities looked at together, 4 MiB, which a processor's cache holds
_PRODUCT = 16  # blocks whose similarities are computed at once: a processor multiplies large matrices faster
_TIE = 1e-12  # rounding in a product of unit vectors: neighbours whose similarities differ by less are tied


def codes_of(names):
    """A number for each name, equal for equal names and in their order."""
    return np.unique(np.asarray(names, dtype=object), return_inverse=True)[1].reshape(-1).astype(np.int32)


def differ(code, rows, columns=slice(None)):
    """Which pairs of treatments lie in different batches, (rows, columns)."""
    return code[rows] @ code[columns].T == 0 if code.ndim == 2 else code[rows, None] != code[columns]


def directions(profiles, metric):
    """Vectors to multiply, which of them have a direction, and the unit of distances: 1 but for extreme ones."""
    largest = np.maximum(profiles.max(axis=1, initial=-np.inf), -profiles.min(axis=1, initial=np.inf))
    finite = np.isfinite(largest)
    vectors, size = np.where(finite[:, None], profiles, 0.0), np.where(finite, largest, 0.0)
    if metric == "euclidean":
        size[:] = size.max(initial=0.0)
    extreme = (size > 1e100) | (size < 1e-100) & (size > 0)  # their squares would overflow or vanish
    unit = float(size.max(initial=0.0)) if extreme.any() and metric == "euclidean" else 1.0
    vectors[extreme] /= size[extreme, None]
    if metric == "euclidean":
        return vectors - (vectors[finite].mean(axis=0) if finite.any() else 0.0), finite, unit
    if metric == "correlation":
        vectors -= vectors.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    # A constant vector minus its mean is rounding noise, not a direction.
    usable = finite & (norms > 1e-12 * np.where(extreme, 1.0, size))
    vectors /= np.where(usable, norms, 1.0)[:, None]
    return vectors, usable, unit


def search(vectors, usable, euclidean, moas, compounds, mechanisms, scores, k):
    """For each score and query the nearest candidates (-1 where there are fewer than `k`), the similarity of the
    first, the number of candidates, and how many are tied for the first.

    `scores` are (code, reasons): what `differ` compares or None, and why a treatment takes no part or None. Each
    admits no pair that the one before it does not.
    """
    count, found = len(vectors), [([], [], [], []) for _ in scores]
    moa, compound = codes_of(moas), codes_of(compounds)
    squares = np.einsum("ij,ij->i", vectors, vectors)
    tie = _TIE * (4 * squares.max(initial=0) if euclidean else 1)
    # Of tied neighbours a wrong one is taken, then the first by name, so that the order of rows never matters.
    rank = np.lexsort((compound, moa)).argsort()
    step = max(8, _BLOCK // max(count, 1))
    for start in range(0, count, step):
        rows, within = slice(start, start + step), start % (_PRODUCT * step)
        if within == 0:
            product = vectors[start : start + _PRODUCT * step] @ vectors.T
        similarity = product[within : within + step]
        if euclidean:
            similarity = 2 * similarity - squares[rows, None] - squares
        allowed = compound[rows, None] != compound
        if not usable.all():
            allowed &= usable & usable[rows, None]
        every = np.arange(len(allowed))
        for one, (code, reasons) in zip(found, scores, strict=True):
            if code is not None:
                inside = np.equal(reasons, None)
                allowed &= differ(code, rows)
                allowed &= inside
                allowed[~inside[rows]] = False
            reach, places = np.where(allowed, similarity, -np.inf), []
            for _ in range(min(k, max(count - 1, 1))):
                pick = reach.argmax(axis=1)
                nearest, tied = reach[every, pick], np.ones(len(every), dtype=int)
                reach[every, pick] = -np.inf
                second = reach[every, reach.argmax(axis=1)]
                for row in np.flatnonzero((second > -np.inf) & (second >= nearest - tie)):
                    reach[row, pick[row]] = nearest[row]
                    equal = np.flatnonzero(reach[row] >= nearest[row] - tie)
                    if euclidean:  # products round at the scale of the farthest vector, differences at that of these
                        distance = np.linalg.norm(vectors[equal] - vectors[rows][row], axis=1)
                        size = distance.min() + 2 * np.sqrt(squares[rows][row])
                        equal = equal[distance <= distance.min() + _TIE * size]
                    own = [not mechanisms[other].isdisjoint(mechanisms[rows.start + row]) for other in equal]
                    pick[row], tied[row] = equal[np.lexsort((rank[equal], own))[0]], len(equal)
                    reach[row, pick[row]] = -np.inf
                places.append((np.where(nearest > -np.inf, pick, -1), nearest, tied * (nearest > -np.inf)))
            neighbours, first, tied = zip(*places, strict=True)
            shown = -np.linalg.norm(vectors[neighbours[0]] - vectors[rows], axis=1) if euclidean else first[0]
            parts = np.stack(neighbours, axis=1), shown, np.count_nonzero(allowed, axis=1), tied[0]
            for values, part in zip(one, parts, strict=True):
                values += part.tolist()
    return found
