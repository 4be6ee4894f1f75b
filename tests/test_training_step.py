"""A real training step against the plain one: loss, gradients, AdamW, centre, teacher, with drop path and freezing."""

import copy
import multiprocessing
import os

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from training_run import BATCH, channel_run, micro_batches, screen, settings_of, views

from benchmarks import train_step
from benchmarks.plain_dino import PlainDino
from pretraining_wsdino import cosine_schedule
from pretraining_wsdino.trainer import step_seed

HEAD_NAMES = {
    **{f"mlp.{layer}.{kind}": f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")},
    "last_layer.parametrizations.weight.original0": "length",
    "last_layer.parametrizations.weight.original1": "direction",
}


def plain_copy(run) -> PlainDino:
    network = copy.deepcopy(run.objective.student)
    projection = {HEAD_NAMES[name]: value for name, value in network.head.named_parameters()}
    a = run.settings
    return PlainDino(
        network.backbone.to_dino_state_dict(),
        projection,
        heads=a.num_attention_heads,
        patch=a.patch_size,
        drop_path=a.drop_path_rate,
    )


def test_three_steps_agree_with_the_published_method(tmp_path, monkeypatch):
    """Loss within 1e-5, gradients within 1e-4 relative at every step; then the weights. Prototypes rest at first."""
    run = channel_run(tmp_path, freeze_last_layer_epochs=1, num_train_epochs=3)
    run.steps_per_epoch, run.total_steps = 2, 6
    plain, a = plain_copy(run), run.settings
    seen = {}
    take_step = run.optimizer.step
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda: (
            seen.update(
                {n: p.grad.clone() for n, p in run.objective.student.named_parameters() if p.grad is not None}
            ),
            take_step(),
        ),
    )
    for step in range(3):
        (batch,) = micro_batches(run, step)
        whole, parts = (list(each.split(BATCH)) for each in views(run, batch))
        seen.clear()
        monitors = run.step(step, [batch])
        torch.manual_seed(step_seed(a.seed, step, 0))
        loss, gradients = plain.step(
            whole,
            parts,
            learning_rate=cosine_schedule(step, start=1e-3, end=a.final_learning_rate, total_steps=6),
            momentum=cosine_schedule(step, start=0.99, end=1.0, total_steps=6),
            weight_decay=cosine_schedule(step, start=0.04, end=0.4, total_steps=6),
            freeze_prototypes=step < 2,
        )
        assert float(monitors["loss"]) == pytest.approx(loss, abs=1e-5)
        names = {f"head.{ours}": ("head", theirs) for ours, theirs in HEAD_NAMES.items()}
        for name in seen:
            part = names.get(name)
            if part is None:
                key = {n: k for n, k in dino_names(run.objective.student.backbone)}[name.removeprefix("backbone.")]
                part = ("backbone", key)
            expected = gradients[part]
            assert (seen[name] - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name
        assert ("head.last_layer.parametrizations.weight.original1" in seen) == (step >= 2)
        torch.testing.assert_close(run.objective.criterion.center, plain.center, atol=1e-6, rtol=1e-5)
    for ours, theirs in ((run.objective.student, plain.student), (run.objective.teacher, plain.teacher)):
        state = ours.backbone.to_dino_state_dict()
        for name, value in theirs["backbone"].items():
            if name.endswith("qkv.bias"):
                # A key's bias shifts all of a query's logits alike, so its true gradient is 0 and AdamW, which
                # divides rounding noise by its own size, moves it at random: leave the middle third out.
                kept = torch.ones_like(value).view(3, -1)
                kept[1] = 0
                value, state[name] = value * kept.flatten(), state[name] * kept.flatten()
            torch.testing.assert_close(state[name], value.detach(), atol=2e-5, rtol=1e-3, msg=name)
        for name, value in ours.head.named_parameters():
            torch.testing.assert_close(value.detach(), theirs["head"][HEAD_NAMES[name]].detach(), atol=2e-5, rtol=1e-3)


def dino_names(backbone):
    """(our parameter name, the original's), told by tagging every weight with a number of its own."""
    tagged = copy.deepcopy(backbone)
    for number, parameter in enumerate(tagged.parameters()):
        parameter.data.fill_(float(number))
    original = {value.detach().flatten()[0].item(): name for name, value in tagged.to_dino_state_dict().items()}
    return [(name, original[value.detach().flatten()[0].item()]) for name, value in tagged.named_parameters()]


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """Two micro-batches of 3 against one batch of 6: same pairs, one teacher and one centre update, equal weights."""
    whole = channel_run(tmp_path / "a", per_device_train_batch_size=6, drop_path_rate=0.0)
    parts = channel_run(
        tmp_path / "b", per_device_train_batch_size=3, gradient_accumulation_steps=2, drop_path_rate=0.0
    )
    for step in range(3):
        one, two = micro_batches(whole, step), micro_batches(parts, step)
        assert (len(one), len(two)) == (1, 2)
        losses = [float(run.step(step, batches)["loss"]) for run, batches in ((whole, one), (parts, two))]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(
        whole.objective.criterion.center, parts.objective.criterion.center, atol=1e-6, rtol=1e-5
    )
    for left, right in zip(whole.objective.teacher.parameters(), parts.objective.teacher.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, saving = (channel_run(tmp_path, gradient_checkpointing=flag) for flag in (False, True))
    for step in range(2):
        losses = [float(run.step(step, micro_batches(run, step))["loss"]) for run in (plain, saving)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for left, right in zip(plain.objective.student.parameters(), saving.objective.student.parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


def test_compiling_changes_nothing_but_rounding(tmp_path, monkeypatch):
    """The graphs are captured and differentiated as ever, but run without a C++ compiler, which a machine may lack."""
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **words: compiling(self, backend="aot_eager", **words)
    )
    plain, compiled = (channel_run(tmp_path, compile=flag, drop_path_rate=0.0) for flag in (False, True))
    assert list(plain.objective.student.state_dict()) == list(compiled.objective.student.state_dict())
    for step in range(3):
        losses = [float(run.step(step, micro_batches(run, step))["loss"]) for run in (plain, compiled)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_an_eight_bit_screen_with_other_names_trains(tmp_path):
    """A newcomer's data: a channel "er", a label "gene", no plates, 8 bits."""
    run = channel_run(tmp_path, fields=screen(np.uint8))
    assert run.objective.max_intensity == 255.0
    crops = views(run, micro_batches(run, 0)[0])[0]
    assert 0.4 < float(crops.mean()) < 0.6
    assert np.isfinite(float(run.step(0, micro_batches(run, 0))["loss"]))


def test_bf16_keeps_float32_master_weights_and_follows_float32(tmp_path):
    """Under autocast the networks, centre and loss stay float32, and ten steps' losses stay near float32's."""
    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)  # one process has one precision; this test needs two
        run = channel_run(tmp_path / precision, mixed_precision=precision, drop_path_rate=0.0)
        losses[precision] = [float(run.step(step, micro_batches(run, step))["loss"]) for step in range(10)]
        kept = [
            *run.objective.student.parameters(),
            *run.objective.teacher.parameters(),
            run.objective.criterion.center,
            run.objective.features.features,
        ]
        assert {tensor.dtype for tensor in kept} == {torch.float32}
        moments = [value for state in run.optimizer.state.values() for name, value in state.items() if name != "step"]
        assert {value.dtype for value in moments} == {torch.float32}
    assert losses["no"] != losses["bf16"], "bf16 was not used"
    np.testing.assert_allclose(losses["bf16"], losses["no"], rtol=0.05)
    AcceleratorState._reset_state(True)


def test_whitening_sinkhorn_and_koleo_enter_the_step(tmp_path):
    """From the options for random weights: one start for both networks, and the gradient of loss + weight x KoLeo."""
    run = channel_run(tmp_path, whiten_patches=True, centering="sinkhorn", koleo_weight=0.5, drop_path_rate=0.0)
    kernels = [
        one.backbone.embeddings.patch_embeddings.weight for one in (run.objective.student, run.objective.teacher)
    ]
    assert torch.equal(*kernels)
    # A whitened kernel answers with variance about 1 to the very planes; 0.02-sized weights would answer far below.
    planes = torch.from_numpy(np.stack([run.data.images.planes[row] for row in range(12)]).astype(np.float32))[:, None]
    answers = run.objective.student.backbone.embeddings.patch_embeddings(planes.clamp(max=10_000) / 10_000)
    assert answers.detach().var() == pytest.approx(1.0, rel=0.3)

    (batch,) = micro_batches(run, 0)
    crops = views(run, batch)
    copied = copy.deepcopy(run.objective.student)
    with torch.no_grad():
        teacher_logits, _ = run.objective.teacher(crops[:1])
    logits, features = copied(crops)
    targets = (teacher_logits.double() / 0.04).exp()
    for _ in range(3):
        targets = targets / targets.sum(0) * len(targets) / targets.shape[1]
        targets = targets / targets.sum(1, keepdim=True)
    expected = 0.0
    for t, target in enumerate(targets.float().split(BATCH)):
        for s, view in enumerate(logits.split(BATCH)):
            if s != t:
                expected = expected - (target * torch.log_softmax(view / 0.07, 1)).sum(1).mean() / 8
    koleo = 0.0
    for view in features[: 2 * BATCH].split(BATCH):
        unit = view / view.norm(dim=1, keepdim=True)
        distances = torch.cdist(unit, unit) + 10 * torch.eye(BATCH)
        koleo = koleo - distances.min(1).values.log().mean() / 2
    (expected + 0.5 * koleo).backward()
    seen = {}
    take_step = run.optimizer.step
    run.optimizer.step = lambda: (
        seen.update({n: p.grad.clone() for n, p in run.objective.student.named_parameters() if p.grad is not None}),
        take_step(),
    )
    monitors = run.step(0, [batch])
    assert float(monitors["loss"]) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(monitors["koleo"]) == pytest.approx(float(koleo.detach()), rel=1e-3)
    for name, parameter in copied.named_parameters():
        if name in seen and not name.endswith("key.bias"):
            assert (seen[name] - parameter.grad).norm() <= 2e-3 * parameter.grad.norm() + 1e-6, name


def test_without_local_crops_the_global_views_learn_from_each_other(tmp_path):
    """As many crops as the limits allow at least: the loss is that of the two views' four logits, by hand."""
    run = channel_run(tmp_path, local_crops=0, drop_path_rate=0.0)
    (batch,) = micro_batches(run, 0)
    assert set(batch) == {"global", "anchors", "fallbacks"}
    crops = views(run, batch)
    with torch.no_grad():
        student, teacher = (
            network(crops)[0].split(BATCH) for network in (run.objective.student, run.objective.teacher)
        )
    terms = [
        -(torch.softmax(target / 0.04, 1) * torch.log_softmax(view / 0.07, 1)).sum(1).mean()
        for target, view in zip(teacher, student[::-1], strict=True)
    ]
    assert float(run.step(0, [batch])["loss"]) == pytest.approx(float(sum(terms)) / 2, rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_benchmark_finds_the_gradients_of_both_steps(tmp_path, monkeypatch, device):
    """On either device the workers leave them under the names that the benchmark then reads, and they agree."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    changes = {"drop_path_rate": 0.0, "freeze_last_layer_epochs": 0, "global_crop_area": [0.004, 0.008]}
    arguments = settings_of(channels=["dna"], weak_label="compound", local_crop_area=[0.001, 0.002], **changes)
    losses = []
    for kind in ("plain float32", "ours float32"):
        mine, theirs = multiprocessing.Pipe()
        mine.send(0)
        mine.send(None)
        train_step.worker(kind, device, arguments, str(tmp_path), 0, theirs)
        assert mine.recv() == "ready"
        losses.append(mine.recv()[1])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    gradients = [torch.load(tmp_path / f"{kind} float32.pt") for kind in ("plain", "ours")]
    assert train_step.largest_gradient_difference(*gradients) < 1e-3


def test_the_benchmark_of_a_cpu_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr("sys.argv", ["train_step"])

    class Begun(Exception):
        pass

    def begin(method):
        raise Begun

    monkeypatch.setattr(multiprocessing, "get_context", begin)
    with pytest.raises(Begun):
        train_step.main()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
