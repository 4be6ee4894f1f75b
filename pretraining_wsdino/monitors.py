"""What tells a healthy teacher from a collapsed one while training runs."""

import torch
from torch import nn


def participation_ratio(features: torch.Tensor) -> float:
    """(sum of eigenvalues)^2 / (sum of squared eigenvalues) of the features' covariance: how many directions vary.

    `features (n, dim)`; 1 when everything varies along one line, at most min(dim, n - 1); 0 for constant features.
    """
    centred = features.double() - features.double().mean(0, keepdim=True)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    squared = gram.square().sum()
    return float(gram.trace().square() / squared) if squared > 0 else 0.0


class FeatureWindow(nn.Module):
    """The last `length` teacher features, kept to watch their participation ratio; saved with the training state."""

    features: torch.Tensor
    seen: torch.Tensor

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.register_buffer("features", torch.zeros(length, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, features: torch.Tensor) -> None:
        """Keep `features (n, dim)`; only the last `length` of them when n is larger."""
        features = features.detach()[-len(self.features) :].to(self.features)
        # All on the device: asking for the count here would make the host wait for the teacher.
        place = (self.seen + torch.arange(len(features), device=self.seen.device)) % len(self.features)
        self.features[place] = features
        self.seen += len(features)

    def participation_ratio(self) -> float:
        """`participation_ratio` of the features kept."""
        return participation_ratio(self.features[: min(int(self.seen), len(self.features))])
