"""The method in 100 lines runs on a built dataset, and its steps are those of the packages, given the same draws."""

import copy
import importlib.util
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_wsdino import WSDinoModel
from pretraining_wsdino import (
    DinoHead,
    DinoLoss,
    MultiCropNetwork,
    cosine_schedule,
    cut_window,
    resize_windows,
    update_teacher,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "wsdino_in_100_lines.py"
BLOCK = {
    "norm1": "norm1",
    "self_attn.in_proj_": "attn.qkv.",
    "self_attn.out_proj": "attn.proj",
    "norm2": "norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
}


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("wsdino_in_100_lines", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dino_names(vit):
    """The example's backbone under the names of DINO's authors."""
    state = vit.state_dict()
    positions = [state.pop("cls_position"), state.pop("positions").flatten(2).mT]
    renamed = {"cls_token": state.pop("cls"), "pos_embed": torch.cat(positions, dim=1)}
    for name, value in state.items():
        for theirs, original in BLOCK.items():
            name = name.replace(theirs, original)
        renamed[name.replace("patches.", "patch_embed.proj.")] = value
    return {name: value.clone() for name, value in renamed.items()}


def copied(network, path):
    """The same weights in the classes of the packages."""
    head = DinoHead(96, 1024, 256, 64)
    weights = {name.replace("prototypes.", "last_layer."): value for name, value in network.state_dict().items()}
    head.load_state_dict({name: value for name, value in weights.items() if not name.startswith("backbone")})
    torch.save(dino_names(network.backbone), path)
    backbone = WSDinoModel.from_dino_checkpoint(path, num_attention_heads=3)
    return MultiCropNetwork(backbone, head)


def assert_equal(network, theirs):
    """Weights within 1e-5."""
    torch.testing.assert_close(
        network.backbone.to_dino_state_dict(), dino_names(theirs.backbone), atol=1e-5, rtol=1e-5
    )
    head = {name.replace("prototypes.", "last_layer."): value for name, value in theirs.named_parameters()}
    for name, value in network.head.named_parameters():
        torch.testing.assert_close(value, head[name], atol=1e-5, rtol=1e-5)


@contextmanager
def precision(dtype):
    """Double for networks: AdamW's first steps divide each gradient, also one of rounding noise, by its size."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_its_steps_equal_those_of_the_packages(example, tiny_screen, monkeypatch, capsys, tmp_path):
    """Crops, then three steps' losses and weights within 1e-5; the run continues to its end."""
    crops, train_step, ours, losses = example.crops, example.train_step, {}, []

    @precision(torch.float32)
    def compared_crops(planes, count, size, area, random):
        replayed = copy.deepcopy(random)
        views = crops(planes, count, size, area, random)
        for plane, view in zip([*planes] * count, views, strict=True):
            side = round(math.sqrt(replayed.uniform(*area) * plane.size))
            top, left = (replayed.integers(length - side + 1) for length in plane.shape)
            up_down, left_right = (replayed.random() < 0.5 for _ in range(2))
            window = torch.from_numpy(cut_window(plane, np.array([top, left, side, side])))[None]
            sizes, flips = torch.tensor([[side, side]]), torch.tensor([[left_right, up_down]])
            expected = resize_windows(window, sizes, flips, size, 10_000.0)[0]
            torch.testing.assert_close(expected, view, atol=2e-6, rtol=0)
        return views.double()

    def compared_step(student, teacher, center, optimizer, global_views, local_views, batch, momentum):
        step = len(losses)
        if step == 0:
            ours["student"], ours["teacher"] = (copied(one, tmp_path / "weights.pth") for one in (student, teacher))
            ours["loss"] = DinoLoss(1024, student_temperature=0.07, center_momentum=0.8)
            ours["optimizer"] = torch.optim.AdamW(ours["student"].parameters(), lr=5e-4, weight_decay=0.0)
        loss = train_step(student, teacher, center, optimizer, global_views, local_views, batch, momentum)
        losses.append(loss)
        if step < 3:
            with monkeypatch.context() as patch:  # head and loss insist on single precision
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
                targets, _ = ours["teacher"]([global_views])
                logits, _ = ours["student"]([global_views, local_views])
                expected, _ = ours["loss"](logits, targets, batch, 0.04)
            ours["optimizer"].zero_grad()
            expected.backward()
            ours["optimizer"].step()
            ours["loss"].update_center()
            update_teacher(
                ours["student"], ours["teacher"], cosine_schedule(step, start=0.99, end=1.0, total_steps=20)
            )
            assert loss == pytest.approx(expected.item(), abs=1e-5)
            torch.testing.assert_close(center, ours["loss"].center[0], atol=1e-5, rtol=1e-5)
            assert_equal(ours["student"], student)
            assert_equal(ours["teacher"], teacher)
        return loss

    monkeypatch.setattr(example, "crops", compared_crops)
    monkeypatch.setattr(example, "train_step", compared_step)
    with precision(torch.float64):
        backbone = example.main(str(tiny_screen))
    assert len(losses) == 20 and np.isfinite(losses).all()
    assert capsys.readouterr().out.count("loss") == 20
    assert backbone(torch.rand(2, 1, 64, 64).double()).shape == (2, 96)


def test_pairs_share_the_label_and_each_label_is_drawn_equally_often(example):
    labels = np.array(["a"] * 9 + ["b"] * 2 + ["c"])
    anchors, partners = example.draw_pairs(labels, 3000, np.random.default_rng(0))
    assert (labels[anchors] == labels[partners]).all()
    assert ((anchors != partners) | (labels[anchors] == "c")).all()
    assert np.unique(labels[anchors], return_counts=True)[1] == pytest.approx([1000] * 3, abs=100)
