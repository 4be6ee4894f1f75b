"""The NSC and NSCB scores of treatment profiles as one self-contained `evaluate` module.

Not-same-compound (NSC): each treatment is given the mechanism of action (MOA) of its nearest neighbour among the
treatments of all other compounds. Not-same-compound-and-batch (NSCB): the neighbour must also come from another batch.
Protocol: Ljosa et al. 2013 (NSC), Ando et al. 2017 (NSCB), Cross-Zamirski et al. 2022 (the defaults here).

This file needs numpy, and `evaluate` and `datasets` for the metric class; it is what a metric Space holds.
"""

import numbers
import re

import datasets
import evaluate
import numpy as np

_CITATION = """\
@article{ljosa2013comparison,
  title={Comparison of methods for image-based profiling of cellular morphological responses
    to small-molecule treatment},
  author={Ljosa, Vebjorn and others},
  journal={Journal of Biomolecular Screening}, volume={18}, number={10}, year={2013}
}
@article{ando2017improving,
  title={Improving phenotypic measurements in high-content imaging screens},
  author={Ando, D. Michael and McLean, Cory Y. and Berndl, Marc}, journal={bioRxiv 161422}, year={2017}
}
@article{crosszamirski2022selfsupervised,
  title={Self-supervised learning of phenotypic representations from cell images with weak labels},
  author={Cross-Zamirski, Jan Oscar and others}, journal={arXiv:2209.07819}, year={2022}
}
"""

_DESCRIPTION = """\
Share of treatments whose nearest neighbour among other compounds (NSC), and among other compounds in other batches
(NSCB), has the same mechanism of action.
"""

_INPUTS = """
Args:
    predictions: treatments x dimensions, one profile a treatment.
    references: the mechanism of action (MOA) of each treatment.
    compounds: the compound of each treatment; neighbours of the same compound never count.
    batches: the batch of each treatment, or several names joined by "|" for one seen in several batches.
    metric: "cosine" (default), "correlation" or "euclidean".
    k: neighbours that vote, 1 by default. A tied vote goes to the MOA whose member is nearest.
    batch_rule: when two treatments are in one batch (see the README): "median" (default), "joined", "disjoint" or
        "plate".
    plates: with batch_rule="plate", the plate or plates (joined by "|") of each treatment; without it the batches.
    exclude: NSCB queries left out: "single_batch" (default: MOAs that occur in one batch, as in the published table),
        "unanswerable" (treatments without a candidate of their own MOA; in NSC too) or "none".
    keep_excluded: True leaves the treatments of excluded MOAs among the candidates (the published table removes them).
    ties: "pessimistic" (default: of equally near neighbours a wrong one is taken) or "first" (the first row).
    invalid: for vectors without a direction (not finite; zero under cosine; constant under correlation): "error"
        (default), "wrong" (queries count as wrong, never candidates) or "exclude".
Returns:
    nsc, nscb: shares in [0, 1] (nan without a query); nsc_correct, nsc_total, nsc_excluded, and the same for nscb;
    moas: the sorted MOA names; nsc_confusion: counts, rows the true and columns the neighbours' MOA in that order;
    nsc_per_moa: correct, total and accuracy (None without a query) of each MOA;
    nsc_queries: one dictionary a treatment (row, moa, compound, neighbour, neighbour_moa, neighbour_compound,
        predicted, similarity, candidates, answerable, tied, correct, excluded: None or the reason).
Examples:

    >>> metric = evaluate.load("evaluation_wsdino/not_same_compound")
    >>> result = metric.compute(predictions=[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]],
    ...                         references=["DNA damage", "DNA damage", "Eg5 inhibitors", "Eg5 inhibitors"],
    ...                         compounds=["cisplatin", "etoposide", "AZ-C", "AZ138"],
    ...                         batches=["Week1", "Week2", "Week1", "Week2"])
    >>> result["nsc"], result["nscb"]
    (1.0, 1.0)
    >>> result["nscb_queries"][0]["neighbour"]
    1
"""

# One block of similarities: some three arrays of that size live at once, best in the processor's cache.
_BLOCK_BYTES = 4 * 2**20
_WHOLE_BYTES = 64 * 2**20  # up to this all similarities are computed at once
_LEAST_ROWS = 128  # fewer rows a product would waste the processor
_MISSING = ("None", "nan", "NaT", "<NA>")  # how values that are no text print where a name is missing


def _natural_key(name):
    """Sort key that puts Week2 before Week10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}.")


def _codes(names):
    return np.unique(np.asarray(names, dtype=object).astype(str), return_inverse=True)[1].reshape(-1)


def _texts(values):
    """Each value as text; None for None and for the missing values of numpy and pandas: NaN, NaT and NA."""
    texts = [value if isinstance(value, str) else str(value) for value in values]
    missing = [not isinstance(value, str) and text in _MISSING for value, text in zip(values, texts, strict=True)]
    return [None if gone else text for gone, text in zip(missing, texts, strict=True)]


def _labels(name, values, length):
    values = _texts(values)
    if len(values) != length:
        raise ValueError(f"{name} holds {len(values)} values for {length} profiles: give one a treatment.")
    empty = [row for row, value in enumerate(values) if value is None or not value.strip()]
    if empty:
        raise ValueError(f"{name}[{empty[0]}] is empty: leave out treatments without one.")
    return values


def _split_names(name, values):
    split = [[part.strip() for part in value.split("|") if part.strip()] for value in values]
    for row, parts in enumerate(split):
        if not parts:
            raise ValueError(f"{name}[{row}] is {values[row]!r}: give at least one name.")
    return split


def _median_codes(split):
    """One code a treatment: its (lower) median batch in natural order, names counted as often as they are given."""
    return _codes([sorted(parts, key=_natural_key)[(len(parts) - 1) // 2] for parts in split])


def _joined_codes(split):
    """One code a treatment: the set of its batches; a set equals only the very same set."""
    return _codes(["|".join(sorted(set(parts))) for parts in split])


def _membership(split):
    """(treatments, names) float32 of 0 and 1."""
    columns = {name: column for column, name in enumerate(sorted({part for parts in split for part in parts}))}
    membership = np.zeros((len(split), len(columns)), dtype=np.float32)
    for row, parts in enumerate(split):
        membership[row, [columns[part] for part in parts]] = 1
    return membership


class _BatchRule:
    """Says which pairs of treatments lie in different batches, by codes or by shared names."""

    def __init__(self, codes=None, membership=None):
        self.codes, self.membership = codes, membership

    def different(self, rows, columns):
        if self.codes is not None:
            return self.codes[rows, None] != self.codes[None, columns]
        return self.membership[rows] @ self.membership[columns].T == 0

    def occurs_in_one_batch(self, rows):
        """Whether no two of these treatments lie in different batches."""
        if self.codes is not None:
            return len(np.unique(self.codes[rows])) == 1
        step = max(1, _BLOCK_BYTES // (8 * len(rows)))
        return not any(self.different(rows[i : i + step], rows).any() for i in range(0, len(rows), step))


def _directions(profiles, metric):
    """Vectors whose products (cosine, correlation) or differences (euclidean) are compared, and which are usable.

    The third is what the vectors were divided by so that their squares are numbers; 1 but for extreme distances.
    """
    # A row's largest value in size, which is not finite where any of the row's values is not.
    largest = np.maximum(profiles.max(axis=1, initial=-np.inf), -profiles.min(axis=1, initial=np.inf))
    finite = np.isfinite(largest)
    vectors = profiles.copy()
    vectors[~finite] = 0.0
    if metric == "euclidean":
        size = largest.max(where=finite, initial=0.0)
        unit = size if size > 1e100 or 0 < size < 1e-100 else 1.0
        vectors /= unit
        vectors -= vectors[finite].mean(axis=0) if finite.any() else 0.0
        return vectors, finite, unit
    # Squares of values like 1e-200 vanish and of 1e200 overflow; the direction is the same at another scale.
    extreme = finite & (largest > 0) & ((largest < 1e-100) | (largest > 1e100))
    vectors[extreme] /= largest[extreme, None]
    largest = np.where(extreme, 1.0, np.where(finite, largest, 0.0))
    if metric == "correlation":
        vectors -= vectors.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    # A constant vector minus its mean is rounding noise, not a direction.
    usable = finite & (norms > 1e-12 * largest)
    vectors /= np.where(usable, norms, 1.0)[:, None]
    return vectors, usable, 1.0


class _Found:
    """What a search found: neighbours (treatments, k), -1 where there are fewer, and counts of each query."""

    def __init__(self, count, k):
        self.neighbours = np.full((count, k), -1)
        self.similarities = np.full((count, k), np.nan)
        self.candidates, self.answerable, self.tied = (np.zeros(count, dtype=np.int64) for _ in range(3))


def _search(vectors, euclidean, moa, compound, usable, scores, k, ties):
    """Nearest candidates of every query for several scores, a block of rows at a time.

    `scores` are (different_batch or None, takes_part), each admitting no pair that one before it does not: a block's
    similarities are computed once and then masked further. Returns one `_Found` a score.

    Under cosine and correlation with k = 1 a first look in single precision settles the queries whose nearest
    neighbour is nearer than the second by more than that precision's worst error; the others are searched in double.
    """
    count, width = vectors.shape
    found = [_Found(count, min(k, max(count - 1, 1))) for _ in scores]
    columns = np.flatnonzero(usable & scores[0][1])
    queries = columns
    if not len(columns):
        return found
    # Contiguous in the order of candidates, and small codes: these comparisons are as costly as the products.
    candidate_vectors = vectors if len(columns) == count else vectors[columns]
    moa, compound = moa.astype(np.int32), compound.astype(np.int32)
    squares = np.einsum("ij,ij->i", vectors, vectors) if euclidean else None
    # Rounding in a product of unit vectors, or of squares up to the largest: nearer than this is a tie (of squares,
    # may be one).
    tolerance = 1e-12 * (4 * squares.max() if euclidean else 1.0)
    # The order in which tied candidates are taken; names first, so that shuffled rows give the same answer.
    priority = np.arange(count)
    if ties == "pessimistic":
        priority[np.lexsort((compound, moa))] = np.arange(count)

    def masked(rows, similarity, first_look):
        similarity[compound[rows, None] == compound[None, columns]] = -np.inf
        for score, (different_batch, takes_part) in zip(found, scores, strict=True):
            if different_batch is not None:
                similarity[~different_batch(rows, columns)] = -np.inf
            similarity[:, ~takes_part[columns]] = -np.inf
            inside = takes_part[rows]
            if first_look:
                allowed = similarity > -np.inf
                own = moa[rows, None] == moa[None, columns]
                score.candidates[rows] = np.where(inside, np.count_nonzero(allowed, axis=1), 0)
                allowed &= own
                score.answerable[rows] = np.where(inside, np.count_nonzero(allowed, axis=1), 0)
            yield score, inside

    def exact(rows, first_look):
        similarity = vectors[rows] @ candidate_vectors.T
        if euclidean:
            similarity *= 2
            similarity -= squares[rows, None]
            similarity -= squares[None, columns]
        for score, inside in masked(rows, similarity, first_look):
            taken = []
            for place in range(score.neighbours.shape[1]):
                nearest = similarity.max(axis=1)
                some = np.isfinite(nearest) & inside
                with np.errstate(invalid="ignore"):
                    tied = similarity >= (nearest - tolerance)[:, None]
                pick = similarity.argmax(axis=1)
                number = np.where(some, np.count_nonzero(tied, axis=1), 0)
                for row in np.flatnonzero(number > 1):
                    equal = np.flatnonzero(tied[row])
                    if euclidean:
                        # The products round at the scale of the farthest vector, differences at that of these.
                        distance = np.linalg.norm(candidate_vectors[equal] - vectors[rows[row]], axis=1)
                        least, size = distance.min(), np.sqrt(squares[rows[row]])
                        equal = equal[distance <= least + 1e-12 * (least + 2 * size)]
                        number[row] = len(equal)
                    order = priority[columns[equal]]
                    if ties == "pessimistic":
                        order = order + count * (moa[columns[equal]] == moa[rows[row]])
                    pick[row] = equal[order.argmin()]
                value = similarity[np.arange(len(rows)), pick]
                score.neighbours[rows, place] = np.where(some, columns[pick], -1)
                shown = -np.linalg.norm(candidate_vectors[pick] - vectors[rows], axis=1) if euclidean else value
                score.similarities[rows, place] = np.where(some, shown, np.nan)
                if place == 0:
                    score.tied[rows] = number
                taken.append((pick, value))
                if k > 1:
                    similarity[np.arange(len(rows)), pick] = -np.inf
            for pick, value in reversed(taken):  # the next score needs them again
                similarity[np.arange(len(rows)), pick] = value

    step = max(_LEAST_ROWS, _BLOCK_BYTES // (8 * len(columns)))
    if euclidean or k > 1:
        for start in range(0, len(queries), step):
            exact(queries[start : start + step], True)
    else:
        single = vectors.astype(np.float32)
        single_candidates = single if len(columns) == count else single[columns]
        # Twice the bound on the error of a product of unit vectors (Higham 2002, section 3.1), and rounding them.
        window = np.float32(2 * (width + 4) * 2.0**-24)
        # A product with its own transpose costs half; queries and candidates are the same rows here.
        whole = single_candidates @ single_candidates.T if 4 * len(columns) ** 2 <= _WHOLE_BYTES else None
        unclear = []
        for start in range(0, len(queries), step):
            rows = queries[start : start + step]
            similarity = single[rows] @ single_candidates.T if whole is None else whole[start : start + step]
            open_rows = np.zeros(len(rows), dtype=bool)
            for score, inside in masked(rows, similarity, True):
                pick = similarity.argmax(axis=1)
                nearest = similarity[np.arange(len(rows)), pick]
                some = (nearest > -np.inf) & inside
                near = np.count_nonzero(similarity >= (nearest - window)[:, None], axis=1)
                open_rows |= some & (near > 1)
                score.neighbours[rows, 0] = np.where(some, columns[pick], -1)
                score.tied[rows] = some
                products = np.einsum("ij,ij->i", vectors[rows], candidate_vectors[pick])
                score.similarities[rows, 0] = np.where(some, products, np.nan)
            unclear.append(rows[open_rows])
        unclear = np.concatenate(unclear)
        for start in range(0, len(unclear), step):
            exact(unclear[start : start + step], False)
    return found


def _vote(neighbour_moas):
    """The MOA most frequent among the neighbours (nearest first); a tied vote goes to the nearest of the tied."""
    counts = {}
    for moa in neighbour_moas:
        counts[moa] = counts.get(moa, 0) + 1
    return max(counts, key=counts.get) if counts else None  # dictionaries keep the order nearest first


def not_same_compound(
    profiles,
    moas,
    compounds,
    batches=None,
    *,
    plates=None,
    metric="cosine",
    k=1,
    batch_rule="median",
    exclude="single_batch",
    keep_excluded=False,
    ties="pessimistic",
    invalid="error",
):
    """NSC, and with `batches` NSCB, of `profiles` (treatments, dimensions): see the metric's inputs description.

    Returns the dictionary of the metric; without `batches` its nscb keys are absent.
    Raises ValueError, with one sentence, for inputs of different lengths, empty labels or an unknown option.
    """
    _choice("metric", metric, ("cosine", "correlation", "euclidean"))
    _choice("batch_rule", batch_rule, ("median", "joined", "disjoint", "plate"))
    _choice("exclude", exclude, ("single_batch", "unanswerable", "none"))
    _choice("ties", ties, ("pessimistic", "first"))
    _choice("invalid", invalid, ("error", "wrong", "exclude"))
    if isinstance(k, bool) or not isinstance(k, numbers.Real) or not 1 <= k < float("inf") or int(k) != k:
        raise ValueError(f"k is {k!r}: give a whole number of neighbours, at least 1.")
    try:
        profiles = np.asarray(profiles, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("predictions are not a table of numbers: give every treatment as many values.") from None
    if profiles.ndim != 2 or not profiles.shape[1]:
        raise ValueError(f"predictions have the shape {profiles.shape}: give (treatments, dimensions).")
    count = len(profiles)
    moas = _labels("references", moas, count)
    compounds = _labels("compounds", compounds, count)
    moa_names = sorted(set(moas))
    moa, compound = np.searchsorted(moa_names, moas) if count else np.zeros(0, dtype=int), _codes(compounds)

    vectors, usable, unit = _directions(profiles, metric)
    if invalid == "error" and not usable.all():
        rows = np.flatnonzero(~usable)
        raise ValueError(
            f"predictions[{rows[0]}] ({compounds[rows[0]]}) has no direction under {metric} ({len(rows)} such rows: "
            'not finite, zero or constant): leave them out, or choose invalid="wrong" or invalid="exclude".'
        )
    reasons = ["" if good or invalid != "exclude" else "invalid vector" for good in usable]

    def excluded_by(exclusion_rule):
        excluded = list(reasons)
        if exclusion_rule is not None and exclude == "single_batch":
            for code, name in enumerate(moa_names):
                rows = np.flatnonzero(moa == code)
                if exclusion_rule.occurs_in_one_batch(rows):
                    for row in rows:
                        excluded[row] = excluded[row] or f"{name} occurs in one batch"
        return excluded

    def takes_part(excluded):
        return np.array([not reason for reason in (reasons if keep_excluded else excluded)], dtype=bool)

    def answerable_by_labels(different_batch, takes_part):
        """Which treatments have a candidate of their MOA, whatever became of its vector."""
        answerable = np.zeros(count, dtype=bool)
        for code in range(len(moa_names)):
            own = np.flatnonzero(takes_part & (moa == code))
            step = max(1, _BLOCK_BYTES // max(1, len(own)))
            for rows in (own[start : start + step] for start in range(0, len(own), step)):
                others = compound[rows, None] != compound[None, own]
                if different_batch is not None:
                    others &= different_batch(rows, own)
                answerable[rows] = others.any(axis=1)
        return answerable

    def summary(prefix, excluded, found):
        neighbours, similarities = found.neighbours.tolist(), (unit * found.similarities[:, 0]).tolist()
        candidates, answerable, tied = found.candidates.tolist(), found.answerable.tolist(), found.tied.tolist()
        queries, confusion = [], np.zeros((len(moa_names), len(moa_names)), dtype=np.int64)
        per_moa = {name: {"correct": 0, "total": 0, "accuracy": None} for name in moa_names}
        for row in range(count):
            near = [index for index in neighbours[row] if index >= 0]
            predicted = _vote([moas[index] for index in near])
            reason = excluded[row]
            if not reason and not candidates[row] and usable[row]:
                reason = "no candidate"
            if not reason and exclude == "unanswerable" and not answerable[row]:
                reason = "no candidate of its MOA"
            correct = predicted == moas[row]
            query = {
                "row": row, "moa": moas[row], "compound": compounds[row],
                "neighbour": near[0] if near else None,
                "neighbour_moa": moas[near[0]] if near else None,
                "neighbour_compound": compounds[near[0]] if near else None,
                "similarity": similarities[row] if near else None,
                "predicted": predicted, "correct": correct, "excluded": reason or None,
                "candidates": candidates[row], "answerable": bool(answerable[row]), "tied": tied[row],
            }  # fmt: skip
            if k > 1:
                query["neighbours"] = near
            queries.append(query)
            if not reason:
                per_moa[moas[row]]["total"] += 1
                per_moa[moas[row]]["correct"] += correct
                if predicted is not None:
                    confusion[moa[row], moa_names.index(predicted)] += 1
        for value in per_moa.values():
            if value["total"]:
                value["accuracy"] = value["correct"] / value["total"]
        correct = sum(value["correct"] for value in per_moa.values())
        total = sum(value["total"] for value in per_moa.values())
        return {
            prefix: correct / total if total else float("nan"),
            f"{prefix}_correct": correct,
            f"{prefix}_total": total,
            f"{prefix}_excluded": count - total,
            f"{prefix}_per_moa": per_moa,
            f"{prefix}_confusion": confusion.tolist(),
            f"{prefix}_queries": queries,
        }

    scores = [("nsc", None, excluded_by(None))]
    if batches is not None:
        names = _split_names("batches", _labels("batches", batches, count))
        rules = {
            "median": lambda split: _BatchRule(codes=_median_codes(split)),
            "joined": lambda split: _BatchRule(codes=_joined_codes(split)),
            "disjoint": lambda split: _BatchRule(membership=_membership(split)),
        }
        if batch_rule == "plate":
            # Plates decide who may be a neighbour, as sets compared whole; which MOAs occur in one batch stays a
            # question of batches, so that the queries are those of the published table.
            split = names if plates is None else _split_names("plates", _labels("plates", plates, count))
            rule, exclusion_rule = rules["joined"](split), rules["median"](names)
        else:
            rule = exclusion_rule = rules[batch_rule](names)
        scores.append(("nscb", rule.different, excluded_by(exclusion_rule)))
    masks = [(different, takes_part(excluded)) for _, different, excluded in scores]
    found = _search(vectors, metric == "euclidean", moa, compound, usable, masks, int(k), ties)
    if invalid == "wrong" and not usable.all():
        for part, mask in zip(found, masks, strict=True):
            part.answerable = answerable_by_labels(*mask)
    result = {"moas": moa_names}
    for (prefix, _, excluded), part in zip(scores, found, strict=True):
        result.update(summary(prefix, excluded, part))
    return result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class NotSameCompound(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("string"),
                    "compounds": datasets.Value("string"),
                    "batches": datasets.Value("string"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2209.07819", "https://doi.org/10.1177/1087057113503553"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add a batch of predictions and references for the evaluation module's stack."""
        # evaluate indexes what it is given with [0], which a pandas Series with its own index refuses, and takes
        # only text for a name: turn tables into arrays, columns into lists, and compound ids into text.
        if predictions is not None:
            predictions = np.asarray(predictions) if hasattr(predictions, "to_numpy") else predictions
        columns = {"references": references, **kwargs}
        for name, column in columns.items():
            if column is None:
                raise ValueError(f"{name} is None: give one value a treatment (not_same_compound needs no batches).")
            columns[name] = _texts(column)
        super().add_batch(predictions=predictions, **columns)

    def _compute(self, predictions, references, compounds, batches, **options):
        return not_same_compound(predictions, references, compounds, batches, **options)
