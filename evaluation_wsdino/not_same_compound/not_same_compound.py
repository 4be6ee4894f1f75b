"""The NSC and NSCB scores of treatment profiles as one self-contained `evaluate` module.

Not-same-compound (NSC): each treatment is given the mechanism of action (MOA) of its nearest neighbour among the
treatments of all other compounds. Not-same-compound-and-batch (NSCB): the neighbour must also come from another batch.
Protocol: Ljosa et al. 2013 (NSC), Ando et al. 2017 (NSCB), Cross-Zamirski et al. 2022 (the defaults here).

This file needs numpy, and `evaluate` and `datasets` for the metric class; it is what a metric Space holds.
"""

import re
from collections import Counter

import datasets
import evaluate
import numpy as np

from .neighbours import codes_of, differ, directions, search

_CITATION = """\
@article{ljosa2013comparison, author={Ljosa, Vebjorn and others}, journal={Journal of Biomolecular Screening},
  title={Comparison of methods for image-based profiling of cellular morphological responses to small-molecule
  treatment}, volume={18}, number={10}, year={2013}}
@article{ando2017improving, author={Ando, D. Michael and McLean, Cory Y. and Berndl, Marc}, journal={bioRxiv 161422},
  title={Improving phenotypic measurements in high-content imaging screens}, year={2017}}
@article{crosszamirski2022selfsupervised, author={Cross-Zamirski, Jan Oscar and others}, journal={arXiv:2209.07819},
  title={Self-supervised learning of phenotypic representations from cell images with weak labels}, year={2022}}
"""

_DESCRIPTION = """\
Share of treatments whose nearest neighbour among other compounds (NSC), and among other compounds in other batches
(NSCB), has the same mechanism of action.
"""

_INPUTS = """
Args:
    predictions: treatments x dimensions, one profile per treatment.
    references: the mechanism of action (MOA) of each treatment.
    compounds: the compound of each treatment; neighbours of the same compound never count.
    batches: the batch of each treatment, or several names joined by "|" for one seen in several batches.
    metric: "cosine" (default), "correlation" or "euclidean".
    k: neighbours that vote, 1 by default. A tied vote goes to the MOA whose member is nearest.
    batch_rule: when two treatments are in one batch (see the README): "median" (default), "joined", "disjoint" or
        "plate", which compares `plates`, the plate or plates of each treatment (the batches if not given).
    moa_separator: what joins the MOAs of a treatment with several, such as "|"; a neighbour that shares one is right.
    invalid: vectors without a direction (not finite; zero under cosine; constant under correlation) are an "error"
        (default) or "wrong" (queries count as wrong, never candidates).
Returns:
    nsc, nscb: shares in [0, 1] (nan without a query); nsc_correct, nsc_total, nsc_excluded, and the same for nscb;
    moas: the sorted names in references; nsc_confusion: counts, rows the true and columns the neighbours' names;
    nsc_per_moa: correct, total and accuracy (None without a query) of each name;
    nsc_queries: one dictionary per treatment (row, moa, compound, neighbour, neighbour_moa, neighbour_compound,
        predicted, similarity, candidates, tied, correct, excluded: None or the reason).
Examples:

    >>> metric = evaluate.load("evaluation_wsdino/not_same_compound")
    >>> result = metric.compute(predictions=[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]],
    ...                         references=["DNA damage", "DNA damage", "Eg5 inhibitors", "Eg5 inhibitors"],
    ...                         compounds=["cisplatin", "etoposide", "AZ-C", "AZ138"],
    ...                         batches=["Week1", "Week2", "Week1", "Week2"])
    >>> result["nsc"], result["nscb"], result["nscb_queries"][0]["neighbour"]
    (1.0, 1.0, 1)
"""

_OPTIONS = {
    "metric": ("cosine", "correlation", "euclidean"),
    "batch_rule": ("median", "joined", "disjoint", "plate"),
    "invalid": ("error", "wrong"),
}


def not_same_compound(profiles, moas, compounds, batches=None, *, plates=None, metric="cosine", k=1,
                      batch_rule="median", moa_separator=None, invalid="error"):  # fmt: skip
    """NSC, and with `batches` NSCB, of `profiles` (treatments, dimensions), as the metric's description says.

    Raises ValueError, with one sentence, for inputs of different lengths, empty labels or an unknown option.
    """
    for name, value in {"metric": metric, "batch_rule": batch_rule, "invalid": invalid}.items():
        if value not in _OPTIONS[name]:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(_OPTIONS[name])}.")
    if isinstance(k, bool) or not isinstance(k, int | float | np.number) or not 1 <= k < 2**31 or int(k) != k:
        raise ValueError(f"k is {k!r}: give a whole number of neighbours, at least 1.")
    k = int(k)
    try:
        profiles = np.asarray(profiles, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("predictions are not a table of numbers: give every treatment as many values.") from None
    if profiles.ndim != 2 or not profiles.shape[1]:
        raise ValueError(f"predictions have the shape {profiles.shape}: give (treatments, dimensions).")
    count = len(profiles)
    moas, compounds = _names("references", moas, count), _names("compounds", compounds, count)
    mechanisms = [{name.strip() for name in moa.split(moa_separator)} if moa_separator else {moa} for moa in moas]
    vectors, usable, unit = directions(profiles, metric)
    if invalid == "error" and not usable.all():
        row = usable.argmin()
        raise ValueError(f"predictions[{row}] ({compounds[row]}) has no direction under {metric} (not finite, zero or "
                         'constant): leave it out, or choose invalid="wrong".')  # fmt: skip
    scores = {"nsc": (None, np.full(count, None))}  # for each, batches as codes, and why a treatment is left out
    if batches is not None:
        batches = _names("batches", batches, count)
        code = judged = _batch_codes(batches, batch_rule)
        if batch_rule == "plate":
            # Plates decide who may be a neighbour, but which MOAs occur in one batch remains a question of batches,
            # so that the queries are those of the published table.
            code = _batch_codes(batches if plates is None else _names("plates", plates, count), "joined")
        scores["nscb"] = (code, _in_one_batch(mechanisms, judged))
    found = search(vectors, usable, metric == "euclidean", moas, compounds, mechanisms, scores.values(), int(k))
    names = sorted(set(moas))
    result = {"moas": names}
    for (prefix, (_, reasons)), one in zip(scores.items(), found, strict=True):
        queries = []
        for row, (near, similarity, candidates, tied) in enumerate(zip(*one, strict=True)):
            near = [index for index in near if index >= 0]
            first, (winners, voted) = near[0] if near else None, _vote([(mechanisms[index], index) for index in near])
            queries.append({
                "row": row, "moa": moas[row], "compound": compounds[row], "neighbour": first,
                "neighbour_moa": moas[first] if near else None,
                "neighbour_compound": compounds[first] if near else None,
                "similarity": unit * similarity if near else None, "candidates": candidates, "tied": tied,
                "predicted": moas[voted] if near else None, "correct": not winners.isdisjoint(mechanisms[row]),
                "excluded": reasons[row] or ("no candidate" if usable[row] and not candidates else None),
            } | ({"neighbours": near} if k > 1 else {}))  # fmt: skip
        scored = [query for query in queries if not query["excluded"]]
        total = Counter(query["moa"] for query in scored)
        right = Counter(query["moa"] for query in scored if query["correct"])
        pairs = Counter((query["moa"], query["predicted"]) for query in scored)
        result |= {
            prefix: sum(right.values()) / len(scored) if scored else float("nan"),
            f"{prefix}_correct": sum(right.values()),
            f"{prefix}_total": len(scored),
            f"{prefix}_excluded": count - len(scored),
            f"{prefix}_per_moa": {name: {"correct": right[name], "total": total[name], "accuracy":
                                         right[name] / total[name] if total[name] else None} for name in names},
            f"{prefix}_confusion": [[pairs[name, other] for other in names] for name in names],
            f"{prefix}_queries": queries,
        }  # fmt: skip
    return result


def _names(what, values, length):
    """Each value as text. None, NaN, NaT and NA, which stand where a name is missing, are no text and print so."""
    names = [str(value) for value in values]
    if len(names) != length:
        raise ValueError(f"{what} holds {len(names)} values for {length} profiles: give one per treatment.")
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        gone = not isinstance(value, str) and name in ("None", "nan", "NaT", "<NA>")
        if gone or not name.replace("|", "").strip():
            raise ValueError(f"{what}[{row}] is empty: leave out treatments without a name.")
    return names


def _batch_codes(batches, rule):
    """What `differ` compares: a number per treatment, or for the rule "disjoint" 0 or 1 per treatment and batch."""

    def natural(name):  # Week2 before Week10
        return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]

    split = [sorted(filter(None, map(str.strip, names.split("|"))), key=natural) for names in batches]
    if rule == "disjoint":
        every = sorted({name for names in split for name in names})
        return np.array([[name in names for name in every] for names in map(set, split)], dtype=np.float32)
    if rule == "joined":
        return codes_of(["|".join(sorted(set(names))) for names in split])
    return codes_of([names[(len(names) - 1) // 2] for names in split])  # the (lower) median


def _in_one_batch(mechanisms, code):
    """For each treatment None, or that no two treatments of its MOA lie in different batches."""
    members = {}
    for row, names in enumerate(mechanisms):
        for name in names:
            members.setdefault(name, []).append(row)
    alone = {name for name, rows in members.items() if not any(differ(code, [row], rows).any() for row in rows)}
    words = [f"{', '.join(sorted(names))} occurs in one batch" if names <= alone else None for names in mechanisms]
    return np.array(words, dtype=object)


def _vote(near):
    """The mechanisms with most votes and whose they are, of (mechanisms, row) of neighbours, the nearest first.

    A tied vote goes to the nearest neighbour that has one of the tied.
    """
    if len(near) == 1:
        return near[0]
    votes = Counter(name for names, _ in near for name in names)
    most = {name for name in votes if votes[name] == max(votes.values())}
    return next(((names & most, row) for names, row in near if names & most), (set(), None))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class NotSameCompound(evaluate.Metric):
    def _info(self):
        columns = {name: datasets.Value("string") for name in ("references", "compounds", "batches")}
        columns = {"predictions": datasets.Sequence(datasets.Value("float64")), **columns}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_INPUTS,
            features=datasets.Features(columns),
            reference_urls=["https://arxiv.org/abs/2209.07819", "https://doi.org/10.1177/1087057113503553"],
        )  # fmt: skip

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add treatments: profiles as an array, a table or lists, names as text or numbers."""
        # evaluate takes only text as a name, and [0] of a column, which a pandas Series with its own index refuses.
        predictions = np.asarray(predictions) if hasattr(predictions, "to_numpy") else predictions
        columns = {"references": references, **kwargs}
        for name, column in columns.items():
            if column is None:
                raise ValueError(f"{name} is None: give one per treatment (not_same_compound needs no batches).")
            columns[name] = _names(name, column, len(column))
        super().add_batch(predictions=predictions, **columns)

    def _compute(self, predictions, references, compounds, batches, **options):
        return not_same_compound(predictions, references, compounds, batches, **options)
