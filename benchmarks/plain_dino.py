"""WS-DINO's training step in its plainest form: the oracle of the tests and the baseline of the benchmarks.

Written from the papers (Caron et al. 2021; Cross-Zamirski et al. 2022) for reading, not for speed: gray images
replicated to RGB and convolved, softmax attention written out, every block over every token, one loss per pair of
views, AdamW and the teacher's average one parameter at a time. It shares no code with the packages of this project.
"""

import math

import torch
import torch.nn.functional as F


def vit(weights: dict, images: torch.Tensor, *, heads: int, patch: int, drop_path: float = 0.0) -> torch.Tensor:
    """CLS tokens `(n, dim)` of gray `images (n, 1, height, width)`; `weights` under the original DINO's names."""
    rgb = images.repeat(1, 3, 1, 1)
    x = F.conv2d(rgb, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    n, _, dim = x.shape
    x = torch.cat([weights["cls_token"].repeat(n, 1, 1), x], dim=1)

    table = weights["pos_embed"]
    side = math.isqrt(table.shape[1] - 1)
    if (rows, columns) != (side, side):
        grid = table[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        table = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)
    x = x + table

    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    for block in range(depth):
        w = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{block}.")}
        rate = drop_path * block / max(depth - 1, 1)

        def drop(branch, rate=rate):
            if rate == 0:
                return branch
            kept = (torch.rand(n, 1, 1) < 1 - rate).float()
            return branch * kept / (1 - rate)

        y = F.layer_norm(x, (dim,), w["norm1.weight"], w["norm1.bias"], eps=1e-6)
        qkv = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).reshape(n, -1, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(dim // heads), dim=-1)
        y = (attention @ v).transpose(1, 2).reshape(n, -1, dim)
        x = x + drop(F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"]))
        y = F.layer_norm(x, (dim,), w["norm2.weight"], w["norm2.bias"], eps=1e-6)
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        x = x + drop(F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"]))
    return F.layer_norm(x, (dim,), weights["norm.weight"], weights["norm.bias"], eps=1e-6)[:, 0]


def head(weights: dict, features: torch.Tensor) -> torch.Tensor:
    """Logits of the projection head: three layers, unit bottleneck, prototypes of unit direction times a length."""
    x = F.gelu(F.linear(features, weights["0.weight"], weights["0.bias"]))
    x = F.gelu(F.linear(x, weights["2.weight"], weights["2.bias"]))
    x = F.linear(x, weights["4.weight"], weights["4.bias"])
    x = x / x.norm(dim=1, keepdim=True)
    prototypes = weights["length"] * weights["direction"] / weights["direction"].norm(dim=1, keepdim=True)
    return F.linear(x, prototypes)


class PlainDino:
    """Student, teacher, centre and AdamW state in dictionaries, and one `step`.

    Args:
        backbone, projection: initial weights under the names that `vit` and `head` use, copied for both networks.
    """

    def __init__(self, backbone: dict, projection: dict, *, heads: int, patch: int, drop_path: float = 0.0):
        copy = lambda weights: {name: value.detach().clone() for name, value in weights.items()}  # noqa: E731
        self.student = {"backbone": copy(backbone), "head": copy(projection)}
        self.teacher = {"backbone": copy(backbone), "head": copy(projection)}
        self.heads, self.patch, self.drop_path = heads, patch, drop_path
        self.center = torch.zeros(1, len(projection["direction"]))
        self.moments: dict = {}
        for part in self.student.values():
            for value in part.values():
                value.requires_grad_(True)

    def logits(self, network: dict, views: list[torch.Tensor], drop_path: float) -> list[torch.Tensor]:
        """One tensor `(batch, prototypes)` a view; views of one size go through the backbone together."""
        features = []
        for size in sorted({view.shape[-1] for view in views}, reverse=True):
            same = torch.cat([view for view in views if view.shape[-1] == size])
            features.append(vit(network["backbone"], same, heads=self.heads, patch=self.patch, drop_path=drop_path))
        return list(head(network["head"], torch.cat(features)).split(len(views[0])))

    def loss_and_gradients(
        self,
        global_views: list[torch.Tensor],
        local_views: list[torch.Tensor],
        student_temperature,
        teacher_temperature,
    ) -> tuple[torch.Tensor, dict, torch.Tensor]:
        """The loss, the gradient of every student parameter, and the mean teacher output."""
        with torch.no_grad():
            teacher = self.logits(self.teacher, global_views, 0.0)
        student = self.logits(self.student, global_views + local_views, self.drop_path)
        total, pairs = 0.0, 0
        for t, teacher_view in enumerate(teacher):
            target = torch.softmax((teacher_view - self.center) / teacher_temperature, dim=1)
            for s, student_view in enumerate(student):
                if s != t:
                    predicted = torch.log_softmax(student_view / student_temperature, dim=1)
                    total = total - (target * predicted).sum(dim=1).mean()
                    pairs += 1
        loss = total / pairs
        named = [(part, name) for part in self.student for name in self.student[part]]
        gradients = torch.autograd.grad(loss, [self.student[part][name] for part, name in named])
        return loss.detach(), dict(zip(named, gradients, strict=True)), torch.cat(teacher).mean(0, keepdim=True)

    @torch.no_grad()
    def step(
        self,
        global_views,
        local_views,
        *,
        learning_rate: float,
        momentum: float,
        student_temperature: float = 0.07,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.8,
        weight_decay: float = 0.0,
        freeze_prototypes: bool = False,
    ) -> tuple[float, dict]:
        """One optimiser step; returns the loss and the gradients before it."""
        with torch.enable_grad():
            loss, gradients, mean = self.loss_and_gradients(
                global_views, local_views, student_temperature, teacher_temperature
            )
        for (part, name), gradient in gradients.items():
            if freeze_prototypes and name in ("length", "direction"):
                continue
            value = self.student[part][name]
            state = self.moments.setdefault((part, name), [torch.zeros_like(value), torch.zeros_like(value), 0])
            if value.ndim > 1:  # biases and norms are not decayed
                value -= learning_rate * weight_decay * value
            state[0] = 0.9 * state[0] + 0.1 * gradient
            state[1] = 0.999 * state[1] + 0.001 * gradient**2
            state[2] += 1
            first, second = state[0] / (1 - 0.9 ** state[2]), state[1] / (1 - 0.999 ** state[2])
            value -= learning_rate * first / (second.sqrt() + 1e-8)
        self.center = center_momentum * self.center + (1 - center_momentum) * mean
        for part, weights in self.teacher.items():
            for name, value in weights.items():
                value.copy_(momentum * value + (1 - momentum) * self.student[part][name].detach())
        return float(loss), gradients
