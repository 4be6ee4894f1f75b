"""Weak-label pairs against enumeration and chi-square; the collator against one-at-a-time cutting."""

import pickle

import numpy as np
import pytest
from scipy.stats import chisquare
from torch.utils.data import DataLoader

from pretraining_wsdino import (
    CropSpec,
    PairBatchSampler,
    PlanePairs,
    WeakLabelPairCollator,
    WeakLabelPairSampler,
    resize_windows,
)
from wsdino.errors import UserError

SIGNIFICANCE = 1e-4  # seeds are fixed, so these tests either always pass or never do


@pytest.fixture(scope="module")
def screen():
    """Labels of unequal sizes over wells, plates and batches, shuffled; "lonely" has a single image."""
    random = np.random.default_rng(5)
    rows = [
        (f"compound {c}", f"week {b}", f"plate {b}-{p}", f"plate {b}-{p}/well {c}-{w}")
        for c in range(6)
        for b in ([0, 1, 2] if c == 0 else [c % 3])
        for p in range(2)
        for w in range(1 + c % 2)
        for _ in range(3)
    ]
    rows.append(("lonely", "week 0", "plate 0-0", "plate 0-0/well x"))
    rows = [rows[i] for i in random.permutation(len(rows))]
    labels, batches, plates, wells = (list(column) for column in zip(*rows, strict=True))
    return labels, {"batch": batches, "plate": plates, "well": wells}


def draws(sampler, steps, size):
    parts = [sampler.draw(step, size)[:2] for step in range(steps)]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def test_labels_are_balanced_and_images_uniform_within_them(screen):
    labels, _ = screen
    anchors, _ = draws(WeakLabelPairSampler(labels, seed=1), 200, 100)
    drawn = np.array(labels)[anchors]
    names, counts = np.unique(drawn, return_counts=True)
    assert len(names) == 7
    assert chisquare(counts).pvalue > SIGNIFICANCE
    for name in names:
        images = np.flatnonzero(np.array(labels) == name)
        if len(images) > 1:
            counts = np.bincount(anchors[drawn == name], minlength=len(labels))[images]
            assert chisquare(counts).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("constraint", ["none", "image", "well", "plate", "batch"])
def test_partners_are_uniform_over_exactly_the_allowed_images(screen, constraint):
    labels, groups = screen
    chains = {"none": [], "image": ["image"], "well": ["well", "image"], "plate": ["plate", "well", "image"]}
    chain = chains.get(constraint, ["batch", "plate", "well", "image"])
    group = {"image": list(range(len(labels))), **groups}
    sampler = WeakLabelPairSampler(labels, groups=groups, constraint=constraint, seed=2)
    anchors, partners = draws(sampler, 300, 100)
    fallbacks = {}
    for step in range(300):
        for level, count in sampler.draw(step, 100)[2].items():
            fallbacks[level] = fallbacks.get(level, 0) + count
    expected_fallbacks = dict.fromkeys([*chain[1:], "self"] if chain else [], 0)
    for anchor in range(len(labels)):
        same = [i for i in range(len(labels)) if labels[i] == labels[anchor]]
        allowed, used = same if not chain else [anchor], None if not chain else "self"
        for level in chain:
            outside = [i for i in same if group[level][i] != group[level][anchor]]
            if outside:
                allowed, used = outside, level
                break
        own = partners[anchors == anchor]
        assert set(own) <= set(allowed)
        if len(allowed) > 1:
            assert chisquare(np.bincount(own, minlength=len(labels))[allowed]).pvalue > SIGNIFICANCE
        if used in expected_fallbacks:
            expected_fallbacks[used] += len(own)
    assert fallbacks == expected_fallbacks


def test_no_self_pairs_but_for_a_label_with_one_image(screen):
    labels, _ = screen
    anchors, partners = draws(WeakLabelPairSampler(labels, seed=0), 50, 100)
    selves = anchors[anchors == partners]
    assert len(selves) and {labels[i] for i in selves} == {"lonely"}


def test_draws_are_keyed_by_seed_and_step(screen):
    labels, _ = screen
    first, again = (WeakLabelPairSampler(labels, seed=3) for _ in range(2))
    other = WeakLabelPairSampler(labels, seed=4)
    np.testing.assert_array_equal(first.draw(17, 64)[0], again.draw(17, 64)[0])
    assert (first.draw(17, 64)[0] != first.draw(18, 64)[0]).any()
    assert (first.draw(17, 64)[0] != other.draw(17, 64)[0]).any()


def test_without_weak_labels_every_image_is_its_own_partner():
    anchors, partners = draws(WeakLabelPairSampler(None, num_images=20, seed=0), 100, 50)
    np.testing.assert_array_equal(anchors, partners)
    assert chisquare(np.bincount(anchors, minlength=20)).pvalue > SIGNIFICANCE


def test_unlabelled_images_are_dropped_or_pair_with_themselves():
    labels = ["a", None, "b", "", "a", "b", float("nan"), "a", None, "b"]
    empty = {1, 3, 6, 8}
    anchors, partners = draws(WeakLabelPairSampler(labels, seed=0), 50, 40)
    assert not empty & set(anchors) and not empty & set(partners)
    anchors, partners = draws(WeakLabelPairSampler(labels, unlabelled="self", seed=0), 250, 40)
    counts = np.bincount(anchors, minlength=10)
    assert chisquare(counts).pvalue > SIGNIFICANCE  # two labels of three images and four unlabelled: all equally often
    mine = np.isin(anchors, list(empty))
    np.testing.assert_array_equal(anchors[mine], partners[mine])
    assert (anchors[~mine] != partners[~mine]).all()


@pytest.mark.parametrize("group", ["batch", "plate"])
def test_anchors_of_a_step_come_from_one_group_with_its_labels_balanced(screen, group):
    labels, groups = screen
    sampler = WeakLabelPairSampler(labels, groups=groups, constraint="plate", anchor_group=group, seed=4)
    of_image, labels = np.array(groups[group]), np.array(labels)
    chosen, by_label = [], {}
    for step in range(1500):
        anchors, partners, _ = sampler.draw(step, 12)
        (name,) = set(of_image[anchors])
        chosen.append(name)
        by_label.setdefault(name, []).extend(labels[anchors])
        assert (labels[partners] == labels[anchors]).all()  # partners may come from anywhere
    names, counts = np.unique(chosen, return_counts=True)
    sizes = np.array([(of_image == name).sum() for name in names])
    assert set(names) == set(of_image)
    assert chisquare(counts, sizes / sizes.sum() * len(chosen)).pvalue > SIGNIFICANCE
    for name in names:
        inside, counts = np.unique(by_label[name], return_counts=True)
        assert set(inside) == set(labels[of_image == name])
        assert len(counts) == 1 or chisquare(counts).pvalue > SIGNIFICANCE


def test_grouped_anchors_work_without_labels_and_with_few():
    groups = {"plate": ["A"] * 6 + ["B"] * 4}
    plain = WeakLabelPairSampler(None, num_images=10, groups=groups, anchor_group="plate")
    few = WeakLabelPairSampler(["x", "x"] + [""] * 8, groups=groups, anchor_group="plate", unlabelled="self")
    for sampler in (plain, few):
        seen = set()
        for step in range(200):
            anchors, partners, _ = sampler.draw(step, 8)
            assert len({i < 6 for i in anchors}) == 1
            labelled = (anchors < 2) if sampler is few else np.zeros(8, bool)
            assert (partners[~labelled] == anchors[~labelled]).all()
            assert (partners[labelled] == 1 - anchors[labelled]).all()
            seen |= set(anchors.tolist())
        assert seen == set(range(10))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"labels": ["", None]}, "no values|without values"),
        ({"labels": []}, "no images"),
        ({"labels": ["a"], "constraint": "plate"}, "'plate'"),
        ({"labels": ["a", "b"], "constraint": "well", "groups": {"well": ["x"]}}, "1 values for 2"),
        ({"labels": ["a"], "anchor_group": "plate"}, "--anchor_group plate needs the column 'plate'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        WeakLabelPairSampler(arguments.pop("labels"), **arguments)


def batches_of(sampler, processes, batch_size, accumulation, steps):
    """All processes' micro-batches, joined to one list of pairs per step."""
    parts = [
        list(
            PairBatchSampler(
                sampler,
                batch_size=batch_size,
                total_steps=steps,
                accumulation=accumulation,
                process_index=index,
                num_processes=processes,
            )
        )
        for index in range(processes)
    ]
    joined = []
    for step in range(steps):
        micro = range(step * accumulation, (step + 1) * accumulation)
        joined.append([pair for m in micro for part in parts for pair in part[m]])
    return joined


def test_the_global_batch_is_the_same_on_any_number_of_processes(screen):
    sampler = WeakLabelPairSampler(screen[0], seed=9)
    one = batches_of(sampler, 1, 12, 1, 4)
    assert one == batches_of(sampler, 2, 6, 1, 4) == batches_of(sampler, 3, 2, 2, 4)
    assert [pair.slot for pair in one[2]] == list(range(12))
    anchors, partners, _ = sampler.draw(2, 12)
    assert [(pair.anchor, pair.partner) for pair in one[2]] == list(zip(anchors, partners, strict=True))


def test_processes_draw_independently(screen):
    """Two processes' labels at the same place of the batch are independent (chi-square on the joint table)."""
    labels = screen[0]
    sampler = WeakLabelPairSampler(labels, seed=11)
    names = sorted(set(labels))
    table = np.zeros((len(names), len(names)))
    parts = [
        PairBatchSampler(sampler, batch_size=8, total_steps=500, process_index=index, num_processes=2)
        for index in (0, 1)
    ]
    for left, right in zip(*parts, strict=True):
        for a, b in zip(left, right, strict=True):
            table[names.index(labels[a.anchor]), names.index(labels[b.anchor])] += 1
    assert chisquare(table.ravel()).pvalue > SIGNIFICANCE


def test_resuming_starts_at_the_step_without_drawing_what_came_before(screen):
    sampler = WeakLabelPairSampler(screen[0], seed=1)
    whole = list(PairBatchSampler(sampler, batch_size=4, total_steps=10, accumulation=2))
    rest = PairBatchSampler(sampler, batch_size=4, total_steps=10, accumulation=2, first_step=7)
    assert len(rest) == 6 and list(rest) == whole[14:]


def field_of(row, shape=(60, 80)):
    return np.random.default_rng(row).integers(0, 12_000, shape, dtype=np.uint16)


@pytest.mark.parametrize("workers", [0, 2])
def test_collator_cuts_global_crops_from_anchors_and_local_crops_from_partners(screen, workers):
    """Each crop is found again in its own image and in no other; nothing depends on workers or batch splits."""
    planes = np.stack([field_of(row) for row in range(len(screen[0]))])
    sampler = WeakLabelPairSampler(screen[0], seed=1)
    collator = WeakLabelPairCollator(CropSpec(2, 16, (0.1, 0.2)), CropSpec(3, 8, (0.04, 0.08)), seed=1)

    def load(processes, index):
        batches = PairBatchSampler(
            sampler, batch_size=6 // processes, total_steps=2, process_index=index, num_processes=processes
        )
        return list(DataLoader(PlanePairs(planes), batch_sampler=batches, collate_fn=collator, num_workers=workers))

    whole, halves = load(1, 0), [load(2, index) for index in (0, 1)]
    for step in range(2):
        pairs = sampler.draw(step, 6)
        for part, views, rows in (("global", 2, pairs[0]), ("local", 3, pairs[1])):
            own = whole[step][part]
            assert len(own["windows"]) == views * 6
            for place, (window, (height, width)) in enumerate(zip(own["windows"], own["sizes"], strict=True)):
                cut = window[:height, :width].numpy()
                view, slot = divmod(place, 6)
                patches = np.lib.stride_tricks.sliding_window_view(planes[rows[slot]], cut.shape)
                corner = patches[..., 0, 0] == cut[0, 0]
                assert any((patches[y, x] == cut).all() for y, x in np.argwhere(corner))
                half = halves[slot // 3][step][part]
                there = half["windows"][view * 3 + slot % 3][:height, :width].numpy()
                np.testing.assert_array_equal(there, cut)
            crops = resize_windows(own["windows"], own["sizes"], own["flips"], 8, 10_000.0)
            assert crops.shape == (views * 6, 1, 8, 8)


def test_a_memory_map_is_pickled_as_its_file(tmp_path):
    """What a spawned loader process is sent; a part of a map, which has no file of its own, goes as its values."""
    planes = np.stack([field_of(row) for row in range(9)])
    np.save(tmp_path / "planes.npy", planes)
    mapped = np.load(tmp_path / "planes.npy", mmap_mode="r")
    sent = pickle.dumps(PlanePairs(mapped))
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert isinstance(received.planes, np.memmap)
    np.testing.assert_array_equal(received.planes, planes)
    for part in (mapped[2:], planes):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(PlanePairs(part))).planes, part)


def test_groups_hold_different_images_of_different_labels():
    labels = ["a"] * 3 + ["b"] * 10 + ["c"] * 5 + [""] + ["d"] * 2
    sampler = WeakLabelPairSampler(labels, group_size=4, seed=5)
    seen = set()
    for step in range(300):
        anchors, partners, fallbacks = sampler.draw(step, 12)
        assert (anchors == partners).all() and not fallbacks
        groups = anchors.reshape(3, 4)
        names = [{labels[image] for image in group} for group in groups]
        assert all(len(name) == 1 for name in names) and len(set.union(*names)) == 3
        for group, (name,) in zip(groups, names, strict=True):
            assert len(set(group)) == (4 if labels.count(name) >= 4 else len(set(group)))
        seen |= set(anchors.tolist())
    assert seen == set(range(len(labels))) - {18}
    again = WeakLabelPairSampler(labels, group_size=4, seed=5).draw(7, 12)[0]
    np.testing.assert_array_equal(again, sampler.draw(7, 12)[0])
    more = sampler.draw(0, 40)[0].reshape(10, 4)  # more groups than labels: every label before one comes again
    assert sorted(labels[group[0]] for group in more[:4]) == ["a", "b", "c", "d"]


def test_a_label_with_a_single_image_makes_no_group():
    with pytest.raises(UserError, match="lonely"):
        WeakLabelPairSampler(["a", "a", "lonely"], group_size=2)
    assert WeakLabelPairSampler(None, num_images=5, group_size=4).group_size == 1
