"""WS-DINO in 100 lines of plain PyTorch: read this in three minutes, then `pretraining_wsdino` for the real one.

    wsdino-simulate data/raw --size tiny
    wsdino-prepare --raw data/raw --output data/screen
    python examples/wsdino_in_100_lines.py data/screen tubulin compound

From small crops of one image, a student predicts what its teacher says about large crops of another image with the
same weak label (here the compound). The teacher is a moving average of the student. Comments give the values of the
paper (Cross-Zamirski et al. 2022) where it differs, because it starts from ImageNet weights and has a GPU.
"""

import copy
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import nn

STEPS, BATCH, LEARNING_RATE = 20, 8, 5e-4  # 200 epochs, 16, and 4e-6 after a warm-up


class ViT(nn.Module):
    """Vision transformer: images `(n, 1, height, width)` -> CLS features `(n, dim)`. Paper: 224, 8, 384, 12, 6."""

    def __init__(self, image_size=64, patch=8, dim=96, depth=4, heads=3):
        super().__init__()
        self.side = image_size // patch
        self.patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.cls, self.cls_position = (nn.Parameter(0.02 * torch.randn(1, 1, dim)) for _ in range(2))
        self.positions = nn.Parameter(0.02 * torch.randn(1, dim, self.side, self.side))
        options = {"dropout": 0.0, "activation": "gelu", "norm_first": True, "layer_norm_eps": 1e-6}
        blocks = [nn.TransformerEncoderLayer(dim, heads, 4 * dim, batch_first=True, **options) for _ in range(depth)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):
        x = self.patches(images.expand(-1, 3, -1, -1))  # gray as RGB, which ImageNet weights expect
        positions, scale = self.positions, (x.shape[-1] + 0.1) / self.side  # 0.1: rounding must not lose a patch
        if x.shape[-1] != self.side:
            positions = F.interpolate(positions, scale_factor=(scale, scale), mode="bicubic")
        cls = (self.cls + self.cls_position).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, (x + positions).flatten(2).mT], dim=1)))[:, 0]


class Network(nn.Module):
    """Backbone and head: views of several sizes -> logits `(n, prototypes)`. Paper: 384, 65536, 2048, 256."""

    def __init__(self, backbone, dim=96, prototypes=1024, hidden=256, bottleneck=64):
        super().__init__()
        layers = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        self.backbone, self.mlp = backbone, nn.Sequential(*layers)
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        nn.init.ones_(self.prototypes.parametrizations.weight.original0)  # their lengths

    def forward(self, views):
        features = torch.cat([self.backbone(view) for view in views])
        return self.prototypes(F.normalize(self.mlp(features), dim=-1))


def draw_pairs(labels, count, random):
    """Rows of `count` anchors and their partners: each label equally often, the partner another image of the label."""
    rows_of = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = [rows_of[i] for i in random.choice(len(rows_of), count)]
    return np.transpose([random.choice(rows, 2, replace=len(rows) == 1) for rows in chosen])


def crops(planes, count, size, area, random):
    """`count` random squares of each plane, resized and flipped at random: `(count * planes, 1, size, size)`."""
    views = []
    for plane in [*planes] * count:  # view by view, each over the whole batch
        side = round(math.sqrt(random.uniform(*area) * plane.size))
        top, left = (random.integers(length - side + 1) for length in plane.shape)
        window = torch.from_numpy(plane[top : top + side, left : left + side].astype(np.float32))
        view = F.interpolate(window.clamp(max=10_000)[None, None] / 10_000, (size, size), mode="bicubic")
        views.append(view.flip([axis for axis in (2, 3) if random.random() < 0.5]))
    return torch.cat(views)


def dino_loss(student, teacher, center):
    """Cross-entropy of each student view with each *other* teacher view, of logits `(views, batch, prototypes)`."""
    targets = F.softmax((teacher - center) / 0.04, dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", targets, F.log_softmax(student / 0.07, dim=-1)) / student.shape[1]
    return pairs[~torch.eye(*pairs.shape, dtype=torch.bool)].mean()


def train_step(student, teacher, center, optimizer, global_views, local_views, batch, momentum):
    """Move the student down its loss; then the centre of the teacher's logits, and the teacher, follow slowly."""
    with torch.no_grad():
        targets = teacher([global_views]).unflatten(0, (-1, batch))
    logits = student([global_views, local_views]).unflatten(0, (-1, batch))
    loss = dino_loss(logits, targets, center)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        center.lerp_(targets.mean((0, 1)), 1 - 0.8)
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)
    return loss.item()


def main(folder, channel="tubulin", label="compound"):
    """Train on one channel of a dataset folder; returns the teacher's backbone, which is the result."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    screen = load_dataset(folder, "annotated", split="train").with_format("numpy")
    planes, labels = screen[channel], np.asarray(screen[label])
    student, center = Network(ViT()), torch.zeros(1024)
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=0.0)
    for step in range(STEPS):
        anchors, partners = draw_pairs(labels, BATCH, random)
        global_views = crops([planes[int(row)] for row in anchors], 2, 64, (0.1, 0.2), random)  # 224 pixels
        local_views = crops([planes[int(row)] for row in partners], 8, 32, (0.04, 0.08), random)  # 96 pixels
        momentum = 1 - (1 - 0.99) * (1 + math.cos(math.pi * step / STEPS)) / 2  # from 0.99 to 1 along a cosine
        loss = train_step(student, teacher, center, optimizer, global_views, local_views, BATCH, momentum)
        print(f"step {step + 1}: loss {loss:.4f}")
    return teacher.backbone


if __name__ == "__main__":
    main(*sys.argv[1:])
