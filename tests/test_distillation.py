"""Head, loss, centre, teacher and monitors against plain transcriptions of the published formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from pretraining_wsdino import (
    DinoHead,
    DinoLoss,
    FeatureWindow,
    MultiCropNetwork,
    TrainingSettings,
    check_settings,
    koleo_loss,
    participation_ratio,
    sinkhorn_targets,
    update_teacher,
    whiten_patch_embedding,
)
from wsdino.errors import UserError
from wsdino.settings import check_bounds


def loss_by_pairs(student, teacher, center, batch, student_temperature, teacher_temperature):
    """The published double loop: every (teacher view, student view) pair but equal views, averaged."""
    total, pairs = 0.0, 0
    for t, teacher_view in enumerate(teacher.split(batch)):
        target = torch.softmax((teacher_view - center) / teacher_temperature, dim=1)
        for s, student_view in enumerate(student.split(batch)):
            if s == t:
                continue
            predicted = torch.log_softmax(student_view / student_temperature, dim=1)
            total = total + torch.stack([-(q * p).sum() for q, p in zip(target, predicted, strict=True)]).mean()
            pairs += 1
    return total / pairs


@pytest.mark.parametrize(("teacher_views", "student_views"), [(2, 10), (1, 3), (2, 2)])
def test_loss_and_gradient_equal_the_double_loop(teacher_views, student_views):
    torch.manual_seed(0)
    batch, prototypes = 5, 37
    student = torch.randn(student_views * batch, prototypes, requires_grad=True)
    teacher = torch.randn(teacher_views * batch, prototypes)
    loss = DinoLoss(prototypes, student_temperature=0.07)
    loss.center.copy_(torch.randn(1, prototypes) * 0.1)
    ours, monitors = loss(student, teacher, batch, 0.04)
    (gradient,) = torch.autograd.grad(ours, student)
    plain = loss_by_pairs(student, teacher, loss.center, batch, 0.07, 0.04)
    (expected,) = torch.autograd.grad(plain, student)
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)

    targets = torch.softmax((teacher - loss.center) / 0.04, dim=1).double()
    entropy = -(targets * targets.clamp_min(1e-300).log()).sum(1).mean()
    mean = targets.mean(0)
    assert float(monitors["teacher_entropy"]) == pytest.approx(float(entropy), abs=1e-5)
    assert float(monitors["mean_entropy"]) == pytest.approx(float(-(mean * mean.log()).sum()), abs=1e-5)
    assert float(monitors["kl"]) == pytest.approx(float(plain.detach() - entropy), abs=1e-4)


def test_monitors_tell_both_collapses():
    prototypes, batch = 16, 4
    one = torch.zeros(2 * batch, prototypes)
    one[:, 3] = 100.0
    uniform = torch.zeros(2 * batch, prototypes)
    for teacher, entropy in ((one, 0.0), (uniform, math.log(prototypes))):
        _, monitors = DinoLoss(prototypes)(torch.randn(4 * batch, prototypes), teacher, batch, 0.04)
        assert float(monitors["teacher_entropy"]) == pytest.approx(entropy, abs=1e-5)
        assert float(monitors["mean_entropy"]) == pytest.approx(entropy, abs=1e-5)


def test_center_moves_once_a_step_over_all_micro_batches():
    loss = DinoLoss(6, center_momentum=0.8)
    first, second = torch.randn(4, 6), torch.randn(4, 6)
    student = torch.randn(8, 6)
    before, _ = loss(student, second, 2, 0.04)
    loss(student, first, 2, 0.04)
    again, _ = loss(student, second, 2, 0.04)
    assert float(before) == float(again), "micro-batches of one step must see one centre"
    loss._sums.pop()
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.2 * torch.cat([first, second]).mean(0, keepdim=True))
    loss(student, first, 2, 0.04)
    old = loss.center.clone()
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.8 * old + 0.2 * first.mean(0, keepdim=True))


def test_loss_is_float32_under_half_precision_logits():
    torch.manual_seed(0)
    student, teacher = torch.randn(8, 20).bfloat16(), torch.randn(4, 20).bfloat16()
    ours, _ = DinoLoss(20)(student, teacher, 2, 0.04)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(
        float(loss_by_pairs(student.float(), teacher.float(), 0.0, 2, 0.07, 0.04)), 1e-6
    )


def sinkhorn_by_loops(logits, temperature, iterations):
    """Columns to sum n / K, then rows to sum 1, in turn, one number at a time."""
    q = [[math.exp(value / temperature) for value in row] for row in logits.tolist()]
    n, k = len(q), len(q[0])
    for _ in range(iterations):
        for column in range(k):
            total = sum(q[row][column] for row in range(n))
            for row in range(n):
                q[row][column] *= n / (k * total)
        for row in range(n):
            total = sum(q[row])
            q[row] = [value / total for value in q[row]]
    return torch.tensor(q)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_equals_the_plain_loops(iterations):
    torch.manual_seed(0)
    logits = torch.randn(6, 9)
    ours = sinkhorn_targets(logits, 0.1, iterations)
    torch.testing.assert_close(ours, sinkhorn_by_loops(logits.double(), 0.1, iterations), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.sum(1), torch.ones(6))


def test_sinkhorn_uses_all_prototypes_and_bears_extreme_logits():
    torch.manual_seed(0)
    shared = torch.randn(1, 16) * 5  # what all images have in common, which a softmax would answer to alone
    used = sinkhorn_targets(shared + 0.3 * torch.randn(64, 16), 0.1, 50).sum(0)
    torch.testing.assert_close(used, torch.full((16,), 4.0), atol=0.05, rtol=0)
    assert sinkhorn_targets(torch.randn(8, 16) * 40 + 1e3, 0.04).isfinite().all()


def test_loss_with_sinkhorn_equals_the_double_loop():
    torch.manual_seed(0)
    batch, prototypes = 4, 11
    student, teacher = torch.randn(5 * batch, prototypes), torch.randn(2 * batch, prototypes)
    targets = sinkhorn_by_loops(teacher.double(), 0.2, 3).float().split(batch)
    total = 0.0
    for t in range(2):
        for s, view in enumerate(student.split(batch)):
            if s != t:
                total -= float((targets[t] * torch.log_softmax(view / 0.1, dim=1)).sum(1).mean()) / 8
    loss = DinoLoss(prototypes, student_temperature=0.1, centering="sinkhorn")
    loss.center.fill_(3.0)  # unused
    ours, _ = loss(student, teacher, batch, 0.2)
    assert float(ours) == pytest.approx(total, rel=1e-4)


def _sinkhorn_worker(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    results[rank] = sinkhorn_targets(torch.randn(10, 7)[rank * 5 : rank * 5 + 5], 0.1).tolist()
    torch.distributed.destroy_process_group()


def test_sinkhorn_of_two_processes_equals_that_of_all_rows(tmp_path):
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(_sinkhorn_worker, args=(str(tmp_path / "store"), results), nprocs=2)
    torch.manual_seed(0)
    expected = sinkhorn_by_loops(torch.randn(10, 7).double(), 0.1, 3)
    torch.testing.assert_close(torch.tensor(results[0] + results[1]).double(), expected.double(), atol=1e-6, rtol=1e-4)


def test_koleo_equals_the_plain_loops_and_its_gradient_parts_neighbours():
    torch.manual_seed(0)
    features = torch.randn(7, 5)
    unit = [row / row.norm() for row in features.double()]
    total = 0.0
    for i, row in enumerate(unit):
        # The neighbour by distance: on the sphere the largest cosine is the smallest distance.
        total -= math.log(min(float((row - other).norm()) for j, other in enumerate(unit) if j != i))
    assert float(koleo_loss(features)) == pytest.approx(total / 7, rel=1e-4)
    near = torch.tensor([[1.0, 0.02], [1.0, -0.02]], requires_grad=True)
    koleo_loss(near).backward()
    assert near.grad[0, 1] < 0 < near.grad[1, 1]


def test_whitened_patches_have_mean_zero_and_no_correlation():
    random = np.random.default_rng(0)
    # Smooth and bright: every pixel is its neighbour's half-brother.
    noise = random.normal(size=(30, 41, 43))
    planes = 4000 + 900 * (noise[:, :-1, :-1] + noise[:, 1:, :-1] + noise[:, :-1, 1:] + noise[:, 1:, 1:])
    planes = planes.clip(0, 65535).astype(np.uint16)
    embedding = nn.Conv2d(3, 16, 4, 4)
    whiten_patch_embedding(embedding.weight, embedding.bias, planes, 10_000.0, rows=np.arange(2, 30), floor=0.0)
    gray = torch.from_numpy(planes[2:].astype(np.float32)).clamp(max=10_000)[:, None] / 10_000
    with torch.no_grad():
        outputs = embedding(gray.expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).flatten(0, 2).double()
    # 16 filters of 16 pixels: outputs = M z with z white, so their covariance is M M^T of known size.
    assert outputs.mean(0).abs().max() < 0.1
    filters = embedding.weight.detach().double().sum(1).flatten(1).numpy()
    pixels = gray[:, 0].double().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (4, 4), axis=(1, 2))[:, ::4, ::4].reshape(-1, 16)
    mixtures = filters @ np.linalg.cholesky(np.cov(windows.T))
    assert np.linalg.norm(mixtures) ** 2 == pytest.approx(16, rel=0.35)  # 16 filters of variance about 1
    scrambled = nn.Conv2d(3, 16, 4, 4)
    whiten_patch_embedding(scrambled.weight, scrambled.bias, planes, 10_000.0, rows=np.arange(2, 30), floor=0.0)
    torch.testing.assert_close(scrambled.weight, embedding.weight)
    flat = np.full((3, 20, 20), 700, np.uint16)
    whiten_patch_embedding(scrambled.weight, scrambled.bias, flat, 10_000.0)
    assert scrambled.weight.isfinite().all() and scrambled.bias.isfinite().all()


def test_head_equals_its_formula():
    torch.manual_seed(0)
    head = DinoHead(12, 50, hidden_dim=20, bottleneck_dim=8)
    x = torch.randn(7, 12)
    weights = dict(head.named_parameters())
    hidden = x
    for layer in (0, 2, 4):
        hidden = hidden @ weights[f"mlp.{layer}.weight"].T + weights[f"mlp.{layer}.bias"]
        if layer < 4:
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    prototypes = weights["last_layer.parametrizations.weight.original1"]
    length = weights["last_layer.parametrizations.weight.original0"]
    assert (length == 1).all() and length.requires_grad
    with torch.no_grad():
        length += torch.rand_like(length)
    expected = hidden @ (length * prototypes / prototypes.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-5)


class CountingBackbone(nn.Module):
    """Mean and largest pixel of a view as its two features; counts its calls."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, pixel_values, cls_only=False):
        assert cls_only
        self.calls += 1
        features = torch.stack([pixel_values.mean((1, 2, 3)), pixel_values.amax((1, 2, 3))], dim=1) * self.scale
        return type("Output", (), {"pooler_output": features})


def test_network_keeps_the_order_of_views_and_runs_once_a_size():
    network = MultiCropNetwork(CountingBackbone(), nn.Identity())
    views = [torch.rand(4, 1, 16, 16), torch.rand(6, 1, 8, 8)]
    logits, features = network(views)
    expected = torch.stack([torch.stack([image.mean(), image.max()]) for view in views for image in view])
    torch.testing.assert_close(features, expected)
    assert logits is features and network.backbone.calls == 2


def test_teacher_is_the_exponential_moving_average():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(5, 4), DinoHead(4, 9, 6, 3))
    teacher = copy.deepcopy(student)
    for parameter in student.parameters():
        parameter.data.normal_()
    expected = [
        0.9 * t.detach() + 0.1 * s.detach() for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    update_teacher(student, teacher, 0.9)
    for ours, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(200, 8), (6, 40)])
def test_participation_ratio_by_eigenvalues(shape):
    features = torch.from_numpy(np.random.default_rng(0).normal(size=shape) * np.linspace(0.1, 3, shape[1]))
    values = np.linalg.eigvalsh(np.cov(features.numpy().T))
    assert participation_ratio(features) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)


def test_participation_ratio_of_a_line_and_of_a_point():
    line = torch.linspace(0, 1, 30)[:, None] * torch.tensor([[1.0, -2.0, 3.0]])
    assert participation_ratio(line) == pytest.approx(1.0)
    assert participation_ratio(torch.ones(10, 3)) == 0.0


def test_feature_window_keeps_the_last_features_and_survives_a_save():
    window = FeatureWindow(10, 3)
    rows = torch.randn(37, 3)
    for part in rows.split(4):
        window.add(part)
    restored = FeatureWindow(10, 3)
    restored.load_state_dict(window.state_dict())
    assert restored.participation_ratio() == pytest.approx(participation_ratio(rows[-10:]), rel=1e-5)
    short = FeatureWindow(10, 3)
    short.add(rows[:4])
    assert short.participation_ratio() == pytest.approx(participation_ratio(rows[:4]), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"whiten_patches": True, "init": "facebook/dino-vits8"}, "--whiten_patches"),
        ({"koleo_weight": 0.1, "per_device_train_batch_size": 1}, "--koleo_weight"),
        ({"koleo_weight": -0.1}, "--koleo_weight"),
        ({"initializer_range": 0.0}, "--initializer_range"),
    ],
)
def test_settings_that_contradict_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        given = TrainingSettings(**settings)
        check_bounds(given)
        check_settings(given, 8)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_grouped_targets_of_a_student_with_views_of_its_own(centering):
    """All views of all images of a group learn from one target: that of the mean of the teacher's logits over it."""
    torch.manual_seed(3)
    groups, size, prototypes, student_views = 3, 4, 7, 2
    batch = groups * size
    teacher, student = torch.randn(2 * batch, prototypes), torch.randn(student_views * batch, prototypes)
    loss = DinoLoss(prototypes, 0.1, centering=centering, group_size=size, student_sees_globals=False)
    ours, monitors = loss(student, teacher, batch, 0.05)
    means = torch.stack([
        torch.stack([teacher[view * batch + group * size + one] for one in range(size)]).mean(0)
        for view in range(2) for group in range(groups)
    ])  # fmt: skip
    targets = sinkhorn_targets(means, 0.05) if centering == "sinkhorn" else (means / 0.05).softmax(-1)
    total = 0.0
    for teacher_view in range(2):
        for view in range(student_views):
            for image in range(batch):
                target = targets[teacher_view * groups + image // size]
                total -= float((target * (student[view * batch + image] / 0.1).log_softmax(-1)).sum())
    assert float(ours) == pytest.approx(total / (2 * student_views * batch), rel=1e-5)
    assert float(monitors["teacher_entropy"]) == pytest.approx(
        float(torch.special.entr(targets).sum(1).mean()), rel=1e-5
    )
