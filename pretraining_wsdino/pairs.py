"""Weak-label pairs: which image gives the global crops, which gives the local crops, and the batch made of them.

The one change WS-DINO makes to DINO (paper section 3.2): the global crops come from an anchor image, the local crops
from a partner image with the same weak label. Anchors are drawn label-balanced with replacement; an epoch is as many
draws as there are images.

Every draw is keyed by (seed, step, slot in the global batch) through a counter-based generator, and each process takes
its slice of the global batch. So the pairs and crops do not depend on workers or on the number of processes, no two
processes draw the same slot (the released code's did), and resuming at step n costs nothing.
"""

from collections.abc import Iterator, Sequence
from mmap import mmap
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from wsdino.errors import UserError

from .multicrop import CropSpec, cut_window, draw_boxes, draw_log_gains
from .settings import CONSTRAINTS

# Separate streams of one seed: pair draws, crop draws and shuffled labels must not share random numbers.
PAIR_STREAM, CROP_STREAM, LABEL_STREAM = 0, 1, 2


def keyed_generator(seed: int, stream: int, step: int, slot: int = 0) -> np.random.Generator:
    """Counter-based random numbers that depend on (seed, stream, step, slot) and on nothing else."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, slot, step]))


class Pair(NamedTuple):
    """One slot of a global batch: the images (row numbers) of the global and of the local crops.

    All pairs of a step share `fallbacks`, the number of its draws that fell back to each looser constraint.
    """

    step: int
    slot: int
    anchor: int
    partner: int
    fallbacks: dict[str, int] = {}


class Stratum(NamedTuple):
    """What the anchors of one step may be drawn from."""

    order: np.ndarray  # labelled images, sorted by label
    starts: np.ndarray  # where each label begins in `order`
    counts: np.ndarray  # how many it has there
    unlabelled: np.ndarray  # rows that train as their own partner
    unlabelled_share: float


class PairDraws(Protocol):
    """Draws the pairs of any step without state; `rows` are the images that may be drawn."""

    rows: np.ndarray

    def draw(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Row numbers of anchors and partners of a global batch, and counted fallbacks."""
        ...


class WeakLabelPairSampler:
    """Label-balanced anchors and same-label partners for any step of a run, without state.

    Parameters
    ----------
    labels : sequence of str or None
        Weak label of every image, by row; None or "" means unlabelled. `None` in place of the sequence means no weak
        labels at all, which is DINO: anchors uniform, each its own partner.
    groups : dict
        For the constraints used, the group of every image, e.g. `{"well": [...], "plate": [...]}`; a well must be
        named so that two plates' B02 differ.
    constraint : str
        What the partner must differ in, where the label allows it. "image": another image (the default; what the paper
        describes). "well", "plate", "batch": another well, plate or batch; where the label has none, the next looser
        constraint of this order is used, and such fallbacks are counted. "none": any image of the label, the anchor
        included, as the released code drew (4.3 % of its BBBC021 draws paired an image with itself).
    unlabelled : {"drop", "self"}
        "drop" leaves images without a label out; "self" lets each train as its own partner, drawn as often as an image
        is on average, so that a partly labelled screen trains whole (the paper's section 5).
    eligible : sequence of bool, optional
        Whether each image may be drawn at all; the others are held out, whatever their label.
    anchor_group : {"none", "plate", "batch"}
        "plate" or "batch": all anchors of a step come from one of them, drawn by its number of images, with the labels
        it has drawn equally often. Targets that must differ within a step then cannot do so by what plates or batches
        differ in, which nearly every compound's images share as well (37 of BBBC021's 38 compounds live in one week).
        "none" (the paper): from all images.
    group_size : int
        1 draws pairs (the paper). With k > 1 a batch consists of groups of k different images that share a label, of
        as many different labels as there are; each image is then anchor and partner of itself, and the loss makes one
        target per group. Constraints and anchor groups do not apply.
    seed : int
        Of the whole run.

    Raises
    ------
    UserError
        A missing group column, lengths that differ, no image left, or a label with a single image where groups are
        asked for.
    """

    def __init__(
        self,
        labels: Sequence[str | None] | None,
        *,
        num_images: int | None = None,
        groups: dict[str, Sequence] | None = None,
        constraint: str = "image",
        unlabelled: str = "drop",
        eligible: Sequence[bool] | None = None,
        anchor_group: str = "none",
        group_size: int = 1,
        seed: int = 0,
    ):
        self.group_size = group_size if labels is not None else 1
        self.seed, self.constraint = seed, constraint
        self.num_images = len(labels) if labels is not None else int(num_images or 0)
        if self.num_images == 0:
            raise UserError("The dataset has no images to train on: check --dataset and --subset.")

        rows = np.arange(self.num_images) if eligible is None else np.flatnonzero(eligible)
        if not len(rows):
            raise UserError("Every image is held out of training: exclude fewer compounds.")
        labels_given = labels if labels is not None else [None] * self.num_images
        names = ["" if name is None or name != name else str(name) for name in labels_given]
        known, codes = np.unique(np.array(names), return_inverse=True)
        label_of = np.where(known[codes] == "", -1, codes)
        if labels is not None:
            if unlabelled == "drop":
                rows = rows[label_of[rows] >= 0]
            if not (label_of[rows] >= 0).any():
                raise UserError(
                    "--weak_label names a column without values: every row of it is empty; choose another column."
                )
        self.rows = rows
        self.labelled, unlabelled_rows = rows[label_of[rows] >= 0], rows[label_of[rows] < 0]
        _, self.code, self.label_counts = np.unique(label_of[self.labelled], return_inverse=True, return_counts=True)
        self.starts = np.cumsum(self.label_counts) - self.label_counts
        if self.group_size > 1 and self.label_counts.min() < 2:
            alone = names[self.labelled[np.flatnonzero(self.label_counts[self.code] < 2)[0]]]
            raise UserError(
                f"The weak label {alone!r} has a single image, of which --group_size {group_size} can make no group: "
                "leave it out with --exclude_compounds, choose another --weak_label, or give --group_size 1."
            )
        # From the constraint asked for to the loosest: ("plate", "well", "image") for "plate", () for "none".
        self.chain = tuple(reversed(CONSTRAINTS[1 : CONSTRAINTS.index(constraint) + 1]))
        flag = f"--pair_constraint {constraint}"
        self.levels = [
            self._runs(
                np.arange(len(self.labelled))
                if level == "image"
                else self._groups(level, groups or {}, flag)[self.labelled]
            )
            for level in (self.chain or ("image",) if len(self.labelled) else ())
        ]
        group = np.zeros(self.num_images, dtype=np.int64)
        if anchor_group != "none":
            group = self._groups(anchor_group, groups or {}, f"--anchor_group {anchor_group}")
        present, sizes = np.unique(group[rows], return_counts=True)
        self.strata = [
            self._stratum(np.flatnonzero(group[self.labelled] == one), unlabelled_rows[group[unlabelled_rows] == one])
            for one in present
        ]
        self.stratum_ends = np.cumsum(sizes) / sizes.sum()

    def _groups(self, level: str, groups: dict[str, Sequence], flag: str) -> np.ndarray:
        """Integer group of every image at one level."""
        if level not in groups:
            raise UserError(
                f"{flag} needs the column {level!r}, which the dataset lacks: add it or choose another value."
            )
        values = np.asarray(groups[level], dtype=object).astype(str)
        if len(values) != self.num_images:
            raise UserError(f"The column {level!r} has {len(values)} values for {self.num_images} images.")
        return np.unique(values, return_inverse=True)[1]

    def _stratum(self, labelled: np.ndarray, unlabelled: np.ndarray) -> Stratum:
        """What anchors are drawn from: `labelled` are indices into the labelled rows, `unlabelled` row numbers."""
        order = labelled[np.argsort(self.code[labelled], kind="stable")]
        _, starts, counts = np.unique(self.code[order], return_index=True, return_counts=True)
        return Stratum(order, starts, counts, unlabelled, len(unlabelled) / (len(labelled) + len(unlabelled)))

    def _runs(self, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The labelled rows ordered by (label, group), and for each row the [first, last) of its group's run there.

        A label's rows are contiguous in that order and a group's rows are contiguous inside them, so that a partner
        outside the group is one integer draw over what is left of the label.
        """
        order = np.lexsort((group, self.code))
        starts_run = np.r_[True, (np.diff(self.code[order]) != 0) | (np.diff(group[order]) != 0)][: len(order)]
        firsts = np.flatnonzero(starts_run)
        lasts = np.r_[firsts[1:], len(order)][: len(firsts)]
        run_of = np.empty(len(order), dtype=np.int64)
        run_of[order] = np.cumsum(starts_run) - 1
        return order, firsts[run_of], lasts[run_of]

    def draw(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Anchors and partners of one global batch.

        Returns
        -------
        numpy.ndarray, numpy.ndarray, dict
            `anchors (size,)`, `partners (size,)` row numbers, and the number of draws that fell back to each looser
            constraint, e.g. `{"well": 3, "image": 1, "self": 0}`.
        """
        random = keyed_generator(self.seed, PAIR_STREAM, step)
        if self.group_size > 1:
            images = self._grouped(random, size)
            return images, images, {}
        u = random.random((4, size))
        stratum = self.strata[np.searchsorted(self.stratum_ends, random.random(), side="right")]
        anchors = np.full(size, -1, dtype=np.int64)
        partners = anchors.copy()
        fallbacks: dict[str, int] = {}
        if len(stratum.order):
            label = (u[0] * len(stratum.counts)).astype(np.int64)
            within = (u[1] * stratum.counts[label]).astype(np.int64)
            anchor = stratum.order[stratum.starts[label] + within]
            partner, fallbacks = self._partners(anchor, u[2])
            anchors, partners = self.labelled[anchor], self.labelled[partner]
        if len(stratum.unlabelled):
            plain = u[3] < stratum.unlabelled_share
            own = stratum.unlabelled[(u[1] * len(stratum.unlabelled)).astype(np.int64)]
            anchors, partners = np.where(plain, own, anchors), np.where(plain, own, partners)
        return anchors, partners, fallbacks

    def _grouped(self, random: np.random.Generator, size: int) -> np.ndarray:
        """Rows of a batch of groups, one after another: labels without replacement, and images of a label likewise."""
        labels, order = len(self.label_counts), np.argsort(self.code, kind="stable")
        groups = size // self.group_size
        turns = [random.permutation(labels) for _ in range(-(-groups // labels))]
        chosen = [
            self.starts[label]
            + random.choice(
                self.label_counts[label], self.group_size, replace=bool(self.label_counts[label] < self.group_size)
            )
            for label in np.concatenate(turns)[:groups]
        ]
        return self.labelled[order[np.concatenate(chosen)]]

    def _partners(self, anchor: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """A partner for each anchor, both as indices into the labelled rows, and the counted fallbacks."""
        label = self.code[anchor]
        partner = np.full(len(anchor), -1, dtype=np.int64)
        fallbacks: dict[str, int] = {}
        if not self.chain:  # any image of the label, the anchor included
            order, _, _ = self.levels[0]
            partner = order[self.starts[label] + (u * self.label_counts[label]).astype(np.int64)]
        for depth, (level, (order, first, last)) in enumerate(zip(self.chain, self.levels, strict=False)):
            first_of, last_of, start = first[anchor], last[anchor], self.starts[label]
            candidates = self.label_counts[label] - (last_of - first_of)
            todo = (partner < 0) & (candidates > 0)
            offset = start + (u * candidates).astype(np.int64)
            offset = np.where(offset >= first_of, offset + (last_of - first_of), offset)
            partner[todo] = order[offset[todo]]
            if depth:
                fallbacks[level] = int(todo.sum())
        alone = partner < 0
        partner[alone] = anchor[alone]
        if self.chain:
            fallbacks["self"] = int(alone.sum())
        return partner, fallbacks


class PairBatchSampler(Sampler):
    """One process's slice of every global batch from `first_step` on, as lists of `Pair` for a DataLoader.

    A global batch of `batch_size * num_processes * accumulation` slots is cut into micro-batches; process r takes the
    r-th `batch_size` slots of each. The order of slots is thus the same for any number of processes.
    """

    def __init__(
        self,
        pairs: PairDraws,
        *,
        batch_size: int,
        total_steps: int,
        first_step: int = 0,
        accumulation: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.pairs, self.batch_size = pairs, batch_size
        self.total_steps, self.first_step, self.accumulation = total_steps, first_step, accumulation
        self.process_index, self.num_processes = process_index, num_processes
        self.global_batch = batch_size * num_processes * accumulation

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Pair]]:
        for step in range(self.first_step, self.total_steps):
            anchors, partners, fallbacks = self.pairs.draw(step, self.global_batch)
            for micro in range(self.accumulation):
                first = (micro * self.num_processes + self.process_index) * self.batch_size
                slots = range(first, first + self.batch_size)
                yield [Pair(step, slot, int(anchors[slot]), int(partners[slot]), fallbacks) for slot in slots]


class PlanePairs(Dataset):
    """Looks a `Pair` up in the planes: `(pair, anchor plane, partner plane)`, planes as `(height, width)` views.

    Parameters
    ----------
    planes : numpy.ndarray
        Anything indexed by row that gives one channel's plane, e.g. a read-only memory map `(fields, height, width)`
        of uint16 or uint8.
    """

    def __init__(self, planes: np.ndarray):
        self.planes = planes

    def __len__(self) -> int:
        return len(self.planes)

    def __getitem__(self, pair: Pair) -> tuple[Pair, np.ndarray, np.ndarray]:
        return pair, self.planes[pair.anchor], self.planes[pair.partner]

    def __getstate__(self) -> dict:
        """With a whole memory map's file in place of its content, of which each spawned worker would hold a copy."""
        planes, state = self.planes, dict(self.__dict__)
        if isinstance(planes, np.memmap) and isinstance(planes.base, mmap) and planes.flags.c_contiguous:
            state["planes"] = None
            state["file"] = (planes.filename, planes.dtype, "r", planes.offset, planes.shape)
        return state

    def __setstate__(self, state: dict) -> None:
        file = state.pop("file", None)
        self.__dict__ |= state
        if file:
            self.planes = np.memmap(*file)


class WeakLabelPairCollator:
    """Cuts the global crops out of the anchors and the local crops out of the partners, as one batch of windows.

    Only the windows are cut here (a copy of just their pixels); `resize_windows` makes them crops of one size on the
    training device.

    Parameters
    ----------
    global_crops, local_crops : CropSpec
        What to draw.
    seed : int
        Of the run; crop boxes are keyed by (seed, step, slot).
    """

    def __init__(self, global_crops: CropSpec, local_crops: CropSpec, seed: int = 0):
        self.global_crops, self.local_crops, self.seed = global_crops, local_crops, seed

    def __call__(self, items: Sequence[tuple[Pair, np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Windows and boxes, view-major: the first `len(items)` windows are everyone's first view, and so on.

        Returns
        -------
        dict
            `{"global": {...}, "local": {...}, "anchors": (batch,), "fallbacks": {...}}`, each part that has crops
            `{"windows": (views * batch, tallest, widest) uint16 or uint8, zero-padded, "sizes": (views * batch, 2),
            "flips": (views * batch, 3) bool, "log_gains": (views * batch,) float32}` as `resize_windows` takes them.
        """
        chosen: dict[str, list] = {"global": [], "local": []}
        for pair, anchor, partner in items:
            random = keyed_generator(self.seed, CROP_STREAM, pair.step, pair.slot)
            for part, spec, plane in (("global", self.global_crops, anchor), ("local", self.local_crops, partner)):
                chosen[part].append((plane, draw_boxes(random, spec, plane.shape), draw_log_gains(random, spec)))
        batch: dict[str, Any] = {part: self._windows(rows) for part, rows in chosen.items() if len(rows[0][1])}
        batch["anchors"] = torch.tensor([pair.anchor for pair, _, _ in items])
        batch["fallbacks"] = items[0][0].fallbacks
        return batch

    @staticmethod
    def _windows(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        views = len(rows[0][1])
        boxes = np.stack([boxes for _, boxes, _ in rows], axis=1)  # (views, batch, 7)
        tallest, widest = boxes[..., 2].max(), boxes[..., 3].max()
        windows = np.zeros((views * len(rows), tallest, widest), dtype=rows[0][0].dtype)
        for view in range(views):
            for item, (plane, own, _) in enumerate(rows):
                cut_window(plane, own[view], out=windows[view * len(rows) + item])
        flat = boxes.reshape(-1, 7)
        return {
            "windows": torch.from_numpy(windows),
            "sizes": torch.from_numpy(flat[:, 2:4].copy()),
            "flips": torch.from_numpy(flat[:, 4:7].astype(bool)),
            "log_gains": torch.from_numpy(np.stack([gains for _, _, gains in rows], axis=1).reshape(-1)),
        }
